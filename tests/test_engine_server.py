"""An engine behind a server, made here, that does what vLLM's does, and what can go wrong with one."""

import copy
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from agents import LanguagePolicy
from tests.conftest import refused
from tests.test_engines import TOKENIZER, V, agent_for


@contextmanager
def server(answer):
    """Serves `answer(path, body) -> (status, value)`; None hangs up."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            found = answer(self.path, json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}"))
            if found is None:
                return
            text = (found[1] if isinstance(found[1], str) else json.dumps(found[1])).encode()
            self.send_response(found[0])
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST

        def log_message(self, *args):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{made.server_port}"
    finally:
        made.shutdown()
        made.server_close()


class Served:
    """What vLLM's server does, as far as an engine asks, around a copy of the policy; `faults` are answered first."""

    def __init__(self, policy, rules):
        self.policy = LanguagePolicy(copy.deepcopy(policy.lm), TOKENIZER)
        self.rules, self.faults, self.asked, self.version = rules, [], [], None
        self.config, self.lock = policy.lm.config.to_dict(), threading.Lock()

    def __call__(self, path, body):
        self.asked.append(path)
        if self.faults and path == self.faults[0][0]:
            return self.faults.pop(0)[1]
        return 200, getattr(self, path.rsplit("/")[-1])(body)

    def models(self, body):
        return {"data": [{"id": "mine"}]}

    def collective_rpc(self, body):
        return {"results": [getattr(self, body["method"])(*body["args"])]}

    def llm_env_begin(self, vocab_size):
        return {"config": self.config, "dtype": "torch.float32", "max_model_len": 100}

    def llm_env_take_text(self, text):
        import base64

        from safetensors.torch import load

        self.policy.lm.load_state_dict(load(base64.b64decode(text)), strict=False)

    def llm_env_commit(self, version):
        self.version = version
        return {"missing": []}

    def llm_env_version(self):
        return {"version": self.version}

    def reset_prefix_cache(self, body):
        return {"success": True}

    def completions(self, body):
        assert body["model"] == "mine" and body["return_token_ids"] and body["logprobs"] == 0
        generator = torch.Generator().manual_seed(body["seed"])
        settings = {"max_new_tokens": body["max_tokens"], "temperature": body["temperature"], "eos_id": self.rules.eos_id}
        with self.lock:
            drawn = self.policy.sample([body["prompt"]], body["n"], **settings, generator=generator)
        rows = enumerate(zip(*drawn, strict=True))
        choices = [{"index": i, "token_ids": r, "logprobs": {"token_logprobs": p.tolist()}} for i, (r, p) in rows]
        return {"choices": choices[::-1]}


def served(attempts=2, **settings):
    """An agent and what its server does; to be used in `with server(...)`."""
    agent = agent_for(None, **settings)
    served = Served(agent.policy, agent.rules)
    return agent, served


def test_an_agent_learns_through_a_server():
    agent, does = served()
    with server(does) as url:
        agent.set_engine("vllm", {"base_url": url})
        agent.learn(200)
        assert agent.num_timesteps >= 200 and agent.engine.gap < 1e-5
        assert does.asked.count("/reset_prefix_cache") == agent._n_updates
        rollout = agent.sample_rollout()
    with torch.no_grad():
        expected = agent.policy.log_probs(rollout.prompts, rollout.responses)
    for row, logp in zip(rollout.sampled_logp, expected, strict=True):
        assert torch.allclose(row[: len(logp)], logp, atol=1e-5)


BAD = {"reset": None, "busy": (503, "busy"), "dead": (500, "EngineCore encountered an issue")}


@pytest.mark.parametrize("fault", BAD.values(), ids=BAD.keys())
def test_a_server_in_trouble_is_asked_again(fault):
    agent, does = served()
    with server(does) as url:
        agent.set_engine("vllm", {"base_url": url, "attempts": 3})
        agent.sample_rollout()
        does.faults = [("/v1/completions", fault)] * 2
        agent.sample_rollout()
        assert not does.faults


