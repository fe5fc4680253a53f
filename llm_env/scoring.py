"""One forward pass over prompts and responses: the path by which a policy is trained and a reference is asked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llm_env.shared_prompt import NotShareable, group_states, shares_prompts

FORBIDDEN = -1e9  # as a logit: its probability is exactly 0, and 0 * log 0 stays finite in the entropy
CHUNK_BYTES = 2**28  # of logits at a time, in float32
SAVES = 0.9  # shared prompts are computed once where that leaves at most this share of the positions

ON_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # what models call what they do to logits

Rows = Sequence[Sequence[int]]
Head = Callable[[Tensor], Tensor]


def pad(rows: Rows, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one int64 tensor (B, longest row), and the 0/1 mask of the same shape and type.

    The padding is token 0; nothing may depend on its value.
    """
    width = max((len(row) for row in rows), default=0)
    ids, mask = torch.zeros((2, len(rows), width), dtype=torch.int64).unbind()
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, at] = torch.as_tensor(row, dtype=torch.int64)
        mask[i, at] = 1
    return ids.to(device), mask.to(device)


def model_inputs(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """Keyword arguments of a forward pass, with the positions that padding on the left would otherwise shift.

    GPT-2's absolute positions need them; models without `position_ids` (ALiBi) count by the mask themselves.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


def log_probs_of(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log softmax(logits / temperature) at the tokens, in float32: (..., V) and (...) -> (...), in nats."""
    scaled = logits.float() / temperature
    return scaled.gather(-1, tokens[..., None])[..., 0] - scaled.logsumexp(-1)


def entropy_of(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature), (..., V) -> (...), in nats and float32."""
    logp = (logits.float() / temperature).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def restrict(logits: Tensor, allowed: np.ndarray | None) -> Tensor:
    """Logits of the distribution over the allowed tokens, in float32; unchanged where `allowed` (bool) is None."""
    if allowed is None:
        return logits
    return logits.float().masked_fill(torch.as_tensor(~allowed, device=logits.device), FORBIDDEN)


@dataclass
class Scored:
    """What a model says of B responses of up to T tokens; padded on the right.

    Attributes:
        logp: (B, T) float32, log pi of the response tokens, in nats; 0 at padding.
        entropy: (B, T) float32, of the distributions they were drawn from, in nats; 0 at padding. None if not asked for.
        mask: (B, T) int64, 1 at response tokens.
        states: (B, T + 1, H), the hidden state before each token and after the last; None if not asked for.
    """

    logp: Tensor
    entropy: Tensor | None
    mask: Tensor
    states: Tensor | None


def score(
    model: PreTrainedModel,
    prompts: Rows,
    responses: Rows,
    vocab_size: int,
    temperature: float = 1.0,
    allowed: Sequence[np.ndarray] | None = None,
    entropy: bool = False,
    states: bool = False,
) -> Scored:
    """Log-probs of all response tokens, from one pass in which prompts that follow each other are computed once.

    Logits are made of some tokens at a time (`CHUNK_BYTES`) and made again in the backward pass, never of all.

    Args:
        model: any causal language model of transformers.
        prompts: B lists of token ids, at least one token each.
        responses: B lists of token ids, at least one token each.
        vocab_size: V; logits of ids beyond it, which pad some models' embeddings, are cut off: they are no actions.
        temperature: divides the logits.
        allowed: for each row (n, V) bool, what might have stood in each token's place; all by default.
        entropy: also of the distributions' entropies.
        states: also return the hidden states.
    """
    targets, mask = pad(responses, "right", model.device)
    at, head = mask.bool(), head_of(model)
    if head is None:
        hidden, known = _plain_outputs(model, prompts, responses, states)
        head = _identity
    else:
        hidden = known = response_states(model.base_model, prompts, responses, with_last=states)
    masks = None if allowed is None else np.concatenate(list(allowed))
    chosen = known[:, : targets.shape[1]][at]
    logp, spread = _token_scores(head, chosen, targets[at], vocab_size, temperature, masks, entropy)
    table = torch.zeros(mask.shape, device=mask.device)
    return Scored(
        table.masked_scatter(at, logp),
        table.masked_scatter(at, spread) if entropy else None,
        mask,
        hidden if states else None,
    )


def _token_scores(
    head: Head,
    states: Tensor,
    tokens: Tensor,
    vocab_size: int,
    temperature: float,
    allowed: np.ndarray | None,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of N tokens, (N,) each, from their states (N, H)."""

    def scores(part: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        logits = restrict(head(part)[..., :vocab_size], None if allowed is None else allowed[at])
        logp = log_probs_of(logits, tokens[at], temperature)
        return logp, entropy_of(logits, temperature) if entropy else torch.zeros_like(logp)

    size = max(1, CHUNK_BYTES // (4 * vocab_size))
    parts = [slice(i, i + size) for i in range(0, len(tokens), size)]
    if len(parts) == 1:
        return scores(states, parts[0])
    found = [checkpoint(scores, states[at], at, use_reentrant=False) for at in parts]
    return torch.cat([logp for logp, _ in found]), torch.cat([spread for _, spread in found])


def response_states(base: PreTrainedModel, prompts: Rows, responses: Rows, with_last: bool = True) -> Tensor:
    """The hidden states (B, T + 1, H) before each response token and after the last, of a model without its head.

    Without the last token's (B, T, H): nothing but V of the state after it depends on it. Prompts that are the same in rows
    that follow each other are computed once where that saves work and the model's attention allows it.
    """
    fed = responses if with_last else [row[:-1] for row in responses]
    groups = groups_of(prompts, fed)
    if groups is not None and shares_prompts(base):
        with suppress(NotShareable):
            return group_states(base, *groups)
    inputs, width = _inputs(base, prompts, fed)
    return base(**inputs, use_cache=False).last_hidden_state[:, -width - 1 :]


def groups_of(prompts: Rows, fed: Rows) -> tuple[Rows, Sequence[Rows]] | None:
    """Rows of one prompt that follow each other as N prompts and N lists of rows; None where that would save no work.

    The work is the number of positions in the batch, padding included.
    """
    heads: list[Sequence[int]] = []
    members: list[list[Sequence[int]]] = []
    for prompt, row in zip(prompts, fed, strict=True):
        if not heads or list(heads[-1]) != list(prompt):
            heads.append(prompt)
            members.append([])
        members[-1].append(row)
    longest_prompt, longest = max(map(len, prompts)), max(map(len, fed))
    _, shared = positions(len(prompts), len(heads), max(map(len, members)), longest_prompt, longest)
    return (heads, members) if shared else None


def positions(rows: int, prompts: int, group: int, longest_prompt: int, longest: int) -> tuple[int, bool]:
    """Positions of a forward pass, padding included, and whether prompts are computed once in it.

    Args:
        rows: B.
        prompts: how many there are, prompts that follow each other and are the same counted once.
        group: the most rows of one of these.
        longest_prompt: in tokens.
        longest: row after a prompt, in tokens.
    """
    together, alone = prompts * (longest_prompt + group * longest), rows * (longest_prompt + longest)
    return (together, True) if together < SAVES * alone else (alone, False)


def _inputs(model: PreTrainedModel, prompts: Rows, fed: Rows) -> tuple[dict[str, Tensor], int]:
    """`[prompt padded left | response padded right]` for a forward pass, and the width of the responses."""
    prompt_ids, prompt_mask = pad(prompts, "left", model.device)
    ids, mask = pad(fed, "right", model.device)
    return model_inputs(model, torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask], 1)), ids.shape[1]


def _plain_outputs(model: PreTrainedModel, prompts: Rows, responses: Rows, with_last: bool) -> tuple[Tensor, Tensor]:
    """Hidden states and logits before each response token, from the whole language model: for a head that stands not alone."""
    inputs, width = _inputs(model, prompts, responses if with_last else [row[:-1] for row in responses])
    last = {"logits_to_keep": width + 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    outputs = model(**inputs, **last, use_cache=False, output_hidden_states=with_last)
    hidden = outputs.hidden_states[-1][:, -width - 1 :] if with_last else outputs.logits
    return hidden, outputs.logits[:, -width - 1 :]


_heads: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def head_of(model: PreTrainedModel) -> Head | None:
    """The map from last hidden states to logits, if it is the output embedding alone; None where a model does more.

    Which of the two is found out by a trial, once a model.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if head is None or model.base_model is model or any(getattr(config, name, None) not in (None, 1) for name in ON_LOGITS):
        return None
    if model not in _heads:
        ids = torch.arange(3, device=model.device)[None] % model.get_input_embeddings().num_embeddings
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
            alone = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        _heads[model] = torch.equal(logits, alone)  # bit for bit: a soft cap hardly shows on small logits
    return head if _heads[model] else None


def _identity(logits: Tensor) -> Tensor:
    return logits
