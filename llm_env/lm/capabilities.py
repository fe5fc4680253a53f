"""Trials of a few tokens that find out, once a model, how rows of different lengths can share its forward pass.

A forward pass over B rows has one of two layouts:

- "left": `[prompt, padded on the left | response, padded on the right]` under an attention mask, with position ids. The model
  has to ignore what the mask hides, and to count positions without it: RWKV, xLSTM and BART's decoders do not.
- "right": whole rows, padded on the right, and nothing but token ids. It suits every causal model: no token sees a later one.

A model whose log-probs of a token depend on later tokens is refused: sampling, which does not have them yet, would draw from
another distribution than the one that is trained.

Outputs that are not finite, or that hardly differ from token to token (a head that begins at zero), tell nothing. Then there is
no verdict: what suits every causal model is done, and the trial is made again the next time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_env.lm.inputs import evaluation_mode, model_inputs, pad, without_cache
from llm_env.lm.positions import max_positions
from llm_env.lm.shared_prompt import WindowProbe, attention_by, window_of

LENGTHS, SHORT = (13, 6, 2), (3, 2, 1)  # of the rows of a trial, in tokens; for models with few positions
LONG = 160  # of a row that is longer than most chunks, blocks and windows that a config does not name
TOLERANCE = 1e-3  # of the outputs' spread: in tiny models rounding stays under 1e-5 of it, and faults are over 2e-3
LEAST_SPREAD = 1 / 32  # of the outputs' size, in half precision; in float32 it is 5e-4
LAYERS = {"full_attention", "sliding_attention"}  # kinds of layers that a mask can describe
REMEDY = "give a causal language model, as AutoModelForCausalLM.from_pretrained(...) loads it"


class NotCausal(TypeError):
    """The model is not a causal language model over token ids."""


@contextmanager
def trial(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode within, without gradients and autocast; the modules' modes are restored after it."""
    with evaluation_mode(model), torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        yield


@contextmanager
def refusing(model: PreTrainedModel) -> Iterator[None]:
    """An error within becomes one that says what model it is that cannot be used.

    Raises:
        NotCausal: If anything but a lack of memory is raised within.
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
    """Return how many token ids a language model, or one without its head, embeds.

    Raises:
        NotCausal: If it embeds no ids, or several codebooks of them.
    """
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # decoders of encoder-decoder models without their heads; ids are embedded before positions
        embeddings = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    if not isinstance(getattr(embeddings, "weight", None), Tensor):
        raise NotCausal(
            f"{type(model).__name__} computes nothing from token ids alone: it embeds them by a {type(embeddings).__name__}; "
            f"{REMEDY}"
        )
    return len(embeddings.weight)


def trial_rows(model: PreTrainedModel, short: bool = False) -> list[list[int]]:
    """Return rows of different lengths, of tokens from the middle of the vocabulary: special tokens stand at its ends."""
    lengths = LENGTHS if _room(model) > LENGTHS[0] and not short else SHORT
    rows = [[token(model, 5 * i + 3 * row) for i in range(length)] for row, length in enumerate(lengths)]
    padding = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None)
    if isinstance(padding, int) and 0 <= padding < vocabulary_of(model):
        rows[0][1] = padding  # RoBERTa gives it no position, XLM hides it; it may be drawn all the same
    return rows


def _room(model: PreTrainedModel) -> int:
    """Return how many tokens a row of a trial may have; some models use up to four positions for other things (ProphetNet)."""
    return min(LONG, (max_positions(model) or LONG + 4) - 4)


def token(model: PreTrainedModel, number: int) -> int:
    """A token id from the middle third of the vocabulary, in no pattern: rows of one token over and over would hide faults."""
    size = vocabulary_of(model)
    span = max(size // 3, min(size, 3))
    return min(size // 3, size - span) + ((number + 1) * 2654435761 % 2**32 >> 8) % span  # Knuth's multiplicative hash


def agree(outputs: Sequence[Tensor], expected: Sequence[Tensor], noise: float | Tensor = 0.0) -> bool:
    """Return whether outputs (n, H) a row are those expected, up to rounding.

    The measure is how much the expected outputs differ from token to token, so that a fault shows in nearly uniform
    distributions, too. A model in half precision rounds more.

    Args:
        outputs: of some rows, (n, H) each.
        expected: of the same rows.
        noise: the largest difference that the size of a batch makes, in the outputs' unit.
    """
    relative = max(TOLERANCE, 16 * torch.finfo(expected[0].dtype).eps)
    return bool(_difference(outputs, expected) <= relative * _spread(torch.cat(list(expected))) + 4 * noise)


def _spread(outputs: Tensor) -> Tensor:
    """How much outputs (n, H) differ from token to token, a root mean square."""
    tokens = outputs.float()
    return (tokens - tokens.mean(0)).square().mean().sqrt()


def tells(outputs: Tensor) -> bool:
    """Whether a trial on outputs (n, H) means anything: they are finite, and differ by far more than they are rounded."""
    size = outputs.float().square().mean().sqrt()
    least = min(4 * torch.finfo(outputs.dtype).eps / TOLERANCE, LEAST_SPREAD) * size
    return bool(outputs.isfinite().all() and _spread(outputs) > least)


def _difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a.float() - b.float()).abs().max() for a, b in zip(outputs, expected, strict=True)]).max()


def plain_outputs(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Logits, or last hidden states of a model without a head, (B, L, H), of rows of one length from token ids alone."""
    return _outputs(model, input_ids=torch.tensor(rows, device=model.device))


