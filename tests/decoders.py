"""Models of many kinds, and what one plain forward pass says of a response."""

import numpy as np
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.conftest import FAMILIES, make_model

V = 60
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128)
OTHERS = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(vocab_size=64, num_key_value_heads=2, head_dim=8, **SIZES)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(vocab_size=64, num_key_value_heads=1, head_dim=8, **SIZES)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(vocab_size=64, logit_scale=0.3, eos_token_id=1, **SIZES)),
}
WINDOWS = {
    "a sliding window": lambda: MistralForCausalLM(
        MistralConfig(vocab_size=64, sliding_window=6, num_key_value_heads=2, **SIZES)
    ),
    "windows in some layers": lambda: Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=64, use_sliding_window=True, sliding_window=6, max_window_layers=1, num_key_value_heads=2, **SIZES
        )
    ),
    "capped logits": lambda: Gemma2ForCausalLM(Gemma2Config(vocab_size=64, head_dim=8, sliding_window=6, **SIZES)),
}
UNABLE = {
    "attention of its own": lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    "a window of its own": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, window_size=6, attention_types=[[["global", "local"], 1]]
        )
    ),
    "a state space": lambda: MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)),
}
PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [8] * 9]
GROUPS = [4, 3, 4]


def build(name):
    torch.manual_seed(0)
    model = make_model(name, 64) if name in FAMILIES else {**OTHERS, **WINDOWS, **UNABLE}[name]()
    for parameter in model.parameters():
        parameter.data *= 1 if name in FAMILIES else 2
    return model.eval()


def batch(seed=0):
    rng = np.random.default_rng(seed)
    prompts = [prompt for prompt, count in zip(PROMPTS, GROUPS, strict=True) for _ in range(count)]
    return prompts, [rng.integers(0, V, rng.integers(1, 7)).tolist() for _ in prompts]


def plain(model, prompt, response, temperature=1.0):
    """Log-probs and entropies (n,) and hidden states (n + 1, H), from one forward pass alone."""
    outputs = model(torch.tensor([prompt + response]), use_cache=False, output_hidden_states=True)
    at = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
    logp = (outputs.logits[0, at, :V].float() / temperature).log_softmax(-1)
    states = outputs.hidden_states[-1][0, len(prompt) - 1 :]
    return logp[range(len(response)), response], -(logp.exp() * logp).sum(-1), states
