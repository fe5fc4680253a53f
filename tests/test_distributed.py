"""Several processes over gloo, replicated and sharded (FSDP2): they make what one process makes, and end together."""

import re
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from agents import GRPO
from agents.distributed import communicator
from llm_env.prompts import read_jsonl
from tests.conftest import refused

pytest.importorskip("accelerate")
pytest.importorskip("peft")

from tests import processes
from tests.processes import FSDP, KINDS, launch, make_agent, make_text_env


def results(run, folder, count, **environment):
    folder.mkdir(exist_ok=True)
    done = launch(run, folder, count, **environment)
    assert [code for code, _ in done] == [0] * count, "\n".join(text[-3000:] for _, text in done)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def furthest(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    processes.equal(folder)
    return torch.load(folder / "0.pt", weights_only=False), folder


@pytest.mark.slow
@pytest.mark.parametrize("count, sharded", [(2, False), (3, False), (2, True), (3, True)])
def test_processes_learn_what_one_learns(count, sharded, alone, tmp_path):
    """The same texts and, with plain SGD, weights to 1e-6, for all algorithms; files of N processes go on in one and in N."""
    expected, folder = alone
    environment = FSDP if sharded else {}
    found = results("equal", tmp_path, count, **environment)
    for kind in KINDS:
        start = make_agent(kind).get_parameters()["policy"]
        assert furthest(start, expected[kind]["weights"]) > 1e-3  # something was learned
        for one in found:
            assert one[kind]["texts"] == expected[kind]["texts"] and one[kind]["tokens"] == expected[kind]["tokens"]
            assert furthest(one[kind]["weights"], expected[kind]["weights"]) < 1e-6
    assert found[0]["report"] == pytest.approx(expected["report"], abs=1e-3)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    saved = {f"lm.{name}": value for name, value in plain.items()}
    assert furthest(saved, found[0]["before"]["weights"]) == 0
    again = processes.learned(GRPO.load(tmp_path / "agent", env=make_text_env()))
    assert again["texts"] == found[0]["after"]["texts"] and again["tokens"] == found[0]["after"]["tokens"]
    assert furthest(again["weights"], found[0]["after"]["weights"]) < 1e-3  # Adam makes large steps of tiny gradients
    if count == 2:
        (tmp_path / "of_one.zip").write_bytes((folder / "agent.zip").read_bytes())
        for one in results("resume", tmp_path, 2, **environment):
            assert furthest(one["agent"]["weights"], found[0]["after"]["weights"]) == 0
            assert one["of_one"]["texts"] == expected["after"]["texts"]


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_processes_stay_together(sharded, tmp_path):
    found = results("together", tmp_path, 2, **(FSDP if sharded else {}))
    for part in ("native", "after a draw", "token clock"):
        assert furthest(found[0][part]["weights"], found[1][part]["weights"]) == 0, part
        assert found[0][part]["texts"] == found[1][part]["texts"], part
        for texts in found[0][part]["texts"]:  # one prompt, and two processes that wrote half of the answers each
            half = len(texts) // 2
            assert len(set(texts[:half]) & set(texts[half:])) < half / 2
    assert found[0]["best"] == found[1]["best"]
    (folder,) = (tmp_path / "runs").iterdir()
    scalars = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in scalars.Scalars("rollout/ep_rew_mean")][-1] == found[0]["token clock"]["tokens"]
    evaluations = np.load(tmp_path / "evaluations.npz")
    assert evaluations["results"].mean(1).max() == pytest.approx(found[0]["best"])
    best = evaluations["timesteps"][evaluations["results"].mean(1).argmax()]
    assert best - 16 * 8 <= GRPO.load(tmp_path / "best_model").num_timesteps <= best  # as it stood when the rollout began
    assert len(list((tmp_path / "checkpoints").iterdir())) > 1
    records = [read_jsonl(tmp_path / name) for name in ("record.jsonl", "record.process1.jsonl")]
    assert len(records[0]) == len(records[1]) == 8 * sum(len(found[0][part]["texts"]) for part in ("native", "after a draw"))


@pytest.mark.slow
def test_an_error_in_one_is_an_error_in_all_and_slow_rewards_are_waited_for_once(alone, tmp_path):
    """Nothing of the rollout that failed has happened: what is learned after it is what one process learns."""
    found = results("fault", tmp_path, 2)
    assert "the judge is out for lunch" in found[0]["error"] and "process 1 of 2 failed" in found[0]["error"]
    assert found[1]["error"].startswith("ValueError") and "the judge is out for lunch" in found[1]["error"]
    for one in found:
        assert furthest(one["weights"], alone[0]["GRPO"]["weights"]) < 1e-6
        assert 1.0 < one["seconds a rollout"] < 1.9  # the second process sleeps for one in each
    assert set(found[0]["calls"]) == {8} and set(found[1]["calls"]) == {12}  # each scores its own episodes


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_where_one_dies_the_others_stop_and_go_on_from_the_last_checkpoint(sharded, tmp_path):
    begun = time.monotonic()
    (code, text), (died, _) = launch("death", tmp_path, 2, **(FSDP if sharded else {}))
    assert died == 7 and code == 1 and time.monotonic() - begun < 60
    assert re.search("RuntimeError: process 0 of 2: another process exited or did not respond within 2 h", text), text[-3000:]
    last = max((tmp_path / "checkpoints").iterdir(), key=lambda file: int(re.search(r"(\d+)_steps", file.name)[1]))
    agent = GRPO.load(last, env=make_text_env())
    found = processes.learned(agent, 300 - agent.num_timesteps)
    whole = processes.learned(make_agent(optimizer=torch.optim.AdamW), 300)
    assert agent._n_updates == len(whole["texts"]) and found["texts"] == whole["texts"][-len(found["texts"]) :]
    assert len(found["texts"]) == len(whole["texts"]) - 1  # the file has what went before the rollout that it was written in
    assert furthest(found["weights"], whole["weights"]) < 1e-3


