"""Agents on CUDA, rehearsed on the CPU: device mistakes, the CPU's results, and synchronizations.

See `tests.rehearsal`. The synchronizations are slopes between two run lengths, so that fixed costs do not count.
"""

import contextlib
import copy
import io
import pickle
import unittest.mock
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors.torch
import torch
from gymnasium.wrappers import TransformReward
from torch import nn

from agents import GRPO, PPO, REINFORCE
from agents.sampling.caching import decodes_with_cache, skips_hidden_slots
from agents.sampling.generate import PlainDecoding, sample_responses
from agents.sampling.sampler import Sampler
from agents.sampling.shared_prefix import SharedDecoding, decodes_shared
from llm_env import RewardModel, TextGenerationEnv
from llm_env.lm.capabilities import takes_left_padding
from llm_env.lm.sharing import supports_sharing
from llm_env.reference import AdaptiveKLController
from tests import architectures
from tests.conftest import make_model, make_tokenizer
from tests.probes import LETTERS, make_env
from tests.rehearsal import CPU, CUDA, CudaTensor, counting_syncs, rehearsal
from tests.test_reward_models import make_classifier
from tests.test_tools import short
from tests.text_envs import GuessNumber, Letters

TOKENIZER = make_tokenizer(LETTERS)


pytestmark = pytest.mark.filterwarnings("ignore", "error:preflight could not")


@pytest.fixture
def rehearsed():
    with rehearsal():
        yield


@contextlib.contextmanager
def without_mistakes():
    """A rehearsal in which no error of CUDA may be raised, caught or not."""
    with rehearsal() as mistakes:
        yield
    assert mistakes == []


# --- mistakes ------------------------------------------------------------------------------------------------------------

TWO_DEVICES = "Expected all tensors to be on the same device"
ON_CPU = torch.arange(6.0).view(2, 3)


def on_cuda():
    return ON_CPU.cuda()


def masked_on_cpu():
    return on_cuda().masked_fill(torch.zeros(2, 3, dtype=torch.bool), -torch.inf)


def put(target, index, value):
    target[index] = value


def drawn_by(generator_device, device):
    return torch.rand(3, device=device, generator=torch.Generator(generator_device))


def assigned_gradient():
    on_cuda().requires_grad_().grad = ON_CPU


def sampled_while_capturing():
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        return on_cuda().sum().item()


