"""Detect a model's capabilities with trial forward passes: padding side, causality, attention windows.

Each trial uses a few tokens and runs once per model. A forward pass over B rows has one of two layouts:

- "left": `[prompt, padded on the left | response, padded on the right]`, with an attention mask and position ids. The model
  must ignore masked tokens and must not count them as positions. RWKV, xLSTM and BART's decoders do not.
- "right": whole rows, padded on the right, without a mask. It works with every causal model, as no token attends to later ones.

A model is rejected if its log-probs of a token depend on later tokens. Sampling does not have these tokens yet, so it would
sample from a different distribution than the one that is trained.

A trial is inconclusive if its outputs are not finite, or hardly differ between tokens (for example, with a head initialized to
zero). Then the choice is the one that works with every causal model, and the trial is repeated next time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeAlias
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from llm_env.lm.inputs import evaluation_mode, model_inputs, pad, without_cache
from llm_env.lm.positions import max_positions
from llm_env.lm.shared_prompt import WindowProbe, attention_by, window_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTHS, SHORT = (13, 6, 2), (3, 2, 1)  # row lengths of a trial, in tokens; SHORT for models with few positions
LONG = 160  # row length, in tokens, that exceeds most attention chunks, blocks and windows that configs do not name
TOLERANCE = 1e-3  # relative to the outputs' std: in tiny models, rounding is below 1e-5 and faults are above 2e-3
LEAST_SPREAD = 1 / 32  # minimum std between tokens in half precision, relative to the outputs' RMS; in float32 5e-4
LAYERS = {"full_attention", "sliding_attention"}  # layer types that a mask can describe
REMEDY = "give a causal language model, as AutoModelForCausalLM.from_pretrained(...) loads it"


class NotCausal(TypeError):
    """The model is not a causal language model over token ids."""


_originals: WeakKeyDictionary[nn.Module, ref[nn.Module]] = WeakKeyDictionary()


def register_copy(copied: PreTrainedModel, original: PreTrainedModel) -> None:
    """Let the trials of a copy in lower precision be those of its original, which rounding does not blur."""
    for one, other in ((copied, original), (copied.base_model, original.base_model)):
        _originals[one] = ref(other)


def original_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model that a registered copy was made of; any other model itself."""
    found = _originals.get(model)
    original = None if found is None else found()
    return model if original is None else original


@contextmanager
def trial(model: PreTrainedModel) -> Iterator[None]:
    """Context for a trial: evaluation mode, no gradients, no autocast. Restores the modules' modes afterwards."""
    with evaluation_mode(model), torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        yield