def _outputs(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    outputs = model(**inputs, **without_cache(model))
    logits = getattr(outputs, "logits", None)
    return outputs.last_hidden_state if logits is None else logits


Verdicts = WeakKeyDictionary[PreTrainedModel, bool]


def passes_once(model: PreTrainedModel, verdicts: Verdicts, passes: Callable[[PreTrainedModel], bool]) -> bool:
    """Return whether a model passes a trial, which is made once; an error within it, but for a lack of memory, is a failure.

    Without a verdict, see the module, it does not for the time being.
    """
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
    """Whether a pass in the "left" layout gives what a plain forward pass gives for each row alone; found out by a trial.

    Without a verdict, see the module, it does not for the time being.

    Args:
        model: a causal language model, or one without its head.

    Raises:
        NotCausal: If the model computes nothing from token ids alone, or a token's outputs depend on later tokens.
    """
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
    ids = ids.masked_fill(mask == 0, rows[1][-1])  # the embedding of token 0 may be zero, which hides a fault
    try:
        padded = _outputs(model, **model_inputs(model, ids, mask))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the "right" layout is taken
        return False
    return agree([outputs[keep] for outputs, keep in zip(padded, mask.bool(), strict=True)], alone, noise)


def _long_outputs(model: PreTrainedModel, row: list[int]) -> Tensor | None:
    """Outputs at a row's tokens, which a row of `LONG` tokens begins with; None for models that describe what they see."""
    length = _room(model)
    if length <= len(row) or describable(model.base_model):
        return None
    return plain_outputs(model, [[*row, *(token(model, 7 * i) for i in range(length - len(row)))]])[0, : len(row)]


_describable: Verdicts = WeakKeyDictionary()


def describable(base: PreTrainedModel) -> bool:
    """Whether all layers of a model without its head say what they see: nothing hidden but by windows that the config names.

    A trial on a few tokens would not show a window, a chunk or a block that is hidden in a model's own attention.
    """
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
    except Exception:  # an error that is the model's own comes again where it is computed in earnest
        return False
    found = {seen for seen in probe.windows if seen is not None}
    layers = range(getattr(config, "num_hidden_layers", 0))  # a layer that is computed twice keeps two sets of keys
    return sorted(probe.layers) == list(layers) and found == (set() if window is None else {window})


def padding_side(model: PreTrainedModel) -> Literal["left", "right"]:
    """Return the layout of a forward pass that scores rows; see the module.

    "left" takes a trial and a model that describes what it sees, since the trial's padding is short.
    """
    return "left" if takes_left_padding(model) and describable(model.base_model) else "right"


_widths: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()


def width_of(base: PreTrainedModel) -> int:
    """H, the width of the last hidden states of a model without its head, from a pass over one token."""
    if base not in _widths:
        with trial(base):
            _widths[base] = plain_outputs(base, [[0]]).shape[-1]
    return _widths[base]
