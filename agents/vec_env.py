"""Convert text envs to Stable-Baselines3 VecEnvs."""

from __future__ import annotations

import time
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker
from gymnasium.wrappers.vector import DictInfoToList
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from llm_env import TextGenerationEnv, TextGenerationVectorEnv
from llm_env.observations import PADDING, Observation, pick
from llm_env.rules import Rules
from llm_env.warn import warn

DEFAULT_N_ENVS = 64
TRANSPARENT_WRAPPERS = (OrderEnforcing, PassiveEnvChecker)


class _TextVecEnvBase(VecEnv):
    """Base class of the SB3 VecEnvs of text envs; subclasses implement `step_wait`.

    The last info of an episode has the entry of SB3's `Monitor` (`episode`: return `r`, length `l`, seconds `t`).

    Args:
        env: a `TextGenerationVectorEnv`, or Gymnasium's vector wrappers around one.

    Attributes:
        venv: the `TextGenerationVectorEnv` without wrappers.
    """

    venv: TextGenerationVectorEnv

    def __init__(self, env: gym.vector.VectorEnv) -> None:
        self.env = env
        self.venv = env.unwrapped  # type: ignore[assignment]
        self.render_mode = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self._actions = np.zeros(env.num_envs, dtype=np.int64)
        self._returns = np.zeros(env.num_envs)
        self._started = time.monotonic()

    def reset(self) -> Any:
        """Start episodes in all rows, with the seeds and options (`index`) set before."""
        seeds = self._seeds if any(seed is not None for seed in self._seeds) else None
        if unknown := {key for row in self._options for key in row} - {"index"}:
            raise ValueError(
                f"reset options {sorted(unknown)} are not known row by row; give 'index', or reset the vector env itself"
            )
        options = {"index": [row.get("index") for row in self._options]}
        observation, _ = self.env.reset(seed=seeds, options=options)  # type: ignore[arg-type]
        self._reset_seeds()
        self._reset_options()
        self._returns[:] = 0
        return observation

    def step_async(self, actions: np.ndarray) -> None:
        """Store the actions for `step_wait`, one token per row.

        Raises:
            ValueError: If `actions` is not one integer per row.
        """
        if isinstance(actions, np.ndarray) and actions.shape == (self.num_envs, 1):
            actions = actions[:, 0]
        self._actions = self.venv.checked_actions(actions)

    def _end_info(self, row: int, final: Any, length: int, truncated: bool) -> dict[str, Any]:
        """Return the entries that SB3 and `Monitor` add to the last info of an episode.

        The return of the row is reset to 0.
        """
        seconds = round(time.monotonic() - self._started, 6)
        episode = {"r": float(self._returns[row]), "l": int(length), "t": seconds}
        self._returns[row] = 0
        return {"TimeLimit.truncated": bool(truncated), "terminal_observation": final, "episode": episode}

    def close(self) -> None:
        """Close the vector env."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute of the vector env, once per row; None for `render_mode`."""
        value = self.render_mode if attr_name == "render_mode" else getattr(self.venv, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the vector env, which all rows share.

        Raises:
            ValueError: If `indices` does not select all rows.
        """
        if len(list(self._get_indices(indices))) != self.num_envs:
            raise ValueError(f"all rows share {attr_name!r}: set it without indices")
        setattr(self.venv, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """Call a method of the vector env, once per row.

        `action_masks` and `set_action_logprob` apply to single rows; other methods apply to the whole vector env.
        """
        if method_name == "action_masks":
            masks = self.venv.action_masks()
            return [masks[i] for i in self._get_indices(indices)]
        if method_name == "set_action_logprob":
            for row in self._get_indices(indices):
                self.venv.set_action_logprob(row, args[0])
            return []
        return [getattr(self.venv, method_name)(*args, **kwargs) for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Return True for `Monitor`, because this VecEnv adds the entries of `Monitor`."""
        return [issubclass(wrapper_class, Monitor) for _ in self._get_indices(indices)]


class TextVecEnv(_TextVecEnvBase):
    """SB3 VecEnv around a `TextGenerationVectorEnv`, stepped token by token.

    A row is reset in the step in which its episode ends. The agents of this package call `step_responses` of the vector env
    instead, which is faster.

    Args:
        venv: the vector env. A single text env becomes a vector env with one row.

    Raises:
        TypeError: If `venv` is neither of these, or has wrappers that change the env.
    """

    def __init__(self, venv: TextGenerationVectorEnv | gym.Env) -> None:
        if isinstance(venv, gym.Env) and isinstance(venv.unwrapped, TextGenerationEnv) and not _wrappers_that_matter(venv):
            venv = venv.unwrapped.vectorize(1)
        if not isinstance(venv, TextGenerationVectorEnv):
            raise TypeError(
                f"TextVecEnv takes a TextGenerationVectorEnv or a TextGenerationEnv without wrappers, not {venv!r}; for one "
                "with wrappers use stable_baselines3.common.vec_env.DummyVecEnv"
            )
        super().__init__(venv)

    def step_wait(self) -> VecEnvStepReturn:
        """Append the tokens and reset the rows whose episode ended.

        The last observation of an episode is `terminal_observation` in its info.
        """
        episodes, rows = self.venv.episodes, np.arange(self.num_envs)
        outcome = self.venv.advance_tokens(rows, self._actions)
        rewards = outcome.rewards[:, 0].astype(np.float32)
        self._returns += rewards
        dones = outcome.terminated | outcome.truncated
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False, **outcome.infos.get(row, {})} for row in rows.tolist()]
        if dones.any():
            final, ended = episodes.observation(), np.flatnonzero(dones)
            for row in ended.tolist():
                length, truncated = episodes.num_actions[row], outcome.truncated[row]
                infos[row].update(self._end_info(row, pick(final, row), length, truncated))
            self.venv.restart_rows(ended)
        return episodes.observation(), rewards, dones, infos


