"""The arguments that make the published methods, seen at work in a training."""

import numpy as np
import pytest
import torch
from gymnasium.wrappers import TransformReward

from agents import GRPO, PPO, REINFORCE
from agents.advantages import equal_groups
from agents.losses import kl_k3, ratio
from agents.rollout import concat
from llm_env import process_reward
from llm_env.reference import AdaptiveKLController
from tests.conftest import FAMILIES, make_model, make_tokenizer, refused
from tests.probes import make_env
from tests.rollouts import collect
from tests.test_agents import Recorder

TOKENIZER = make_tokenizer("abcdefgh")
METHODS = {
    "process supervision": dict(supervision="process"),
    "Dr. GRPO": dict(aggregation="constant", scale="none"),
    "DAPO": dict(aggregation="token", clip_range_high=0.28, max_resamples=2),
    "GSPO": dict(ratio_level="sequence", clip_range=0.1, n_epochs=2, batch_size=32),
    "CISPO": dict(surrogate="cispo", clip_range=1.0, clip_range_high=2.0, aggregation="token", n_epochs=2, batch_size=32),
    "dual clip": dict(dual_clip=3.0, n_epochs=2),
    "batch std and k2": dict(scale="batch", kl_coef=0.01, kl_estimator="k2"),
}


def make_agent(kind, env=None, family="llama", **kwargs):
    defaults = {"learning_rate": 3e-3, "n_envs": 32, "seed": 0}
    groups = {"group_size": 4} if kind is GRPO else {}
    model = make_model(family, len(TOKENIZER), scale=1.0)
    return kind(model, make_env(TOKENIZER) if env is None else env, **{**defaults, **groups, **kwargs})


def score(agent):
    """The mean return of 128 sampled episodes."""
    return np.mean([agent.sample_rollout().scores.mean().item() for _ in range(4)])


def first_a(completions, **kwargs):
    return [float(c.startswith("a")) for c in completions]


@process_reward
def each_a(completion_ids, **kwargs):
    """A step a token: 0.25 for an a, 0 for anything else."""
    a = TOKENIZER.convert_tokens_to_ids("a")
    return [[(t, 0.25 * (token == a)) for t, token in enumerate(ids)] for ids in completion_ids]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method):
    reward = each_a if method == "process supervision" else first_a
    reference = make_model("llama", len(TOKENIZER), scale=1.0) if "kl_coef" in METHODS[method] else None
    env = make_env(TOKENIZER, reward, reference=reference)
    agent = make_agent(GRPO, env, **METHODS[method])
    before = score(agent)
    agent.learn(32 * 4 * (60 if "max_resamples" in METHODS[method] else 30))  # what is thrown away counts, too
    assert before < 0.6 and score(agent) > 0.85


@pytest.mark.parametrize("baseline", ["running_mean", "group_mean", "leave_one_out"])
def test_every_baseline_learns(baseline):
    agent = make_agent(REINFORCE, baseline=baseline, group_size=1 if baseline == "running_mean" else 4)
    agent.learn(32 * 4 * 30)
    assert score(agent) > 0.85


def test_baselines_of_reinforce_by_hand():
    rewards = torch.zeros(4, 3)
    lengths = [1, 3, 2, 3]
    mask = torch.tensor([[1.0] * n + [0.0] * (3 - n) for n in lengths])
    for i, (length, score) in enumerate(zip(lengths, [1.0, 0.0, 4.0, 2.0], strict=True)):
        rewards[i, length - 1] = score

    def advantages(agent):
        rollout = collect(agent.policy, agent.env.venv, 2, agent.sampler()).select([0, 1, 2, 3])
        rollout.rewards, rollout.mask = rewards, mask
        agent.compute_advantages(rollout)
        return (rollout.advantages[:, 0] / (mask * rollout.advantages != 0).any(1)).nan_to_num().tolist(), rollout.advantages

    group, table = advantages(make_agent(REINFORCE, baseline="group_mean", group_size=2))
    assert group == [0.5, -0.5, 1.0, -1.0] and (table == torch.tensor(group)[:, None] * mask).all()
    assert advantages(make_agent(REINFORCE, baseline="leave_one_out", group_size=2))[0] == [1.0, -1.0, 2.0, -2.0]
    running = make_agent(REINFORCE, baseline="running_mean")
    assert advantages(running)[0] == [1.0, 0.0, 4.0, 2.0]  # nothing is known before the first rollout
    assert running.running_mean == pytest.approx(7 / 4)
    rewards *= 2
    assert advantages(running)[0] == pytest.approx([2 - 1.75, -1.75, 8 - 1.75, 4 - 1.75])
    assert running.running_mean == pytest.approx((1.75 + 3.5) / 2)
    for _ in range(20):
        advantages(running)
    before = running.running_mean
    rewards *= 2
    advantages(running)
    assert running.running_mean == pytest.approx(before + 0.1 * (7 - before))  # from the tenth rollout on


