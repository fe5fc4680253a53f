"""Tiny tokenizers and models, built here; nothing is downloaded."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import agents
import llm_env

torch.set_num_threads(1)  # two contended threads make a tiny model many times slower

SHARED = Path(__file__).parents[2] / "shared"
FAMILIES = ["llama", "qwen2", "gpt2"]
PACKAGES = {Path(llm_env.__file__).parent, Path(agents.__file__).parent}


def make_tokenizer(characters="abcdefgh0123456789+= ", pad=True):
    """A character tokenizer: `<eos>` is 0, then (unless pad is False) `<pad>`, then the characters."""
    special = ["<eos>", "<pad>"] if pad else ["<eos>"]
    vocabulary = {token: i for i, token in enumerate([*special, "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>"} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", **names)


def make_model(family, vocab_size, seed=0, scale=3.0, **overrides):
    """A model with random weights, large enough that its distributions are far from uniform."""
    torch.manual_seed(seed)
    common = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    if family == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, **common, **overrides)
        model = GPT2LMHeadModel(config)
    else:
        kind, config_kind = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}[family]
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
        model = kind(config_kind(**{**sizes, **heads, **common, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model


def refused(call, *args, error=(ValueError, TypeError), match=None, **kwargs):
    """The call is refused by this project's own words, not by whatever it stumbled over inside a library."""
    with pytest.raises(error, match=match) as caught:
        call(*args, **kwargs)
    assert PACKAGES & set(Path(caught.traceback[-1].path).parents), caught.traceback[-1]
    assert str(caught.value).encode("utf-8")  # can be printed


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(params=FAMILIES)
def model(request, tokenizer):
    return make_model(request.param, len(tokenizer))


@pytest.fixture(scope="session")
def stories():
    path = SHARED / "models" / "stories260K"
    if not path.exists():
        pytest.skip("the stories260K model is not here")
    return str(path)


@pytest.fixture(scope="session")
def gsm8k():
    path = SHARED / "data" / "gsm8k"
    if not path.exists():
        pytest.skip("the GSM8K data is not here")
    return path