MISTAKES = {
    "a sum": (lambda: on_cuda() + ON_CPU, RuntimeError, TWO_DEVICES),
    "a sum with one element": (lambda: on_cuda() + torch.ones(1), RuntimeError, TWO_DEVICES),
    "in place": (lambda: on_cuda().add_(ON_CPU), RuntimeError, TWO_DEVICES),
    "in place into the CPU": (lambda: torch.tensor(1.0).add_(on_cuda().sum()), RuntimeError, TWO_DEVICES),
    "a product of matrices": (lambda: on_cuda() @ ON_CPU.T, RuntimeError, TWO_DEVICES),
    "a concatenation": (lambda: torch.cat([on_cuda(), ON_CPU]), RuntimeError, TWO_DEVICES),
    "a stack of scalars": (lambda: torch.stack([on_cuda().sum(), ON_CPU.sum()]), RuntimeError, TWO_DEVICES),
    "a mask": (masked_on_cpu, RuntimeError, TWO_DEVICES),
    "a mask in where": (lambda: torch.where(ON_CPU > 2, on_cuda(), 0.0), RuntimeError, TWO_DEVICES),
    "token ids in an embedding": (lambda: nn.Embedding(3, 2).cuda()(torch.tensor([1])), RuntimeError, TWO_DEVICES),
    "an index in gather": (lambda: on_cuda().gather(1, torch.zeros(2, 1, dtype=torch.int64)), RuntimeError, TWO_DEVICES),
    "a layer": (lambda: nn.Linear(3, 2).cuda()(ON_CPU), RuntimeError, TWO_DEVICES),
    "a loss": (lambda: nn.functional.cross_entropy(on_cuda(), torch.tensor([0, 1])), RuntimeError, TWO_DEVICES),
    "an index of CUDA": (lambda: ON_CPU[torch.tensor([0], device="cuda")], RuntimeError, "indices should be either on cpu"),
    "a mask of CUDA": (lambda: ON_CPU[on_cuda() > 2], RuntimeError, "indices should be either on cpu"),
    "a value put at an index": (
        lambda: put(on_cuda(), torch.tensor([0], device="cuda"), ON_CPU[:1]),
        RuntimeError,
        "expected self and value to be on the same device",
    ),
    "a value of CUDA put into the CPU": (
        lambda: put(ON_CPU.clone(), torch.tensor([0]), on_cuda()[:1]),
        RuntimeError,
        "expected self and value to be on the same device",
    ),
    "a generator of the CPU": (lambda: drawn_by("cpu", "cuda"), RuntimeError, "Expected a 'cuda' device type for generator"),
    "a generator of CUDA": (lambda: drawn_by("cuda", "cpu"), RuntimeError, "Expected a 'cpu' device type for generator"),
    "a generator in place": (
        lambda: on_cuda().uniform_(generator=torch.Generator()),
        RuntimeError,
        "Expected a 'cuda' device type for generator",
    ),
    "a multinomial": (
        lambda: on_cuda().multinomial(1, generator=torch.Generator()),
        RuntimeError,
        "Expected a 'cuda' device type for generator",
    ),
    "numpy()": (lambda: on_cuda().numpy(), TypeError, "can't convert cuda:0 device type tensor to numpy"),
    "an array": (lambda: np.asarray(on_cuda()), TypeError, "can't convert cuda:0 device type tensor to numpy"),
    "an array of scalars": (lambda: np.array([on_cuda().sum()] * 2), TypeError, "can't convert cuda:0"),
    "a gradient": (assigned_gradient, RuntimeError, "assigned grad has data located on a different device"),
    "a wait in a graph": (sampled_while_capturing, RuntimeError, "operation not permitted when stream is capturing"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_raises_the_error_of_cuda(name):
    call, error, message = MISTAKES[name]
    with rehearsal() as mistakes, pytest.raises(error, match=message):
        call()
    assert len(mistakes) == 1
    with rehearsal(), ThreadPoolExecutor(1) as pool, pytest.raises(error, match=message):  # the modes are thread-local
        pool.submit(call).result()


ALLOWED = {
    "a number": lambda x: x * 2 + 1,
    "a scalar of the CPU": lambda x: x + torch.tensor(2.0),
    "a scalar of the CPU in where": lambda x: torch.where(x > 2, x, torch.tensor(0.0)),
    "an index of the CPU": lambda x: x[torch.tensor([1, 0])],
    "a list": lambda x: x[[1, 0], [0, 2]],
    "a mask of the CPU": lambda x: x[ON_CPU > 2],
    "numbers put at an index": lambda x: x.clone().index_put_((torch.tensor([0]),), torch.tensor(5.0)),
    "a copy into a slice": lambda x: x.clone()[:1].copy_(ON_CPU[1:]),
    "a slice assigned": lambda x: put(x, slice(1), ON_CPU[1:]) or x,
    "masked scatter": lambda x: x.masked_scatter(x > 2, x * 10),
    "sorts": lambda x: x.sort(descending=True).values.cumsum(-1).topk(2).values,
    "attention": lambda x: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=False),
    "new tensors": lambda x: x.new_full((2,), 3.0) + torch.ones_like(x[0, :2]) + torch.zeros(2, device=x.device),
    "embeddings": lambda x: nn.functional.embedding(x[0].long(), x.T.contiguous()),
    "one-hot": lambda x: nn.functional.one_hot(x.long(), 6),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_cuda_allows_gives_the_values_of_the_cpu(name, rehearsed):
    result, expected = ALLOWED[name](on_cuda()), ALLOWED[name](ON_CPU.clone())
    assert result.device == CUDA and expected.device == CPU
    torch.testing.assert_close(result.cpu(), expected)


def test_gradients_stay_on_their_device(rehearsed):
    """Autograd's own tensors (zeros behind an index) are on CUDA, and copies lead gradients back."""
    leaf = ON_CPU.clone().requires_grad_()
    copied = leaf.cuda()
    (copied[copied > 2].sum().cpu() + copied[[0, 0]].cpu().pow(2).sum()).backward()
    expected = ON_CPU.clone().requires_grad_()
    (expected[expected > 2].sum() + expected[[0, 0]].pow(2).sum()).backward()
    assert leaf.grad.device == CPU
    torch.testing.assert_close(leaf.grad, expected.grad)
    parameter = nn.Parameter(on_cuda())
    parameter[torch.tensor([0], device="cuda")].sum().backward()
    assert parameter.grad.device == CUDA and parameter.grad.tolist() == [[1.0] * 3, [0.0] * 3]


# --- what tensors go through ---------------------------------------------------------------------------------------------


def test_tensors_are_printed_with_their_device(rehearsed):
    x = on_cuda()
    assert repr(x[0]) == str(x[0]) == f"{x[0]}" == "tensor([0., 1., 2.], device='cuda:0')"
    assert f"{x.sum():.2f} {x.max()}" == "15.00 5.0"
    assert "device='cuda:0', requires_grad=True)" in repr(nn.Parameter(x))
    assert [x.device.type, x.is_cuda, x.is_cpu, x.get_device()] == ["cuda", True, False, 0]


def tied():
    module = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)])
    module[1].weight = module[0].weight
    return module