@pytest.mark.slow
def test_what_one_process_is_told_by_a_callback_all_do(alone, tmp_path):
    """To stop, or an error: the rollout has not happened in any, and what follows is what one process learns."""
    found = results("told", tmp_path, 2)
    for one in found:
        assert one["stopped at"] == 0 and furthest(one["weights"], alone[0]["GRPO"]["weights"]) < 1e-6
        assert "at evaluate (results), learn " in one["apart"]
        assert one["stopped while sampling"] == (0, 0)
    for exam, told in (
        (False, "process 0 of 2 failed, and all stop with it: OSError"),
        (True, "at learn (results), evaluate ("),
    ):
        assert found[0][f"error, exam {exam}"] == "OSError: the disk is full" and told in found[1][f"error, exam {exam}"]
    assert found[1]["in the update"] == "MemoryError: no room" and "process 1 of 2 failed" in found[0]["in the update"]
    assert furthest(found[0]["in the end"]["weights"], found[1]["in the end"]["weights"]) == 0


@pytest.mark.slow
def test_sharded_weights_that_one_process_saves_alone_are_not_waited_for(tmp_path):
    """Replicated ones are whole in it."""
    for code, text in launch("apart", tmp_path, 2, **FSDP):
        assert code == 1 and "OutOfStepError: processes 0 to 1 are at save (weights), learn " in text
    assert not (tmp_path / "agent.zip").exists()
    for code, text in launch("apart", tmp_path, 2):
        assert code == 0, text
    assert (tmp_path / "agent.zip").exists()


@pytest.mark.slow
def test_mixed_precision_of_sharded_weights_is_that_of_one_process(tmp_path):
    """bfloat16 products, and log-probs, values and the weights that are trained in float32."""
    found = results("mixed", tmp_path, 2, **FSDP, ACCELERATE_MIXED_PRECISION="bf16")
    for one in found:  # nothing of it is held beside the shards, and in bfloat16 while they are together
        held, gathered = one.pop("base")
        assert set(held) == {"meta"} and gathered == {torch.bfloat16}
    for kind in found[0]:
        expected, exact = (
            make_agent(kind, bf16=bf16).policy.evaluate_actions([[3, 4]] * 2, [[4, 5, 6]] * 2) for bf16 in (True, False)
        )
        start = make_agent(kind).get_parameters()["policy"]
        for one in found:
            before, weights = one[kind]["before"], one[kind]["weights"]
            assert one[kind]["bf16"]
            for name in ("logp", "entropy", "values")[: 3 if kind == "PPO" else 2]:
                value, same = getattr(before, name), getattr(expected, name)
                assert value.dtype == torch.float32
                assert (value - same).abs().max() < 2 * (same - getattr(exact, name)).abs().max() + 1e-6, name
            assert (before.logp != before.logp.bfloat16()).any()
            assert {value.dtype for value in weights.values()} == {torch.float32}
            assert 1e-3 < furthest(start, weights) < 1


@pytest.mark.slow
def test_what_does_not_fit_the_model_is_refused(tmp_path):
    for code, text in launch("refused", tmp_path, 2, **FSDP, FSDP_TRANSFORMER_CLS_TO_WRAP="BertLayer"):
        assert (
            code == 0
            and "n_envs=4 with group_size=4 is 1 prompts a rollout, fewer than the 2 processes; raise n_envs to 8" in text
        )
        assert re.search("ValueError: .*does not fit LanguagePolicy.*LlamaDecoderLayer.*BertLayer", text), text[-3000:]
        assert "optimizer='adamw_8bit', but the weights are sharded" in text
        assert "optimizer='paged_adamw_8bit', but the weights are sharded" in text


@pytest.mark.parametrize(
    "setting, message",
    [
        (
            {"distributed_type": "DEEPSPEED"},
            "distributed_type: DEEPSPEED in accelerate's configuration must be one of MULTI_CPU, MULTI_GPU, FSDP",
        ),
        ({"mixed_precision": "fp16"}, "mixed_precision: fp16 in accelerate's configuration must be 'no' or 'bf16'"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps: 4 in accelerate's configuration must be 1"),
        ({"FSDP_VERSION": "1"}, "fsdp_version: 1 in accelerate's configuration must be 2"),
        (
            {"FSDP_OFFLOAD_PARAMS": "true"},
            "fsdp_offload_params: true in accelerate's configuration is not supported. Leave it out",
        ),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "give the agent gradient_checkpointing=True"),
    ],
)
def test_configurations_that_cannot_work_are_refused(setting, message, monkeypatch):
    def made(cpu):
        said = {"distributed_type": "MULTI_CPU", "mixed_precision": "no", "gradient_accumulation_steps": 1} | setting
        kind = SimpleNamespace(value=said.pop("distributed_type"))
        return SimpleNamespace(distributed_type=kind, state=SimpleNamespace(fsdp_plugin=None), **said)

    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    for name, value in (FSDP | setting).items() if any(name.isupper() for name in setting) else ():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("accelerate.Accelerator", made)
    refused(communicator._accelerator, match=message)


def test_without_accelerate_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(communicator.get_communicator, error=ImportError, match=r"pip install 'llm-env\[distributed\]'")


def test_every_row_is_one_processs():
    """Whole groups, as evenly as can be, in the order of the processes."""
    parts = []
    for rank in range(3):
        process = communicator.Communicator()
        process.rank, process.size = rank, 3
        parts.append(list(process.split_rows(20, 4)))
    assert parts == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18, 19]]
