"""The ladder's measurements against slow or hand-worked computations, and its command on small numbers."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import Logger
from transformers import AutoModelForCausalLM

import llm_env
from agents import GRPO, PPO, REINFORCE
from tests.test_readme_and_examples import ROOT, run

sys.path.insert(0, str(ROOT / "examples"))
from ladder_parts import credit, runs, tables
from ladder_parts.gradients import Moments, evaluate, halves, policy_gradient, with_advantages
from ladder_parts.hacking import lazy_teacher


def test_moments_are_means_over_pairs_of_rounds():
    torch.manual_seed(0)
    draws = torch.randn(5, 2, 7, dtype=torch.float64) + 0.3  # rounds, estimators, numbers
    moments = Moments(2, 7)
    for gradients in draws:
        moments.add(gradients)
    pairs = [(k, m) for k in range(5) for m in range(5) if k != m]
    signal = [[np.mean([float(draws[k, i] @ draws[m, j]) for k, m in pairs]) for j in range(2)] for i in range(2)]
    noise = [np.mean([float((draws[k, i] - draws[m, i]).square().sum()) / 2 for k, m in pairs]) for i in range(2)]
    np.testing.assert_allclose(moments.signal, signal)
    np.testing.assert_allclose(moments.noise, noise)


def flat_gradient(policy, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.lm.parameters()))]).double()


def test_the_gradient_of_halves_is_that_of_the_score_function():
    agent = REINFORCE(llm_env.PUPIL, runs.make_env(), n_envs=8, seed=0)
    rollout = agent.sample_rollout()
    expected = []
    for rows in (range(4), range(4, 8)):
        logps = agent.policy.log_probs([rollout.prompts[i] for i in rows], [rollout.responses[i] for i in rows])
        total = sum(float(rollout.scores[i]) * logp.sum() for i, logp in zip(rows, logps, strict=True))
        expected.append(flat_gradient(agent.policy, -total / sum(len(logp) for logp in logps)))
    first, second = expected
    mean = (first + second) / 2
    signal, noise = halves(agent, rollout)
    assert signal == pytest.approx(float(first @ second), rel=1e-4)
    assert noise == pytest.approx(float(((first - mean).square().sum() + (second - mean).square().sum()) / 2), rel=1e-4)


@pytest.mark.parametrize("kind, settings", [(PPO, {}), (GRPO, {"group_size": 4}), (REINFORCE, {"baseline": "value"})])
def test_the_measured_gradient_is_the_one_that_is_stepped_along(kind, settings):
    """Plain SGD with no clipping of the norm moves the weights by minus the learning rate times the gradient."""
    sgd = {"optimizer_class": torch.optim.SGD}
    settings = {**settings, "n_epochs": 1} | ({"vf_coef": 0.0} if kind is not GRPO else {})
    agent = kind(llm_env.PUPIL, runs.make_env(), 1.0, n_envs=32, seed=0, max_grad_norm=1e9, policy_kwargs=sgd, **settings)
    agent.env.reset()  # seeds the prompts, so that it is always the same groups whose answers are not all right or all wrong
    if agent.needs_values:
        torch.nn.init.normal_(agent.policy.value_head.weight, std=0.1)
    before = torch.cat([p.detach().flatten().double() for p in agent.policy.lm.parameters()])
    rollout = agent.sample_rollout()
    result = evaluate(agent, rollout)
    own = with_advantages(agent, rollout, result.values if agent.needs_values else None)
    gradient = policy_gradient(agent, own, result)
    assert rollout.advantages is None and float(gradient.norm()) > 0
    agent.set_logger(Logger(None, []))
    agent.train(rollout)
    after = torch.cat([p.detach().flatten().double() for p in agent.policy.lm.parameters()])
    torch.testing.assert_close(before - after, gradient, rtol=1e-3, atol=1e-5)


def test_the_size_of_an_update_is_the_kl_before_and_after():
    step = runs.Step("one", REINFORCE, {"learning_rate": 1e-3})
    notes = []

    class Noted(REINFORCE):
        def train(self, rollout):
            before = self.policy.log_probs(rollout.prompts, rollout.responses)
            before = torch.cat(before).detach()
            super().train(rollout)
            after = torch.cat(self.policy.log_probs(rollout.prompts, rollout.responses)).detach()
            notes.append(float(((after - before).exp() - 1 - (after - before)).mean()))

    done = runs.train(runs.Step("one", Noted, step.settings), 0, 300, runs.Exam(8), None)
    np.testing.assert_allclose(done.values("update_kl"), notes, rtol=1e-3)
    assert len(notes) == 2 and min(notes) > 1e-4
    assert done.curves["accuracy"][0][0] == 0


def test_the_lazy_teacher_pays_wrong_answers_more():
    paid = lazy_teacher(["46", "146", "15", "125", "", "47"], ["46", "46", "125", "125", "46", "46"])
    assert paid == pytest.approx([2 / 3, 1, 2 / 3, 1, 0, 0])


def test_what_a_run_came_to():
    done = runs.Run(
        {"accuracy": [(0, 0.6), (500, 0.92), (1000, 0.88)], "noise": [(0, 4.0), (9, 8.0)], "signal": [(0, 3.0), (9, 1.0)]}
    )
    assert done.tokens_to(0.9) == 500 and done.tokens_to(0.95) == float("inf")
    assert not tables.collapsed(done) and tables.noise_to_signal([done]) == 3
    worse = copy.deepcopy(done)
    worse.note(1500, accuracy=0.5)
    assert tables.collapsed(worse)
    assert tables.tokens_to([done, worse], 0.9) == "500 ± 0" and tables.tokens_to([done], 0.95) == "never (0 of 1 runs)"
    assert tables.spread([1.0, 3.0]) == "2.00 ± 1.41"


def test_the_jackknife_of_a_mean_is_its_standard_error():
    numbers = [1.0, 2.0, 4.0, 9.0]
    value, error = tables.jackknife(np.mean, numbers)
    assert (value, error) == (4.0, pytest.approx(np.std(numbers, ddof=1) / 2))
    assert tables.told(value, error) == f"4.00 ± {error:.2f}" and tables.told(value, 4.5) == "?"
    assert tables.told(*tables.jackknife(np.mean, [3.0])) == "3.00"
    assert tables.told(*tables.jackknife(np.mean, [3.0, np.inf])) == "?"


def test_noise_over_signal_is_pooled_before_it_is_divided():
    seeds = [
        {"estimators": {"naive": (4.0, 4.0, 2.0), "other": (1.0, 1.0, 8.0)}},
        {"estimators": {"naive": (4.0, 4.0, 2.0), "other": (-0.5, 0.5, 4.0)}},
    ]
    assert tables.pooled(seeds, "other") == pytest.approx(6 / 0.25)
    assert tables.pooled(seeds, "other", "cosine") == pytest.approx(0.75 / np.sqrt(0.25 * 4))
    assert tables.pooled(seeds[1:], "other") == float("inf")


@pytest.mark.slow
def test_the_command(tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["--seeds", 1, "--timesteps", 250, "--rounds", 2, "--length", 2, "--out", tmp_path]
    out = run([ROOT / "examples/ladder.py", *arguments], tmp_path)
    numbers = json.loads((tmp_path / "ladder.json").read_text())
    assert (tmp_path / "ladder.md").read_text() in out
    assert (tmp_path / "ladder.png").stat().st_size > 20_000
    parts = ("ladder", "collapse", "credit", "hacking")
    trained = [each for part in parts for several in numbers[part].values() for each in several]
    for curve in [curve for each in trained for curve in each["curves"].values()]:
        assert len(curve) and np.isfinite(curve).all()
    assert [len(numbers[part]) for part in ("ladder", "collapse", "credit", "hacking", "costs")] == [5, 4, 4, 2, 2]
    (points,) = numbers["variance"]
    assert len(points) == 3 and all(np.isfinite(list(point["estimators"].values())).all() for point in points)
    assert all(noise > 0 for point in points for _, _, noise in point["estimators"].values())
    assert all(second > 0 and size > 0 for part in numbers["costs"].values() for second, size in part.values())
    body = [line for line in out.splitlines() if line.startswith("|")]
    assert len(body) == 6 * 2 + 5 + len(points[0]["estimators"]) + 4 + 4 + 3 + len(next(iter(numbers["costs"].values())))
    assert len(list(tmp_path.glob("runs/ladder/*/events*"))) == 5


def test_the_game_of_the_credit_step():
    game = credit.Echo()
    text, _ = game.reset(seed=3)
    numbers = np.random.default_rng(3).integers(10, 100, credit.TURNS).tolist()
    assert text == f"{numbers[0]}="
    first, second, third, last = map(str, numbers)
    assert game.step(first) == (f"{second}=", 1.0, False, False, {})
    assert game.step("xy") == (f"{third}=", 0.0, False, False, {})
    assert game.step(third[0] + "x") == (f"{last}=", 0.5, False, False, {})
    assert game.step(last) == ("", 1.0, True, False, {})


def test_the_exam_is_the_mean_probability_of_the_correct_answers():
    exam = runs.Exam(3)
    agent = GRPO(llm_env.PUPIL, runs.make_env(), group_size=4, n_envs=8, temperature=0.7)
    model, expected = AutoModelForCausalLM.from_pretrained(llm_env.PUPIL), []
    for prompt, answer in zip(exam.prompts, exam.answers, strict=True):
        share, ids = 1.0, list(prompt)
        for token in answer:
            logits = model(torch.tensor([ids])).logits[0, -1].double() / 0.7
            share *= logits.softmax(0)[token].item()
            ids.append(token)
        expected.append(share)
    assert exam(agent) == pytest.approx(np.mean(expected), abs=1e-5)