def test_a_module_moves_with_its_ties_and_its_optimizer(rehearsed):
    module = tied()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    weight, before = module[0].weight, module[0].weight.detach().clone()
    module.to("cuda")
    assert module[0].weight is module[1].weight is weight and isinstance(weight, nn.Parameter)
    assert {tensor.device for tensor in module.state_dict().values()} == {CUDA}
    weight.sum().backward()
    optimizer.step()
    module.cpu()
    assert module[0].weight is module[1].weight is weight and type(weight) is nn.Parameter
    torch.testing.assert_close(weight.detach(), before - 1)


def test_copies_and_pickles_stay_on_cuda(rehearsed):
    module = tied().cuda()
    module[0].weight.sum().backward()
    copied = copy.deepcopy(module)
    assert copied[0].weight is copied[1].weight is not module[0].weight
    assert copied[0].weight.grad.device == CUDA and isinstance(copied[0].weight, nn.Parameter)
    pickled = pickle.loads(pickle.dumps(module))
    for other in (copied, pickled):
        for name, value in module.state_dict().items():
            assert other.state_dict()[name].device == CUDA
            torch.testing.assert_close(other.state_dict()[name].cpu(), value.cpu())
    with pytest.raises(RuntimeError, match="deepcopy protocol"):
        copy.deepcopy(module[0].weight * 2)


@pytest.mark.parametrize("location, device", [(None, CUDA), ("cpu", CPU), ("cuda", CUDA), ({"cuda:0": "cpu"}, CPU)])
def test_torch_files_keep_the_device(location, device, rehearsed):
    module = tied().cuda()
    file = io.BytesIO()
    torch.save([module.state_dict(), module[0].weight, torch.ones(2), on_cuda()[0]], file)
    file.seek(0)
    state, weight, other, row = torch.load(file, map_location=location, weights_only=True)
    assert {value.device for value in (*state.values(), weight, row)} == {device} and isinstance(weight, nn.Parameter)
    assert other.device == (CUDA if location == "cuda" else CPU) and row.tolist() == [0.0, 1.0, 2.0]
    module.load_state_dict(state)
    file.seek(0)
    assert torch.load(file, map_location="cpu", weights_only=True)[0]["0.weight"].numpy().shape == (3, 3)


def test_safetensors_files_load_on_a_device(rehearsed, tmp_path):
    safetensors.torch.save_file({"x": on_cuda()}, tmp_path / "x")
    assert safetensors.torch.load_file(tmp_path / "x")["x"].device == CPU
    loaded = safetensors.torch.load_file(tmp_path / "x", device="cuda")["x"]
    assert loaded.device == CUDA and torch.equal(loaded, on_cuda())


def test_threads_and_generators(rehearsed):
    generator = torch.Generator("cuda").manual_seed(3)
    assert generator.device == CUDA and torch.Generator().device == CPU
    drawn = torch.rand(4, device="cuda", generator=generator)
    assert drawn.tolist() == torch.rand(4, generator=torch.Generator().manual_seed(3)).tolist()
    state = generator.get_state()
    first = torch.randint(9, (4,), device="cuda", generator=generator)
    generator.set_state(state)
    assert torch.equal(first, torch.randint(9, (4,), device="cuda", generator=generator))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: torch.tensor([1.0]).to("cuda").new_zeros(2).device).result() == CUDA


