"""Checks of values that users give, where they enter: before any long work starts."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_env.arguments import as_int, check_int
from llm_env.lm.capabilities import vocabulary_of
from llm_env.lm.positions import check_length
from llm_env.rules import Rules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEDULES = ("clip_range", "clip_range_high", "clip_range_vf")  # may be callables of the remaining progress


def check_choice(name: str, value: Any, allowed: Collection[Any]) -> None:
    """Raise if a value is not one of those that are allowed.

    Raises:
        ValueError: If it is not.
    """
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
        *first, last = map(repr, allowed)
        raise ValueError(f"{name}={value!r} must be {', '.join(first)} or {last}")


def check_counts(**counts: int | None) -> None:
    """Raise if a value is neither None nor a whole number of at least 1."""
    for name, value in counts.items():
        if value is not None:
            check_int(name, value, 1)


def check_numbers(minimum: float = -np.inf, **numbers: Any) -> None:
    """Raise if a value is neither None nor a finite number >= minimum; of `SCHEDULES`, callables pass."""
    for name, value in numbers.items():
        if value is None or (callable(value) and name in SCHEDULES):
            continue
        if not isinstance(value, (int, float, np.number)) or not np.isfinite(value) or value < minimum:
            at_least = f" of at least {minimum:g}" if np.isfinite(minimum) else ""
            raise ValueError(f"{name}={value!r} must be a finite number{at_least}")


def check_switches(**switches: Any) -> None:
    """Raise if a value is neither True nor False."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be True or False")


def check_max_num_seqs(max_num_seqs: int | None, group_size: int) -> None:
    """Raise if fewer responses are sampled at a time than a group has."""
    if max_num_seqs is not None and max_num_seqs < group_size:
        raise ValueError(f"max_num_seqs={max_num_seqs} has no room for a group of {group_size}; set at least {group_size}")


def given_once(name: str, value: Any, again: Any) -> Any:
    """Return an argument's value; raise if it was given again by another argument."""
    if again is not None:
        raise ValueError(f"{name} was given twice: {value!r} and {again!r}; drop one of them")
    return value


def parse_learn_args(env_or_timesteps: Any, callback: Any, total_timesteps: Any, env: Any) -> tuple[Any, Any, int | None]:
    """Return env, callback and total_timesteps of a call of `learn`, in whichever place they were given.

    Raises:
        ValueError: If one was given twice, or total_timesteps is not a finite number of at least 0.
    """
    if as_int(env_or_timesteps) is not None or isinstance(env_or_timesteps, float):
        total_timesteps = given_once("total_timesteps", env_or_timesteps, total_timesteps)
    elif env_or_timesteps is not None:
        env = given_once("env", env_or_timesteps, env)
    if as_int(callback) is not None:  # learn(env, 10_000)
        callback, total_timesteps = None, given_once("total_timesteps", callback, total_timesteps)
    check_numbers(0.0, total_timesteps=total_timesteps)
    return env, callback, None if total_timesteps is None else int(total_timesteps)


def check_tokens(rows: Sequence[Sequence[int]], new: int, vocab_size: int, max_positions: int | None) -> None:
    """Raise if the model cannot read some contexts, or has no room for `new` more tokens after them.

    Raises:
        ValueError: If a row holds a number that is no token id, or is too long.
    """
    for i, row in enumerate(rows):
        if not 0 <= min(row) <= max(row) < vocab_size:
            bad = next(token for token in row if not 0 <= token < vocab_size)
            raise ValueError(f"token {bad} in row {i} is not a token id: the vocabulary is 0..{vocab_size - 1}")
    check_length(max_positions, max(map(len, rows)), new)


def checked_masks(action_masks: Any, shape: tuple[int, int]) -> np.ndarray:
    """Return action masks as bool, of `shape` (B, V); one of shape (V,) serves a single row.

    Raises:
        ValueError: If they have another shape, other values than 0 and 1, or a row allows nothing.
    """
    masks = np.atleast_2d(np.asarray(action_masks))
    if masks.shape != shape or not ((masks == 0) | (masks == 1)).all():
        raise ValueError(f"action_masks must be bool, of shape {shape}; got shape {masks.shape} of {masks.dtype}")
    masks = masks.astype(bool)
    if not masks.any(axis=1).all():
        raise ValueError(f"action_masks allows no token in row {masks.any(axis=1).argmin()}; at least one must be left")
    return masks