class WrappedTextVecEnv(_TextVecEnvBase):
    """SB3 VecEnv around a `TextGenerationVectorEnv` with Gymnasium's vector wrappers.

    Every step goes through the wrappers, token by token.

    Args:
        env: the wrapped env. Its autoreset mode must be SAME_STEP, as in SB3.

    Raises:
        ValueError: If the autoreset mode is not SAME_STEP.
    """

    def __init__(self, env: gym.vector.VectorEnv) -> None:
        mode = env.metadata["autoreset_mode"]
        if mode is not AutoresetMode.SAME_STEP:
            raise ValueError(
                f"{env!r} has autoreset_mode={mode}, but SB3 takes the first observation of the next episode in the step that "
                "ends one; make the TextGenerationVectorEnv with autoreset_mode=AutoresetMode.SAME_STEP"
            )
        super().__init__(env if isinstance(env, DictInfoToList) else DictInfoToList(env))
        self._lengths = np.zeros(env.num_envs, dtype=np.int64)

    def reset(self) -> Any:
        """Start episodes in all rows, with the seeds and options (`index`) set before."""
        self._lengths[:] = 0
        return super().reset()

    def step_wait(self) -> VecEnvStepReturn:
        """Step the wrapped env.

        Raises:
            ValueError: If a wrapper ended an episode but did not reset its row.
        """
        observation, paid, terminated, truncated, listed = self.env.step(self._actions)
        rewards, dones = np.asarray(paid, dtype=np.float32), terminated | truncated
        infos: list[Any] = list(listed)
        self._returns += rewards
        self._lengths += 1
        for row, info in enumerate(infos):
            final, last = info.pop("final_obs", None), info.pop("final_info", {})
            info.update({"TimeLimit.truncated": False, **last})
            info.update({key: number.item() for key, number in info.items() if isinstance(number, np.generic)})
            if not dones[row]:
                continue
            if final is None:
                raise ValueError(
                    f"a wrapper ended the episode in row {row}, but the row was not reset and gave no final_obs; wrap the "
                    "single env instead, for instance with gymnasium.wrappers.TimeLimit"
                )
            only_truncated = truncated[row] and not terminated[row]
            info.update(self._end_info(row, final, self._lengths[row], only_truncated))
        self._lengths[dones] = 0
        return observation, rewards, dones, infos


def as_vec_env(env: Any, n_envs: int) -> VecEnv:
    """Convert an env to the VecEnv that an agent trains on.

    A single text env becomes a `TextVecEnv` with `n_envs` rows, unless it has wrappers that change it. A vector env keeps its
    number of rows. An env with wrappers, or another SB3 VecEnv, is stepped token by token.

    Args:
        env: a Gymnasium id, a `TextGenerationEnv` or `TextGenerationVectorEnv` (with or without wrappers), or an SB3 VecEnv.
        n_envs: number of rows for a single env without wrappers.

    Raises:
        TypeError: If `env` is not a text env.
        ValueError: If `env` is a wrapped vector env whose autoreset mode is not SAME_STEP.
    """
    if isinstance(env, str):
        env = gym.make(env)
    if isinstance(env, VecEnv):
        if not isinstance(env, TextVecEnv):
            _warn_of_token_clock(type(env).__name__)
        return env
    if isinstance(env, gym.vector.VectorEnv):
        if not isinstance(env.unwrapped, TextGenerationVectorEnv):
            return _from_single_envs(env)
        if wrappers := _wrappers_that_matter(env):
            _warn_of_token_clock(", ".join(wrappers))
            return WrappedTextVecEnv(env)
        return TextVecEnv(env.unwrapped)
    if not isinstance(env, gym.Env) or not isinstance(env.unwrapped, TextGenerationEnv):
        raise TypeError(f"{env!r} is no text env; make one with llm_env.TextGenerationEnv or gym.make('llm_env/...')")
    if wrappers := _wrappers_that_matter(env):
        _warn_of_token_clock(", ".join(wrappers))
        return DummyVecEnv([lambda: env if is_wrapped(env, Monitor) else Monitor(env)])
    return TextVecEnv(env.unwrapped.vectorize(n_envs))