def test_a_graph_keeps_python_values_and_addresses():
    """Replaying computes anew from the same memory: what was replaced or is another number in Python is not seen."""
    with rehearsal():
        x, replaced, factor = on_cuda(), torch.ones(3, device="cuda"), 2
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = (x * factor + replaced)[:1] + torch.zeros(1, 3, device="cuda")
        x.fill_(5)
        replaced, factor = torch.full((3,), 100.0, device="cuda"), 50
        graph.replay()
        assert y.tolist() == [[11.0] * 3]


def test_nothing_of_the_rehearsal_remains():
    with rehearsal():
        kept = on_cuda()
    assert not torch.cuda.is_available() and torch.Generator is torch._C.Generator
    assert type(torch.ones(1) + 1) is torch.Tensor and isinstance(kept, CudaTensor)
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        torch.ones(1, device="cuda")


# --- agents --------------------------------------------------------------------------------------------------------------


def model_of(family, vocabulary):
    if family == "mamba":
        return architectures.build("mamba", vocab_size=vocabulary, noise=False)
    return make_model(family, vocabulary, scale=1.5)


def agent_of(device, kind=GRPO, env=None, family="llama", **settings):
    """An agent whose weights move as much as their gradients: rounding stays small, unlike with Adam."""
    env = make_env(TOKENIZER) if env is None else env
    settings = {"n_envs": 8, "seed": 0, "learning_rate": 0.02, **({"group_size": 4} if kind is GRPO else {}), **settings}
    settings["policy_kwargs"] = {"optimizer_class": torch.optim.SGD, **settings.get("policy_kwargs", {})}
    model = settings.pop("policy", None) or model_of(family, len(env.unwrapped.rules.tokenizer))
    return kind(model, env, device=device, **settings)


def trained(agent, tokens=70):
    """Learn; return the texts and scores of all rollouts, statistics of the updates, and the weights on the CPU."""
    seen, original, before = [], type(agent).train, weights_of(agent)

    def train(self, rollout):
        original(self, rollout)
        texts = [info["completion"] for info in rollout.infos]
        statistics = {key: value for key, value in self.logger.name_to_value.items() if key.startswith("train/")}
        seen.append((texts, rollout.scores.tolist(), rollout.sampled_logp.tolist(), statistics))

    with unittest.mock.patch.object(type(agent), "train", train):
        agent.learn(tokens)
    after = weights_of(agent)
    assert len(seen) > 1 and max((value - before[name]).abs().max() for name, value in after.items()) > 1e-3
    return seen, after


def weights_of(agent):
    return {name: value.detach().cpu().clone() for name, value in agent.policy.state_dict().items()}


def agrees(a, b):
    """The same texts, and nearly the same scores, log-probs, statistics and weights, which have moved by 1e-3 at least."""
    for (texts, scores, logp, statistics), (texts_b, scores_b, logp_b, statistics_b) in zip(a[0], b[0], strict=True):
        assert texts == texts_b
        np.testing.assert_allclose(scores, scores_b, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(logp, logp_b, rtol=1e-4, atol=1e-5)
        assert statistics.keys() == statistics_b.keys()
        for key, value in statistics.items():
            np.testing.assert_allclose(value, statistics_b[key], rtol=1e-3, atol=1e-5, err_msg=key)
    same_weights(a[1], b[1], atol=1e-5)


def same_weights(a, b, **tolerances):
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], **{"rtol": 1e-5, "atol": 0, **tolerances})


def verdicts(lm):
    """What trials find a model able to do: an error in one makes another way of decoding take over, without a word."""
    modes = {mode: supports_sharing(lm.base_model, 20, mode) for mode in ("split", "dense")}
    trials = (decodes_shared, decodes_with_cache, skips_hidden_slots, takes_left_padding)
    return {**modes, **{trial.__name__: trial(lm) for trial in trials}}


def lora():
    peft = pytest.importorskip("peft")
    return {"peft_config": peft.LoraConfig(r=2, target_modules="all-linear")}


def reference(family="llama"):
    return make_model(family, len(TOKENIZER), seed=1, scale=1.5)