def checked_starts(episode_start: Any, rows: int) -> list[bool]:
    """Return whether an episode starts, for each of the rows.

    Raises:
        ValueError: If there are more or fewer entries than rows.
    """
    starts: list[bool] = np.atleast_1d(episode_start).astype(bool).tolist()
    if len(starts) != rows:
        raise ValueError(f"episode_start has {len(starts)} entries for {rows} observations; give one each")
    return starts


def check_groups(group_size: int, n_envs: int) -> None:
    """Raise if a rollout cannot be cut into whole groups."""
    if n_envs % group_size:
        raise ValueError(
            f"group_size={group_size} must divide n_envs={n_envs}; try n_envs={group_size * -(-n_envs // group_size)}"
        )


def check_processes(n_envs: int, group_size: int, processes: int) -> None:
    """Raise if a rollout has fewer groups than there are processes: some would have nothing to do.

    Raises:
        ValueError: If it has.
    """
    if n_envs // group_size < processes:
        raise ValueError(
            f"n_envs={n_envs} with group_size={group_size} is {n_envs // group_size} prompts a rollout, fewer than the "
            f"{processes} processes; raise n_envs to {processes * group_size} at least, or launch fewer"
        )


def episodes_per_rollout(n_envs: int | None, default: int, rows: int, by_response: bool) -> int:
    """Return the number of episodes in a rollout: `n_envs`, else the rows of a vector env, else the default.

    Raises:
        ValueError: If one whole response is taken of each of `rows` rows, and `n_envs` is another number.
    """
    count = rows if by_response or rows > 1 else default
    if n_envs in (None, count):
        return count
    if by_response:
        raise ValueError(f"n_envs={n_envs}, but the vector env has num_envs={rows}; leave n_envs out or make them equal")
    return n_envs


def check_budget(max_tokens_per_batch: int | None, rules: Rules) -> None:
    """Check that the longest episode of an env fits into the token budget of a forward pass.

    Raises:
        ValueError: If the longest prompt with a response of `max_new_tokens` has more tokens.
    """
    prompt, new = rules.longest_prompt, rules.max_episode_tokens
    if max_tokens_per_batch is not None and max_tokens_per_batch < prompt + new:
        raise ValueError(
            f"max_tokens_per_batch={max_tokens_per_batch} does not hold the longest prompt, of {prompt} tokens, and "
            f"{rules.length_argument}={new}; raise it to {prompt + new} at least, lower {rules.length_argument} or shorten the "
            "prompts"
        )


def check_process_supervision(rules: Rules) -> None:
    """Check that an env pays steps only.

    Raises:
        ValueError: If the KL is in the reward, which is paid at every token.
    """
    if rules.kl is not None:
        raise ValueError(
            f"supervision='process' normalizes the rewards of steps, but the env's kl_coef={rules.kl.value} pays every token; "
            "put the KL into the loss with the agent's kl_coef"
        )


def check_vocabulary(model: PreTrainedModel, vocab_size: int) -> None:
    """Check that the model has an embedding for every id of the tokenizer.

    Raises:
        ValueError: If the model's vocabulary is smaller than `vocab_size`.
    """
    size = vocabulary_of(model)
    if size < vocab_size:
        raise ValueError(
            f"the model's vocabulary has {size} tokens, fewer than the tokenizer's {vocab_size}; use the tokenizer that "
            f"belongs to the model, or call model.resize_token_embeddings({vocab_size}) first"
        )


def with_chat_templates_of(tokenizer: Any, other: Any) -> Any:
    """Return a tokenizer with the chat templates of another one, where that has some.

    Args:
        tokenizer: the policy's, or None, which takes the other one.
        other: the env's, by whose templates prompts are rendered.

    Returns:
        The tokenizer itself where nothing differs, and otherwise a copy. Named templates that the other lacks are kept.
    """
    if tokenizer is None or tokenizer is other:
        return other
    mine, theirs = getattr(tokenizer, "chat_template", None), getattr(other, "chat_template", None)
    if theirs is None or mine == theirs:
        return tokenizer
    if isinstance(mine, dict) or isinstance(theirs, dict):
        mine, theirs = ({"default": value} if isinstance(value, str) else value or {} for value in (mine, theirs))
        theirs = mine | theirs
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = theirs
    return tokenizer
