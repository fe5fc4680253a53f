"""Measure CPU seconds and peak memory of one update, with and without a critic."""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import torch
from benchmarks.peak import peak_bytes
from stable_baselines3.common.logger import Logger
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import llm_env
from agents import GRPO, PPO, REINFORCE
from agents.base import LanguageAgent
from agents.rollout import Rollout
from llm_env import TextGenerationEnv

CRITICS: dict[str, tuple[type[LanguageAgent], dict[str, Any]]] = {
    "REINFORCE, no critic": (REINFORCE, {}),
    "REINFORCE, shared critic": (REINFORCE, {"baseline": "value"}),
    "REINFORCE, separate critic": (REINFORCE, {"baseline": "value", "separate_critic": True}),
    "GRPO": (GRPO, {"group_size": 4}),
    "PPO, shared critic": (PPO, {}),
    "PPO, separate critic": (PPO, {"separate_critic": True}),
}


def larger_llama(vocab_size: int) -> LlamaForCausalLM:
    """Return a Llama of 12M parameters with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 1280, "num_hidden_layers": 6, "num_attention_heads": 6}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, max_position_embeddings=256, tie_word_embeddings=True, **sizes))


def endless_rollout(agent: LanguageAgent, prompt: int, response: int) -> Rollout:
    """Return a rollout of `n_envs` episodes with random tokens and random rewards.

    Every episode has the full length of `response` tokens.
    """
    generator = np.random.default_rng(0)
    count = agent.n_envs
    tokens = generator.integers(3, agent.policy.vocab_size, (count, prompt + response))
    rewards = torch.zeros(count, response)
    rewards[:, -1] = torch.as_tensor(generator.integers(0, 2, count), dtype=torch.float32)
    return Rollout(
        prompts=tokens[:, :prompt].tolist(),
        responses=tokens[:, prompt:].tolist(),
        mask=torch.ones(count, response),
        rewards=rewards,
        step_ends=torch.zeros(count, response),
        sampled_logp=torch.zeros(count, response),
        ref_logp=None,
        truncated=torch.zeros(count, dtype=torch.bool),
        infos=[{} for _ in range(count)],
        group_size=agent.group_size,
    )


def measure(model: PreTrainedModel, episodes: int, prompt: int, response: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Measure CPU seconds and peak bytes of an update, per agent.

    The CPU time is the minimum over `repeats` updates. Bytes include weights, gradients, optimizer state and all temporary
    tensors of an update. The peak covers two updates, because the optimizer state exists only after the first.
    """
    results = {}
    for name, (kind, settings) in CRITICS.items():
        env = TextGenerationEnv(["1"], lambda completions: [0.0] * len(completions), llm_env.PUPIL, max_new_tokens=response)
        settings = {"policy_kwargs": {"tokenizer": env.rules.tokenizer}, **settings}
        agent = kind(copy.deepcopy(model), env, n_envs=episodes, seed=0, **settings)
        agent.set_logger(Logger(folder=None, output_formats=[]))

        def two_updates(agent: LanguageAgent = agent) -> None:  # optimizer state exists from the second on
            for _ in range(2):
                agent.train(endless_rollout(agent, prompt, response))

        peak = peak_bytes(two_updates, agent.device)
        seconds = []
        for _ in range(repeats):
            rollout = endless_rollout(agent, prompt, response)
            start = time.process_time()
            agent.train(rollout)
            seconds.append(time.process_time() - start)
        weights = sum(parameter.nbytes for parameter in agent.policy.parameters())  # allocated before the peak is measured
        results[name] = (min(seconds), float(weights + peak))
    return results