def turns(**kwargs):
    limits = {"max_prompt_tokens": 4, "max_new_tokens": 3, "max_turns": 3, "max_observation_tokens": 4}
    return TextGenerationEnv.from_text_env(Letters, make_tokenizer("abcdefgh"), **{**limits, **kwargs})


def guesses(**kwargs):
    limits = {"max_prompt_tokens": 12, "max_new_tokens": 2, "max_turns": 3, "max_observation_tokens": 2}
    return TextGenerationEnv.from_text_env(GuessNumber, make_tokenizer("gues 1234567=+-"), **{**limits, **kwargs})


def letter(context_ids, response_ids):
    """An even token after an odd one, and the other way round."""
    last = response_ids[-1] if response_ids else context_ids[-1]
    return [0, *range(3 + last % 2, len(TOKENIZER), 2)]


# name: (algorithm, the env, settings)
AGENTS = {
    "GRPO": (GRPO, make_env, {}),
    "GRPO, GPT-2": (GRPO, make_env, {"family": "gpt2"}),
    "GRPO, Qwen2": (GRPO, make_env, {"family": "qwen2"}),
    "GRPO, Mamba": (GRPO, make_env, {"family": "mamba"}),
    "PPO": (PPO, make_env, {"n_epochs": 2}),
    "PPO, GPT-2, its own critic": (PPO, make_env, {"family": "gpt2", "separate_critic": True, "n_epochs": 1}),
    "PPO, Mamba": (PPO, make_env, {"family": "mamba", "n_epochs": 1}),
    "REINFORCE": (REINFORCE, make_env, {}),
    "REINFORCE with values": (REINFORCE, make_env, {"baseline": "value", "family": "qwen2"}),
    "several epochs and micro-batches": (GRPO, make_env, {"n_epochs": 2, "batch_size": 4, "micro_batch_size": 2}),
    "a token budget": (PPO, make_env, {"batch_size": 4, "max_tokens_per_batch": 24}),
    "KL in the loss": (GRPO, lambda t: make_env(t, reference=reference()), {"kl_coef": 0.1}),
    "KL in the reward": (
        PPO,
        lambda t: make_env(t, reference=reference(), kl_coef=AdaptiveKLController(0.1, target=0.1, horizon=100)),
        {"n_epochs": 1},
    ),
    "a reference that follows": (GRPO, lambda t: make_env(t, reference=reference()), {"kl_coef": 0.1, "reference_every": 1}),
    "gradient checkpointing": (GRPO, make_env, {"gradient_checkpointing": True}),
    "LoRA with its base as reference": (
        GRPO,
        lambda t: make_env(t, reference="base"),
        {"kl_coef": 0.1, "policy_kwargs": lora, "learning_rate": 0.2},
    ),
    "LoRA, PPO": (PPO, make_env, {"policy_kwargs": lora, "n_epochs": 1, "gradient_checkpointing": True}),
    "token constraints": (GRPO, lambda t: make_env(t, allowed_tokens=letter, min_new_tokens=2), {}),
    "stop strings": (GRPO, lambda t: make_env(t, stop=["ab", "c"]), {"mask_truncated": True, "kl_coef": 0.0}),
    "restricted sampling": (REINFORCE, make_env, {"top_k": 7, "top_p": 0.9, "min_p": 0.02}),
    "prompts waiting": (GRPO, lambda t: make_env(t, stop="a"), {"max_num_seqs": 4, "prefix_sharing": True}),
    "prompts waiting, plain": (GRPO, lambda t: make_env(t, stop="a"), {"max_num_seqs": 4, "prefix_sharing": False}),
    "dynamic sampling": (GRPO, lambda t: make_env(t, reward=rarely), {"max_resamples": 2, "aggregation": "token"}),
    "importance weights": (GRPO, make_env, {"importance_cap": 1.5, "n_epochs": 2}),
    "overlap": (GRPO, make_env, {"overlap": True}),
    "overlap, PPO": (PPO, make_env, {"overlap": True, "n_epochs": 1}),
    "token by token": (PPO, lambda t: TransformReward(make_env(t), float), {"n_epochs": 1}),
    "turns": (GRPO, lambda t: turns(), {}),
    "turns, GPT-2, PPO": (PPO, lambda t: turns(), {"family": "gpt2", "gae_level": "turn", "n_epochs": 1}),
    "turns in lockstep": (GRPO, lambda t: turns(), {"family": "mamba", "ratio_level": "turn", "tokens": 120}),
    "turns, plain": (GRPO, lambda t: guesses(), {"prefix_sharing": False, "n_epochs": 2, "micro_batch_size": 4}),
    "turns with stop strings": (GRPO, lambda t: turns(stop=["a"]), {"max_num_seqs": 4, "importance_cap": 2.0}),
    "tools": (GRPO, lambda t: short(), {}),
}


