"""Constrained tokens: the same restriction for action masks, sampling, training and the reference."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

logger = logging.getLogger("llm_env")

AllowedTokens = Callable[[list[int], list[int]], Any]


class TokenConstraint:
    """The tokens that may come next, as a function of the context and the turn so far.

    Args:
        allowed: token ids or a (V,) bool array, for every state; or a function `f(context_ids, turn_ids)` that returns one of
            the two. The context is the prompt, and with a text env all earlier turns and observations. The function must
            depend on its arguments only, because it is called again in training. End tokens are allowed only if they are
            among the allowed tokens. None allows all tokens.
        min_new_tokens: no end token is allowed among the first `min_new_tokens` tokens of a turn. Stop strings still end it.
        vocab_size: V.
        eos_ids: the end tokens, as ints; a single one may be an int.

    Raises:
        ValueError, TypeError: If `allowed` has no token, or something that is not a token id.
    """

    def __init__(self, allowed: Any, min_new_tokens: int, vocab_size: int, eos_ids: int | Collection[int]) -> None:
        self._function: AllowedTokens | None = allowed if callable(allowed) else None
        self._vocab_size = vocab_size
        self._eos_ids = [eos_ids] if isinstance(eos_ids, int) else sorted(eos_ids)
        self._min_new_tokens = min_new_tokens
        everything = np.ones(vocab_size, dtype=bool)
        self._always = everything if allowed is None or callable(allowed) else self._as_mask(allowed)
        self._kinds = np.stack([self._always, self._always])  # after and before min_new_tokens
        self._kinds[1, self._eos_ids] = False
        if not self._always[self._eos_ids].any():
            names = ", ".join(map(str, self._eos_ids))
            logger.warning("allowed_tokens does not have the end token %s: only a stop string or the limit ends a turn", names)
        if min_new_tokens and not self._kinds[1].any():
            raise ValueError(
                f"min_new_tokens={min_new_tokens} forbids the end token, and allowed_tokens leaves no other; allow more tokens"
            )

    @property
    def fixed(self) -> tuple[np.ndarray, int] | None:
        """The allowed tokens, (V,) bool, and the minimum length; None if `allowed` is a function."""
        return None if self._function is not None else (self._always, self._min_new_tokens)

    def next(self, prompt: Sequence[int], response: Sequence[int]) -> np.ndarray:
        """Return the tokens that may follow `response`, (V,) bool.

        Raises:
            ValueError: If no token is allowed.
        """
        return self.along(prompt, [*response, self._eos_ids[0]], len(response))[0]

    def masks(self, states: Sequence[tuple[Sequence[int], Sequence[int]]]) -> np.ndarray:
        """Return `next` of B states (prompt, response so far): (B, V) bool, or (1, V) if it is the same for all."""
        if self._function is not None:
            return np.stack([self.next(*state) for state in states])
        held_back = np.array([len(response) < self._min_new_tokens for _, response in states], dtype=int)
        return self._kinds[held_back[:1] if (held_back == held_back[0]).all() else held_back]

    def along(self, prompt: Sequence[int], response: Sequence[int], begin: int = 0) -> np.ndarray:
        """Return the tokens that were allowed in place of each of the n tokens `response[begin:]`, (n, V) bool. Read-only."""
        if self._function is None:
            masks = np.broadcast_to(self._always, (len(response) - begin, self._vocab_size))
        else:
            states = [(list(prompt), list(response[:t])) for t in range(begin, len(response))]
            rows = [self._as_mask(self._function(*state), *state) for state in states]
            masks = np.stack(rows) if rows else np.ones((0, self._vocab_size), dtype=bool)
        early = self._min_new_tokens - begin
        if early > 0:
            masks = masks.copy()
            masks[:early, self._eos_ids] = False
            if self._function is not None and not masks.any(axis=1).all():
                raise ValueError(
                    f"allowed_tokens leaves only the end token after {begin + int(masks.any(axis=1).argmin())} tokens, but "
                    f"min_new_tokens={self._min_new_tokens} forbids it there"
                )
        return masks

    def along_turns(
        self, prompt: Sequence[int], response: Sequence[int], turn_ids: Sequence[int] | np.ndarray, begin: int = 0
    ) -> np.ndarray:
        """Return the allowed tokens for each action of an episode of several turns, from token `begin` on.

        Args:
            prompt: token ids.
            response: token ids of turns and observations.
            turn_ids: the turn of each token, -1 for tokens that the env wrote.
            begin: first token of `response` to return.

        Returns:
            (n, V) bool, n the number of action tokens from `begin` on. Read-only.
        """
        turns, masks = np.asarray(turn_ids), []
        for turn in np.unique(turns[turns >= 0]):
            first, last = np.flatnonzero(turns == turn)[[0, -1]].tolist()
            if last >= begin:
                context = [*prompt, *response[:first]]
                masks.append(self.along(context, response[first : last + 1], max(0, begin - first)))
        return masks[0] if len(masks) == 1 else np.concatenate([np.ones((0, self._vocab_size), dtype=bool), *masks])

    def _as_mask(self, allowed: Any, *state: list[int]) -> np.ndarray:
        try:
            return self._checked(allowed)
        except (ValueError, TypeError) as error:
            raise type(error)(f"allowed_tokens{state or ''} {error}") from None

    def _checked(self, allowed: Any) -> np.ndarray:
        found = np.asarray(allowed if isinstance(allowed, np.ndarray) else list(allowed))
        if found.dtype == bool:
            if found.shape != (self._vocab_size,):
                raise ValueError(f"is a bool array of shape {found.shape}; its shape must be ({self._vocab_size},)")
            mask = found
        elif found.ndim != 1 or (len(found) and not np.issubdtype(found.dtype, np.integer)):
            raise TypeError(f"must give token ids or a bool array; got {str(allowed)[:200]}")
        else:
            if len(found) and not 0 <= found.min() <= found.max() < self._vocab_size:
                outside = found[(found < 0) | (found >= self._vocab_size)][0]
                raise ValueError(f"holds {outside}, which is no token id: the vocabulary is 0..{self._vocab_size - 1}")
            mask = np.zeros(self._vocab_size, dtype=bool)
            mask[found.astype(np.int64)] = True
        if not mask.any():
            raise ValueError("allows no token; at least one must be left")
        return mask
