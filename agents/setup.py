"""Setting up an agent: its policy, optimizer, random generators and env."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv

from agents.checks import check_fit, default_learning_rate, episodes_of
from agents.drawing import Drawing
from agents.engines import check_engine
from agents.policy import LanguagePolicy
from agents.rollout import clock_of
from agents.vec_env import as_vec_env, rules_of_vec_env
from llm_env.prompts import PromptCursor
from llm_env.sharing import PrefixSharing


class SetUp(Drawing):
    """What happens before learning; the attributes are arguments of `LanguageAgent`."""

    needs_values = False
    separate_critic = False
    group_size = 1
    adam_epsilon = 1e-8
    n_epochs: int
    bf16: bool
    prefix_sharing: PrefixSharing
    max_num_seqs: int | None
    _model: Any
    _tokenizer: Any
    _wanted_n_envs: int | None
    _wanted_learning_rate: Any
    _window_is_rollout: bool
    _has_had_env: bool

    def _setup_model(self) -> None:
        """Build the policy (from what the user gave, or from a saved agent), its optimizer and the random generator."""
        settings = dict(self.policy_kwargs)
        optimizer_class = settings.pop("optimizer_class", torch.optim.AdamW)
        optimizer_kwargs = settings.pop("optimizer_kwargs", {})
        if optimizer_class is torch.optim.AdamW:
            optimizer_kwargs = {"weight_decay": 0.0, "eps": self.adam_epsilon, **optimizer_kwargs}
        if self._policy_data:
            self.policy = LanguagePolicy(**self._policy_data)
        elif isinstance(self._model, LanguagePolicy):
            self.policy = self._model
        else:
            self.policy = LanguagePolicy(self._model, self._tokenizer, **settings)
        if self.needs_values:
            self.policy.add_value_head(self.separate_critic)
        self.policy = self.policy.to(self.device)
        self.policy.train(False)
        self._hand_down()
        if self._wanted_learning_rate is None:
            self.learning_rate = self._wanted_learning_rate = default_learning_rate(self.policy, self.n_epochs)
        self._setup_lr_schedule()
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.policy.optimizer = optimizer_class(trained, lr=self.lr_schedule(1), **optimizer_kwargs)
        if not hasattr(self, "observation_space"):
            self.observation_space, self.action_space = self.policy.observation_space, self.policy.action_space
        self._generator = torch.Generator(device=self.device)
        self.np_random = np.random.default_rng(self.seed)
        if self.seed is None:
            self._generator.seed()
        else:
            self.set_random_seed(self.seed)
            self._generator.manual_seed(self.seed)
        self._restore_generators(self._position)

    def _attach(self, env: VecEnv) -> None:
        """Take an env for training, after checking that it and the model fit."""
        rules = rules_of_vec_env(env)
        n_envs = episodes_of(self._wanted_n_envs, self.n_envs, env.num_envs, by_response=clock_of(env) is not None)
        check_fit(self, rules, n_envs)  # type: ignore[arg-type]
        check_engine(self.engine, rules, by_response=clock_of(env) is not None)
        self.env, self.n_envs = env, n_envs
        self.observation_space, self.action_space = env.observation_space, env.action_space
        if self._window_is_rollout:
            self._stats_window_size = n_envs
        self.policy.vocab_size, self.policy.constraint = rules.vocab_size, rules.constraint
        if self.policy.tokenizer is None:
            self.policy.tokenizer = rules.tokenizer
        if rules.reference is not None:
            rules.reference.model.to(self.device)
        self._cursor = PromptCursor(len(rules.prompts), lambda: self.np_random)
        self._last_obs = None
        if self.seed is not None:
            env.seed(self.seed)
        self._restore_prompts(env, rules, self._position)
        self._restore_reference(rules)
        self._position = {}
        self._has_had_env = True
        self._hand_down()

    def _hand_down(self) -> None:
        """Let policy and reference compute as the agent's attributes say now."""
        for name in ("bf16", "prefix_sharing", "max_num_seqs"):
            setattr(self.policy, name, getattr(self, name))
        reference = None if self.env is None else rules_of_vec_env(self.env).reference
        for name in ("temperature", "bf16", "prefix_sharing", "max_tokens_per_batch"):
            if reference is not None:
                setattr(reference, name, getattr(self, name))

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Train on another env from here on; its spaces must be those of the last one (SB3's rule)."""
        vec_env = as_vec_env(env, self.n_envs)
        if self._has_had_env:
            check_for_correct_spaces(vec_env, self.observation_space, self.action_space)
        self._attach(vec_env)
