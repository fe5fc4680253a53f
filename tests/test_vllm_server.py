"""vLLM as an engine behind its server, the real one. `.ci/vllm` makes the environment that these tests need."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from agents import GRPO
from agents.engines.vllm.engine import VLLMEngine
from tests.conftest import refused
from tests.vllm_models import make_llama, make_text_env

pytest.importorskip("vllm")


class Server:
    """`vllm serve` of a model of ours with weights of no meaning, in a process group of its own."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", folder / f"{port}.log"
        make_llama(seed=9).save_pretrained(folder)
        make_text_env().rules.tokenizer.save_pretrained(folder)
        # The command's own script asks for the version of a package named vllm, which the CPU's is not.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--host", "127.0.0.1"]
        command += ["--port", port, "--served-model-name", "ours", "--enforce-eager", "--dtype", "float32"]
        command += ["--max-model-len", 256, "--kv-cache-memory-bytes", 1 << 26, "--block-size", 32]
        command += ["--worker-extension-cls", "agents.engines.vllm.worker.PolicyWeights"]
        root = str(Path(__file__).parents[1])
        settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        environment = {**os.environ, **settings, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.wait()

    def wait(self):
        for _ in range(300):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(1)
        raise TimeoutError(self.log.read_text()[-3000:])

    def kill(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    begun = []

    def begin():
        begun.append(Server(tmp_path_factory.mktemp("served")))
        return begun[-1]

    yield begin
    for server in begun:
        server.kill()


@pytest.fixture(scope="module")
def server(servers):
    return servers()


def agent_for(url, **settings):
    env = make_text_env(**settings)
    kwargs = {"base_url": url, "attempts": 3}
    common = {"group_size": 4, "n_envs": 16, "learning_rate": 1e-3, "seed": 0, "temperature": 0.7}
    return GRPO(
        make_llama(), env, policy_kwargs={"tokenizer": env.rules.tokenizer}, engine="vllm", engine_kwargs=kwargs, **common
    )


def assert_on_policy(agent):
    rollout = agent.sample_rollout()
    with torch.no_grad():
        expected = agent.policy.log_probs(rollout.prompts, rollout.responses, agent.temperature)
    for row, logp in zip(rollout.sampled_logp, expected, strict=True):
        assert torch.allclose(row[: len(logp)], logp, atol=2e-5)
    return rollout


def test_learning_through_a_server(server):
    agent = agent_for(server.url)
    assert_on_policy(agent)
    agent.learn(300)
    assert agent.engine.gap < 2e-5
    assert_on_policy(agent)


def test_stop_strings_and_top_k(server):
    agent = agent_for(server.url, stop="abc", max_new_tokens=24)
    agent.top_k = 6
    rollout = assert_on_policy(agent)
    rules = agent.rules
    ends = [[t == rules.eos_id or rules.completes_stop(r[: i + 1]) for i, t in enumerate(r)] for r in rollout.responses]
    assert not any(any(row[:-1]) for row in ends) and any(row[-1] for row in ends)


def test_weights_of_another_run_are_noticed(server):
    agent, other = agent_for(server.url), agent_for(server.url)
    agent.sample_rollout()
    with torch.no_grad():
        for parameter in other.policy.lm.parameters():
            parameter.mul_(1.1)
    other.sample_rollout()
    pushed = agent.engine.engine._version
    assert_on_policy(agent)
    assert agent.engine.engine._version != pushed


def test_another_vocabulary_and_another_name(server):
    policy_env = make_text_env()
    engine = VLLMEngine(base_url=server.url)
    agent = GRPO(make_llama(vocab_size=40), policy_env, policy_kwargs={"tokenizer": policy_env.rules.tokenizer}, engine=engine)
    refused(agent.learn, 10, error=ValueError, match="vocab_size 16 where the policy has 40")
    agent.set_engine("vllm", {"base_url": server.url, "model": "theirs"})
    refused(agent.learn, 10, error=ValueError, match=r"serves \['ours'\], not theirs")


def test_a_server_that_is_killed_in_the_middle_of_a_batch(servers, server, tmp_path, monkeypatch):
    agent = agent_for(server.url)
    agent.learn(100)
    steps, weights = agent.num_timesteps, [p.clone() for p in agent.policy.parameters()]
    complete = agent.engine.engine.vllm._complete
    asked = []

    def kill(request):
        asked.append(request)
        if len(asked) == 6:  # 4 to verify the push, then the batch
            server.kill()
        return complete(request)

    monkeypatch.setattr(agent.engine.engine.vllm, "_complete", kill)
    began = time.time()
    refused(agent.learn, 100, reset_num_timesteps=False, error=ConnectionError, match=f"{server.url}.* 3 attempts")
    assert time.time() - began < 60 and len(asked) >= 6
    assert agent.num_timesteps == steps and all(map(torch.equal, weights, agent.policy.parameters()))
    agent.save(tmp_path / "agent")
    another = servers()
    agent.set_engine("vllm", {"base_url": another.url})
    agent.learn(100, reset_num_timesteps=False)
    loaded = GRPO.load(tmp_path / "agent", env=make_text_env(), engine_kwargs={"base_url": another.url})
    loaded.learn(100, reset_num_timesteps=False)
    for one, two in ((agent, steps), (loaded, steps)):
        assert one.num_timesteps > two
        assert_on_policy(one)
    assert np.isfinite(agent.engine.gap)
