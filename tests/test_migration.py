"""Checkpoints of version 0.1 load, and training resumes as version 0.1 did."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agents import GRPO, PPO, REINFORCE
from agents.checkpoint import FORMAT, migrate
from tests.conftest import make_tokenizer, refused
from tests.probes import make_env

FOLDER = Path(__file__).parent / "data" / "version_0_1"
TOKENIZER = make_tokenizer("abcdefgh")
CASES = {
    "grpo": (GRPO, True, {}),  # a moving reference, an adaptive coefficient in the loss
    "ppo": (PPO, True, {"kl_coef": 0.05}),
    "reinforce": (REINFORCE, False, {}),  # a running mean
}


def letters(completions, **kwargs):
    return [c.count("a") + 0.3 * len(c) for c in completions]


def reference_model():
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), max_position_embeddings=32, **sizes, **special))


@pytest.mark.parametrize("name", CASES)
def test_a_run_of_version_0_1_resumes_as_it_did(name):
    kind, reference, arguments = CASES[name]
    if reference:
        arguments = {**arguments, "reference": reference_model()}
    env = make_env(TOKENIZER, letters, ["a", "abc", "bcd", "h"], max_prompt_tokens=4, max_new_tokens=6, **arguments)
    agent = kind.load(FOLDER / f"{name}.zip", env=env)
    agent.learn(200, reset_num_timesteps=False)
    expected = dict(np.load(FOLDER / f"{name}.npz"))
    assert (agent.num_timesteps, agent._n_updates) == (expected.pop("num_timesteps"), expected.pop("n_updates"))
    weights = agent.policy.state_dict()
    assert {key.replace(".", "/") for key in weights} == set(expected)
    for key, value in weights.items():  # other libraries and processors round in other ways
        torch.testing.assert_close(value, torch.tensor(expected[key.replace(".", "/")]), atol=1e-4, rtol=1e-4)


def test_saving_again_writes_the_new_format(tmp_path):
    agent = REINFORCE.load(FOLDER / "reinforce.zip")
    agent.save(tmp_path / "again")  # without an env: the state of the env's parts goes through
    again = REINFORCE.load(tmp_path / "again")
    assert again._checkpoint_format == FORMAT and again.running_mean == agent.running_mean != 0
    states = agent._state.snapshot(), again._state.snapshot()
    assert states[0].keys() == states[1].keys() and states[0]["cursor"] == states[1]["cursor"]


def test_what_becomes_of_the_attributes_of_version_0_1():
    attributes = {
        "_engine_setting": None,
        "engine": "vllm",
        "_wanted_n_envs": 8,
        "_reference_moved": True,
        "_rollouts_since": 1,
        "offload_optimizer": False,
        "batch_size": 4,
        "_position": {"counts": {"num_timesteps": 7}, "env": {"rows": []}, "seeds": [None], "kl_coef": None, "numpy": {"a": 1}},
    }
    migrate(attributes)
    assert attributes == {
        "_engine_setting": "vllm",
        "_n_envs_setting": 8,
        "batch_size": 4,
        "_checkpoint_format": FORMAT,
        "_saved_state": {
            "counts": {"num_timesteps": 7},
            "numpy": {"a": 1},
            "env": {"venv": {"rows": []}, "seeds": [None]},
            "reference_sync": {"has_moved": True, "num_rollouts": 1, "rollouts": []},
        },
    }


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path, monkeypatch):
    agent = REINFORCE.load(FOLDER / "reinforce.zip")
    monkeypatch.setattr("agents.base.FORMAT", FORMAT + 1)
    agent.save(tmp_path / "newer")
    refused(
        REINFORCE.load, tmp_path / "newer", error=ValueError, match=f"format {FORMAT + 1}, this version reads up to {FORMAT}"
    )
