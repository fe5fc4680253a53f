"""Saving and loading an agent, on SB3's zip format."""

from __future__ import annotations

import os
import pathlib
from typing import Any, TypeVar

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from agents.policy import LanguagePolicy
from agents.rollout import clock_of
from agents.vec_env import rules_of_vec_env
from llm_env.prompts import PromptCursor
from llm_env.rules import Rules

SelfCheckpointed = TypeVar("SelfCheckpointed", bound="Checkpointed")


class Checkpointed(BaseAlgorithm):
    """What of an agent is written to a file, and how it comes back."""

    policy: LanguagePolicy
    np_random: np.random.Generator
    _generator: torch.Generator
    _policy_data: dict[str, Any]
    _random_states: dict[str, Any]
    _cursor: PromptCursor

    def _excluded_save_params(self) -> list[str]:
        live = ["_model", "_generator", "np_random", "_cursor", "_last_obs", "_last_episode_starts", "_tokenizer"]
        return [*super()._excluded_save_params(), *live]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []

    def save(self, path: Any, exclude: Any = None, include: Any = None) -> None:
        """Write the agent to one zip file: weights, optimizer, counts and random states, but not the env.

        A file is first written beside its name and then put in its place, so that a run cut off here leaves the old one.
        """
        carried = self._random_states
        self._policy_data = self.policy._get_constructor_parameters()
        self._random_states = self._capture_random_states()
        try:
            if not isinstance(path, (str, pathlib.Path)):
                return super().save(path, exclude, include)
            target = pathlib.Path(path)
            if target.suffix == "":
                target = target.with_name(f"{target.name}.zip")
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.partial")
            super().save(partial, exclude, include)
            os.replace(partial, target)
        finally:
            self._policy_data, self._random_states = {}, carried

    def _capture_random_states(self) -> dict[str, Any]:
        states = {
            **self._random_states,  # of an agent that was loaded and has no env yet
            "torch": (self.device.type, self._generator.get_state()),
            "numpy": self.np_random.bit_generator.state,
        }
        if self.env is not None:
            venv, kl = clock_of(self.env), rules_of_vec_env(self.env).kl
            states["env"] = None if venv is None else venv.state_dict()
            states["cursor"] = self._cursor.state_dict()
            states["kl_coef"] = None if kl is None else kl.value
        return states

    def _restore_generators(self) -> None:
        """Go on with the random numbers of a saved agent; on another kind of device, with others."""
        if not self._random_states:
            return
        kind, state = self._random_states["torch"]
        if kind == self.device.type:
            self._generator.set_state(state)
        self.np_random.bit_generator.state = self._random_states["numpy"]

    def _restore_prompts(self, env: VecEnv, rules: Rules) -> None:
        """Go on with the order of the prompts and the KL coefficient of a saved agent, where they fit the new env."""
        states, self._random_states = self._random_states, {}
        venv = clock_of(env)
        if venv is not None and states.get("env") is not None and venv.fits(states["env"]):
            env._reset_seeds()
            venv.load_state_dict(states["env"])
        if states.get("cursor") is not None and states["cursor"]["size"] == len(rules.prompts):
            self._cursor.load_state_dict(states["cursor"])
        if states.get("kl_coef") is not None and rules.kl is not None:
            rules.kl.value = states["kl_coef"]

    @classmethod
    def load(  # type: ignore[override]
        cls: type[SelfCheckpointed], path: Any, env: Any = None, device: torch.device | str = "auto", **kwargs: Any
    ) -> SelfCheckpointed:
        """Read an agent that `save` wrote, to use it or to go on training.

        Args:
            path: the zip file.
            env: the env to go on with; its order of prompts goes on where it was if it has as many prompts and rows.
            device: where to put it.
            kwargs: SB3's `custom_objects`, `print_system_info`, and attributes to replace.
        """
        agent = super().load(path, None, device, **kwargs)
        agent._policy_data = {}
        if env is not None:
            agent.set_env(env)
        return agent
