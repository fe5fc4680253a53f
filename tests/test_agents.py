"""The agents: they learn, their ratio is 1, and nothing but the arguments decides their weights."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from agents import GRPO, PPO, REINFORCE
from agents.losses import token_weights
from agents.sampling.sampler import Sampler
from agents.training.trainer import Trainer
from llm_env import TextGenerationVectorEnv
from tests.conftest import FAMILIES, make_model, make_tokenizer
from tests.probes import PROBES, make_env
from tests.rollouts import collect

AGENTS = {
    "GRPO": (GRPO, {"group_size": 4}),
    "PPO": (PPO, {}),
    "REINFORCE": (REINFORCE, {}),
    "REINFORCE with critic": (REINFORCE, {"baseline": "value"}),
}
TOKENIZER = make_tokenizer("abcdefgh")


def make_agent(name, family="llama", env=None, scale=1.0, model=None, **kwargs):
    kind, defaults = AGENTS[name]
    model = make_model(family, len(TOKENIZER), scale=scale) if model is None else model
    env = make_env(TOKENIZER) if env is None else env
    return kind(model, env, **{"learning_rate": 1e-3, "n_envs": 32, "seed": 0, **defaults, **kwargs})


def weights(agent):
    return [p.detach().clone() for p in agent.policy.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("name", AGENTS)
def test_learns_a_probe_to_within_5_percent_of_its_optimum(name, probe):
    """Half as long again as three seeds needed at most to stay above 0.95: 34 rollouts, or 50 where the prompt matters."""
    env = make_env(TOKENIZER, **PROBES[probe])
    exam = make_env(TOKENIZER, **{**PROBES[probe], "prompts": env.rules.prompts.texts * 64})
    agent = make_agent(name, env=env, learning_rate=1e-3 if name == "PPO" else 3e-3, n_envs=64)
    before = agent.evaluate(exam, deterministic=False)["reward"]
    agent.learn(64 * env.rules.max_new_tokens * (80 if len(env.rules.prompts) > 2 else 50))
    assert before < 0.3 and agent.evaluate(exam, deterministic=False)["reward"] >= 0.95


class Ratios:
    """Records max |ratio - 1| of every minibatch, and the advantages of the rollout."""

    def __init__(self, monkeypatch):
        self.deviations = []
        original = Trainer.step

        def spy(trainer, rollout, rows, is_first_pass):
            agent = trainer.objective
            loss = agent.loss

            def loss_spy(part, result, part_weights):
                if part.old_logp is not None:
                    gap = ((result.logp - part.old_logp).exp() - 1).abs() * part.mask
                    self.deviations.append((agent._n_updates, gap.max().item()))
                return loss(part, result, part_weights)

            agent.loss = loss_spy
            try:
                return original(trainer, rollout, rows, is_first_pass)
            finally:
                del agent.loss

        monkeypatch.setattr(Trainer, "step", spy)


@pytest.mark.parametrize("batch", [{}, {"batch_size": 8}, {"micro_batch_size": 8}], ids=["whole", "minibatches", "micro"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["GRPO", "PPO"])
def test_the_ratio_is_one_before_the_first_update(name, family, batch, monkeypatch):
    seen = Ratios(monkeypatch)
    agent = make_agent(name, family, scale=3.0, temperature=0.8, n_epochs=2, **batch)
    updates_before = [agent._n_updates]
    for _ in range(2):
        agent.learn(1, reset_num_timesteps=False)
        updates_before.append(agent._n_updates)
    for start in updates_before[:-1]:
        fresh = [gap for updates, gap in seen.deviations if updates == start]
        assert fresh and max(fresh) < 1e-5
    assert max(gap for _, gap in seen.deviations) > 1e-4  # and moves away from it afterwards


@pytest.mark.parametrize("name", AGENTS)
def test_the_first_pass_is_that_of_the_sampler(name):
    """Sampling and training path agree on the log-probs of fresh data, for the agents without a ratio too."""
    agent = make_agent(name, scale=3.0, temperature=0.8)
    rollout = collect(agent.policy, agent.env.venv, 4, agent.sampler())
    result = agent.policy.evaluate_actions(rollout.prompts, rollout.responses, 0.8)
    torch.testing.assert_close(result.logp * rollout.mask, rollout.sampled_logp, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", AGENTS)
def test_same_seed_same_weights(name):
    def train(seed):
        agent = make_agent(name, seed=seed, batch_size=16)
        torch.manual_seed(np.random.randint(1000))  # the global generators have no say
        agent.learn(3 * 32 * 4)
        assert agent._n_updates >= 3
        return weights(agent)

    assert same(train(0), train(0))
    assert not same(train(0), train(1))


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("name", AGENTS)
def test_micro_batches_and_padding_do_not_change_the_gradient(name, aggregation, monkeypatch):
    """One step of 12 episodes, whole and in micro-batches of 5, on the same rollout."""
    agent = make_agent(name, n_envs=12, scale=3.0, aggregation=aggregation, max_grad_norm=1e9, n_epochs=1)
    agent.learn(1)  # sets up the logger; the optimizer's state does not matter for gradients
    rollout = collect(agent.policy, agent.env.venv, 4, agent.sampler())
    assert len(set(rollout.lengths.tolist())) > 1
    agent.make_trainer().compute_old_logprobs(rollout)
    if not agent.needs_values:
        rollout.old_logp = None
    agent.compute_advantages(rollout)
    monkeypatch.setattr(agent.policy.optimizer, "step", lambda: None)

    def gradient(size):
        agent.micro_batch_size = size
        part = rollout.select(range(12))
        statistics = agent.make_trainer().step(part, np.arange(12), is_first_pass=agent.needs_old_logp)
        return [p.grad.clone() for p in agent.policy.parameters()], statistics

    whole, statistics = gradient(None)
    parts, part_statistics = gradient(5)
    assert max(g.abs().max() for g in whole) > 1e-4
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    for key, value in statistics.items():
        assert part_statistics[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_grpo_loss_and_gradient_against_a_slow_loop():
    """The formula of the paper, response by response and token by token, from plain forward passes."""
    env = make_env(TOKENIZER, reference=make_model("llama", len(TOKENIZER), seed=1))
    agent = make_agent("GRPO", env=env, n_envs=8, kl_coef=0.04, scale=2.0, max_grad_norm=1e9)
    agent.learn(1)
    rollout = collect(agent.policy, agent.env.venv, 4, agent.sampler())
    old = rollout.sampled_logp + 0.3 * torch.randn(rollout.sampled_logp.shape, generator=torch.Generator().manual_seed(0))
    rollout.old_logp = old
    agent.compute_advantages(rollout)
    model, loss = agent.policy.lm, 0.0
    for group in range(2):
        rows = range(group * 4, group * 4 + 4)
        rewards = np.array([rollout.scores[i].item() for i in rows])
        for k, i in enumerate(rows):
            advantage = (rewards[k] - rewards.mean()) / (rewards.std(ddof=1) + 1e-4) if rewards.std() > 0 else 0.0
            tokens = rollout.responses[i]
            total = 0.0
            for t, token in enumerate(tokens):
                context = torch.tensor([[*rollout.prompts[i], *tokens[:t]]])
                logp = model(context).logits[0, -1].log_softmax(-1)[token]
                ref = env.rules.reference.model(context).logits[0, -1].log_softmax(-1)[token]
                rho, d = (logp - old[i, t]).exp(), ref - logp
                total = total + torch.min(rho * advantage, rho.clamp(0.8, 1.2) * advantage) - 0.04 * (d.exp() - d - 1)
            loss = loss - total / len(tokens) / 8
    expected = torch.autograd.grad(loss, list(model.parameters()))
    agent.policy.zero_grad()
    result = agent.policy.evaluate_actions(rollout.prompts, rollout.responses)
    terms, _ = agent.loss(rollout, result, token_weights(rollout.mask, "sequence"))
    got = sum(coefficient * value for coefficient, value in terms.values())
    got.backward()
    assert got.item() == pytest.approx(loss.item(), abs=1e-5)
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-3)


def test_ppo_advantages_use_the_values_before_each_token():
    agent = make_agent("PPO", gamma=0.9, gae_lambda=0.8, normalize_advantage=False, bootstrap_truncated=True)
    torch.nn.init.normal_(agent.policy.value_head.weight)
    agent.learn(1)
    rollout = collect(agent.policy, agent.env.venv, 1, agent.sampler())
    agent.make_trainer().compute_old_logprobs(rollout)
    agent.compute_advantages(rollout)
    for i in range(32):
        context, n = [*rollout.prompts[i], *rollout.responses[i]], len(rollout.responses[i])
        hidden = agent.policy.lm(torch.tensor([context]), output_hidden_states=True).hidden_states[-1][0]
        values = agent.policy.value_head(hidden)[-n - 1 :, 0].tolist()
        assert bool(rollout.truncated[i]) == (rollout.responses[i][-1] != 0)
        if not rollout.truncated[i]:
            values[-1] = 0.0
        advantage = 0.0
        for t in reversed(range(n)):
            advantage = rollout.rewards[i, t].item() + 0.9 * values[t + 1] - values[t] + 0.9 * 0.8 * advantage
            assert rollout.advantages[i, t].item() == pytest.approx(advantage, abs=1e-4)
            assert rollout.returns[i, t].item() == pytest.approx(advantage + values[t], abs=1e-4)


def test_ppo_trains_on_the_kl_shaped_reward():
    env = make_env(TOKENIZER, reference=make_model("llama", len(TOKENIZER), seed=1), kl_coef=0.5)
    agent = make_agent("PPO", env=env)
    rollout = collect(agent.policy, agent.env.venv, 1, agent.sampler())
    shaped = -0.5 * (rollout.sampled_logp - rollout.ref_logp)
    for i, info in enumerate(rollout.infos):
        shaped[i, len(rollout.responses[i]) - 1] += info["reward/always_a"]
    torch.testing.assert_close(rollout.rewards, shaped * rollout.mask, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["GRPO", "PPO"])
def test_the_kl_is_zero_where_policy_and_reference_are_one(name):
    model = make_model("llama", len(TOKENIZER))
    kl = {"kl_coef": 0.1} if name == "GRPO" else {}
    env = make_env(TOKENIZER, reference=model, **({"kl_coef": 0.1} if name == "PPO" else {}))
    agent = make_agent(name, env=env, model=model, temperature=0.7, learning_rate=0.05, **kl)
    agent.learn(1)
    logged = []
    agent.set_logger(Recorder(logged))
    agent.learn(1, reset_num_timesteps=False)
    rollout = collect(agent.policy, agent.env.venv, 4, agent.sampler())
    assert logged[-1]["train/kl_ref"] > 1e-3  # the policy has moved since, the reference has not
    twins = [make_model("llama", len(TOKENIZER)) for _ in range(2)]
    fresh = make_agent(name, env=make_env(TOKENIZER, reference=twins[0]), model=twins[1], temperature=0.7)
    rollout = collect(fresh.policy, fresh.env.venv, 4, fresh.sampler())
    torch.testing.assert_close(rollout.sampled_logp, rollout.ref_logp, atol=1e-4, rtol=0)


class Recorder(Logger):
    """Keeps what was dumped."""

    def __init__(self, dumped):
        super().__init__(None, [])
        self.dumped = dumped

    def dump(self, step=0):
        self.dumped.append(dict(self.name_to_value))
        super().dump(step)


def test_target_kl_ends_the_passes_over_a_rollout():
    patient, hasty = (make_agent("PPO", learning_rate=3e-2, target_kl=kl, n_epochs=6) for kl in (None, 1e-4))
    for agent in (patient, hasty):
        agent.learn(1)
    assert patient._n_updates == 6 and 1 <= hasty._n_updates < 6


def test_schedules_follow_the_progress():
    seen = []
    agent = make_agent("PPO", learning_rate=lambda left: 1e-3 * left, clip_range=lambda left: 0.2 * left)
    agent.set_logger(Recorder(seen))
    agent.learn(4 * 32 * 4)
    rates, clips = ([row[key] for row in seen] for key in ("train/learning_rate", "train/clip_range"))
    assert rates == sorted(rates, reverse=True) and rates[0] == 1e-3 and 0 < rates[-1] <= 0.3e-3
    assert clips == pytest.approx([200 * rate for rate in rates])


def test_learn_takes_an_env_first_and_counts_tokens():
    agent = PPO(make_model("llama", len(TOKENIZER)), n_envs=8, seed=0)
    env = make_env(TOKENIZER)
    assert agent.learn(env, total_timesteps=50) is agent
    assert 50 <= agent.num_timesteps < 50 + 8 * 4
    assert agent.learn(env, 40).num_timesteps < 40 + 8 * 4
    agent.learn(total_timesteps=40, reset_num_timesteps=False)
    assert 80 <= agent.num_timesteps < 80 + 8 * 4


def test_a_vector_env_brings_its_own_size():
    venv = make_env(TOKENIZER).vectorize(12)
    agent = GRPO(make_model("llama", len(TOKENIZER)), venv, group_size=4)
    assert agent.n_envs == 12 and agent.env.venv is venv
    with pytest.raises(ValueError, match="n_envs=8, but the vector env has num_envs=12"):
        GRPO(make_model("llama", len(TOKENIZER)), venv, group_size=4, n_envs=8)


def test_generate_is_text_in_text_out():
    agent = make_agent("GRPO", scale=3.0)
    texts = agent.generate(["a", "bc"], deterministic=True)
    assert texts == agent.generate(["a", "bc"], deterministic=True)
    for prompt, text in zip(["a", "bc"], texts, strict=True):
        context = TOKENIZER(prompt)["input_ids"]
        for _ in range(4):
            token = agent.policy.lm(torch.tensor([context])).logits[0, -1, : len(TOKENIZER)].argmax().item()
            if token == 0:
                break
            context.append(token)
        assert text == TOKENIZER.decode(context, skip_special_tokens=True)[len(prompt) :]
    assert len(agent.generate(["a"], max_new_tokens=9)[0]) <= 9
    with pytest.raises(TypeError, match="give a list"):
        agent.generate("a")


def test_evaluate_answers_every_prompt_once():
    seen = []

    def note(prompts, completions, **kwargs):
        seen.extend(prompts)
        return [1.0] * len(prompts)

    agent = make_agent("GRPO")
    result = agent.evaluate(make_env(TOKENIZER, reward=note, prompts=tuple("abcdefg")), batch_size=3)
    assert sorted(seen) == list("abcdefg") and result["reward"] == 1.0 == result["reward/note"]


def test_the_end_token_is_trained_on_and_padding_is_not():
    tokenizer = make_tokenizer("abcdefgh", pad=False)
    tokenizer.pad_token = tokenizer.eos_token
    env = make_env(tokenizer)
    agent = GRPO(make_model("llama", len(tokenizer), scale=3.0), env, group_size=4, n_envs=32, seed=0)
    rollout = collect(agent.policy, agent.env.venv, 4, Sampler(generator=agent._generator))
    ended = [i for i, response in enumerate(rollout.responses) if response[-1] == 0]
    assert ended
    for i in ended:
        n = len(rollout.responses[i])
        assert rollout.mask[i].tolist() == [1.0] * n + [0.0] * (rollout.mask.shape[1] - n)


def test_grpo_gives_groups_one_prompt():
    agent = make_agent("GRPO")
    rollout = collect(agent.policy, agent.env.venv, 4, agent.sampler())
    for i in range(0, 32, 4):
        assert rollout.prompts[i : i + 4] == [rollout.prompts[i]] * 4


class InterruptAfter(BaseCallback):
    def __init__(self, rollouts):
        super().__init__()
        self.left = rollouts

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_ctrl_c_leaves_logs_and_a_usable_agent(tmp_path):
    agent = make_agent("GRPO", tensorboard_log=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        agent.learn(10_000, InterruptAfter(3))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = tmp_path.iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert len(events.Scalars("train/loss")) == 2 and events.Scalars("time/fps")
    agent.learn(100, reset_num_timesteps=False)


def test_a_reward_that_fails_midway_leaves_the_agent_usable():
    calls = []

    def fragile(completions):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no network")
        return [1.0] * len(completions)

    agent = make_agent("GRPO", env=make_env(TOKENIZER, reward=fragile))
    with pytest.raises(ValueError, match="'fragile' raised RuntimeError: no network"):
        agent.learn(10_000)
    tokens = agent.num_timesteps
    agent.learn(100, reset_num_timesteps=False)
    assert agent.num_timesteps >= tokens + 100


def test_a_gradient_that_is_not_finite_leaves_the_weights():
    agent = make_agent("REINFORCE")
    agent.learn(1)
    before = weights(agent)
    agent.compute_advantages = lambda rollout: setattr(rollout, "advantages", rollout.mask * torch.nan)
    with pytest.raises(ValueError, match="gradient is not finite"):
        agent.learn(1)
    assert same(before, weights(agent))


def test_load_without_an_env_predicts(tmp_path):
    agent = make_agent("GRPO")
    agent.save(tmp_path / "agent.zip")
    loaded = GRPO.load(tmp_path / "agent")
    assert loaded.generate(["a"], True, 4) == agent.generate(["a"], True, 4)
    with pytest.raises(ValueError, match="the agent has no env yet"):
        loaded.learn(10)


def test_an_agent_that_never_had_an_env_can_be_saved(tmp_path):
    model = make_model("gpt2", len(TOKENIZER))
    agent = PPO(model, policy_kwargs={"tokenizer": TOKENIZER})
    agent.save(tmp_path / "agent")
    loaded = PPO.load(tmp_path / "agent")
    assert same(weights(agent), weights(loaded))
    loaded.learn(make_env(TOKENIZER), total_timesteps=10)


def test_set_env_trains_on_another_env():
    agent = make_agent("GRPO")
    agent.learn(10)
    agent.set_env(make_env(TOKENIZER, reward=lambda completions: [0.5] * len(completions)))
    logged = []
    agent.set_logger(Recorder(logged))
    agent.learn(10)
    assert logged[0]["rollout/ep_rew_mean"] == 0.5 and logged[0]["rollout/zero_std_groups"] == 1.0
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        agent.set_env(make_env(TOKENIZER, max_new_tokens=5))


def test_the_default_learning_rate_depends_on_the_size():
    small = make_agent("GRPO", learning_rate=None)
    assert small.learning_rate == 3e-4
    assert make_agent("PPO", learning_rate=None).learning_rate == 3e-4 / 4  # four passes over the same episodes add up
    from agents.compatibility import default_learning_rate

    billion = SimpleNamespace(base=torch.nn.Linear(10**5, 10**4, bias=False, device="meta"), adapter=None)
    assert default_learning_rate(billion, 1) == pytest.approx(1e-6, rel=0.01)
    assert default_learning_rate(SimpleNamespace(base=billion.base, adapter="default"), 2) == pytest.approx(5e-6, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        (GRPO, {"group_size": 3, "n_envs": 32}, "group_size=3 must divide n_envs=32; try n_envs=33"),
        (GRPO, {"group_size": 1}, "group_size=1 must be a whole number of at least 2"),
        (GRPO, {"scale": "max"}, "scale='max' must be"),
        (GRPO, {"kl_coef": -1.0}, "kl_coef=-1.0"),
        (GRPO, {"kl_coef": 0.1}, "kl_coef=0.1 needs a reference"),
        (GRPO, {"aggregation": "mean"}, "aggregation='mean' must be"),
        (PPO, {"n_epochs": 0}, "n_epochs=0 must be"),
        (PPO, {"batch_size": 2.5}, "batch_size=2.5 must be"),
        (PPO, {"temperature": -1.0}, "temperature=-1.0 must be positive"),
        (REINFORCE, {"baseline": "mode"}, "baseline='mode' must be"),
    ],
)
def test_bad_arguments(kind, kwargs, message):
    with pytest.raises(ValueError, match=message):
        kind(make_model("llama", len(TOKENIZER)), make_env(TOKENIZER), **kwargs)


def test_an_env_that_does_not_fit_the_model():
    model = make_model("llama", len(TOKENIZER))
    other = make_tokenizer("hgfedcba")
    kwargs = {"policy_kwargs": {"tokenizer": TOKENIZER}}
    with pytest.raises(ValueError, match=r"the env's tokenizer .* is not the model's .*for instance \[\('a', 3\), \('a', 10\)"):
        GRPO(model, make_env(other), **kwargs)
    with pytest.raises(ValueError, match="vocabulary has 11 tokens, fewer than the tokenizer's 24"):
        GRPO(model, make_env(make_tokenizer()))
    with pytest.raises(ValueError, match="need 201 positions, the model has 128; lower max_new_tokens to 127"):
        GRPO(model, make_env(TOKENIZER, max_new_tokens=200), **kwargs)
    env = make_env(TOKENIZER, reference=model, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"penalized twice.*drop the env's"):
        GRPO(model, env, kl_coef=0.1)
    import gymnasium as gym

    with pytest.raises(TypeError, match="is no text env"):
        PPO(model, gym.make("CartPole-v1"))


def test_restricted_sampling_warns():
    with pytest.warns(UserWarning, match="top_k=2, top_p=1.0.*off-policy"):
        make_agent("GRPO", top_k=2)


def test_optimizer_settings():
    agent = make_agent("PPO", policy_kwargs={"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {"momentum": 0.5}})
    assert isinstance(agent.policy.optimizer, torch.optim.SGD) and agent.policy.optimizer.defaults["momentum"] == 0.5


def test_a_policy_object_is_used_as_it_is():
    from agents import LanguagePolicy

    policy = LanguagePolicy(make_model("llama", len(TOKENIZER)), TOKENIZER)
    agent = PPO(policy, make_env(TOKENIZER), n_envs=8)
    assert agent.policy is policy and policy.value_head is not None


def test_native_and_copied_envs_share_nothing_they_should_not():
    env = make_env(TOKENIZER)
    assert copy.deepcopy(env).rules is not env.rules
    assert isinstance(env.vectorize(2), TextGenerationVectorEnv) and env.vectorize(2).rules is env.rules