@pytest.mark.parametrize("clock", ["response", "token"])
def test_process_supervision_from_the_env_to_the_advantages(clock):
    """Two kinds of reward, steps of 0 and scores of 0 included, against a loop over steps."""

    @process_reward
    def steps(completion_ids, **kwargs):
        """Every second token ends a step that is worth 1 if the token is odd."""
        return [[(t, float(ids[t] % 2)) for t in range(1, len(ids), 2)] for ids in completion_ids]

    env = make_env(TOKENIZER, [steps, first_a], reward_weights=[1.0, 0.5])
    if clock == "token":
        env = TransformReward(env, lambda r: 2 * r)
    agent = make_agent(GRPO, env, supervision="process", n_envs=16)
    rollout = agent.sample_rollout()
    agent.compute_advantages(rollout)
    assert rollout.truncated.any() and not rollout.truncated.all()
    scale = 2 if clock == "token" else 1
    expected = np.zeros(rollout.mask.shape)
    for begin in range(0, 16, 4):
        found = []
        for i in range(begin, begin + 4):
            ids = rollout.responses[i]
            at = {t: float(ids[t] % 2) for t in range(1, len(ids), 2)}
            at[len(ids) - 1] = at.get(len(ids) - 1, 0.0) + 0.5 * rollout.infos[i]["reward/first_a"]
            found += [(i, t, scale * r) for t, r in at.items()]
            assert tuple(sorted(at)) == rollout.infos[i]["step_ends"]
        values = np.array([r for *_, r in found])
        for i, end, r in found:
            expected[i, : end + 1] += (r - values.mean()) / (values.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(rollout.advantages.numpy(), expected, atol=1e-5)


def test_outcome_rewards_are_one_step_at_the_end():
    agent = make_agent(GRPO, make_env(TOKENIZER, first_a))
    rollout = agent.sample_rollout()
    assert "step_ends" not in rollout.infos[0]
    ends = np.argwhere(rollout.step_ends.numpy())
    assert ends[:, 1].tolist() == (rollout.lengths - 1).tolist()


def rarely(completions, **kwargs):
    """Nearly always 0, so that most groups are equal."""
    return [float(c.startswith("ab")) for c in completions]


def test_dynamic_sampling_fills_up_the_groups_that_teach_something(monkeypatch):
    trained = []
    monkeypatch.setattr("agents.base.Trainer.train", lambda trainer, rollout: trained.append(rollout) or {})
    agent = make_agent(GRPO, make_env(TOKENIZER, rarely), max_resamples=50, n_envs=16)
    sampled = []
    original = agent.sample_rollout
    monkeypatch.setattr(agent, "sample_rollout", lambda: sampled.append(original()) or sampled[-1])
    agent.set_logger(Recorder(written := []))
    agent.learn(1)
    everything, (kept,) = sampled[0], trained
    assert len(everything) > 16 and len(kept) == 16
    assert not equal_groups(kept.scores, 4).any()
    assert (~equal_groups(everything.scores, 4)).sum() >= 4
    assert agent.num_timesteps == everything.lengths.sum()  # what was thrown away was sampled all the same
    assert written[-1]["rollout/resamples"] == len(everything) // 16 - 1
    assert all(response in everything.responses for response in kept.responses)
    for group in range(4):
        rows = slice(4 * group, 4 * group + 4)
        assert len({tuple(p) for p in kept.prompts[rows]}) == 1 and kept.scores[rows].amax() > kept.scores[rows].amin()


def test_dynamic_sampling_gives_up_after_its_tries(monkeypatch):
    agent = make_agent(GRPO, make_env(TOKENIZER, lambda completions: [0.0] * len(completions)), max_resamples=3, n_envs=8)
    rollout = agent.sample_rollout()
    assert len(rollout) == 4 * 8 and len(agent.select_training_rows(rollout)) == 8
    agent.learn(1)  # a rollout that teaches nothing is no error


def test_joined_rollouts_keep_their_episodes():
    agent = make_agent(GRPO, n_envs=8)
    parts = [agent.sample_rollout().select([0, 1, 2, 3]) for _ in range(3)]
    whole = concat(parts)
    assert whole.responses == [r for part in parts for r in part.responses] and len(whole.infos) == 12
    for k, part in enumerate(parts):
        again = whole.select(range(4 * k, 4 * k + 4))
        torch.testing.assert_close(again.sampled_logp, part.sampled_logp)
        torch.testing.assert_close(again.step_ends, part.step_ends)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_masked_truncated_responses_have_no_say_in_the_gradient(aggregation, monkeypatch):
    """The gradient is that of a loss written over the finished responses alone."""
    agent = make_agent(GRPO, n_envs=16, mask_truncated=True, aggregation=aggregation, max_grad_norm=1e9)
    agent.learn(1)
    rollout = agent.sample_rollout()
    agent.compute_advantages(rollout)
    finished = [i for i in range(16) if not rollout.truncated[i]]
    assert 0 < len(finished) < 16
    monkeypatch.setattr(agent.policy.optimizer, "step", lambda: None)
    agent.make_trainer().step(rollout, np.arange(16), is_first_pass=True)
    got = [p.grad.clone() for p in agent.policy.parameters()]
    total = sum(len(rollout.responses[i]) for i in finished)
    loss = 0.0
    for i in finished:
        logp = agent.policy.log_probs([rollout.prompts[i]], [rollout.responses[i]])[0]
        weight = {"token": 1 / total, "sequence": 1 / len(logp) / 16, "constant": 1 / 4 / 16}[aggregation]
        loss = loss - weight * (rollout.advantages[i, : len(logp)] * logp).sum()
    for a, b in zip(got, torch.autograd.grad(loss, list(agent.policy.parameters())), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


class Hook:
    def __init__(self):
        self.calls = []

    def __call__(self, agent, rollouts):
        reference = agent.rules.reference.model.state_dict()
        same = all(torch.equal(reference[name], value) for name, value in agent.policy.lm.state_dict().items())
        self.calls.append((agent.num_timesteps, [len(r) for r in rollouts], same))


def test_iterative_grpo_moves_the_reference_every_k_rollouts():
    start = make_model("llama", len(TOKENIZER), scale=1.0)
    hook, env = Hook(), make_env(TOKENIZER, reference=start)
    agent = make_agent(GRPO, env, kl_coef=0.04, reference_every=3, on_iteration=hook)
    before = [p.clone() for p in env.rules.reference.model.parameters()]
    for rollout in range(1, 8):
        agent.learn(1, reset_num_timesteps=False)
        moved = not all(map(torch.equal, before, env.rules.reference.model.parameters()))
        assert moved == (rollout >= 3)
    assert [sizes for _, sizes, _ in hook.calls] == [[32, 32, 32]] * 2 and all(same for *_, same in hook.calls)
    refused(make_agent, GRPO, make_env(TOKENIZER), reference_every=3, match="needs a reference")
    other = make_env(TOKENIZER, reference=make_model("gpt2", len(TOKENIZER)))
    refused(make_agent, GRPO, other, reference_every=3, match="their weights have different shapes")
    refused(make_agent, GRPO, env, on_iteration=hook, match="say how often")


def test_the_unbiased_kl_has_the_gradient_of_the_reverse_kl_off_policy():
    generator = torch.Generator().manual_seed(0)
    logits, old, ref = (torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    logp, old, ref = logits.log_softmax(-1), old.log_softmax(-1).detach(), ref.log_softmax(-1).detach()
    exact = (logp.exp() * (logp - ref)).sum()
    estimate = (old.exp() * ratio(logp[None], old[None]) * kl_k3(logp, ref)).sum()
    assert estimate.item() == pytest.approx(exact.item())
    wanted, got, biased = (
        torch.autograd.grad(value, logits, retain_graph=True)[0]
        for value in (exact, estimate, (old.exp() * kl_k3(logp, ref)).sum())
    )
    torch.testing.assert_close(got, wanted)
    assert (biased - wanted).abs().max() > 0.01


def test_unbiased_kl_weighs_the_estimate_by_the_ratio():
    env = make_env(TOKENIZER, reference=make_model("llama", len(TOKENIZER), seed=1))
    agent = make_agent(GRPO, env, kl_coef=0.1, unbiased_kl=True)
    rollout = agent.sample_rollout()
    rollout.advantages, rollout.old_logp = torch.zeros_like(rollout.rewards), rollout.sampled_logp - 0.3
    result = agent.policy.evaluate_actions(rollout.prompts, rollout.responses)
    terms, _ = agent.loss(rollout, result, rollout.mask)
    expected = (kl_k3(result.logp, rollout.ref_logp) * np.exp(0.3) * rollout.mask).sum()
    assert terms["kl_loss"][1].item() == pytest.approx(expected.item(), rel=1e-4)


def test_an_adaptive_coefficient_in_the_loss():
    controller = AdaptiveKLController(0.5, target=1e-6, horizon=320)
    agent = make_agent(GRPO, make_env(TOKENIZER, reference=make_model("llama", len(TOKENIZER))), kl_coef=controller)
    agent.learn(1)
    assert controller.value == pytest.approx(0.5 * (1 + 0.2 * 32 / 320))  # far over its target: as much up as it may


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [PPO, REINFORCE])
def test_a_separate_critic_leaves_the_policy_alone(kind, family, tmp_path):
    baseline = {"baseline": "value"} if kind is REINFORCE else {}
    agent = make_agent(kind, family=family, separate_critic=True, **baseline)
    policy = agent.policy
    torch.nn.init.normal_(policy.value_head.weight)
    prompts, responses = [[3, 4], [5]], [[6, 7, 0], [3]]
    values = policy.evaluate_actions(prompts, responses).values
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        hidden = policy.critic(torch.tensor([[*prompt, *response]])).last_hidden_state[0]
        expected = policy.value_head(hidden)[len(prompt) - 1 :, 0]
        torch.testing.assert_close(values[i, : len(response) + 1], expected, atol=1e-4, rtol=0)
    values.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.lm.parameters())
    assert any(p.grad is not None and p.grad.any() for p in policy.critic.parameters())
    before = {name: p.clone() for name, p in policy.named_parameters()}
    agent.learn(1)
    moved = {name.split(".")[0] for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"lm", "critic", "value_head"}
    agent.save(tmp_path / "agent")
    loaded = kind.load(tmp_path / "agent", env=make_env(TOKENIZER))
    again = loaded.policy.evaluate_actions(prompts, responses).values
    assert torch.equal(again, agent.policy.evaluate_actions(prompts, responses).values)
    shared = make_agent(kind, family=family, **baseline).policy
    assert shared.critic is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(supervision="steps"), "supervision='steps' must be"),
        (dict(kl_estimator="k4"), "kl_estimator='k4' must be"),
        (dict(ratio_level="word"), "ratio_level='word' must be"),
        (dict(surrogate="x"), "surrogate='x' must be"),
        (dict(dual_clip=0.5), "dual_clip=0.5 must be"),
        (dict(dual_clip=2.0, surrogate="cispo"), "dual_clip=2.0 has no meaning"),
        (dict(max_resamples=-1), "max_resamples=-1"),
        (dict(reference_every=0), "reference_every=0"),
    ],
)
def test_bad_arguments_of_grpo(arguments, message):
    refused(make_agent, GRPO, match=message, **arguments)


def test_combinations_that_cannot_be_meant():
    refused(make_agent, REINFORCE, baseline="leave_one_out", group_size=1, match="group_size=1")
    refused(make_agent, REINFORCE, baseline="running_mean", separate_critic=True, match="has no critic")
    env = make_env(TOKENIZER, each_a, reference=make_model("llama", len(TOKENIZER)), kl_coef=0.1)
    refused(make_agent, GRPO, env, supervision="process", match="put the KL into the loss")
    with pytest.warns(UserWarning, match="expected gradient of 0"):
        make_agent(GRPO, make_env(TOKENIZER, reference=make_model("llama", len(TOKENIZER))), kl_coef=0.1, kl_estimator="k1")
