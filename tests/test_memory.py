"""The keywords that save memory: what they leave as it is, and that they do what they say."""

import copy
import re
import sys
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import llm_env.reference
from agents import GRPO, PPO
from agents.policy.gradient_checkpointing import layers_of
from agents.training.optimizers import missing_state_bytes
from examples.benchmarks.peak import peak_bytes
from tests.conftest import make_model, make_tokenizer
from tests.probes import make_env

TOKENIZER = make_tokenizer("abcdefgh")
PROMPTS = ("abcdefgh", "cd", "efg")


def letters(completions, **kwargs):
    return [c.count("a") + 0.3 * len(c) for c in completions]


def env(**kwargs):
    return make_env(TOKENIZER, letters, PROMPTS, **{"max_prompt_tokens": 8, "max_new_tokens": 6, **kwargs})


def make_agent(kind=GRPO, family="llama", environment=None, model=None, **kwargs):
    group = {"group_size": 4} if issubclass(kind, GRPO) else {}
    settings = {"learning_rate": 1e-2, "n_envs": 12, "seed": 0, "preflight": False, **group, **kwargs}
    return kind(model or make_model(family, len(TOKENIZER)), environment or env(), **settings)


def gradients(agent, rollout):
    """Of the loss of a whole rollout, from one pass."""
    agent.policy.zero_grad()
    if agent.needs_values:
        rollout.old_values, rollout.last_values = torch.zeros_like(rollout.rewards), torch.zeros_like(rollout.scores)
    rollout.old_logp = None
    agent.compute_advantages(rollout)
    rollout.advantages = torch.linspace(-1, 1, rollout.advantages.numel()).view(rollout.advantages.shape) * rollout.mask
    agent.make_trainer().backward_micro_batch(rollout, rollout.mask / rollout.mask.sum(), is_first_pass=True)
    return [p.grad.clone() for p in agent.policy.parameters() if p.grad is not None]


@contextmanager
def layer_calls(model):
    """Counts how often attention is computed, layer by layer."""
    calls = []
    hooks = [
        module.register_forward_hook(lambda module, *_: calls.append(module))
        for layer in layers_of(model)
        for name, module in layer.named_children()
        if name in ("self_attn", "attn")
    ]
    assert len(hooks) == model.config.num_hidden_layers
    yield calls
    for hook in hooks:
        hook.remove()


# --- gradient checkpointing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("sharing", [True, False, "dense"])
@pytest.mark.parametrize("bf16", [False, True])
def test_layers_are_computed_again_and_the_gradient_is_the_same(family, sharing, bf16, monkeypatch):
    """Once in the forward pass and once in the backward pass, prompts shared in either way or not."""
    agent = make_agent(family=family, prefix_sharing=bool(sharing), bf16=bf16)
    rollout, layers = agent.sample_rollout(), agent.policy.lm.config.num_hidden_layers
    if sharing == "dense":
        monkeypatch.setattr(llm_env.lm.sharing, "WAYS", ("dense",))
    gradients(agent, rollout)  # trials of a few tokens are over after this
    with layer_calls(agent.policy.lm) as calls:
        plain = gradients(agent, rollout)
        assert len(calls) == layers
        agent.policy.gradient_checkpointing = True
        again = gradients(agent, rollout)
        assert len(calls) == 3 * layers
        with torch.no_grad():
            agent.policy.evaluate_actions(rollout.prompts, rollout.responses)
        assert len(calls) == 4 * layers
    assert len(plain) == len(again) > 10
    for a, b in zip(plain, again, strict=True):
        assert (a - b).abs().max() <= 1e-6 * max(1, a.abs().max())
    assert "forward" not in {name for layer in layers_of(agent.policy.lm) for name in vars(layer)}


@pytest.mark.parametrize("kind", [GRPO, PPO])
def test_checkpointing_trains_to_the_same_weights(kind):
    """A critic of its own is computed again likewise."""
    critic = {"separate_critic": True} if kind is PPO else {}
    plain, again = (make_agent(kind, gradient_checkpointing=wanted, **critic) for wanted in (False, True))
    with layer_calls(again.policy.critic or again.policy.lm) as calls:
        for agent in (plain, again):
            agent.learn(150)
    assert calls and again._n_updates == plain._n_updates > 1
    for a, b in zip(plain.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


def test_checkpointing_takes_less_memory():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 12}
    agent = make_agent(model=make_model_of(**sizes), n_envs=24)
    rollout, peaks = agent.sample_rollout(), []
    gradients(agent, rollout)
    for wanted in (False, True):
        agent.policy.gradient_checkpointing = wanted
        agent.policy.zero_grad()
        peaks.append(peak_bytes(lambda: gradients(agent, rollout), agent.device))
    weights = sum(p.nbytes for p in agent.policy.parameters())
    assert peaks[1] - weights < 0.4 * (peaks[0] - weights)