def test_a_server_that_goes_away_in_the_middle_of_a_batch(tmp_path):
    agent, does = served()
    with server(does) as url:
        agent.set_engine("vllm", {"base_url": url, "attempts": 2})
        agent.learn(100)
        steps, before = agent.num_timesteps, agent.np_random.bit_generator.state
        does.faults = [("/v1/completions", None)] * 10_000
        refused(agent.learn, 100, reset_num_timesteps=False, error=ConnectionError, match=f"{url}/v1/completions .* 2 attempts")
    assert agent.num_timesteps == steps and agent.np_random.bit_generator.state == before
    agent.save(tmp_path / "agent")
    _, other = served()
    with server(other) as url:
        agent.set_engine("vllm", {"base_url": url})
        agent.learn(100, reset_num_timesteps=False)
    assert agent.num_timesteps > steps


def test_a_server_that_began_anew_in_the_middle_of_a_batch_gets_the_weights_again():
    agent, does = served()
    fresh = copy.deepcopy(does.policy.lm.state_dict())
    with server(does) as url:
        agent.set_engine("vllm", {"base_url": url})
        agent.learn(300)
        completions = does.completions

        def begin_anew(body):
            does.version, does.completions = None, completions
            does.policy.lm.load_state_dict({name: 0.5 * tensor for name, tensor in fresh.items()})
            return completions(body)

        agent.sample_rollout()
        does.completions = begin_anew
        rollout = agent.sample_rollout()
    with torch.no_grad():
        expected = agent.policy.log_probs(rollout.prompts, rollout.responses)
    for row, logp in zip(rollout.sampled_logp, expected, strict=True):
        assert torch.allclose(row[: len(logp)], logp, atol=1e-5)


REFUSED = {
    "not in dev mode": (("/collective_rpc", (404, "Not Found")), {}, "answered 404.*VLLM_SERVER_DEV_MODE=1 .*serve"),
    "no worker of ours": (("/collective_rpc", (500, "has no attribute 'llm_env_begin'")), {}, "--worker-extension-cls"),
    "no vLLM": (("/v1/models", (200, "<html>")), {}, "is it a vLLM server"),
    "another name": (None, {"model": "yours"}, r"serves \['mine'\], not yours"),
}


@pytest.mark.parametrize(("fault", "kwargs", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_servers_that_will_not_do(fault, kwargs, match):
    agent, does = served()
    does.faults = [] if fault is None else [fault]
    with server(does) as url:
        agent.set_engine("vllm", {"base_url": url, **kwargs})
        refused(agent.learn, 10, error=ValueError, match=match)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"vocab_size": V + 1}, f"vocab_size {V + 1} where the policy has {V}"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 3"),
    ],
    ids=["vocabulary", "layers"],
)
def test_a_server_of_another_model(entry, match):
    agent, does = served()
    does.config |= entry
    with server(does) as url:
        agent.set_engine("vllm", {"base_url": url})
        refused(agent.learn, 10, error=ValueError, match=match)
    does.config, does.llm_env_begin = agent.policy.lm.config.to_dict(), lambda size: {"error": "its sampler is a Gumbel"}
    with server(does) as url:
        agent.set_engine("vllm", {"base_url": url})
        refused(agent.learn, 10, error=ValueError, match="VLLM_USE_V2_MODEL_RUNNER=0")
    del does.llm_env_begin
    does.llm_env_begin = lambda size: {"config": does.config, "dtype": "torch.float32", "max_model_len": 4}
    with server(does) as url:
        agent.set_engine("vllm", {"base_url": url})
        refused(agent.learn, 10, error=ValueError, match="max_model_len=4, but .* need 5")


def test_weights_that_do_not_all_arrive():
    agent, does = served()
    does.llm_env_commit = lambda version: {"missing": ["lm_head.weight"]}
    with server(does) as url:
        agent.set_engine("vllm", {"base_url": url})
        refused(agent.learn, 10, error=ValueError, match="1 of vLLM's parameters got no weights")
        del does.llm_env_commit
        does.reset_prefix_cache = lambda body: {"success": False}
        refused(agent.learn, 10, error=RuntimeError, match="in use and was not emptied")
