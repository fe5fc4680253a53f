"""The packaged model: what it is, what it can do before any reinforcement learning, and that reward alone makes it carry."""

from pathlib import Path

import gymnasium as gym
import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import llm_env
from agents import GRPO
from llm_env.prompts import split_of


def test_it_is_a_small_llama_that_plain_transformers_loads():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llm_env.PUPIL), AutoTokenizer.from_pretrained(llm_env.PUPIL)
    config = AutoConfig.from_pretrained(llm_env.PUPIL)
    assert config.model_type == "llama" and config.head_dim in (32, 64)
    assert 0.9e6 < sum(p.numel() for p in model.parameters()) < 1.1e6
    assert sum(file.stat().st_size for file in Path(llm_env.PUPIL).iterdir() if file.is_file()) < 4.5e6
    text = "12+34=\n~ A  b"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text and len(tokenizer(text)["input_ids"]) == len(text)
    assert tokenizer.eos_token_id == config.eos_token_id == model.generation_config.eos_token_id


def test_it_forgets_to_carry_more_often_than_not_and_samples_both_habits():
    env = gym.make("llm_env/Addition-v0", split="test")
    agent = GRPO(llm_env.PUPIL, env, seed=0)
    assert 1 / 3 <= agent.evaluate(env)["success_rate"] <= 1 / 2
    assert 0.5 < agent.evaluate(env, deterministic=False)["success_rate"] < 0.65
    answers = {agent.generate(["57+68="])[0] for _ in range(60)}
    assert {"15", "125"} <= answers
    assert split_of("57+68=") in ("train", "test")


@pytest.mark.slow
def test_reward_alone_makes_it_carry():
    """A minute of GRPO; the examples go on until 0.98 and more, `examples/train_grpo.py --seed 0, 1, 2`."""
    agent = GRPO(llm_env.PUPIL, "llm_env/Addition-v0", learning_rate=3e-4, n_envs=256, seed=0)
    agent.learn(25_000)
    assert agent.evaluate(gym.make("llm_env/Addition-v0", split="test"))["success_rate"] > 0.9
