"""What is logged, where it comes from, and that the manual's table explains all of it."""

import re
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.metrics import print_samples, samples_of, samples_table
from tests.conftest import make_model
from tests.probes import always_a, make_env, named
from tests.rollouts import collect
from tests.test_agents import AGENTS, TOKENIZER, Recorder, make_agent

PAGE = Path(__file__).parents[1] / "docs" / "training.md"
COMMON = {
    "rollout/ep_rew_mean", "rollout/ep_len_mean", "rollout/success_rate", "rollout/reward_std", "rollout/truncated",
    "rollout/reward/always_a", "rollout/reward/named", "time/fps", "train/loss", "train/policy_gradient_loss",
    "train/entropy", "train/entropy_loss", "train/grad_norm", "train/learning_rate", "train/kl_ref",
}  # fmt: skip
EXTRA = {
    "GRPO": {"rollout/zero_std_groups", "train/approx_kl", "train/clip_fraction", "train/clip_range", "train/logp_gap",
             "train/kl_loss", "rollout/kl_coef"},
    "PPO": {
        "train/approx_kl", "train/clip_fraction", "train/clip_range", "train/logp_gap", "train/value_loss",
        "train/explained_variance", "rollout/kl", "rollout/kl_coef",
    },
    "REINFORCE": {"rollout/kl"},
    "REINFORCE with critic": {"train/value_loss", "train/explained_variance", "train/logp_gap", "rollout/kl"},
}  # fmt: skip


def run(name, **kwargs):
    shaping = {"kl_coef": 0.1} if name == "PPO" else {}
    reference = make_model("llama", len(TOKENIZER), seed=1)
    env = make_env(TOKENIZER, reward=[always_a, named], success="named", reference=reference, **shaping)
    loss_kl = {"kl_coef": 0.1} if name == "GRPO" else {}
    agent = make_agent(name, env=env, **loss_kl, **kwargs)
    return agent


@pytest.mark.parametrize("name", AGENTS)
def test_tensorboard_has_scalars_and_samples(name, tmp_path):
    agent = run(name, tensorboard_log=str(tmp_path))
    agent.learn(300, log_interval=1)
    (folder,) = tmp_path.iterdir()
    assert folder.name == f"{type(agent).__name__}_1"
    events = EventAccumulator(str(folder)).Reload()
    scalars = set(events.Tags()["scalars"])
    assert COMMON | EXTRA[name] <= scalars, COMMON | EXTRA[name] - scalars
    for key in scalars:
        assert all(torch.isfinite(torch.tensor(event.value)) for event in events.Scalars(key)), key
    steps = [event.step for event in events.Scalars("rollout/ep_rew_mean")]
    assert steps[-1] == agent.num_timesteps and len(steps) == len(set(steps)) == len(events.Scalars("train/loss"))
    (text,) = [tag for tag in events.Tags()["tensors"] if "samples" in tag]
    assert b"| prompt | completion | return |" in events.Tensors(text)[0].tensor_proto.string_val[0]


@pytest.mark.parametrize("name", AGENTS)
def test_the_readme_explains_every_key(name):
    documented = set(re.findall(r"`((?:rollout|train|time)/[a-z_/<>]+)`", PAGE.read_text()))
    logged = []
    agent = run(name)
    agent.set_logger(Recorder(logged))
    agent.learn(50)
    keys = {re.sub("/reward/.*", "/reward/<name>", key) for key in logged[-1]}
    assert keys <= documented, keys - documented


def test_values_by_hand():
    logged = []
    agent = run("GRPO", n_envs=16)
    agent.set_logger(Recorder(logged))
    seen = []
    train = agent.train
    agent.train = lambda rollout: seen.append(rollout) or train(rollout)
    agent.learn(1)
    rollout, row = seen[0], logged[0]
    infos, lengths = rollout.infos, rollout.lengths
    returns = torch.tensor([info["reward/always_a"] + info["reward/named"] for info in infos])
    assert row["rollout/ep_rew_mean"] == pytest.approx(returns.mean().item())
    assert row["rollout/ep_len_mean"] == pytest.approx(lengths.mean())
    assert (
        row["rollout/reward/named"]
        == row["rollout/success_rate"]
        == pytest.approx(sum(info["reward/named"] for info in infos) / 16)
    )
    assert row["rollout/reward_std"] == pytest.approx(returns.std(correction=0).item(), abs=1e-6)
    groups = returns.view(-1, 4)
    equal = (groups == groups[:, :1]).all(1).float().mean().item()
    assert row["rollout/zero_std_groups"] == pytest.approx(equal)
    assert row["rollout/truncated"] == pytest.approx(sum(r[-1] != 0 for r in rollout.responses) / 16)
    d = (rollout.ref_logp - rollout.sampled_logp)[rollout.mask.bool()]
    assert row["train/kl_ref"] == pytest.approx((d.exp() - d - 1).mean().item(), rel=1e-3)
    assert row["train/kl_loss"] == pytest.approx(
        sum(
            ((r - s).exp() - (r - s) - 1)[:n].mean().item()
            for r, s, n in zip(rollout.ref_logp, rollout.sampled_logp, lengths, strict=True)
        )
        / 16,
        rel=1e-3,
    )
    assert row["train/approx_kl"] == pytest.approx(0, abs=1e-6) and row["train/clip_fraction"] == 0
    assert row["time/total_timesteps"] == lengths.sum() == agent.num_timesteps


def test_samples_are_escaped_for_markdown():
    agent = make_agent("GRPO")
    rollout = collect(agent.policy, agent.env.venv, 4, agent.sampler())
    rollout.infos[0].update({"prompt": "a|b\n<i>", "completion": ""})
    lines = samples_table(samples_of(rollout, agent.rules)).splitlines()
    assert lines[0].startswith("| prompt | completion |") and "| reward/always_a |" in lines[0]
    assert lines[2].startswith("| a&#124;b<br>&lt;i> | (empty) |")
    assert len(lines) == 2 + 8 and len(rollout) == 32  # one of every group


def test_samples_have_the_reference_answer_and_every_component(capsys):
    rows = [{"prompt": "abc", "answer": "xyz"}, {"prompt": "a", "answer": "uvw"}]
    env = make_env(TOKENIZER, [always_a, named], rows, max_prompt_tokens=3)
    agent = make_agent("GRPO", env=env, verbose=1, n_envs=8)
    agent.learn(1)
    shown = capsys.readouterr().out
    for part in ("prompt", "completion", "answer", "return", "reward/always_a", "reward/named"):
        assert part in shown
    rollout = agent.sample_rollout()
    for sample, info in zip(samples_of(rollout, agent.rules, 2), rollout.infos[::4], strict=True):
        assert sample["answer"] == {"abc": "xyz", "a": "uvw"}[info["prompt"]] and sample["completion"] == info["completion"]
        assert float(sample["reward/named"]) == pytest.approx(info["reward/named"], abs=1e-2)
    quiet = make_agent("GRPO", env=make_env(TOKENIZER), verbose=0, n_envs=8)
    quiet.learn(1)
    assert capsys.readouterr().out == ""


def test_samples_are_printed_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    print_samples([{"prompt": "a\nb", "completion": "[red]c[/red]", "return": "1"}])
    assert capsys.readouterr().out == "prompt: 'a\\nb' | completion: '[red]c[/red]' | return: '1'\n"
    monkeypatch.undo()
    print_samples([{"prompt": "a", "completion": "[red]c[/red]", "return": "1"}])
    assert "[red]c[/red]" in capsys.readouterr().out  # text of a model is no markup
