"""Score responses: log-probs and entropies from one forward pass, for training a policy and for the reference model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from llm_env.lm.capabilities import padding_side, refusing, tells, trial, vocabulary_of, width_of
from llm_env.lm.inputs import model_inputs, only_last, pad, pad_with_tokens, takes, without_cache
from llm_env.lm.logprob_kernel import FusedLogProbs, runs_on
from llm_env.lm.shared_prompt import PrefixSharingUnsupported, Rows, group_states
from llm_env.lm.sharing import BatchShape, PrefixSharing, groups_of, sharing_mode, sharing_modes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORBIDDEN = -1e9  # logit of a forbidden token: probability exactly 0, and finite, so that 0 * log 0 in the entropy is 0
CHUNK_BYTES = 2**28  # size of the float32 logits that are computed at a time
CHUNK_BYTES_CUDA = 2**31  # the same on a GPU, where each chunk reads the head's weights and adds to their gradient

ON_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # config names of operations on logits

Head = Callable[[Tensor], Tensor]


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """Return an autocast context to bfloat16 if `bf16`, else a null context. Weights keep their dtype."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def log_probs_and_entropies(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """Compute log-probs of tokens and entropies of softmax(logits / temperature), in nats.

    Args:
        logits: (N, V).
        tokens: (N,) int64.
        temperature: divisor of the logits.
        entropy: whether to compute entropies; if False, zeros are returned instead.

    Returns:
        Log-probs (N,) and entropies (N,), float32.
    """
    if runs_on(logits.device):
        logp, entropies = FusedLogProbs.apply(logits, tokens, temperature)
        return logp, entropies if entropy else torch.zeros_like(entropies)
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    with torch.autocast(logits.device.type, enabled=False):
        return _LogProbsAndEntropies.apply(scaled, tokens, entropy)


class _LogProbsAndEntropies(torch.autograd.Function):
    """Log-probs and entropies that save a single (N, V) tensor for the backward pass.

    With l = log_softmax(x) and p = exp(l): d l_token / d x = onehot(token) - p, and d H / d x = -p * (l + H).
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
        if of_entropies is not None:  # skipped if the loss does not use entropies
            factors = factors - of_entropies[:, None] * (table + entropies[:, None])
        out = table.exp().mul_(factors)
        return out.scatter_add_(-1, tokens[:, None], of_logp[:, None]), None, None


def restrict(logits: Tensor, allowed: np.ndarray | None) -> Tensor:
    """Mask the logits of forbidden tokens.

    Args:
        logits: (N, V).
        allowed: (N, V) bool, True at allowed tokens; None allows all.

    Returns:
        (N, V) logits in float32; the unchanged logits if `allowed` is None.
    """
    if allowed is None:
        return logits
    return logits.float().masked_fill(torch.as_tensor(~allowed, device=logits.device), FORBIDDEN)


@dataclass
class Scored:
    """Scores of B responses of up to T tokens, padded on the right.

    Attributes:
        logp: (B, T) float32, log pi of the response tokens, in nats; 0 at padding.
        entropy: (B, T) float32, entropy of the distribution of each token, in nats; 0 at padding. None if not requested.
        mask: (B, T) int64, 1 at action tokens.
        states: (B, T + 1, H), hidden states before each token and after the last; None if not requested.
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
    actions: Sequence[np.ndarray] | None = None,
) -> Scored:
    """Compute log-probs of all response tokens in one forward pass.

    Consecutive equal prompts may be computed once (prefix sharing). Logits are computed in chunks of at most `CHUNK_BYTES`
    (`CHUNK_BYTES_CUDA` on a GPU) and recomputed in the backward pass, so the logits of all tokens are never in memory at once.
    A model that is computed as a whole (see `head_of`) has no such chunks.

    Args:
        model: any causal language model of transformers.
        prompts: B lists of token ids, at least one token each.
        responses: B lists of token ids, at least one token each.
        vocab_size: V, the number of actions. Logits of higher ids, which only pad some models' embeddings, are ignored.
        temperature: divisor of the logits.
        allowed: B bool arrays (n, V), True at tokens that were allowed in place of each action token; all by default.
        entropy: whether to compute entropies.
        states: whether to return hidden states.
        prefix_sharing: see `sharing_mode`.
        actions: B bool arrays, True at action tokens; the head is computed for these only. All tokens by default.
    """
    targets, mask = pad(responses, "right", model.device)
    chosen_rows = [np.arange(len(row)) for row in responses]
    if actions is not None:
        mask = pad([row.astype(int).tolist() for row in actions], "right", model.device)[0]
        chosen_rows = [np.flatnonzero(row) for row in actions]
    # Indices from the host: a boolean index would wait for the device to count them.
    numbers = np.repeat(np.arange(len(responses)), [len(row) for row in chosen_rows])
    at = tuple(torch.from_numpy(np.stack([numbers, np.concatenate(chosen_rows)])).to(model.device))
    head = head_of(model)
    if head is None:
        if prefix_sharing is True:
            raise ValueError(
                f"prefix_sharing=True, but {type(model).__name__} computes its logits by more than a matrix product, so that "
                "it is computed as a whole; set prefix_sharing='auto'"
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

    chunk = CHUNK_BYTES_CUDA if mask.is_cuda else CHUNK_BYTES
    logp, spread = _in_chunks(scores, chosen, targets[at], masks, max(1, chunk // (4 * vocab_size)))
    table, is_action = torch.zeros(mask.shape, device=mask.device), mask.bool()
    return Scored(
        table.masked_scatter(is_action, logp),
        table.masked_scatter(is_action, spread) if entropy else None,
        mask,
        hidden if states else None,
    )


def _in_chunks(
    scores: Callable[..., tuple[Tensor, Tensor]], states: Tensor, tokens: Tensor, allowed: np.ndarray | None, size: int
) -> tuple[Tensor, Tensor]:
    """Apply `scores` to chunks of `size` tokens, with activation checkpointing; return (N,) and (N,)."""
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
    """Compute hidden states before each response token and after the last.

    Args:
        base: a model without its head.
        prompts: B lists of token ids.
        responses: B lists of token ids.
        with_last: whether to feed the last token of each response. Only the value of the state after it needs that.
        prefix_sharing: see `sharing_mode`.

    Returns:
        (B, T + 1, H); (B, T, H) without the last token.
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
    """Return the last hidden states of a model without a head, or whose base model includes the head (Llama 4)."""
    if model.get_output_embeddings() is None:
        states = getattr(model(**inputs, **without_cache(model)), "last_hidden_state", None)
        if states is None:
            raise TypeError(_no_states(model))
        return states
    return _with_states(model, **inputs, **without_cache(model))[1]


