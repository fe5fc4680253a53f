"""Observation formats: a Dict of ids and mask, or a flat Box with padding -1."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

Observation = dict[str, np.ndarray] | np.ndarray
FORMS = ("dict", "flat")
PADDING = -1


def spaces_of(form: str, max_tokens: int, vocab_size: int) -> tuple[spaces.Space, spaces.Discrete]:
    """Return the observation space and the action space of a single env.

    Args:
        form: `"dict"` or `"flat"`; see `observe`.
        max_tokens: L, the length of an observation in tokens.
        vocab_size: V, the number of actions.
    """
    shape, last = (max_tokens,), vocab_size - 1
    actions = spaces.Discrete(vocab_size)
    if form == "flat":
        return spaces.Box(PADDING, last, shape, np.int64), actions
    ids, mask = spaces.Box(0, last, shape, np.int64), spaces.Box(0, 1, shape, np.int8)
    return spaces.Dict({"input_ids": ids, "attention_mask": mask}), actions


def observe(form: str, ids: np.ndarray, lengths: np.ndarray) -> Any:
    """Return the observations of B rows, as new arrays.

    Args:
        form: `"dict"` for `input_ids` (B, L) int64 and `attention_mask` (B, L) int8; `"flat"` for token ids (B, L) int64
            with -1 as padding.
        ids: (B, L) int64 token ids, padded on the right.
        lengths: (B,) numbers of tokens without padding.
    """
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    if form == "flat":
        return np.where(mask, ids, PADDING)
    return {"input_ids": ids.copy(), "attention_mask": mask.astype(np.int8)}


def pick(observation: Any, index: Any) -> Any:
    """Return a copy of `observation[index]`, for either format.

    An int selects one row, a list selects several rows, and None adds a batch dimension of size 1.
    """
    if isinstance(observation, dict):
        return {key: pick(value, index) for key, value in observation.items()}
    return np.array(np.asarray(observation)[index])
