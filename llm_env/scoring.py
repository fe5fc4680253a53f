"""One forward pass over prompts and responses: the path by which a policy is trained and a reference is asked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llm_env.shared_prompt import NotShareable, Rows, group_states
from llm_env.sharing import Extent, PrefixSharing, groups_of, way_to_share

FORBIDDEN = -1e9  # as a logit: its probability is exactly 0, and 0 * log 0 stays finite in the entropy
CHUNK_BYTES = 2**28  # of logits at a time, in float32

ON_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # what models call what they do to logits

Head = Callable[[Tensor], Tensor]


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """Matrix products in bfloat16 within, if `bf16`; weights stay as they are, float32."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


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


def only_last(model: PreTrainedModel, count: int) -> dict[str, int]:
    """Keyword arguments of a forward pass that makes logits at the last positions alone, if the model knows how to."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def log_probs_and_entropies(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """Log softmax(logits / temperature) at the tokens and the distributions' entropies, in float32 and nats.

    Args:
        logits: (N, V).
        tokens: (N,) int64.
        temperature: divides the logits.
        entropy: whether the entropies are wanted; they are 0 if not.

    Returns:
        (N,) and (N,).
    """
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    with torch.autocast(logits.device.type, enabled=False):
        return _LogProbsAndEntropies.apply(scaled, tokens, entropy)


class _LogProbsAndEntropies(torch.autograd.Function):
    """Keeps one table (N, V) for the backward pass, l = log_softmax(x) with p = exp(l).

    d l_token / d x = onehot(token) - p, and d H / d x = -p * (l + H).
    """

    @staticmethod
    def forward(ctx: Any, scaled: Tensor, tokens: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
        table = scaled.log_softmax(-1)
        entropies = -torch.linalg.vecdot(table.exp(), table) if entropy else scaled.new_zeros(len(scaled))
        ctx.save_for_backward(table, tokens, entropies)
        ctx.set_materialize_grads(False)
        return table.gather(-1, tokens[:, None])[:, 0], entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logp: Tensor | None, of_entropies: Tensor | None) -> tuple[Tensor, None, None]:
        table, tokens, entropies = ctx.saved_tensors
        of_logp = torch.zeros_like(entropies) if of_logp is None else of_logp
        factors = -of_logp[:, None]
        if of_entropies is not None:  # a loss without them costs nothing here
            factors = factors - of_entropies[:, None] * (table + entropies[:, None])
        out = table.exp().mul_(factors)
        return out.scatter_add_(-1, tokens[:, None], of_logp[:, None]), None, None


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
    prefix_sharing: PrefixSharing = "auto",
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
        prefix_sharing: see `way_to_share`.
    """
    targets, mask = pad(responses, "right", model.device)
    at, head = mask.bool(), head_of(model)
    if head is None:
        if prefix_sharing is True:
            raise ValueError(
                f"prefix_sharing=True, but {type(model).__name__} does more than a matrix product to make logits and is "
                "computed as a whole; set prefix_sharing='auto'"
            )
        hidden, known = _plain_outputs(model, prompts, responses, states)
        head = _identity
    else:
        hidden = known = response_states(model.base_model, prompts, responses, states, prefix_sharing)
    masks = None if allowed is None else np.concatenate(list(allowed))
    chosen = known[:, : targets.shape[1]][at]

    def scores(states: Tensor, tokens: Tensor, allowed: np.ndarray | None) -> tuple[Tensor, Tensor]:
        logits = restrict(head(states)[..., :vocab_size], allowed)
        return log_probs_and_entropies(logits, tokens, temperature, entropy)

    logp, spread = _in_chunks(scores, chosen, targets[at], masks, max(1, CHUNK_BYTES // (4 * vocab_size)))
    table = torch.zeros(mask.shape, device=mask.device)
    return Scored(
        table.masked_scatter(at, logp),
        table.masked_scatter(at, spread) if entropy else None,
        mask,
        hidden if states else None,
    )


def _in_chunks(
    scores: Callable[..., tuple[Tensor, Tensor]], states: Tensor, tokens: Tensor, allowed: np.ndarray | None, size: int
) -> tuple[Tensor, Tensor]:
    """`scores` of N tokens, (N,) each, from `size` tokens at a time; of more than that the logits are not kept."""
    if len(tokens) <= size:
        return scores(states, tokens, allowed)
    parts = [slice(i, i + size) for i in range(0, len(tokens), size)]
    found = [
        checkpoint(scores, states[at], tokens[at], None if allowed is None else allowed[at], use_reentrant=False)
        for at in parts
    ]
    return torch.cat([logp for logp, _ in found]), torch.cat([entropy for _, entropy in found])


def response_states(
    base: PreTrainedModel, prompts: Rows, responses: Rows, with_last: bool = True, prefix_sharing: PrefixSharing = "auto"
) -> Tensor:
    """The hidden states (B, T + 1, H) before each response token and after the last, of a model without its head.

    Without the last token's (B, T, H): nothing but V of the state after it depends on it.
    """
    fed = responses if with_last else [row[:-1] for row in responses]
    groups = groups_of(prompts, fed)
    way = way_to_share(base, Extent.of(*groups), prefix_sharing)
    if way is not None:
        try:
            return group_states(base, *groups, way)
        except NotShareable:
            if prefix_sharing is True:
                raise
    inputs, width = _inputs(base, prompts, fed)
    return base(**inputs, use_cache=False).last_hidden_state[:, -width - 1 :]


def _inputs(model: PreTrainedModel, prompts: Rows, fed: Rows) -> tuple[dict[str, Tensor], int]:
    """`[prompt padded left | response padded right]` for a forward pass, and the width of the responses."""
    prompt_ids, prompt_mask = pad(prompts, "left", model.device)
    ids, mask = pad(fed, "right", model.device)
    return model_inputs(model, torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask], 1)), ids.shape[1]


def _plain_outputs(model: PreTrainedModel, prompts: Rows, responses: Rows, with_last: bool) -> tuple[Tensor, Tensor]:
    """Hidden states and logits before each response token, from the whole language model: for a head that stands not alone."""
    inputs, width = _inputs(model, prompts, responses if with_last else [row[:-1] for row in responses])
    outputs = model(**inputs, **only_last(model, width + 1), use_cache=False, output_hidden_states=with_last)
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
        ids = torch.arange(3, device=model.device)[None] % len(model.get_input_embeddings().weight)
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            logits = model(input_ids=ids, use_cache=False).logits
            alone = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        _heads[model] = torch.equal(logits, alone)  # bit for bit: a soft cap hardly shows on small logits
    return head if _heads[model] else None


def _identity(logits: Tensor) -> Tensor:
    return logits
