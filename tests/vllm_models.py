"""Models that vLLM runs (a head has 32 numbers at least), and envs for them."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_env import TextGenerationEnv

PIECES = ["<eos>", "<unk>", "a", "b", "c", "d", "ab", "bc", "ca", ".", " a"]
PADDING = 5  # ids of the model that are no tokens

SIZE = len(PIECES) + PADDING


def make_pieces():
    """A tokenizer with tokens of one and of two characters."""
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def make_llama(seed=0, scale=4.0, heads=2, head_dim=32, vocab_size=SIZE, **overrides):
    """Random weights, large enough that distributions are far from uniform and no push goes unnoticed."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": heads * head_dim, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": heads}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None, "max_position_embeddings": 256}
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **ids, "vocab_size": vocab_size, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model


def share_of_a(completions, **kwargs):
    return [c.count("a") / 8 for c in completions]


def make_text_env(**kwargs):
    settings = {"max_prompt_tokens": 200, "max_new_tokens": 12, **kwargs}
    return TextGenerationEnv(["a", "bcab", "d" * 70, "cab."], share_of_a, make_pieces(), **settings)