def make_model_of(**sizes):
    common = {"vocab_size": len(TOKENIZER), "eos_token_id": 0, "bos_token_id": None, "max_position_embeddings": 128}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes, **common))


@pytest.mark.parametrize("sharing", ["auto", False])
def test_sampling_keeps_its_cache(sharing):
    """Prompts are fed once, and then one token a response at a time, as without checkpointing; and the same is drawn."""
    widths, drawn = {}, {}
    for wanted in (False, True):
        agent = make_agent(gradient_checkpointing=wanted, prefix_sharing=sharing)
        agent.policy.sample([[1, 2, 3]], 1, 1)
        seen = widths[wanted] = []
        agent.policy.lm.base_model.register_forward_pre_hook(
            lambda _, args, given, seen=seen: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
        )
        with layer_calls(agent.policy.lm):
            drawn[wanted] = agent.policy.sample([[1, 2, 3]], 4, 8, generator=torch.Generator().manual_seed(0))[0]
    assert widths[False] == widths[True] and drawn[False] == drawn[True]
    assert len(widths[True]) > 2 and all(width <= 4 for _, width in widths[True])


def test_dropout_stays_off_in_layers_that_are_computed_again():
    """OPT's layers drop out themselves, in training mode: what transformers' own switch would ask for."""
    config = OPTConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, dropout=0.5,
        max_position_embeddings=64, word_embed_proj_dim=32, eos_token_id=0, bos_token_id=None, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    agent = make_agent(model=OPTForCausalLM(config), gradient_checkpointing=True)
    rollout = agent.sample_rollout()
    once, again = gradients(agent, rollout), gradients(agent, rollout)
    agent.policy.gradient_checkpointing = False
    plain = gradients(agent, rollout)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(once, plain, strict=True))


def test_a_model_without_such_layers_is_refused_and_its_own_switch_is_spoken_of():
    model = make_model("llama", len(TOKENIZER))
    for module in model.modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            module.__class__ = type("Layer", (nn.Module,), {**vars(type(module)), "gradient_checkpointing": False})
    with pytest.raises(ValueError, match="transformers cannot checkpoint the layers of LlamaForCausalLM"):
        make_agent(model=model, gradient_checkpointing=True)
    model = make_model("llama", len(TOKENIZER))
    model.activation_checkpointing_enable()
    with pytest.warns(UserWarning, match="own gradient checkpointing is on, which has no effect in evaluation mode"):
        make_agent(model=model)


# --- peak memory -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_peak_memory_on_cuda_is_that_of_its_allocator():
    x = torch.zeros(1 << 20, device="cuda")
    assert peak_bytes(lambda: x + 1, x.device) == 4 << 20


def test_peak_memory_on_a_cpu_by_hand():
    """Three tables of 4 MiB at once, the fourth after two were released."""

    def call():
        a = x + x
        b = a + a
        c = b + b
        del a, b
        return c + c

    x = torch.zeros(1 << 20)
    assert peak_bytes(call, x.device) == 3 * 4 << 20


# --- optimizers ------------------------------------------------------------------------------------------------------


def bytes_of_state(optimizer):
    tables = {id(v): v.nbytes for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.ndim}
    return sum(tables.values())


def large_model():
    """With weights of more than 4096 numbers, from which on bitsandbytes keeps 8 bits, and others."""
    torch.manual_seed(0)
    return make_model_of(hidden_size=72, intermediate_size=100, num_hidden_layers=2, head_dim=18)


@pytest.fixture(scope="module")
def large():
    return large_model()


def eight_bit():
    pytest.importorskip("bitsandbytes")
    return {"optimizer": "adamw_8bit"}


