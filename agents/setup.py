"""Setting up an agent: its policy, optimizer, random generators and env."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv

from agents.checks import (
    agree_on_ends,
    check_fit,
    check_processes,
    check_reference,
    check_sharding,
    check_trainable,
    default_learning_rate,
    episodes_of,
)
from agents.drawing import Drawing
from agents.engines import check_engine
from agents.optimizers import make_optimizer
from agents.policy import LanguagePolicy, check_auxiliary_loss
from agents.recomputing import check_recomputing
from agents.rollout import clock_of
from agents.sharded import begin, is_sharded, wholeness
from agents.vec_env import all_rules, as_vec_env, rules_of_vec_env
from llm_env.lm.scoring import try_out
from llm_env.lm.sharing import PrefixSharing
from llm_env.prompts import PromptCursor
from llm_env.reference import BaseReference
from llm_env.rules import Rules


class SetUp(Drawing):
    """What happens before learning; the attributes are arguments of `LanguageAgent`."""

    needs_values = False
    separate_critic = False
    group_size = 1
    adam_epsilon = 1e-8
    n_epochs: int
    batch_size: int | None
    micro_batch_size: int | None
    bf16: bool
    gradient_checkpointing: bool
    optimizer: str
    offload_optimizer: bool
    offload_reference: bool
    prefix_sharing: PrefixSharing
    max_num_seqs: int | None
    _model: Any
    _tokenizer: Any
    _peft_config: Any
    _wanted_n_envs: int | None
    _wanted_learning_rate: Any
    _window_is_rollout: bool
    _has_had_env: bool

    def _setup_model(self) -> None:
        """Build the policy (from what the user gave, or from a saved agent), its optimizer and the random generator."""
        settings = {key: value for key, value in self.policy_kwargs.items() if not key.startswith("optimizer_")}
        self.policy = self._made_policy(settings)
        check_trainable(self.policy)
        if self.needs_values:
            self.policy.add_value_head(self.separate_critic)
        check_recomputing(self.policy.lm, self.gradient_checkpointing)
        self.policy = self.policy.to(self.device)
        if self.policy.adapter is not None:
            self.policy.adapter.base.to(self.device)  # what it does not have in common with the policy: buffers
        self.policy.train(False)
        offloads = {"offload_optimizer": self.offload_optimizer, "offload_reference": self.offload_reference}
        quantized = self.policy.adapter is not None and self.policy.adapter.quantized
        check_sharding(self.world.sharded, self.optimizer, quantized, **offloads)
        self._hand_down()
        self._share_policy()
        if self._wanted_learning_rate is None:
            self.learning_rate = self._wanted_learning_rate = default_learning_rate(self.policy, self.n_epochs)
        self._setup_lr_schedule()
        trained = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        self.policy.optimized = frozenset(trained)
        self.policy.optimizer = make_optimizer(
            self.optimizer,
            self.offload_optimizer,
            self.policy_kwargs,
            list(trained.values()),
            lr=self.lr_schedule(1),
            eps=self.adam_epsilon,
        )
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

    def _made_policy(self, settings: dict[str, Any]) -> LanguagePolicy:
        if self.seed is not None:
            torch.manual_seed(self.seed)  # an adapter's weights are drawn
        if self._policy_data:
            base = None if self._model is LanguagePolicy else self._model  # of an adapter, where `load` was given one
            return LanguagePolicy(**self._policy_data, base=base)
        if not isinstance(self._model, LanguagePolicy):
            return LanguagePolicy(self._model, self._tokenizer, peft_config=self._peft_config, **settings)
        if self._peft_config is not None:
            raise ValueError("policy is a LanguagePolicy, which is made already; give it the peft_config")
        return self._model

    def _attach(self, env: VecEnv) -> None:
        """Take an env for training, after checking that it and the model fit."""
        rules = rules_of_vec_env(env)
        n_envs = episodes_of(self._wanted_n_envs, self.n_envs, env.num_envs, by_response=clock_of(env) is not None)
        check_fit(self, rules, n_envs)  # type: ignore[arg-type]
        check_processes(n_envs, self.group_size, self.world.size)
        check_engine(self.engine, rules, by_response=clock_of(env) is not None, sharded=self.world.sharded)
        self.env, self.n_envs = env, n_envs
        self.observation_space, self.action_space = env.observation_space, env.action_space
        if self._window_is_rollout:
            self._stats_window_size = n_envs
        agree_on_ends(self.policy, env)
        self.policy.take_over(rules)
        self._hand_down()
        self._share_env(rules)
        self._cursor = PromptCursor(len(rules.prompts), lambda: self.np_random)
        self._last_obs = None
        if self.seed is not None:
            env.seed(self.seed)
        self._restore_prompts(env, rules, self._position)
        self._restore_reference(rules)
        self._position = {}
        self._has_had_env = True

    def _share_policy(self) -> None:
        """Let all processes begin with the main one's weights, spread over them where the launcher says so; one alone logs."""
        world, policy = self.world, self.policy
        if not world.main:
            self.verbose, self.tensorboard_log = 0, None
        if is_sharded(policy):
            return

        def try_out_all() -> None:
            for model in (policy.lm, policy.critic):
                if model is not None:
                    try_out(model)

        def run() -> None:
            try_out_all()
            policy._evaluate([[0]], [[0]], None, 1.0)

        world.spread(policy)
        try_out_all()
        if world.sharded and policy.adapter is not None:
            _ = policy.adapter.base_hash  # which files have, of the base as it is now
        if world.sharded and policy.critic is not None:
            # What is frozen it has in common with the policy, and each is spread by itself.
            policy.critic = copy.deepcopy(policy.critic)
        begin(world, policy, run, "_evaluate", None if policy.adapter is None else policy.adapter.base)

    def _share_env(self, rules: Rules) -> None:
        """The same for the reference; and every process but the main one records episodes to a file of its own."""
        world, reference = self.world, rules.reference
        if reference is not None and not isinstance(reference, BaseReference):  # which is the policy's
            model = reference.model

            def run() -> None:
                try_out(model)
                model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device))

            if not is_sharded(model):
                world.spread(model)
                begin(world, model, run, "forward")
        rules.record_apart(world.rank)

    def _hand_down(self) -> None:
        """Let policy and reference compute as the agent's attributes say now."""
        check_auxiliary_loss(self.policy.lm)  # a flag of the config, which may have been set since
        for name in ("bf16", "gradient_checkpointing", "prefix_sharing", "max_num_seqs"):
            setattr(self.policy, name, getattr(self, name))
        if self.env is not None and self.policy.adapter is not None:
            for rules in all_rules(self.env):
                if isinstance(rules.reference, BaseReference):
                    rules.reference.bind(self.policy.base, wholeness(self.policy))
                    rules.reference.batch_size = self.micro_batch_size or self.batch_size or self.n_envs  # as in the update
        reference = None if self.env is None else rules_of_vec_env(self.env).reference
        if reference is not None:
            check_reference(reference, self.policy, self.offload_reference)
            reference.place(self.device, self.offload_reference)
        for name in ("temperature", "bf16", "prefix_sharing", "max_tokens_per_batch"):
            if reference is not None:
                setattr(reference, name, getattr(self, name))

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Train on another env from here on; its spaces must be those of the last one (SB3's rule)."""
        vec_env = as_vec_env(env, self.n_envs)
        if self._has_had_env:
            check_for_correct_spaces(vec_env, self.observation_space, self.action_space)
        self._attach(vec_env)
