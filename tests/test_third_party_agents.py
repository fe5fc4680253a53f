"""Agents that nobody here wrote learn on the env: Stable-Baselines3, sb3-contrib, CleanRL's style, TorchRL."""

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import TimeLimit
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3 import PPO as SB3PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from torch import nn
from torch.distributions import Categorical

from agents import TextVecEnv, TokenEmbeddingExtractor
from llm_env import TextGenerationEnv
from tests.conftest import make_tokenizer
from tests.probes import make_env
from tests.text_envs import ShortGame

LETTERS = "abcdefghijklmnop"
CODE = dict(zip(LETTERS, "gkobjnaeldphcmfi", strict=True))
TOKENIZER = make_tokenizer(LETTERS)
EMBEDDED = {"features_extractor_class": TokenEmbeddingExtractor}


def coded(prompts, completions, **kwargs):
    """1 for the letter that the prompt's letter stands for: at most 1, and 1/19 by chance."""
    return [float(c[:1] == CODE[p]) for p, c in zip(prompts, completions, strict=True)]


def make_coded(observation="dict"):
    return make_env(TOKENIZER, coded, LETTERS, max_prompt_tokens=1, max_new_tokens=1, observation=observation)


def test_features_see_order_count_and_prompt_but_not_the_padding():
    torch.manual_seed(0)
    env = make_env(TOKENIZER, max_prompt_tokens=2, max_new_tokens=4)
    dict_space = env.observation_space
    extractor = TokenEmbeddingExtractor(dict_space, features_dim=16, embedding_dim=4)
    rows = [[3, 4], [4, 3], [3, 4, 3], [3, 4, 4], [5, 4, 4], [3, 4, 4, 0]]
    ids, mask = torch.zeros(6, 6), torch.zeros(6, 6)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row).float(), 1.0
    features = extractor({"input_ids": ids, "attention_mask": mask})
    assert features.shape == (6, 16)
    distances = torch.cdist(features, features) + torch.eye(6)
    assert distances.min() > 0.05  # another order, length, last token or prompt is another vector
    other_padding = torch.where(mask > 0, ids, 7.0)
    assert torch.equal(extractor({"input_ids": other_padding, "attention_mask": mask}), features)
    flat = TokenEmbeddingExtractor(make_env(TOKENIZER, observation="flat").observation_space, 16, 4)
    flat.load_state_dict(extractor.state_dict())
    assert torch.equal(flat(torch.where(mask > 0, ids, -1.0)), features)
    by_hand = extractor.tokens.weight[4] + extractor.positions.weight[2]
    torch.testing.assert_close(features[3, :4], by_hand)  # the last token, in its place


def test_the_extractor_refuses_what_it_cannot_read():
    env = make_env(TOKENIZER)
    with pytest.raises(ValueError, match="is no text env's"):
        TokenEmbeddingExtractor(env.action_space)
    with pytest.raises(ValueError, match="embedding_dim=128 must be at least 1 and less than features_dim=128"):
        TokenEmbeddingExtractor(env.observation_space, embedding_dim=128)