@contextmanager
def refusing(model: PreTrainedModel) -> Iterator[None]:
    """Context that converts errors to `NotCausal`, with the model's class in the message.

    Raises:
        NotCausal: If the block raises anything but an out-of-memory error.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = "; ".join(str(error).strip().splitlines()[:1])
        raise NotCausal(
            f"{type(model).__name__} computes nothing from token ids alone ({type(error).__name__}: {reason}); {REMEDY}"
        ) from error


def vocabulary_of(model: PreTrainedModel) -> int:
    """Return the number of token ids that a model embeds; the model may have a head or not.

    Raises:
        NotCausal: If the model does not embed token ids, or embeds several codebooks of them.
    """
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # headless decoders of encoder-decoder models; their first embedding is that of ids
        embeddings = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    if not isinstance(getattr(embeddings, "weight", None), Tensor):
        raise NotCausal(
            f"{type(model).__name__} computes nothing from token ids alone: it embeds them by a {type(embeddings).__name__}; "
            f"{REMEDY}"
        )
    return len(embeddings.weight)


def trial_rows(model: PreTrainedModel, short: bool = False) -> list[list[int]]:
    """Return trial rows of different lengths. Tokens are from the middle of the vocabulary, to avoid special tokens."""
    lengths = LENGTHS if _room(model) > LENGTHS[0] and not short else SHORT
    rows = [[token(model, 5 * i + 3 * row) for i in range(length)] for row, length in enumerate(lengths)]
    padding = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None)
    if isinstance(padding, int) and 0 <= padding < vocabulary_of(model):
        rows[0][1] = padding  # RoBERTa gives it no position, XLM masks it, but the policy can still sample it
    return rows


def _room(model: PreTrainedModel) -> int:
    """Return the maximum length of a trial row; some models reserve up to four positions (ProphetNet)."""
    return min(LONG, (max_positions(model) or LONG + 4) - 4)


def token(model: PreTrainedModel, number: int) -> int:
    """Return a pseudo-random token id from the middle third of the vocabulary; repeated tokens would hide faults."""
    size = vocabulary_of(model)
    span = max(size // 3, min(size, 3))
    return min(size // 3, size - span) + ((number + 1) * 2654435761 % 2**32 >> 8) % span  # Knuth's multiplicative hash


def agree(outputs: Sequence[Tensor], expected: Sequence[Tensor], noise: float | Tensor = 0.0) -> bool:
    """Return whether outputs equal the expected outputs up to rounding.

    The tolerance is relative to how much the expected outputs differ between tokens. So a fault is also detected in nearly
    uniform distributions. It is larger in half precision.

    Args:
        outputs: the outputs of some rows, (n, H) each.
        expected: the expected outputs of the same rows, (n, H) each.
        noise: the largest difference that another batch size causes, in the outputs' unit.
    """
    relative = max(TOLERANCE, 16 * torch.finfo(expected[0].dtype).eps)
    return bool(_difference(outputs, expected) <= relative * _spread(torch.cat(list(expected))) + 4 * noise)


def _spread(outputs: Tensor) -> Tensor:
    """Return how much outputs (n, H) differ between tokens, as a root mean square."""
    tokens = outputs.float()
    return (tokens - tokens.mean(0)).square().mean().sqrt()


def tells(outputs: Tensor) -> bool:
    """Return whether outputs (n, H) are informative: finite, and different between tokens by far more than rounding."""
    size = outputs.float().square().mean().sqrt()
    least = min(4 * torch.finfo(outputs.dtype).eps / TOLERANCE, LEAST_SPREAD) * size
    return bool(outputs.isfinite().all() and _spread(outputs) > least)


def _difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a.float() - b.float()).abs().max() for a, b in zip(outputs, expected, strict=True)]).max()


def plain_outputs(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Run a model on equally long rows of token ids, without padding; return logits or last hidden states (B, L, H)."""
    return _outputs(model, input_ids=torch.tensor(rows, device=model.device))