def rarely(completions):
    return [float(c.startswith("a")) for c in completions]


@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_learns_on_cuda_what_it_learns_on_the_cpu(name):
    kind, make, settings = AGENTS[name]
    settings = {key: value() if callable(value) else value for key, value in settings.items()}
    tokens = settings.pop("tokens", 70)
    on_cpu = agent_of("cpu", kind, make(TOKENIZER), **settings)
    able, expected = verdicts(on_cpu.policy.lm), trained(on_cpu, tokens)
    with without_mistakes():
        agent = agent_of("cuda", kind, make(TOKENIZER), **settings)
        assert {tensor.device for tensor in agent.policy.state_dict().values()} == {CUDA}
        assert verdicts(agent.policy.lm) == able
        found = trained(agent, tokens)
    agrees(found, expected)


@pytest.mark.parametrize("family, sharing", [("llama", "auto"), ("gpt2", False)])
def test_bf16_is_as_near_as_its_digits(family, sharing):
    settings = {"family": family, "bf16": True, "prefix_sharing": sharing, "importance_cap": 2.0}
    expected = trained(agent_of("cpu", **settings))
    without = trained(agent_of("cpu", **{**settings, "bf16": False}))
    with without_mistakes():
        found = trained(agent_of("cuda", **settings))
    assert found[0][0][0] == expected[0][0][0]  # the texts of the first rollout
    assert found[0][0][2] != without[0][0][2]
    np.testing.assert_allclose(found[0][0][2], expected[0][0][2], atol=0.02)
    same_weights(found[1], expected[1], atol=5e-4)  # of 5e-3 by which they have moved


def test_an_agent_saved_on_cuda_goes_on_there_and_on_the_cpu(tmp_path):
    with without_mistakes():
        agent = agent_of("cuda", PPO, separate_critic=True, policy_kwargs={"optimizer_class": torch.optim.AdamW})
        agent.learn(30)
        agent.save(tmp_path / "agent")
        again = PPO.load(tmp_path / "agent", env=make_env(TOKENIZER), device="cuda")
        assert again.policy.optimizer.state_dict()["state"][0]["exp_avg"].device == CUDA
        saved = weights_of(agent)
        for one in (agent, again):
            one.learn(40, reset_num_timesteps=False)
        after = weights_of(agent)
        assert not torch.equal(after["lm.lm_head.weight"], saved["lm.lm_head.weight"])
        same_weights(weights_of(again), after, rtol=0)
        agent.policy.lm.save_pretrained(tmp_path / "model")
    on_cpu = PPO.load(tmp_path / "agent", env=make_env(TOKENIZER), device="cpu")
    same_weights(weights_of(on_cpu), saved, rtol=0)
    on_cpu.learn(40, reset_num_timesteps=False)
    on_cpu.save(tmp_path / "other")
    with without_mistakes():
        back = PPO.load(tmp_path / "other", env=make_env(TOKENIZER), device="cuda")
        assert next(back.policy.parameters()).device == CUDA
        back.learn(20, reset_num_timesteps=False)
        loaded = agent_of("cuda", policy=str(tmp_path / "model"), policy_kwargs={"tokenizer": TOKENIZER})
        loaded.learn(20)


def test_a_step_of_a_resumed_optimizer_waits_as_often_as_before(tmp_path):
    """Adam's step counts belong on the CPU: each one on CUDA is read in every step."""
    with without_mistakes():
        agent = agent_of("cuda", policy_kwargs={"optimizer_class": torch.optim.AdamW})
        agent.learn(30)
        agent.save(tmp_path / "agent")
        counts = []
        for one in (agent, GRPO.load(tmp_path / "agent", env=make_env(TOKENIZER), device="cuda")):
            for parameter in one.policy.parameters():
                parameter.grad = torch.zeros_like(parameter)
            with counting_syncs() as syncs:
                one.policy.optimizer.step()
            counts.append(syncs.count)
    assert counts == [0, 0]