def _from_single_envs(env: gym.vector.VectorEnv) -> VecEnv:
    """Convert a Gymnasium vector env of single text envs to a VecEnv.

    `gym.make_vec` makes such a vector env for an id without a vector entry point.

    Raises:
        TypeError: If its envs are not text envs, have wrappers that change them, or run in other processes.
    """
    envs = getattr(env.unwrapped, "envs", ())
    if not envs or not all(isinstance(single.unwrapped, TextGenerationEnv) for single in envs):
        raise TypeError(
            f"{env!r} is a vector env that holds no text envs in this process; make the native one with "
            "TextGenerationEnv(...).vectorize(n), or register the id with "
            "vector_entry_point=lambda num_envs, **kwargs: make(**kwargs).vectorize(num_envs)"
        )
    whole = [type(env).__name__] if isinstance(env, gym.vector.VectorWrapper) else []
    if wrappers := [*whole, *(name for single in envs for name in _wrappers_that_matter(single))]:
        raise TypeError(
            f"{env!r} has the wrappers {', '.join(sorted(set(wrappers)))}, whose effect on a whole vector env is not known; "
            "give the single env with its wrappers, and n_envs"
        )
    return TextVecEnv(envs[0].unwrapped.vectorize(env.num_envs))


def _warn_of_token_clock(cause: str) -> None:
    warn(f"the env is stepped token by token to honour {cause}; without it whole responses would be taken, which is faster")


def _wrappers_that_matter(env: Any) -> list[str]:
    """Return the names of wrappers and subclasses that may change an env's behavior."""
    names = []
    while isinstance(env, (gym.Wrapper, gym.vector.VectorWrapper)):
        # A Monitor without a file only adds infos, and `TextVecEnv` adds the same ones.
        if not isinstance(env, TRANSPARENT_WRAPPERS) and not (isinstance(env, Monitor) and env.results_writer is None):
            names.append(type(env).__name__)
        env = env.env
    base = TextGenerationEnv if isinstance(env, TextGenerationEnv) else TextGenerationVectorEnv
    if (type(env).step, type(env).reset) != (base.step, base.reset):
        names.append(type(env).__name__)
    return names


def rules_of_vec_env(vec_env: VecEnv) -> Rules:
    """Return the rules of the text envs in a VecEnv.

    Raises:
        TypeError: If the VecEnv has no text envs.
    """
    try:
        rules = vec_env.get_attr("rules")[0]
    except AttributeError:
        rules = None
    if not isinstance(rules, Rules):
        raise TypeError(f"{vec_env!r} holds no text envs; make them with llm_env.TextGenerationEnv or gym.make('llm_env/...')")
    return rules


def vector_env_of(vec_env: VecEnv) -> TextGenerationVectorEnv | None:
    """Return the vector env that takes whole responses, or None.

    None means that the env must be stepped token by token, because of wrappers or because it is another SB3 VecEnv.
    """
    return vec_env.venv if isinstance(vec_env, TextVecEnv) else None


def unique_rules(env: VecEnv) -> list[Rules]:
    """Return the distinct rules objects of all rows of an env."""
    return list({id(rules): rules for rules in env.get_attr("rules")}.values())


def ids_and_mask(observation: Observation) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids and attention mask of an observation.

    Args:
        observation: an observation in dict or flat format, batched or not.

    Returns:
        Token ids, (L,) or (B, L), and a bool mask of the same shape, False at padding.

    Raises:
        ValueError: If `observation` is not an observation of a text env.
    """
    if isinstance(observation, dict) and {"input_ids", "attention_mask"} <= observation.keys():
        ids, mask = np.asarray(observation["input_ids"]), np.asarray(observation["attention_mask"])
        fits = ids.shape == mask.shape and ((mask == 0) | (mask == 1)).all()
    else:
        ids = np.empty(0) if isinstance(observation, dict) else np.asarray(observation)
        mask, fits = ids != PADDING, True
    if fits and ids.ndim in (1, 2) and np.issubdtype(ids.dtype, np.integer):
        return ids, mask.astype(bool)
    raise ValueError(
        "an observation must be a dict with 'input_ids' (integers) and 'attention_mask' (0 or 1) of one shape, (L,) or (B, L), "
        "or an integer array with -1 for padding, as the text envs give it"
    )


def rows_of(observation: Observation) -> list[list[int]]:
    """Return the token ids of each row of a batched observation, without padding.

    Raises:
        ValueError: If `observation` is not an observation of a text env, or a row has no tokens.
    """
    ids, mask = ids_and_mask(observation)
    rows = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    if not rows:
        raise ValueError("the observation has no rows")
    if not all(rows):
        raise ValueError(f"row {[bool(r) for r in rows].index(False)} of the observation holds no token (its mask is all 0)")
    return rows
