"""The Stable-Baselines3 face of the vector env, and how any env a user brings becomes a VecEnv."""

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
    """What the two SB3 faces of a vector env share; they differ in how a step is taken.

    What SB3's `Monitor` adds to the last info (`episode`: return `r`, length `l`, seconds `t`) is there too.

    Args:
        env: a `TextGenerationVectorEnv`, or Gymnasium's vector wrappers around one.

    Attributes:
        venv: the `TextGenerationVectorEnv` itself.
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
        """New episodes in all rows, with the seeds and options (`index`) set before."""
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
        """Take note of one token a row.

        Raises:
            ValueError: If there are more or fewer, or they are no whole numbers.
        """
        if isinstance(actions, np.ndarray) and actions.shape == (self.num_envs, 1):
            actions = actions[:, 0]
        self._actions = self.venv.checked_actions(actions)

    def _end_info(self, row: int, final: Any, length: int, truncated: bool) -> dict[str, Any]:
        """Return what SB3 and its `Monitor` add to the last info of an episode, whose return is then counted from 0 again."""
        seconds = round(time.monotonic() - self._started, 6)
        episode = {"r": float(self._returns[row]), "l": int(length), "t": seconds}
        self._returns[row] = 0
        return {"TimeLimit.truncated": bool(truncated), "terminal_observation": final, "episode": episode}

    def close(self) -> None:
        """Close the vector env."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return the vector env's attribute, once a row; None for `render_mode`."""
        value = self.render_mode if attr_name == "render_mode" else getattr(self.venv, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the vector env, which all rows share."""
        if len(list(self._get_indices(indices))) != self.num_envs:
            raise ValueError(f"all rows share {attr_name!r}: set it without indices")
        setattr(self.venv, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """Call a method of the vector env once a row; of `action_masks` and `set_action_logprob` each row has its own."""
        if method_name == "action_masks":
            masks = self.venv.action_masks()
            return [masks[i] for i in self._get_indices(indices)]
        if method_name == "set_action_logprob":
            for row in self._get_indices(indices):
                self.venv.set_action_logprob(row, args[0])
            return []
        return [getattr(self.venv, method_name)(*args, **kwargs) for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """True for `Monitor`, whose records this face keeps itself."""
        return [issubclass(wrapper_class, Monitor) for _ in self._get_indices(indices)]


class TextVecEnv(_TextVecEnvBase):
    """A `TextGenerationVectorEnv` as an SB3 VecEnv, on the token clock: rows begin anew in the step in which they end.

    Args:
        venv: the env; its `step_responses` stays the faster way through, and is what the agents of this package use. A single
            text env becomes a vector env of one row.

    Raises:
        TypeError: If it is neither, or has wrappers.
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
        """Append the tokens; rows that end are reset, their last observation in the info as `terminal_observation`."""
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
    """Gymnasium's vector wrappers around a `TextGenerationVectorEnv` as an SB3 VecEnv: every token goes through them.

    Args:
        env: the wrapped env, in the autoreset mode SAME_STEP, the one that SB3 has.

    Raises:
        ValueError: If it has another mode.
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
        """New episodes in all rows, with the seeds and options (`index`) set before."""
        self._lengths[:] = 0
        return super().reset()

    def step_wait(self) -> VecEnvStepReturn:
        """Take a step of the wrapped env.

        Raises:
            ValueError: If a wrapper ended an episode whose row it did not reset.
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
    """Return the VecEnv an agent works on.

    A text env without wrappers that change it becomes a `TextVecEnv` of `n_envs` rows. Any other (one with wrappers, or an
    SB3 VecEnv) is stepped token by token, as it is.

    Args:
        env: an id of Gymnasium, a `TextGenerationEnv` or a `TextGenerationVectorEnv` (wrapped or not), or an SB3 VecEnv.
        n_envs: rows of a `TextVecEnv` made here.

    Raises:
        TypeError: If it is no text env.
        ValueError: If it is a wrapped vector env whose autoreset mode is not SAME_STEP.
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
    """Make the VecEnv of a vector env that Gymnasium made of single text envs, such as `gym.make_vec` of an env's own id.

    Raises:
        TypeError: If its envs are no text envs, or are in other processes.
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
    """Return names of the wrappers, or of the subclass, by which an env may differ from its rules."""
    names = []
    while isinstance(env, (gym.Wrapper, gym.vector.VectorWrapper)):
        # A Monitor without a file only counts, and `TextVecEnv` counts the same.
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
        TypeError: If there are other envs in it.
    """
    try:
        rules = vec_env.get_attr("rules")[0]
    except AttributeError:
        rules = None
    if not isinstance(rules, Rules):
        raise TypeError(f"{vec_env!r} holds no text envs; make them with llm_env.TextGenerationEnv or gym.make('llm_env/...')")
    return rules


def vector_env_of(vec_env: VecEnv) -> TextGenerationVectorEnv | None:
    """Return the vector env to collect whole responses from; None where only the token clock honours all wrappers."""
    return vec_env.venv if isinstance(vec_env, TextVecEnv) else None


def unique_rules(env: VecEnv) -> list[Rules]:
    """Return the rules of all rows of an env, each once."""
    return list({id(rules): rules for rules in env.get_attr("rules")}.values())


def ids_and_mask(observation: Observation) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, and True where they are no padding, of an observation in either form, batched or not.

    Raises:
        ValueError: If it is not the observation of a text env.
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
    """Return the token ids of each row of a batched observation, without the padding.

    Raises:
        ValueError: If it is not the observation of a text env, or a row holds no token.
    """
    ids, mask = ids_and_mask(observation)
    rows = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    if not rows:
        raise ValueError("the observation has no rows")
    if not all(rows):
        raise ValueError(f"row {[bool(r) for r in rows].index(False)} of the observation holds no token (its mask is all 0)")
    return rows