def inference(device):
    """What an agent says, and is measured at, without training."""
    agent = agent_of(device, env=make_env(TOKENIZER, stop="ab", reference=reference()), kl_coef=0.05, max_num_seqs=4)
    agent.learn(20)
    env, said, state = make_env(TOKENIZER), [], None
    for episode in range(2):
        observation, _ = env.reset(seed=episode)
        done = False
        while not done:
            action, state = agent.predict(observation, state, deterministic=episode == 0)
            observation, _, terminated, truncated, _ = env.step(int(action))
            said.append(int(action))
            done = terminated or truncated
    texts = agent.generate(["a", "b"], n=2, max_new_tokens=5), agent.generate(["a"], deterministic=True)
    report = agent.audit(n=8, quiet=True)
    assert report.passed, str(report)
    return said, texts, agent.evaluate(make_env(TOKENIZER)), str(agent.play().table())


def test_evaluation_prediction_audit_and_playback_are_those_of_the_cpu():
    expected = inference("cpu")
    with without_mistakes():
        found = inference("cuda")
    assert found[:2] == expected[:2]
    assert found[2].keys() == expected[2].keys()
    for key, value in expected[2].items():
        assert found[2][key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_a_reward_model_on_cuda_scores_and_trains_an_agent(family):
    def scored(device):
        torch.manual_seed(0)
        model = RewardModel(make_classifier(family, len(TOKENIZER), 1).to(device), TOKENIZER, batch_size=3)
        assert next(model.model.parameters()).device.type == device
        scores = model(prompts=["a", "ab", "", "c"], completions=["b", "cdefg", "a", "hh"])
        return scores, trained(agent_of(device, env=make_env(TOKENIZER, reward=model)), 40)

    expected = scored("cpu")
    with without_mistakes():
        scores, found = scored("cuda")
    np.testing.assert_allclose(scores, expected[0], rtol=1e-4, atol=1e-5)
    agrees(found, expected[1])


# --- synchronizations ----------------------------------------------------------------------------------------------------


def test_synchronizations_are_counted_by_their_site(rehearsed):
    x = on_cuda()
    with counting_syncs() as syncs:
        assert x.sum().item() == 15 and float(x.max()) == 5 and int(x[0, 1]) == 1 and bool((x >= 0).all())
        x.tolist(), x.cpu(), x.to("cpu"), torch.empty(2, 3).copy_(x)
        x[x > 2], x.masked_select(x > 2), x.nonzero(), x.unique(), torch.equal(x, x)
        x[x > 2] = 0.0  # a fill, without a wait
        x[x > 2] = x[0, :0]  # with one
        torch.cuda.Event().synchronize()
        x.repeat_interleave(torch.ones_like(x[0]).long(), dim=1, output_size=3)
        x + 1, x.any(), x.masked_fill(x > 2, 0), x.to(torch.float64), x[torch.tensor([0], device="cuda")]
    assert all(site.startswith("tests/test_rehearsal.py:") for site, _ in syncs.sites)
    kinds = Counter()
    for (_, kind), count in syncs.sites.items():
        kinds[kind] += count
    expected = {"item": 4, "tolist": 1, "to cpu": 3, "mask index": 2, "synchronize": 1}
    assert kinds == {**expected, **dict.fromkeys(("masked_select", "nonzero", "unique", "equal"), 1)}
    assert syncs.count == 15 and syncs.num_uploads == 1 and "mask index" in syncs.table()
    with counting_syncs() as none:
        ON_CPU.sum().item(), ON_CPU.tolist(), ON_CPU[ON_CPU > 2], torch.tensor([1.0])
    assert none.count == none.num_uploads == 0


def waits_in(call, shorter, longer):
    """The slope of the synchronizations between two lengths of a run, and its table by call sites."""
    counts = []
    call(shorter)  # trials and other work that is done once
    for length in (shorter, longer):
        with counting_syncs() as syncs:
            call(length)
        counts.append(syncs)
    difference, steps = counts[1] - counts[0], longer - shorter
    return difference.count / steps, difference.table(steps)


DECODINGS = {
    "shared prompts": ("llama", True, SharedDecoding, {}),
    "shared prompts, GPT-2": ("gpt2", True, SharedDecoding, {}),
    "plain": ("llama", False, PlainDecoding, {}),
    "plain, GPT-2": ("gpt2", False, PlainDecoding, {}),
    "greedy": ("llama", True, SharedDecoding, {"deterministic": True}),
    "restricted": ("llama", True, SharedDecoding, {"top_k": 5, "top_p": 0.9}),
    "constrained": ("llama", True, SharedDecoding, {"constraint": True}),
}


@pytest.mark.parametrize("name", DECODINGS)
def test_a_decoding_step_waits_for_the_device_once(name, rehearsed):
    family, sharing, decoding, sampling = DECODINGS[name]
    model = make_model(family, len(TOKENIZER), scale=1.5).eval().cuda()
    used, original, sampling = [], decoding.__call__, dict(sampling)
    rules = make_env(TOKENIZER, allowed_tokens=letter).unwrapped.rules
    constraint = rules.constraint if sampling.pop("constraint", False) else None

    def decode(length):
        """All rows go on to the limit, within the slots that are allocated at first."""
        sampler = Sampler(generator=torch.Generator("cuda").manual_seed(0), **sampling)
        settings = {"vocab_size": rules.vocab_size, "eos_id": 99, "max_new_tokens": length, "group_size": 2}
        settings |= {"prefix_sharing": sharing, "constraint": constraint}
        responses, _ = sample_responses(model, [[3, 4, 5], [6, 7]], sampler, **settings)
        assert [len(response) for response in responses] == [length] * 4

    def spy(self, *tokens):
        used.append(type(self))
        return original(self, *tokens)

    with unittest.mock.patch.object(decoding, "__call__", spy):
        slope, table = waits_in(decode, 20, 40)
    assert set(used) == {decoding}
    # One transfer. With a mask of padding, transformers also asks whether there is any, to leave the mask out.
    of_masks = 1 if decoding is PlainDecoding else 0
    assert slope <= 1 + of_masks, f"{slope} synchronizations in a decoding step:\n{table}"
    assert not of_masks or "masking_utils" in table


STEPS = {
    "GRPO": (GRPO, {}, {}),
    "GRPO, KL and importance weights": (GRPO, {"reference": "model"}, {"kl_coef": 0.1, "importance_cap": 2.0}),
    "PPO": (PPO, {}, {}),
    "PPO, its own critic": (PPO, {}, {"separate_critic": True}),
    "REINFORCE": (REINFORCE, {}, {}),
    "plain prompts": (GRPO, {}, {"prefix_sharing": False}),
    "token constraints": (GRPO, {"allowed_tokens": letter}, {}),
}


def micro_batch_waits(agent):
    agent._configure()
    trainer, rollout = agent.make_trainer(), agent.sample_rollout()
    trainer.compute_old_logprobs(rollout)
    agent.compute_advantages(rollout)
    rows = np.arange(len(rollout))

    def step(count):
        trainer.micro_batch_size = len(rollout) // count
        trainer.step(rollout, rows, is_first_pass=True)
        assert len(trainer.local_micro_batches(rollout, rows)) == count

    return waits_in(step, 2, 6)


@pytest.mark.parametrize("name", STEPS)
def test_a_micro_batch_waits_for_the_device_four_times_at_most(name, rehearsed):
    kind, env, settings = STEPS[name]
    env = {**env, **({"reference": reference()} if "reference" in env else {})}
    group = {"group_size": 2} if kind is GRPO else {}
    slope, table = micro_batch_waits(agent_of("cuda", kind, make_env(TOKENIZER, **env), n_envs=24, **group, **settings))
    assert slope <= 4, f"{slope} synchronizations in a micro-batch:\n{table}"


@pytest.mark.parametrize("kind", [GRPO, PPO])
def test_a_micro_batch_of_several_turns_waits_four_times_at_most(kind, rehearsed):
    group = {"group_size": 2} if kind is GRPO else {}
    slope, table = micro_batch_waits(agent_of("cuda", kind, turns(), n_envs=24, prefix_sharing=False, **group))
    assert slope <= 4, f"{slope} synchronizations in a micro-batch:\n{table}"
