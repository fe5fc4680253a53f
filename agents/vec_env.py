"""The Stable-Baselines3 face of the vector env, and how any env a user brings becomes a VecEnv."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from llm_env import TextGenerationEnv, TextGenerationVectorEnv
from llm_env.rules import Rules

DEFAULT_N_ENVS = 64
TRANSPARENT_WRAPPERS = (OrderEnforcing, PassiveEnvChecker)


class TextVecEnv(VecEnv):
    """A `TextGenerationVectorEnv` as an SB3 VecEnv, on the token clock: rows begin anew in the step in which they end.

    What SB3's `Monitor` adds to the last info (`episode`: return `r`, length `l`, seconds `t`) is there too.

    Args:
        venv: the env; its `step_responses` stays the faster way through, and is what the agents of this package use.
    """

    def __init__(self, venv: TextGenerationVectorEnv) -> None:
        self.venv = venv
        self.render_mode = None
        super().__init__(venv.num_envs, venv.single_observation_space, venv.single_action_space)
        self._actions = np.zeros(venv.num_envs, dtype=np.int64)
        self._returns = np.zeros(venv.num_envs)
        self._started = time.monotonic()

    def reset(self) -> dict[str, np.ndarray]:
        """New episodes in all rows, with the seeds and options (`index`) set before."""
        seeds = self._seeds if any(seed is not None for seed in self._seeds) else None
        if unknown := {key for row in self._options for key in row} - {"index"}:
            raise ValueError(
                f"reset options {sorted(unknown)} are not known row by row; give 'index', or reset the vector env itself"
            )
        options = {"index": [row.get("index") for row in self._options]}
        observation, _ = self.venv.reset(seed=seeds, options=options)
        self._reset_seeds()
        self._reset_options()
        self._returns[:] = 0
        return observation

    def step_async(self, actions: np.ndarray) -> None:
        """Take note of one token a row."""
        self._actions = np.asarray(actions).reshape(self.num_envs).astype(np.int64)

    def step_wait(self) -> VecEnvStepReturn:
        """Append the tokens; rows that end are reset, their last observation in the info as `terminal_observation`."""
        episodes, rows = self.venv.episodes, np.arange(self.num_envs)
        outcome = episodes.advance(rows, self._actions[:, None], np.ones_like(rows))
        rewards = outcome.rewards[:, 0].astype(np.float32)
        self._returns += rewards
        dones = outcome.terminated | outcome.truncated
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False, **outcome.infos.get(row, {})} for row in rows.tolist()]
        if dones.any():
            final = episodes.observation()
            for row in np.flatnonzero(dones):
                infos[row].update(
                    {
                        "TimeLimit.truncated": bool(outcome.truncated[row]),
                        "terminal_observation": {key: value[row].copy() for key, value in final.items()},
                        "episode": self.episode_info(self._returns[row], int(episodes.response_lengths[row])),
                    }
                )
            self._returns[dones] = 0
            self.venv.restart_rows(np.flatnonzero(dones))
        return episodes.observation(), rewards, dones, infos

    def episode_info(self, episode_return: float, length: int) -> dict[str, float]:
        """What SB3's `Monitor` writes at the end of an episode."""
        return {"r": float(episode_return), "l": length, "t": round(time.monotonic() - self._started, 6)}

    def close(self) -> None:
        """Close the vector env."""
        self.venv.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The vector env's attribute, once a row; None for `render_mode`."""
        value = self.render_mode if attr_name == "render_mode" else getattr(self.venv, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the vector env, which all rows share."""
        if len(list(self._get_indices(indices))) != self.num_envs:
            raise ValueError(f"all rows share {attr_name!r}: set it without indices")
        setattr(self.venv, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """Call a method of the vector env once a row; of `action_masks` each row gets its own."""
        if method_name == "action_masks":
            masks = self.venv.action_masks()
            return [masks[i] for i in self._get_indices(indices)]
        return [getattr(self.venv, method_name)(*args, **kwargs) for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """True for `Monitor`, whose records this face keeps itself."""
        return [issubclass(wrapper_class, Monitor) for _ in self._get_indices(indices)]


def as_vec_env(env: Any, n_envs: int) -> VecEnv:
    """The VecEnv an agent works on.

    A text env without wrappers that change it becomes a `TextVecEnv` of `n_envs` rows. Any other (one with wrappers, or an
    SB3 VecEnv) is stepped token by token, as it is.

    Args:
        env: an id of Gymnasium, a `TextGenerationEnv` (wrapped or not), a `TextGenerationVectorEnv` or an SB3 VecEnv.
        n_envs: rows of a `TextVecEnv` made here.

    Raises:
        TypeError: it is no text env.
    """
    if isinstance(env, str):
        env = gym.make(env)
    if isinstance(env, VecEnv):
        if not isinstance(env, TextVecEnv):
            _warn_of_token_clock(type(env).__name__)
        return env
    if isinstance(env, TextGenerationVectorEnv):
        return TextVecEnv(env)
    if isinstance(env, gym.vector.VectorEnv):
        raise TypeError(
            f"{env!r} is a wrapped or foreign vector env; give the TextGenerationVectorEnv itself, or wrap the single env"
        )
    if not isinstance(env, gym.Env) or not isinstance(env.unwrapped, TextGenerationEnv):
        raise TypeError(f"{env!r} is no text env; make one with llm_env.TextGenerationEnv or gym.make('llm_env/...')")
    if wrappers := _wrappers_that_matter(env):
        _warn_of_token_clock(", ".join(wrappers))
        return DummyVecEnv([lambda: env if is_wrapped(env, Monitor) else Monitor(env)])
    return TextVecEnv(env.unwrapped.vectorize(n_envs))


def _warn_of_token_clock(cause: str) -> None:
    warnings.warn(
        f"the env is stepped token by token to honour {cause}; without it whole responses would be taken, which is faster",
        stacklevel=4,
    )


def _wrappers_that_matter(env: gym.Env) -> list[str]:
    """Names of the wrappers, or of the subclass, by which an env may differ from its rules."""
    names = []
    while isinstance(env, gym.Wrapper):
        # A Monitor without a file only counts, and `TextVecEnv` counts the same.
        if not isinstance(env, TRANSPARENT_WRAPPERS) and not (isinstance(env, Monitor) and env.results_writer is None):
            names.append(type(env).__name__)
        env = env.env
    own = (TextGenerationEnv.step, TextGenerationEnv.reset)
    if (type(env).step, type(env).reset) != own:
        names.append(type(env).__name__)
    return names


def rules_of_vec_env(vec_env: VecEnv) -> Rules:
    """The rules of the text envs in a VecEnv.

    Raises:
        TypeError: there are other envs in it.
    """
    try:
        rules = vec_env.get_attr("rules")[0]
    except AttributeError:
        rules = None
    if not isinstance(rules, Rules):
        raise TypeError(f"{vec_env!r} holds no text envs; make them with llm_env.TextGenerationEnv or gym.make('llm_env/...')")
    return rules


def rows_of(observation: dict[str, np.ndarray]) -> list[list[int]]:
    """The token ids of each row of a batched observation, without the padding.

    Raises:
        ValueError: it is not the observation of a text env, or a row holds no token.
    """
    try:
        ids, mask = np.asarray(observation["input_ids"]), np.asarray(observation["attention_mask"])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            "an observation must be a dict with 'input_ids' and 'attention_mask', as the text envs give it"
        ) from error
    rows = [row[keep.astype(bool)].tolist() for row, keep in zip(ids, mask, strict=True)]
    if not all(rows):
        raise ValueError(f"row {[bool(r) for r in rows].index(False)} of the observation holds no token (its mask is all 0)")
    return rows


def prompt_rows(observation: dict[str, np.ndarray], rows: Sequence[int]) -> list[list[int]]:
    """The token ids of some rows of a batched observation."""
    return rows_of({key: value[list(rows)] for key, value in observation.items()})
