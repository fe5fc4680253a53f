"""Stable-Baselines3's own tools on the agents and the env, and the token clock for what users wrap or bring."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit, TransformReward, vector
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    LogEveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from agents import GRPO, PPO, REINFORCE, TextVecEnv
from tests.conftest import make_model
from tests.probes import make_env
from tests.rollouts import collect_by_tokens
from tests.test_agents import AGENTS, TOKENIZER, make_agent, same, weights


def flipped():
    """The probe with its reward turned round by a wrapper: now a costs."""
    return TransformReward(make_env(TOKENIZER), lambda reward: -reward)


class Steps(BaseCallback):
    """Notes what callbacks see at every step."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def _on_step(self):
        self.seen.append((self.num_timesteps, int(self.locals["dones"].sum()), len(self.locals["infos"])))
        return True


def test_callbacks_are_called_once_every_num_envs_tokens():
    steps = Steps()
    agent = make_agent("GRPO", n_envs=8)
    agent.learn(300, steps)
    tokens = [row[0] for row in steps.seen]
    assert tokens == sorted(tokens) and tokens[-1] == agent.num_timesteps
    assert abs(len(tokens) * 8 - agent.num_timesteps) < 8
    assert sum(row[1] for row in steps.seen) % 8 == 0 and max(row[1] for row in steps.seen) == 8


@pytest.mark.parametrize("name", AGENTS)
def test_eval_and_checkpoint_callbacks(name, tmp_path):
    agent = make_agent(name, n_envs=8)
    eval_env = TextVecEnv(make_env(TOKENIZER).vectorize(4))
    callbacks = [
        EvalCallback(
            eval_env, n_eval_episodes=8, eval_freq=5, log_path=str(tmp_path), best_model_save_path=str(tmp_path), verbose=0
        ),
        CheckpointCallback(10, str(tmp_path), name_prefix="at"),
    ]
    agent.learn(400, callbacks)
    results = np.load(tmp_path / "evaluations.npz")
    assert results["results"].shape[1] == 8 and len(results["timesteps"]) >= 400 // 8 // 5
    kind = AGENTS[name][0]
    best, checkpoint = kind.load(tmp_path / "best_model"), kind.load(next(tmp_path.glob("at_*_steps.zip")))
    assert best.generate(["a"], True, 3) and not same(weights(checkpoint), weights(agent))


def test_a_reward_threshold_stops_the_training():
    env = make_env(TOKENIZER)
    agent = make_agent("GRPO", env=env, learning_rate=3e-3, n_envs=32)
    stop = StopTrainingOnRewardThreshold(0.9, verbose=0)
    agent.learn(60_000, EvalCallback(TextVecEnv(env.vectorize(8)), stop, n_eval_episodes=16, eval_freq=20, verbose=0))
    assert agent.num_timesteps < 60_000
    assert agent.evaluate(env)["reward"] >= 0.9


def test_stop_training_on_max_episodes():
    agent = make_agent("GRPO", n_envs=8)
    agent.learn(10_000, StopTrainingOnMaxEpisodes(3))
    assert 8 * 3 <= agent.num_timesteps <= 8 * 4 * 3


def test_log_every_n_timesteps_and_a_custom_logger(tmp_path):
    agent = make_agent("GRPO", n_envs=8)
    agent.set_logger(configure(str(tmp_path), ["csv"]))
    agent.learn(200, LogEveryNTimesteps(50), log_interval=None)
    assert (tmp_path / "progress.csv").read_text().count("\n") >= 3


def test_the_last_update_is_logged(tmp_path):
    agent = make_agent("GRPO", n_envs=8)
    agent.set_logger(configure(str(tmp_path), ["csv"]))
    agent.learn(60, log_interval=100)
    assert (tmp_path / "progress.csv").read_text().count("\n") == 2


def test_evaluate_policy_agrees_with_our_own():
    def make():
        return make_env(TOKENIZER, prompts=("a", "b", "ab", "c"), max_new_tokens=4)

    env = make()
    agent = make_agent("GRPO", env=env, scale=3.0)
    own = agent.evaluate(env)["reward"]
    assert own > 0
    for vec_env in (TextVecEnv(env.vectorize(4)), DummyVecEnv([lambda: Monitor(env)])):
        rewards, lengths = evaluate_policy(agent, vec_env, n_eval_episodes=40, return_episode_rewards=True)
        assert len(rewards) == 40 and set(lengths) <= {1, 2, 3, 4}
    single, _ = evaluate_policy(agent, Monitor(make()), n_eval_episodes=40)  # ten times each of the four prompts
    assert single == pytest.approx(own)


@pytest.mark.parametrize("name", AGENTS)
def test_the_wrapped_reward_is_the_one_trained_on(name):
    with pytest.warns(UserWarning, match="token by token to honour TransformReward"):
        agent = make_agent(name, env=flipped(), n_envs=16, learning_rate=3e-3)
    assert agent.n_envs == 16
    rollouts, train = [], agent.train
    agent.train = lambda rollout: rollouts.append(rollout) or train(rollout)
    agent.learn(60)
    for rollout in rollouts:
        assert rollout.scores.tolist() == [-info["reward/always_a"] for info in rollout.infos]
    assert min(rollout.scores.min() for rollout in rollouts) < 0  # a pays in the env itself and costs through the wrapper
    with pytest.warns(UserWarning):
        assert agent.evaluate(TransformReward(make_env(TOKENIZER), lambda reward: 7.0))["reward"] >= 7.0


