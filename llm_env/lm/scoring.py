"""One forward pass over prompts and responses: the path by which a policy is trained and a reference is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llm_env.lm.capabilities import padding_side, refusing, tells, trial, vocabulary_of, width_of
from llm_env.lm.inputs import model_inputs, only_last, pad, pad_with_tokens, takes, without_cache
from llm_env.lm.shared_prompt import PrefixSharingUnsupported, Rows, group_states
from llm_env.lm.sharing import BatchShape, PrefixSharing, groups_of, sharing_mode, sharing_modes

FORBIDDEN = -1e9  # as a logit: its probability is exactly 0, and 0 * log 0 stays finite in the entropy
CHUNK_BYTES = 2**28  # of logits at a time, in float32

ON_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # what models call what they do to logits

Head = Callable[[Tensor], Tensor]


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """Matrix products in bfloat16 within, if `bf16`; weights stay as they are, float32."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


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
    """Return logits of the distribution over the allowed tokens, in float32; unchanged where `allowed` (bool) is None."""
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
    """Return log-probs of all response tokens, from one pass in which prompts that follow each other are computed once.

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
        prefix_sharing: see `sharing_mode`.
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
    """Return the hidden states (B, T + 1, H) before each response token and after the last, of a model without its head.

    Without the last token's (B, T, H): nothing but V of the state after it depends on it.
    """
    fed = responses if with_last else [row[:-1] for row in responses]
    groups = groups_of(prompts, fed)
    mode = sharing_mode(base, BatchShape.of(*groups), prefix_sharing)
    if mode is not None:
        try:
            return group_states(base, *groups, mode)
        except PrefixSharingUnsupported:
            if prefix_sharing is True:
                raise
    inputs, taken = _laid_out(base, prompts, fed)
    return taken(_last_states(base, **inputs))


def _last_states(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """Return the last hidden states, of a model that has no head, or whose head is a part of it (Llama 4)."""
    if model.get_output_embeddings() is None:
        states = getattr(model(**inputs, **without_cache(model)), "last_hidden_state", None)
        if states is None:
            raise TypeError(_no_states(model))
        return states
    return _with_states(model, **inputs, **without_cache(model))[1]


def _with_states(model: PreTrainedModel, **inputs: Any) -> tuple[Any, Tensor]:
    """Outputs and last hidden states of a model with its head.

    Raises:
        TypeError: If the model gives no hidden states.
    """
    if not takes(model, "output_hidden_states"):
        raise TypeError(_no_states(model))
    outputs = model(**inputs, output_hidden_states=True)
    if not (states := getattr(outputs, "hidden_states", None)):
        raise TypeError(_no_states(model))
    return outputs, states[-1]


def _no_states(model: PreTrainedModel) -> str:
    return (
        f"the {type(model).__name__} gives no hidden states, so that no value head can be put on it; let its forward return "
        "hidden_states where output_hidden_states=True, or train it by an algorithm without a critic (GRPO, REINFORCE)"
    )


def _laid_out(model: PreTrainedModel, prompts: Rows, fed: Rows) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """Rows `[prompt | response]` for a forward pass in the model's layout, and what takes (B, T + 1, X) from its outputs.

    These are at the last token of each prompt and at those of each response. See `llm_env.lm.capabilities`.
    """
    width = max(map(len, fed))
    if padding_side(model) == "left":
        prompt_ids, prompt_mask = pad(prompts, "left", model.device)
        ids, mask = pad(fed, "right", model.device)
        inputs = model_inputs(model, torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask], 1))
        return inputs, lambda outputs: outputs[:, -width - 1 :]
    ids = pad_with_tokens([[*prompt, *row] for prompt, row in zip(prompts, fed, strict=True)], model.device)
    first = torch.tensor([len(prompt) - 1 for prompt in prompts], device=ids.device)
    at = (first[:, None] + torch.arange(width + 1, device=ids.device)).clamp(max=ids.shape[1] - 1)

    def taken(outputs: Tensor) -> Tensor:
        """Return where a model gives only the last outputs, the others come before them."""
        places = at - (ids.shape[1] - outputs.shape[1])
        return outputs.gather(1, places[..., None].expand(-1, -1, outputs.shape[-1]))

    return {"input_ids": ids}, taken


def _plain_outputs(model: PreTrainedModel, prompts: Rows, responses: Rows, with_last: bool) -> tuple[Tensor, Tensor]:
    """Hidden states and logits before each response token, from the whole language model: for a head that stands not alone."""
    inputs, taken = _laid_out(model, prompts, responses if with_last else [row[:-1] for row in responses])
    before = min(map(len, prompts)) if padding_side(model) == "right" else max(map(len, prompts))  # the first that is taken
    last = only_last(model, inputs["input_ids"].shape[1] - before + 1)
    arguments = {**inputs, **last, **without_cache(model)}
    if not with_last:
        logits = taken(model(**arguments).logits)
        return logits, logits
    if model.base_model is model:  # no part of it ends where its head begins (Llama 4)
        outputs, states = _with_states(model, **arguments)
        return taken(states), taken(outputs.logits)
    read: list[Any] = []  # by the head; the last of `hidden_states` may be another one (Gemma 3n)
    hook = model.base_model.register_forward_hook(lambda _module, _inputs, outputs: read.append(outputs))
    try:
        logits = taken(model(**arguments).logits)
    finally:
        hook.remove()
    if not read or not isinstance(getattr(read[-1], "last_hidden_state", None), Tensor):
        raise TypeError(_no_states(model))
    return taken(read[-1].last_hidden_state), logits


_heads: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def head_of(model: PreTrainedModel) -> Head | None:
    """Return the map from last hidden states to logits, if it is the output embedding alone; None where a model does more.

    Which of the two is found out by a trial, once a model. Logits that tell nothing (see `llm_env.lm.capabilities`) are no
    verdict: what is done to them, such as a soft cap, would not show.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if head is None or model.base_model is model or any(getattr(config, name, None) not in (None, 1) for name in ON_LOGITS):
        return None
    if model not in _heads:
        ids = torch.arange(3, device=model.device)[None] % vocabulary_of(model)
        with trial(model):
            with refusing(model):
                logits = model(input_ids=ids, **without_cache(model)).logits
                states = model.base_model(input_ids=ids, **without_cache(model.base_model)).last_hidden_state
            if not tells(logits[0]):
                return None
            # Bit for bit: a soft cap hardly shows on small logits. RemBERT's last states are of another width.
            fits = _inputs_of(head) in (None, states.shape[-1])
            _heads[model] = fits and torch.equal(logits, head(states))
    return head if _heads[model] else None


def _inputs_of(head: nn.Module) -> int | None:
    """How wide the states are that a head multiplies, from its weight (V, H); None if it has none."""
    weight = getattr(head, "weight", None)
    return None if weight is None else weight.shape[-1]


def _identity(logits: Tensor) -> Tensor:
    return logits


def try_out(model: PreTrainedModel) -> None:
    """Run the trials on which scoring relies, of a language model or of one without its head, before the first batch.

    Raises:
        NotCausal: If the model cannot be trained on token ids; see `llm_env.lm.capabilities.takes_left_padding`.
    """
    alone = head_of(model) is not None or model.get_output_embeddings() is None
    padding_side(model.base_model if alone else model)
    if alone:
        width_of(model.base_model)
        sharing_modes(model.base_model, 2)
