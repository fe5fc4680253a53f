"""Optimizer and reference on the CPU while nothing asks for them: what that leaves as it is, and that it is done."""

import copy
import re

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import llm_env.reference
from agents import GRPO
from agents.optimizers import Offloaded, offloaded, states_to_come
from llm_env.reference import Reference
from tests.conftest import make_model
from tests.test_memory import ACCELERATOR, TOKENIZER, eight_bit, env, large_model, make_agent, same_numbers


@pytest.fixture(scope="module")
def large():
    return large_model()


@pytest.mark.parametrize(
    "keywords",
    [{}, {"policy_kwargs": {"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}}}, {"optimizer": "8"}],
    ids=["AdamW", "SGD", "8 bits"],
)
def test_offloading_leaves_the_training_as_it_is(keywords, large):
    if "optimizer" in keywords:
        keywords = eight_bit()
    weights = []
    for offload in (False, True):
        environment = env(reference=make_model("llama", len(TOKENIZER), seed=1))
        switches = {"offload_optimizer": offload, "offload_reference": offload}
        agent = make_agent(model=copy.deepcopy(large), environment=environment, kl_coef=0.1, **keywords, **switches).learn(150)
        assert isinstance(agent.policy.optimizer, Offloaded) == offload and agent.rules.reference.visited == (
            torch.device("cpu") if offload else None
        )
        weights.append(list(agent.policy.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.fixture
def moves(monkeypatch):
    """What is moved to an accelerator, which is played by copies on the CPU, and from there."""
    original, seen, there = torch.Tensor.to, [], set()

    def to(tensor, *args, **kwargs):
        if args and args[0] == ACCELERATOR:
            seen.append(("there", tensor.numel()))
            copied = tensor.clone()
            there.add(copied.untyped_storage().data_ptr())
            return copied
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    return seen, lambda tensor: tensor.untyped_storage().data_ptr() in there


@pytest.mark.parametrize("fails", [False, True])
def test_the_reference_is_on_the_device_while_it_is_asked_and_not_after(fails, moves, monkeypatch):
    seen, is_there = moves
    reference = Reference(make_model("llama", len(TOKENIZER)))
    reference.check_vocabulary(len(TOKENIZER))
    asked = [[1, 2, 3], [4]], [[5, 6], [7, 1]]
    before = reference.log_probs(*asked)
    tensors = [*reference.model.parameters(), *reference.model.buffers()]
    homes = [tensor.data_ptr() for tensor in tensors]
    reference.visited = ACCELERATOR
    original, passes = llm_env.reference.score, []

    def score(model, *args, **kwargs):
        passes.append([is_there(tensor) for tensor in tensors])
        if fails:
            raise RuntimeError("out of memory")
        return original(model, *args, **kwargs)

    monkeypatch.setattr(llm_env.reference, "score", score)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            reference.log_probs(*asked)
    else:
        after = reference.log_probs(*asked)
        assert all((a == b).all() for a, b in zip(before, after, strict=True))
    assert passes == [[True] * len(tensors)]
    assert len(seen) == len(tensors) and [tensor.data_ptr() for tensor in tensors] == homes


def test_a_reference_that_cannot_be_moved_as_a_whole_is_not_moved_at_all(moves, monkeypatch):
    """Memory may run out in the middle of the way."""
    seen, is_there = moves
    model, to = make_model("llama", len(TOKENIZER)), torch.Tensor.to

    def breaks_off(tensor, *args, **kwargs):
        if len(seen) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", breaks_off)
    reference = Reference(model, copy_model=False)
    reference.check_vocabulary(len(TOKENIZER))
    reference.visited = ACCELERATOR
    with pytest.raises(torch.OutOfMemoryError):
        reference.log_probs([[1]], [[2]])
    assert len(seen) == 5 and not any(is_there(tensor) for tensor in (*model.parameters(), *model.buffers()))


def test_a_reference_that_is_the_policy_is_not_offloaded():
    model = make_model("llama", len(TOKENIZER))
    environment = env(reference=Reference(model, copy_model=False))
    with pytest.raises(ValueError, match="offload_reference=True, but the env's reference has its weights in common"):
        make_agent(model=model, environment=environment, offload_reference=True)


@pytest.fixture
def fake_device():
    """Tensors without numbers that are on an accelerator by name; what mixes devices is an error, as it would be there."""
    with FakeTensorMode() as mode:
        yield mode


KINDS = [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {"capturable": True})]


@pytest.mark.parametrize(("kind", "kwargs"), KINDS, ids=["SGD", "AdamW"])
def test_the_state_is_on_the_cpu_between_two_steps_and_on_the_device_in_them(kind, kwargs, fake_device, monkeypatch):
    parameters = [nn.Parameter(torch.zeros(size, 3, device=ACCELERATOR)) for size in (5, 2, 7)]
    optimizer = offloaded(kind)(parameters, lr=0.1, **kwargs)
    largest = {torch.optim.SGD: 1, torch.optim.AdamW: 2}[kind] * 7 * 3 * 4
    assert states_to_come(optimizer) == largest
    places, step = [], kind.step

    def spied(self, *args):
        step(self, *args)
        places.append([{v.device.type for v in self.state.get(p, {}).values() if v.ndim} or set() for p in parameters])

    monkeypatch.setattr(kind, "step", spied)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    there, here = {"cuda"}, {"cpu"}
    assert places[3:] == [[there, here, here], [here, there, here], [here, here, there]]
    optimizer.load_state_dict(optimizer.state_dict())
    moments = [v for state in optimizer.state.values() for v in state.values() if v.ndim]
    assert {v.device.type for v in moments} == here and len(moments) >= 3
    assert all(parameter.device.type == "cuda" and parameter.shape[1] == 3 for parameter in parameters)
    assert states_to_come(optimizer) == 0


def test_a_step_that_fails_leaves_the_state_on_the_cpu_and_all_parameters_in_their_groups(fake_device, monkeypatch):
    parameters = [nn.Parameter(torch.zeros(size, 3, device=ACCELERATOR)) for size in (5, 2)]
    optimizer = offloaded(torch.optim.SGD)(parameters, lr=0.1, momentum=0.9)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert {v.device.type for state in optimizer.state.values() for v in state.values()} == {"cpu"}
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]


def test_an_optimizer_that_counts_for_all_parameters_together_is_refused():
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            self.param_groups[0]["steps"] = self.param_groups[0].get("steps", 0) + 1
            super().step()

    given = {"policy_kwargs": {"optimizer_class": Counting, "optimizer_kwargs": {}}}
    make_agent(**given).learn(1)
    agent = make_agent(**given, offload_optimizer=True)
    with pytest.raises(ValueError, match="Counting keeps steps for all parameters together"):
        agent.learn(1)


@pytest.mark.parametrize("saved", [False, True])
def test_a_file_can_be_gone_on_with_under_the_other_setting(saved, large, tmp_path):
    """Whether the state is offloaded is no matter of the file."""
    first = make_agent(model=copy.deepcopy(large), offload_optimizer=saved).learn(100)
    first.save(tmp_path / "agent")
    second = GRPO.load(tmp_path / "agent", env=env(), offload_optimizer=not saved)
    assert isinstance(second.policy.optimizer, Offloaded) != saved
    for agent in (first, second):
        agent.learn(100, reset_num_timesteps=False)
    assert same_numbers(first, second)


def test_switches_are_true_or_false():
    for name in ("gradient_checkpointing", "offload_optimizer", "offload_reference"):
        with pytest.raises(ValueError, match=re.escape(f"{name}='yes' must be True or False")):
            make_agent(**{name: "yes"})