def test_a_monitor_alone_keeps_the_fast_way():
    agent = GRPO(make_agent("GRPO").policy, Monitor(make_env(TOKENIZER)), group_size=4, n_envs=8)
    assert isinstance(agent.env, TextVecEnv)


def test_a_time_limit_and_statistics_are_honoured():
    env = RecordEpisodeStatistics(TimeLimit(make_env(TOKENIZER), 2))
    with pytest.warns(UserWarning, match="RecordEpisodeStatistics, TimeLimit"):
        agent = make_agent("REINFORCE", env=env, n_envs=4)
    agent.learn(30)
    assert agent.logger.name_to_value is not None and env.episode_count >= 4
    lengths = [info["l"] for info in agent.ep_info_buffer]
    assert max(lengths) == 2


@pytest.mark.parametrize("wrap", [lambda v: v, VecMonitor], ids=["plain", "VecMonitor"])
def test_an_sb3_vec_env_of_text_envs(wrap):
    vec_env = wrap(DummyVecEnv([lambda: make_env(TOKENIZER) for _ in range(8)]))
    with pytest.warns(UserWarning, match="token by token"):
        agent = GRPO(make_agent("GRPO").policy, vec_env, group_size=4, learning_rate=3e-3, seed=0)
    assert agent.n_envs == 8
    agent.learn(4000)
    assert agent.evaluate(make_env(TOKENIZER), deterministic=False)["reward"] > 0.7
    assert not np.isnan(agent.ep_info_buffer[-1]["r"])


class Rewriting(gym.ActionWrapper):
    def action(self, action):
        return 3


def test_a_wrapper_that_rewrites_actions_is_refused():
    for limit in (1, 4):
        with pytest.warns(UserWarning):
            agent = make_agent("REINFORCE", env=Rewriting(make_env(TOKENIZER, max_new_tokens=limit)), n_envs=4)
        with pytest.raises(ValueError, match="rewrites input_ids"):
            agent.learn(20)


@pytest.mark.parametrize("wrap", ["single", "vector"])
def test_kl_shaping_is_exact_through_wrappers(wrap):
    reference = make_model("llama", len(TOKENIZER), seed=9)
    env = make_env(TOKENIZER, reference=reference, kl_coef=0.1, max_new_tokens=3)
    if wrap == "single":
        env = TransformReward(env, lambda r: r)
    else:
        env = vector.TransformReward(env.vectorize(4, autoreset_mode=AutoresetMode.SAME_STEP), lambda r: r)
    with pytest.warns(UserWarning):
        agent = make_agent("PPO", env=env, n_envs=4)
    rollout = collect_by_tokens(agent.policy, agent.env, [0, 1, 1, 0], 1, agent.sampler())
    for i, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        logp = agent.policy.log_probs([prompt], [response])[0].detach()
        whole = reference(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        ref = torch.stack([whole[len(prompt) - 1 + t, token] for t, token in enumerate(response)])
        expected = -0.1 * (logp - ref)
        expected[-1] += rollout.infos[i]["completion"].count("a") / 4
        torch.testing.assert_close(rollout.rewards[i, : len(response)], expected, atol=1e-5, rtol=1e-4)
        assert rollout.infos[i]["kl"] == pytest.approx((logp - ref).sum().item(), abs=1e-4)


def test_the_sb3_face_resets_rows_with_their_own_options():
    vec_env = TextVecEnv(make_env(TOKENIZER, prompts=("a", "b", "c")).vectorize(2))
    vec_env.set_options([{"index": 2}, {}])
    vec_env.seed(0)
    assert vec_env.reset()["input_ids"][0, 0] == TOKENIZER("c")["input_ids"][0]
    _, _, dones, infos = vec_env.step(np.array([0, 3]))
    assert dones.tolist() == [True, False]
    assert infos[0]["episode"]["l"] == 1 and infos[0]["terminal_observation"]["attention_mask"].sum() == 2
    assert infos[0]["TimeLimit.truncated"] is False and "completion" not in infos[1]
    vec_env.set_options([{"group_size": 2}, {}])
    with pytest.raises(ValueError, match=r"reset options \['group_size'\]"):
        vec_env.reset()


def test_a_gymnasium_id_is_an_env(tmp_path):
    import llm_env

    agent = REINFORCE(llm_env.PUPIL, "llm_env/Addition-v0", n_envs=8, seed=0)
    agent.learn(10)
    assert agent.rules.prompts.texts[0].endswith("=")


def test_an_sb3_agent_that_nobody_here_wrote_runs_on_the_env():
    from stable_baselines3 import PPO as SB3PPO

    model = SB3PPO("MultiInputPolicy", make_env(TOKENIZER), n_steps=32, batch_size=32, n_epochs=1, seed=0)
    model.learn(64)
    assert model.num_timesteps == 64


def test_a_schedule_never_goes_below_its_end():
    seen = []
    agent = PPO(make_agent("PPO").policy, make_env(TOKENIZER), lambda left: seen.append(left) or 1e-3 * left, n_envs=32, seed=0)
    agent.learn(20)
    assert min(seen) >= 0 and torch.isfinite(weights(agent)[0]).all()