def before_and_after(policy_kwargs, observation="dict", seed=0):
    """The mean return of SB3's PPO before and after a fixed budget."""
    env = make_coded(observation)
    model = SB3PPO(
        "MultiInputPolicy" if observation == "dict" else "MlpPolicy",
        TextVecEnv(env.vectorize(128)),
        learning_rate=7e-3,
        n_steps=8,
        batch_size=256,
        n_epochs=4,
        ent_coef=0.01,
        policy_kwargs=policy_kwargs,
        seed=seed,
        device="cpu",
    )
    exam = TextVecEnv(env.vectorize(64))
    exam.seed(seed)
    before, _ = evaluate_policy(model, exam, 256, deterministic=False)
    model.learn(15_000)
    return before, evaluate_policy(model, exam, 256, deterministic=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize("observation", ["dict", "flat"])
def test_sb3_ppo_learns_with_embedded_tokens(observation):
    before, after = before_and_after(EMBEDDED, observation)
    assert before < 0.2 and after > 0.8


@pytest.mark.slow
def test_token_ids_as_plain_numbers_teach_sb3_ppo_little():
    assert before_and_after({})[1] < 0.6


@pytest.mark.parametrize("kind", ["SB3", pytest.param("MaskablePPO", marks=pytest.mark.slow)])
def test_other_agents_learn_a_game_of_several_turns(kind):
    """Always won only if the second guess depends on the reply to the first one."""
    tokenizer = make_tokenizer("123+-=")
    limits = {"max_turns": 2, "max_new_tokens": 1, "max_prompt_tokens": 1, "max_observation_tokens": 1}
    agent = SB3PPO
    if kind == "MaskablePPO":
        agent = pytest.importorskip("sb3_contrib").MaskablePPO
        limits["allowed_tokens"] = tokenizer.convert_tokens_to_ids(["1", "2", "3"])
    env = TextGenerationEnv.from_text_env(ShortGame, tokenizer, **limits)
    model = agent(
        "MultiInputPolicy",
        TextVecEnv(env.vectorize(128)),
        learning_rate=3e-3,
        n_steps=8,
        batch_size=256,
        n_epochs=4,
        gamma=1.0,
        ent_coef=0.01,
        policy_kwargs=EMBEDDED,
        seed=0,
        device="cpu",
    )
    model.learn(12_000)
    assert np.mean([episode["r"] for episode in model.ep_info_buffer]) > 0.8  # the last hundred games


def masked(reward, prompts=("a",)):
    """Only letters may be written, and the prompt's own letter may not: the mask follows the state."""

    def letters_but_the_prompts(prompt, response):
        return [token for token in range(3, len(TOKENIZER)) if token not in prompt]

    return make_env(TOKENIZER, reward, prompts, max_prompt_tokens=1, allowed_tokens=letters_but_the_prompts)


def masked_answers(seed=0):
    """The (prompt, completion) pairs of sb3-contrib's MaskablePPO from first to last, b being what pays."""
    contrib = pytest.importorskip("sb3_contrib")
    seen = []

    def share_of_b(prompts, completions, **kwargs):
        seen.extend(zip(prompts, completions, strict=True))
        return [c.count("b") / 4 for c in completions]

    def make():
        return masked(share_of_b, ("a", "b", "c"))

    model = contrib.MaskablePPO(
        "MultiInputPolicy",
        make_vec_env(make, 8),
        3e-3,
        32,
        128,
        4,
        policy_kwargs=EMBEDDED,
        seed=seed,
        device="cpu",
        ent_coef=0.01,
    )
    model.learn(5000)
    return seen


def share_of_b_where_allowed(pairs):
    return np.mean([c.count("b") / 4 for p, c in pairs if p != "b"])


@pytest.mark.slow
def test_maskable_ppo_learns_and_never_takes_a_forbidden_token():
    seen = masked_answers()
    assert all(len(c) == 4 and p not in c for p, c in seen)  # no end token, no padding, not the prompt's own letter
    assert share_of_b_where_allowed(seen[:200]) < 0.25 and share_of_b_where_allowed(seen[-200:]) > 0.8


def test_sb3_contrib_finds_the_masks_through_wrappers_and_vec_envs():
    pytest.importorskip("sb3_contrib")
    from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported

    def make():
        return Monitor(TimeLimit(masked(lambda completions: [0.0]), 3))

    expected = [False] * 4 + [True] * (len(TOKENIZER) - 4)  # <eos>, <pad>, <unk> and a are forbidden
    vec_env = make_vec_env(make, 2)
    for env, rows in ((make(), 1), (vec_env, 2)):
        env.reset()
        assert is_masking_supported(env) and get_action_masks(env).reshape(rows, -1).tolist() == [expected] * rows
    native = TextVecEnv(make_env(TOKENIZER).vectorize(2))
    assert is_masking_supported(native) and get_action_masks(native).shape == (2, len(TOKENIZER))


class SmallAgent(nn.Module):
    """Actor and critic over one-hot tokens, as a CleanRL user would write them for a Box."""

    def __init__(self, length, vocab_size, hidden=64):
        super().__init__()
        self.vocab_size = vocab_size
        self.body = nn.Sequential(nn.Linear(length * (vocab_size + 1), hidden), nn.Tanh())
        self.actor, self.critic = nn.Linear(hidden, vocab_size), nn.Linear(hidden, 1)

    def forward(self, observation):
        hidden = self.body(nn.functional.one_hot(observation + 1, self.vocab_size + 1).float().flatten(1))
        return Categorical(logits=self.actor(hidden)), self.critic(hidden)[:, 0]


def single_file_ppo(envs, seed, num_updates, num_steps=16, epochs=4, lr=1e-2, clip=0.2, gamma=1.0, lam=0.95):
    """PPO in one function over a Box, autoreset in the same step; returns the mean episode return of each update."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    agent = SmallAgent(envs.single_observation_space.shape[0], envs.single_action_space.n)
    optimizer = torch.optim.Adam(agent.parameters(), lr=lr, eps=1e-5)
    shape = (num_steps, envs.num_envs)
    obs = torch.zeros(shape + envs.single_observation_space.shape, dtype=torch.int64)
    actions, logps, values = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape), torch.zeros(shape)
    rewards, ends = torch.zeros(shape), torch.zeros(shape)
    next_obs, history = torch.as_tensor(envs.reset(seed=seed)[0]), []
    for _ in range(num_updates):
        finished = []
        for t in range(num_steps):
            obs[t] = next_obs
            with torch.no_grad():
                policy, values[t] = agent(next_obs)
            actions[t] = policy.sample()
            logps[t] = policy.log_prob(actions[t])
            seen, paid, terminations, truncations, infos = envs.step(actions[t].numpy())
            next_obs, rewards[t] = torch.as_tensor(seen), torch.as_tensor(paid)
            ends[t] = torch.as_tensor(terminations | truncations)
            if "episode" in infos:
                finished += infos["episode"]["r"][infos["_episode"]].tolist()
        history.append(np.mean(finished))
        with torch.no_grad():
            following, advantages, last = agent(next_obs)[1], torch.zeros(shape), 0.0
        for t in reversed(range(num_steps)):
            delta = rewards[t] + gamma * (1 - ends[t]) * following - values[t]
            advantages[t] = last = delta + gamma * lam * (1 - ends[t]) * last
            following = values[t]
        returns = (advantages + values).flatten()
        batch = [x.flatten(0, 1) for x in (obs, actions, logps, advantages)]
        for _ in range(epochs):
            for rows in np.array_split(rng.permutation(len(returns)), 4):
                o, a, old, adv = (x[rows] for x in batch)
                policy, value = agent(o)
                ratio = (policy.log_prob(a) - old).exp()
                adv = (adv - adv.mean()) / (adv.std() + 1e-8)
                loss = torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - clip, 1 + clip)).mean()
                loss = loss + 0.5 * ((value - returns[rows]) ** 2).mean() - 0.01 * policy.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
    return history


def spelled(prompts, completions, **kwargs):
    """The share of right letters in an answer that is to be the prompt turned round: at most 1."""
    return [sum(a == b for a, b in zip(c, p[::-1], strict=False)) / 2 for p, c in zip(prompts, completions, strict=True)]


def single_file_history(seed=0):
    kwargs = dict(prompts=[a + b for a in "abcd" for b in "abcd"], max_new_tokens=2, observation="flat")
    venv = make_env(make_tokenizer("abcd"), spelled, **kwargs).vectorize(32, autoreset_mode=AutoresetMode.SAME_STEP)
    return single_file_ppo(RecordEpisodeStatistics(venv), seed, 60)


@pytest.mark.slow
def test_a_single_file_ppo_learns_on_flat_observations():
    history = single_file_history()
    assert np.mean(history[:2]) < 0.3 and np.mean(history[-5:]) > 0.85


def test_torchrl_checks_the_env_and_gets_its_rewards():
    pytest.importorskip("torchrl")
    from torchrl.envs import GymWrapper, check_env_specs

    for observation in ("dict", "flat"):
        for categorical in (True, False):
            env = GymWrapper(make_env(make_tokenizer("abc"), observation=observation), categorical_action_encoding=categorical)
            check_env_specs(env)
            env.set_seed(0)
            rollout = env.rollout(60, break_when_any_done=False)["next"]
            ids = rollout["observation"] if observation == "flat" else rollout["input_ids"]
            written, paid = 0, []
            for row, reward, done in zip(ids.tolist(), rollout["reward"], rollout["done"], strict=True):
                written += 1
                expected = row[1 : 1 + written].count(3) / 4 if done else 0.0  # a prompt is one token
                assert reward.item() == expected
                paid.append(expected)
                written = 0 if done else written
            assert sum(paid) > 0 and rollout["done"].sum() > 10