def test_adamw_8bit_takes_what_was_foretold_and_much_less_than_adamw(large):
    agent, other = make_agent(model=large, **eight_bit()), make_agent(model=large)
    foretold = missing_state_bytes(agent.policy.optimizer)
    agent.learn(1), other.learn(1)
    state = agent.policy.optimizer.state
    kinds = {value["state1"].dtype for value in state.values()}
    assert kinds == {torch.uint8, torch.float32} and missing_state_bytes(agent.policy.optimizer) == 0
    tables = 2 * 256 * 4  # from 8 bits to a number, once for all
    assert bytes_of_state(agent.policy.optimizer) == foretold + tables
    assert bytes_of_state(other.policy.optimizer) == 2 * sum(p.nbytes for p in large.parameters()) > 2.5 * foretold


MOVING = {"kl_coef": 0.1, "reference_every": 2}


@pytest.mark.parametrize("keywords", [{"optimizer": "adamw_8bit"}, {"optimizer": "paged_adamw_8bit"}, MOVING, {}], ids=str)
def test_a_run_that_is_saved_goes_on_exactly(keywords, large, tmp_path):
    """Also from a reference that has become another."""
    if "optimizer" in keywords:
        eight_bit()

    def fresh():
        return env(reference=copy.deepcopy(large)) if keywords is MOVING else env()

    whole, first = (make_agent(model=copy.deepcopy(large), environment=fresh(), **keywords) for _ in range(2))
    whole.learn(150).learn(150, reset_num_timesteps=False)
    first.learn(150).save(tmp_path / "agent")
    assert first._reference_sync.has_moved == (keywords is MOVING)
    second = GRPO.load(tmp_path / "agent", env=fresh())
    assert second._n_updates > 1 and [getattr(second, key) for key in keywords] == list(keywords.values())
    second.learn(150, reset_num_timesteps=False)
    assert same_numbers(whole, second) and whole._n_updates == second._n_updates
    assert not same_numbers(whole, first)


def same_numbers(*agents):
    """Bit for bit: weights and the optimizer's state."""
    tables = []
    for agent in agents:
        states = [value for state in agent.policy.optimizer.state.values() for value in state.values()]
        tables.append([*agent.policy.state_dict().values(), *map(torch.as_tensor, states)])
    assert len(tables[0]) == len(tables[1]) > 20
    return all(torch.equal(a, b) for a, b in zip(*tables, strict=True))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_the_paged_optimizer_takes_the_steps_of_the_other(large):
    """Where nothing can be paged, on a CPU, they are the same bit for bit; on a GPU large tables are left to the driver."""
    plain, paged = (make_agent(model=copy.deepcopy(large), optimizer=f"{kind}adamw_8bit") for kind in ("", "paged_"))
    assert type(paged.policy.optimizer).__name__ == "PagedAdamW8bit"
    assert plain.learn(100).num_timesteps == paged.learn(100).num_timesteps and same_numbers(plain, paged)
    sizes = (400, 300), (100, 3)
    weights = [nn.Parameter(torch.zeros(size)) for size in sizes]
    assert missing_state_bytes(type(paged.policy.optimizer)(weights)) == 2 * 300 * 4


def test_an_optimizer_that_is_not_there_or_unknown(monkeypatch):
    with pytest.raises(
        ValueError, match=r"optimizer='adam' must be one of 'adamw_torch', 'adamw_8bit', 'paged_adamw_8bit'\. Set policy_kwargs"
    ):
        make_agent(optimizer="adam")
    with pytest.raises(ValueError, match=r"optimizer='adamw_8bit' and policy_kwargs\['optimizer_class'\]=.*SGD.* Drop one"):
        make_agent(**eight_bit(), policy_kwargs={"optimizer_class": torch.optim.SGD})
    for kwargs, error, message in (
        ({"optimizer_class": "SGD"}, TypeError, "optimizer_class'] is 'SGD'; give a torch.optim.Optimizer"),
        ({"optimizer_class": torch.optim.LBFGS}, TypeError, "closure"),
        ({"optimizer_kwargs": {"lr": 1.0}}, ValueError, "has lr=1.0; set learning_rate of the agent"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            make_agent(policy_kwargs=kwargs)
    with pytest.raises(TypeError, match="policy_kwargs='x' must be a dict"):
        make_agent(policy_kwargs="x")
    with pytest.raises(ValueError, match=r"importance_cap=.*must be a finite number of at least 1"):
        make_agent(importance_cap=float)
    with pytest.raises(ValueError, match="gradient_checkpointing='yes' must be True or False"):
        make_agent(gradient_checkpointing="yes")
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match=r"needs bitsandbytes \(.*\): pip install llm-env\[8bit\]"):
        make_agent(optimizer="adamw_8bit")