def _outputs(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    outputs = model(**inputs, **without_cache(model))
    logits = getattr(outputs, "logits", None)
    return outputs.last_hidden_state if logits is None else logits


Verdicts: TypeAlias = "WeakKeyDictionary[PreTrainedModel, bool]"


def passes_once(model: PreTrainedModel, verdicts: Verdicts, passes: Callable[[PreTrainedModel], bool]) -> bool:
    """Return whether a model passes a trial, and cache the result in `verdicts`.

    An error in the trial counts as a failure; an out-of-memory error is re-raised. If the model's outputs are uninformative
    (see the module), the result is False and is not cached.
    """
    model = original_of(model)
    if model not in verdicts:
        with trial(model):
            if not tells(plain_outputs(model, trial_rows(model)[:1])[0]):
                return False
            try:
                verdicts[model] = passes(model)
            except torch.OutOfMemoryError:
                raise
            except Exception:
                verdicts[model] = False
    return verdicts[model]


_takes_left: Verdicts = WeakKeyDictionary()


def takes_left_padding(model: PreTrainedModel) -> bool:
    """Return whether a model supports left padding, according to a trial.

    It does if a forward pass in the "left" layout gives the same outputs as each row alone. If the trial is inconclusive (see
    the module), the result is False and is not cached.

    Args:
        model: a causal language model, with or without its head.

    Raises:
        NotCausal: If the model cannot compute outputs from token ids alone, or a token's outputs depend on later tokens.
    """
    model = original_of(model)
    if model not in _takes_left:
        with trial(model):
            verdict = _try_padding(model)
        if verdict is None:
            return False
        _takes_left[model] = verdict
    return _takes_left[model]


def _try_padding(model: PreTrainedModel) -> bool | None:
    rows = trial_rows(model)
    with refusing(model):
        alone = [plain_outputs(model, [row])[0] for row in rows]
        if not tells(torch.cat(alone)):
            return None
        others = (token(model, number) for number in range(100))
        changed = [*rows[0][:-1], next((other for other in others if other != rows[0][-1]), rows[0][-1])]
        whole, other = plain_outputs(model, [rows[0], changed])
        first = plain_outputs(model, [rows[0][: len(rows[0]) // 2]])[0]
        long = _long_outputs(model, rows[0])
    noise = _difference([whole], [alone[0]])
    early = [other[:-1], first, *([] if long is None else [long])]
    if not agree(early, [alone[0][: len(outputs)] for outputs in early], noise):
        raise NotCausal(
            f"{type(model).__name__} is not causal: its outputs at a token depend on later tokens, which sampling does not "
            f"have yet; {REMEDY}, with config.is_decoder=True where the class has that (BERT)"
        )
    cuts = [-(-len(row) // 2) for row in rows]
    prompts, mask = pad([row[:cut] for row, cut in zip(rows, cuts, strict=True)], "left", model.device)
    rest, rest_mask = pad([row[cut:] for row, cut in zip(rows, cuts, strict=True)], "right", model.device)
    ids, mask = torch.cat([prompts, rest], 1), torch.cat([mask, rest_mask], 1)
    ids = ids.masked_fill(mask == 0, rows[1][-1])  # not token 0: its embedding may be zero, which hides faults
    try:
        padded = _outputs(model, **model_inputs(model, ids, mask))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # use the "right" layout
        return False
    return agree([outputs[keep] for outputs, keep in zip(padded, mask.bool(), strict=True)], alone, noise)


def _long_outputs(model: PreTrainedModel, row: list[int]) -> Tensor | None:
    """Return the outputs at a row's tokens when the row is extended to `LONG` tokens; None if `describable`."""
    length = _room(model)
    if length <= len(row) or describable(model.base_model):
        return None
    return plain_outputs(model, [[*row, *(token(model, 7 * i) for i in range(length - len(row)))]])[0, : len(row)]


_describable: Verdicts = WeakKeyDictionary()


def describable(base: PreTrainedModel) -> bool:
    """Return whether the config describes the attention of all layers: full, or in the sliding window that it names.

    A trial on a few tokens cannot detect a window, chunk or block that is implemented in a model's own attention code.
    """
    base = original_of(base)
    if base not in _describable:
        with trial(base):
            _describable[base] = _describes(base)
    return _describable[base]


def _describes(base: PreTrainedModel) -> bool:
    probe = WindowProbe()
    try:
        config = base.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or LAYERS)
        if not kinds <= LAYERS or getattr(config, "attention_chunk_size", None):
            return False
        with attention_by(base, probe):
            base(input_ids=torch.tensor([[1, 2, 0]], device=base.device), use_cache=False)
        window = window_of(base)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # an error of the model itself is raised again in the real forward pass
        return False
    found = {seen for seen in probe.windows if seen is not None}
    layers = range(getattr(config, "num_hidden_layers", 0))  # a layer that is computed twice has two sets of keys
    return sorted(probe.layers) == list(layers) and found == (set() if window is None else {window})


def padding_side(model: PreTrainedModel) -> Literal["left", "right"]:
    """Return the layout of a forward pass that scores rows, "left" or "right"; see the module.

    "left" requires that the trial passes and that the model is `describable`, since the trial only tests short padding.
    """
    return "left" if takes_left_padding(model) and describable(model.base_model) else "right"


_widths: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()


def width_of(base: PreTrainedModel) -> int:
    """Return the hidden size H of a model without its head, from a forward pass over one token."""
    base = original_of(base)
    if base not in _widths:
        with trial(base):
            _widths[base] = plain_outputs(base, [[0]]).shape[-1]
    return _widths[base]
