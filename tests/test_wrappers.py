"""What a user wraps around the env, one episode or many at once, is what the agents of this package train on."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import ClipReward, NormalizeReward, RecordEpisodeStatistics
from gymnasium.wrappers import vector as vector_wrappers
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from agents import TextVecEnv
from agents.vec_env import WrappedTextVecEnv, as_vec_env, vector_env_of
from llm_env import TextGenerationVectorEnv
from tests.probes import make_env
from tests.rollouts import collect, collect_by_tokens
from tests.test_agents import AGENTS, TOKENIZER, make_agent, same, weights

EOS, A, B, C = 0, 3, 4, 5
pytestmark = pytest.mark.filterwarnings("ignore:the env is stepped token by token")


class Manners(gym.Wrapper):
    """Pays half for every c, nothing else, and ends the episode at the first b, which costs 1."""

    def step(self, action):
        observation, _, terminated, truncated, info = self.env.step(action)
        if action == B:
            return observation, -1.0, terminated, True, info
        return observation, 0.5 * (action == C), terminated, truncated, info


def rollout_of(env, n=24, agent="REINFORCE", **kwargs):
    agent = make_agent(agent, env=env, n_envs=n, **kwargs)
    return collect_by_tokens(agent.policy, agent.env, [0] * n, 1, agent.sampler())


def test_a_users_wrapper_decides_rewards_and_ends():
    rollout = rollout_of(Manners(make_env(TOKENIZER)))
    cut_short = 0
    for i, response in enumerate(rollout.responses):
        assert B not in response[:-1] and len(response) <= 4
        expected = [{B: -1.0, C: 0.5}.get(token, 0.0) for token in response]
        assert rollout.rewards[i, : len(response)].tolist() == expected and rollout.rewards[i, len(response) :].sum() == 0
        if response[-1] == B:
            cut_short += len(response) < 4
            text = "".join(TOKENIZER.convert_ids_to_tokens(token) for token in response if token >= 3)
            assert rollout.truncated[i] and rollout.infos[i]["completion"] == text
    assert cut_short > 0


@pytest.mark.parametrize("envs", [1, 5, 24])
def test_both_clocks_draw_the_same_texts(envs):
    """However many envs are stepped beside each other."""
    by_response = make_agent("REINFORCE", env=make_env(TOKENIZER), n_envs=24)
    expected = collect(by_response.policy, vector_env_of(by_response.env), 1, by_response.sampler(), 0)
    by_token = make_agent("REINFORCE", env=DummyVecEnv([lambda: Manners(make_env(TOKENIZER))] * envs), n_envs=24)
    rollout = collect_by_tokens(by_token.policy, by_token.env, [0] * 24, 1, by_token.sampler())
    ends = [response.index(B) + 1 if B in response else 4 for response in expected.responses]
    assert rollout.responses == [response[:end] for response, end in zip(expected.responses, ends, strict=True)]
    assert len(set(map(tuple, rollout.responses))) > 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GRPO", "PPO"])
def test_agents_learn_a_users_wrapper(name):
    envs = DummyVecEnv([lambda: Manners(make_env(TOKENIZER)) for _ in range(32)])
    agent = make_agent(name, env=envs, learning_rate=3e-3, n_envs=32)

    def score():
        return collect_by_tokens(agent.policy, envs, [0] * 128, 1, agent.sampler()).scores.mean()

    before = score()
    agent.learn(6000)
    after = score()
    assert before < 1.0 and after > 1.7, (before, after)  # the optimum is cccc: 2


def test_clip_reward():
    rollout = rollout_of(ClipReward(make_env(TOKENIZER), 0.125, 0.375))
    for i, response in enumerate(rollout.responses):
        last = min(max(response.count(A) / 4, 0.125), 0.375)
        assert rollout.rewards[i, : len(response)].tolist() == [0.125] * (len(response) - 1) + [last]


def test_record_episode_statistics_counts_what_was_trained_on():
    env = RecordEpisodeStatistics(make_env(TOKENIZER))
    rollout = rollout_of(env)
    assert list(env.return_queue) == rollout.scores.tolist() and list(env.length_queue) == rollout.lengths.tolist()
    assert sum(env.return_queue) > 0


def test_normalize_reward():
    """Against the pooled variance of all discounted sums, and of the weight 1e-4 with variance 1 that it begins with."""
    rollout = rollout_of(NormalizeReward(make_env(TOKENIZER), gamma=0.9))
    total, seen = 0.0, []
    for i, response in enumerate(rollout.responses):
        for t, token in enumerate(response):
            last = t == len(response) - 1
            paid = response.count(A) / 4 if last else 0.0
            total = total * 0.9 * (token != EOS) + paid
            seen.append(total)
            n = len(seen) + 1e-4
            variance = (1e-4 + np.sum(np.square(seen))) / n - (np.sum(seen) / n) ** 2
            assert rollout.rewards[i, t].item() == pytest.approx(paid / np.sqrt(variance + 1e-8), rel=1e-5)


# --- around the vector env -------------------------------------------------------------------------------------------


def vectorized(mode=AutoresetMode.SAME_STEP, n=16, **kwargs):
    return make_env(TOKENIZER, **kwargs).vectorize(n, autoreset_mode=mode)


@pytest.mark.parametrize("observation", ["dict", "flat"])
def test_the_face_of_a_wrapped_vector_env_steps_as_the_plain_one(observation):
    doubled = vector_wrappers.TransformReward(vectorized(n=3, observation=observation), lambda r: 2 * r)
    plain = TextVecEnv(vectorized(n=3, observation=observation))
    with pytest.warns(UserWarning, match="token by token to honour TransformReward"):
        wrapped = as_vec_env(doubled, 64)
    assert vector_env_of(wrapped) is None and wrapped.num_envs == 3
    for face in (plain, wrapped):
        face.seed(4)
        face.set_options([{"index": 1}, {}, {}])
    first = [face.reset() for face in (plain, wrapped)]
    assert str(first[0]) == str(first[1])
    rng = np.random.default_rng(0)
    for _ in range(20):
        actions = rng.choice([EOS, A, C], 3)
        (obs, rewards, dones, infos), (obs_w, rewards_w, dones_w, infos_w) = (face.step(actions) for face in (plain, wrapped))
        assert str(obs) == str(obs_w) and np.array_equal(2 * rewards, rewards_w) and np.array_equal(dones, dones_w)
        for info, info_w in zip(infos, infos_w, strict=True):
            episode, episode_w = info.pop("episode", None), info_w.pop("episode", None)
            assert str(info) == str({key: info_w[key] for key in info}) and info.keys() == info_w.keys()
            if episode is not None:
                assert episode_w["r"] == 2 * episode["r"] and episode_w["l"] == episode["l"]


@pytest.mark.parametrize("name", AGENTS)
def test_the_reward_of_a_vector_wrapper_is_the_one_trained_on(name):
    statistics = vector_wrappers.RecordEpisodeStatistics(vector_wrappers.TransformReward(vectorized(), lambda reward: -reward))
    agent = make_agent(name, env=statistics, n_envs=16, learning_rate=3e-3)
    rollouts, train = [], agent.train
    agent.train = lambda rollout: rollouts.append(rollout) or train(rollout)
    agent.learn(100)
    for rollout in rollouts:
        assert rollout.scores.tolist() == [-info["reward/always_a"] for info in rollout.infos]
    assert min(rollout.scores.min() for rollout in rollouts) < 0  # a pays in the env and costs here
    assert statistics.episode_count >= agent.num_timesteps / 4
    rewards, lengths = evaluate_policy(agent, agent.env, 32, return_episode_rewards=True)
    assert max(rewards) <= 0 and len(lengths) == 32


def test_a_vector_wrapper_that_changes_nothing_trains_as_the_wrapper_of_one_env_does():
    agents = []
    for env in (
        vector_wrappers.TransformReward(vectorized(n=1), lambda r: r),
        gym.wrappers.TransformReward(make_env(TOKENIZER), lambda r: r),
    ):
        agents.append(make_agent("GRPO", env=env, n_envs=8).learn(60))
    assert same(weights(agents[0]), weights(agents[1]))


class Subclassed(TextGenerationVectorEnv):
    def step(self, actions, logprobs=None):
        observation, rewards, *rest = super().step(actions, logprobs)
        return observation, rewards + 1, *rest


def test_a_subclass_of_the_vector_env_with_a_step_of_its_own_is_honoured():
    env = Subclassed.from_rules(make_env(TOKENIZER).rules, 4, AutoresetMode.SAME_STEP)
    with pytest.warns(UserWarning, match="to honour Subclassed"):
        rollout = rollout_of(env, 4)
    assert rollout.scores.tolist() == [len(response) + response.count(A) / 4 for response in rollout.responses]


class CutsShort(gym.vector.VectorWrapper):
    def step(self, actions):
        observation, rewards, terminated, truncated, infos = self.env.step(actions)
        return observation, rewards, terminated, np.ones_like(truncated), infos


def test_vector_envs_that_cannot_be_served_say_why():
    for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED):
        with pytest.raises(ValueError, match=r"make the TextGenerationVectorEnv with autoreset_mode=AutoresetMode\.SAME_STEP"):
            make_agent("GRPO", env=vector_wrappers.ClipReward(vectorized(mode), 0, 1), n_envs=16)
    face = WrappedTextVecEnv(CutsShort(vectorized(n=2)))
    face.reset()
    with pytest.raises(ValueError, match="a wrapper ended the episode in row 0, but the row was not reset"):
        face.step(np.array([A, A]))
    with pytest.raises(TypeError, match="make the native one with"):
        make_agent("GRPO", env=gym.make_vec("CartPole-v1", 2))
    assert isinstance(as_vec_env(vectorized(AutoresetMode.NEXT_STEP), 1), TextVecEnv)  # unwrapped, any mode will do