def _with_states(model: PreTrainedModel, **inputs: Any) -> tuple[Any, Tensor]:
    """Return the outputs and the last hidden states of a model with its head.

    Raises:
        TypeError: If the model returns no hidden states.
    """
    if not takes(model, "output_hidden_states"):
        raise TypeError(_no_states(model))
    outputs = model(**inputs, output_hidden_states=True)
    if not (states := getattr(outputs, "hidden_states", None)):
        raise TypeError(_no_states(model))
    return outputs, states[-1]


def _no_states(model: PreTrainedModel) -> str:
    return (
        f"the {type(model).__name__} gives no hidden states, which a value head needs; make its forward return hidden_states "
        "if output_hidden_states=True, or train it with an algorithm without a critic (GRPO, REINFORCE)"
    )


def _laid_out(model: PreTrainedModel, prompts: Rows, fed: Rows) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """Pad rows `[prompt | response]` in the model's layout for a forward pass.

    See `llm_env.lm.capabilities` for the layouts.

    Returns:
        The keyword arguments of the forward pass, and a function that selects (B, T + 1, X) from its outputs: those at the
        last token of each prompt and at the tokens of each response.
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
        """Select the outputs at `at`; shift the indices if the model returned only the last outputs."""
        places = at - (ids.shape[1] - outputs.shape[1])
        return outputs.gather(1, places[..., None].expand(-1, -1, outputs.shape[-1]))

    return {"input_ids": ids}, taken


def _plain_outputs(model: PreTrainedModel, prompts: Rows, responses: Rows, with_last: bool) -> tuple[Tensor, Tensor]:
    """Return hidden states and logits before each response token, from the model with its head (see `head_of`)."""
    inputs, taken = _laid_out(model, prompts, responses if with_last else [row[:-1] for row in responses])
    before = min(map(len, prompts)) if padding_side(model) == "right" else max(map(len, prompts))  # first output used
    last = only_last(model, inputs["input_ids"].shape[1] - before + 1)
    arguments = {**inputs, **last, **without_cache(model)}
    if not with_last:
        logits = taken(model(**arguments).logits)
        return logits, logits
    if model.base_model is model:  # Llama 4 has no module without the head
        outputs, states = _with_states(model, **arguments)
        return taken(states), taken(outputs.logits)
    read: list[Any] = []  # the head's input; the last of `hidden_states` may differ (Gemma 3n)
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
    """Return the output embedding if it alone maps last hidden states to logits, else None.

    A trial forward pass decides, once per model. If the logits are uninformative (see `llm_env.lm.capabilities`), the result
    is None and the trial is repeated next time: an operation on them, such as a soft cap, would not show.
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
            # Exact comparison: a soft cap hardly changes small logits. RemBERT's head takes another width than its last states.
            fits = _inputs_of(head) in (None, states.shape[-1])
            _heads[model] = fits and torch.equal(logits, head(states))
    return head if _heads[model] else None


def _inputs_of(head: nn.Module) -> int | None:
    """Return the input width H of a head from its weight (V, H); None if it has no weight."""
    weight = getattr(head, "weight", None)
    return None if weight is None else weight.shape[-1]


def _identity(logits: Tensor) -> Tensor:
    return logits


def try_out(model: PreTrainedModel) -> None:
    """Run all trials that scoring relies on, so that errors are raised before the first batch.

    Args:
        model: a language model, with or without its head.

    Raises:
        NotCausal: If the model cannot be trained on token ids; see `llm_env.lm.capabilities.takes_left_padding`.
    """
    alone = head_of(model) is not None or model.get_output_embeddings() is None
    padding_side(model.base_model if alone else model)
    if alone:
        width_of(model.base_model)
        sharing_modes(model.base_model, 2)
