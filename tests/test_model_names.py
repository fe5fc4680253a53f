"""What is no model is refused at once, without asking a hub."""

import socket

import gymnasium as gym
import pytest

import llm_env
from agents import GRPO, PPO, LanguagePolicy
from llm_env.reference import Reference
from tests.conftest import refused

ENV = "llm_env/Addition-v0"
NAMES = {
    "MlpPolicy": "is the name of a network of Stable-Baselines3",
    "MultiInputPolicy": "is the name of a network of Stable-Baselines3",
    ENV: "is the id of an env; the model comes first",
    f"llm_env:{ENV}": "is the id of an env; the model comes first",
    "CartPole-v1": "is the id of an env",
    "/no/such/folder": "there is no such folder",
    "./model": "there is no such folder",
    "../models/mine": "there is no such folder",
    "~/no/such": "there is no such folder",
    "tests/nothing": "there is no such folder",  # a folder that is there holds no such model
    "a/b/c": "there is no such folder",
    "my model": "there is no such folder",
    "C:\\models": "there is no such folder",
    "grpo.zip": r"GRPO\.load\('grpo\.zip', env=env\)",
    "README.md": "is a single file",
}


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("asks the network"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", NAMES)
def test_names_that_cannot_be_a_model(name, request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    for call in (lambda: PPO(name, ENV), lambda: GRPO(name), lambda: LanguagePolicy(name), lambda: Reference(name)):
        refused(call, error=(ValueError, OSError), match=NAMES[name])
    refused(lambda: gym.make(ENV, tokenizer=name), error=(ValueError, OSError), match=NAMES[name])
    refused(lambda: gym.make(ENV, reference=name), error=(ValueError, OSError), match=NAMES[name])


def test_swapped_arguments_and_zips(tmp_path):
    refused(PPO, ENV, llm_env.PUPIL, error=ValueError, match="the model comes first, then the env")
    agent = GRPO(llm_env.PUPIL, ENV, n_envs=16)
    agent.save(tmp_path / "agent")
    refused(GRPO, tmp_path / "agent.zip", ENV, error=ValueError, match="checkpoint")
    refused(GRPO, str(tmp_path / "agent.zip"), ENV, error=ValueError, match="checkpoint")
    agent.policy.save_pretrained(tmp_path / "model")
    refused(GRPO.load, tmp_path / "model", error=ValueError, match=r"is a folder, as save_pretrained writes it; .*GRPO\(")
    assert GRPO(tmp_path / "model", ENV, n_envs=16).n_envs == 16
