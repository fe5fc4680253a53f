"""Define model, prompts and reward of `speed.py`, the same for all sides."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<end>"
BETA = 0.04  # KL coefficient, as in DeepSeekMath
LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Work:
    """Shape and settings of a measurement.

    Attributes:
        model: folder of the model and its tokenizer.
        vocabulary: vocabulary size, V. The last id is the end token.
        prompt: tokens per prompt, P.
        group: responses per prompt, G.
        new_tokens: tokens per response, T.
        problems: prompts per rollout.
        passes: minimum number of forward passes per update. One optimizer step follows them. This package may use more, by
            default on a CPU.
        device: torch device.
        dtype: dtype of matrix products, by autocast if not float32. Weights are float32.
        threads: number of torch threads.
    """

    model: str
    vocabulary: int
    prompt: int
    group: int
    new_tokens: int
    problems: int
    passes: int
    device: str
    dtype: str
    threads: int

    @property
    def batch(self) -> int:
        """Responses per rollout."""
        return self.problems * self.group

    @property
    def tokens(self) -> int:
        """Response tokens per rollout."""
        return self.batch * self.new_tokens

    def texts(self) -> list[str]:
        """Return the prompts: P random words each, uniformly distributed."""
        numbers = np.random.default_rng(self.prompt).integers(self.vocabulary - 1, size=(self.problems, self.prompt))
        return [" ".join(f"w{number}" for number in row) for row in numbers]

    def autocast(self) -> torch.autocast:
        """Return the autocast context of a measurement."""
        dtype = getattr(torch, self.dtype)
        return torch.autocast(torch.device(self.device).type, dtype, enabled=dtype is not torch.float32)

    def smaller(self, problems: int) -> Work:
        """Return a copy with at most `problems` prompts and one pass."""
        return replace(self, problems=min(problems, self.problems), passes=1)

    def to_argument(self) -> str:
        """Return the settings as JSON, for the command line of a worker."""
        return json.dumps(asdict(self))


def work_of_this_process() -> Work:
    """Parse the settings from the command line; set threads, seed and OOM priority."""
    work = Work(**json.loads(sys.argv[1]))
    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, Linux kills this process first
    torch.set_num_threads(work.threads)
    torch.manual_seed(0)
    return work


def even_words(completions: list[str], **_: Any) -> list[float]:
    """Return as reward the share of words with an even number."""
    return [float(np.mean([word[-1] in "02468" for word in completion.split()])) for completion in completions]


def build(folder: str, vocabulary: int, hidden: int, layers: int, heads: int, intermediate: int, positions: int) -> int:
    """Save a random Llama and its tokenizer; return the number of parameters.

    Each of the words `w0`, `w1`, ... is one token. The end token has probability 0, so every response has the maximum length.
    This needs no logit mask, which would cost time on one of the sides. Instead, the first channel of the hidden states is a
    constant, because no layer writes to it. The embedding of the end token, tied to the output embedding, turns it into a
    logit whose exponential is 0 in float32.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        embeddings = model.get_input_embeddings().weight
        embeddings[:, 0] = 0.3
        embeddings[-1, 0] = -1000.0
    model.save_pretrained(folder)
    words = {**{f"w{i}": i for i in range(vocabulary - 1)}, END: vocabulary - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(folder)
    return model.num_parameters()
