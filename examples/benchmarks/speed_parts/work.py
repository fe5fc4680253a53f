"""What every side is given: a model, prompts and a reward that make the work of all sides equal."""

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
BETA = 0.04  # of the KL to the reference, as in DeepSeekMath
LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Work:
    """One shape of the work.

    Attributes:
        model: folder of the model and its tokenizer.
        vocabulary: V; the last id is the end token.
        prompt: P, tokens of every prompt.
        group: G, responses to each.
        new_tokens: T of every response.
        problems: prompts in a rollout.
        passes: forward passes that a rollout is cut into for the update at least, with one optimizer step after them; here it
            may be more, by default on a CPU.
        device: where it is done.
        dtype: what matrix products are computed in; weights are float32, with autocast over them for another dtype.
        threads: of torch.
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
        """Responses in a rollout."""
        return self.problems * self.group

    @property
    def tokens(self) -> int:
        """Response tokens in a rollout."""
        return self.batch * self.new_tokens

    def texts(self) -> list[str]:
        """Return the prompts: P words each, drawn evenly."""
        numbers = np.random.default_rng(self.prompt).integers(self.vocabulary - 1, size=(self.problems, self.prompt))
        return [" ".join(f"w{number}" for number in row) for row in numbers]

    def autocast(self) -> torch.autocast:
        """Return what turns are taken in."""
        dtype = getattr(torch, self.dtype)
        return torch.autocast(torch.device(self.device).type, dtype, enabled=dtype is not torch.float32)

    def smaller(self, problems: int) -> Work:
        """Return the same with fewer prompts, in one pass."""
        return replace(self, problems=min(problems, self.problems), passes=1)

    def to_argument(self) -> str:
        """For the command line of a worker."""
        return json.dumps(asdict(self))


def work_of_this_process() -> Work:
    """Return the work that the command line names."""
    work = Work(**json.loads(sys.argv[1]))
    Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out it is this process that ends, no other
    torch.set_num_threads(work.threads)
    torch.manual_seed(0)
    return work


def even_words(completions: list[str], **_: Any) -> list[float]:
    """Return the reward: the share of words with an even number."""
    return [float(np.mean([word[-1] in "02468" for word in completion.split()])) for completion in completions]


def build(folder: str, vocabulary: int, hidden: int, layers: int, heads: int, intermediate: int, positions: int) -> int:
    """Write a Llama with random weights, and a tokenizer for which each of `w0 w1 ...` is one token; the number of parameters.

    The end token is never drawn, so that every response has the greatest length, without a mask that some side would have to
    pay for: the first channel of the hidden states is a constant, into which no layer writes, and the end token's embedding,
    which is tied to the output, makes a logit of it whose exponential is 0 in float32.
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
