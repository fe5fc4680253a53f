"""One set of allowed tokens for action masks, sampling, training and the reference."""

import numpy as np
import pytest
import torch
from gymnasium.wrappers import TransformReward

from agents import GRPO, PPO, LanguagePolicy
from agents.sampling.sampler import Sampler
from llm_env import TextGenerationVectorEnv
from tests.conftest import FAMILIES, make_model, make_tokenizer
from tests.probes import make_env
from tests.rollouts import collect, collect_by_tokens

TOKENIZER = make_tokenizer("abcd")
EOS, A, B, C, D = 0, 3, 4, 5, 6


def not_twice(prompt, response):
    """Anything but padding and the token before; the end token after two tokens."""
    last = response[-1] if response else prompt[-1]
    return [t for t in (A, B, C, D) if t != last] + ([EOS] if len(response) >= 2 else [])


def ids_of(mask):
    return np.flatnonzero(mask).tolist()


def test_masks_by_hand():
    env = make_env(TOKENIZER, allowed_tokens=[EOS, A, B], min_new_tokens=2)
    env.reset(seed=0)
    assert ids_of(env.action_masks()) == [A, B]
    env.step(A)
    assert ids_of(env.action_masks()) == [A, B]
    env.step(B)
    assert ids_of(env.action_masks()) == [EOS, A, B]
    env.step(EOS)
    assert env.action_masks().all()  # it is over: nothing to choose
    venv = make_env(TOKENIZER, prompts=("a",), allowed_tokens=not_twice).vectorize(2)
    venv.reset(seed=0)
    venv.step(np.array([B, C]))
    assert [ids_of(row) for row in venv.action_masks()] == [[A, C, D], [A, B, D]]
    venv.step(np.array([A, B]))
    assert [ids_of(row) for row in venv.action_masks()] == [[EOS, B, C, D], [EOS, A, C, D]]


@pytest.mark.parametrize(
    "allowed", [np.arange(7) % 2 == 1, np.array([1, 3, 5]), {1, 3, 5}, range(1, 7, 2), lambda p, r: [1, 3, 5]]
)
def test_ids_masks_and_functions_say_the_same(allowed):
    env = make_env(TOKENIZER, allowed_tokens=allowed)
    env.reset(seed=0)
    assert ids_of(env.action_masks()) == [1, 3, 5]


def test_a_forbidden_token_changes_nothing():
    env = make_env(TOKENIZER, prompts=("a",), allowed_tokens=not_twice)
    before, _ = env.reset(seed=0)
    for token in (A, EOS):
        with pytest.raises(
            ValueError, match=rf"action {token} \('.*'\) in row 0 is not allowed as token 0 of the response.*\[4, 5, 6\]"
        ):
            env.step(token)
    after, *_ = env.step(B)
    assert after["attention_mask"].sum() == before["attention_mask"].sum() + 1
    venv = env.vectorize(2)
    venv.reset(seed=0)
    with pytest.raises(ValueError, match=r"action 4 .* in row 1 is not allowed as token 1"):
        venv.step_responses([[B, A, EOS], [B, B, EOS]])
    assert venv.step_responses([[B, A, EOS], [B, A, EOS]]).terminated.all()


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"allowed_tokens": []}, ValueError, "allowed_tokens allows no token"),
        ({"allowed_tokens": [A, 7]}, ValueError, r"holds 7, which is no token id: the vocabulary is 0\.\.6"),
        ({"allowed_tokens": [-1]}, ValueError, "holds -1"),
        ({"allowed_tokens": ["a"]}, TypeError, "must give token ids or a bool array"),
        ({"allowed_tokens": np.ones(3, dtype=bool)}, ValueError, r"shape \(3,\); its shape must be \(7,\)"),
        (
            {"allowed_tokens": [EOS], "min_new_tokens": 1},
            ValueError,
            "forbids the end token, and allowed_tokens leaves no other",
        ),
        ({"min_new_tokens": 5}, ValueError, "min_new_tokens=5 must be a whole number of at least 0, at most 4"),
        ({"min_new_tokens": 0.5}, ValueError, "min_new_tokens=0.5 must be"),
    ],
)
def test_bad_constraints_are_refused_at_construction(kwargs, error, message):
    with pytest.raises(error, match=message):
        make_env(TOKENIZER, **kwargs)


def test_a_function_that_leaves_nothing_is_named_with_its_state():
    env = make_env(TOKENIZER, prompts=("a",), allowed_tokens=lambda prompt, response: [] if response else [A])
    env.reset(seed=0)
    env.step(A)
    with pytest.raises(ValueError, match=r"allowed_tokens\(\[3\], \[3\]\) allows no token"):
        env.step(A)
    env = make_env(TOKENIZER, prompts=("a",), allowed_tokens=lambda prompt, response: [EOS], min_new_tokens=1)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="leaves only the end token after 0 tokens, but min_new_tokens=1"):
        env.step(EOS)


def test_what_comes_after_the_end_is_refused_as_that():
    def only_before_the_end(prompt, response):
        return [] if EOS in response else [EOS, A]

    venv = make_env(TOKENIZER, prompts=("a",), max_new_tokens=4, allowed_tokens=only_before_the_end).vectorize(1)
    venv.reset(seed=0)
    with pytest.raises(ValueError, match="has 1 tokens after its end at token 1"):
        venv.step_responses([[A, EOS, A]])
    with pytest.raises(ValueError, match="has 5 tokens, more than max_new_tokens=4"):
        venv.step_responses([[A, EOS, A, A, A]])


def slow_log_probs(model, prompt, response, allowed, temperature):
    """One unpadded forward pass a token, renormalized over the allowed tokens in float64; and the entropies."""
    logps, entropies = [], []
    for t, token in enumerate(response):
        logits = model(torch.tensor([[*prompt, *response[:t]]])).logits[0, -1].double() / temperature
        chosen = sorted(allowed(prompt, response[:t]))
        logp = logits[chosen].log_softmax(-1)
        logps.append(logp[chosen.index(token)].item())
        entropies.append(-(logp.exp() * logp).sum().item())
    return np.array(logps), np.array(entropies)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_training_and_the_reference_agree_with_a_slow_computation(family, temperature):
    model, other = make_model(family, len(TOKENIZER)), make_model(family, len(TOKENIZER), seed=5).eval()
    env = make_env(TOKENIZER, prompts=("a", "bc"), max_new_tokens=6, allowed_tokens=not_twice, reference=other)
    agent = GRPO(model, env, group_size=8, n_envs=16, kl_coef=0.1, temperature=temperature, seed=0)
    rollout = collect(agent.policy, agent.env.venv, 8, agent.sampler())
    assert len({tuple(response) for response in rollout.responses}) > 8
    result = agent.policy.evaluate_actions(rollout.prompts, rollout.responses, temperature)
    for i, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        n = len(response)
        assert all(token in not_twice(prompt, response[:t]) for t, token in enumerate(response))
        expected, entropies = slow_log_probs(model, prompt, response, not_twice, temperature)
        np.testing.assert_allclose(rollout.sampled_logp[i, :n], expected, atol=1e-4)
        np.testing.assert_allclose(result.logp[i, :n].detach(), expected, atol=1e-4)
        np.testing.assert_allclose(result.entropy[i, :n].detach(), entropies, atol=1e-4)
        ref, _ = slow_log_probs(other, prompt, response, not_twice, temperature)
        np.testing.assert_allclose(rollout.ref_logp[i, :n], ref, atol=1e-4)
    result.entropy.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("wrap", [False, True], ids=["responses", "tokens"])
@pytest.mark.filterwarnings("ignore:the env is stepped token by token")
def test_the_ratio_is_one_and_the_kl_to_oneself_is_nothing(wrap):
    model = make_model("gpt2", len(TOKENIZER))
    env = make_env(TOKENIZER, max_new_tokens=5, allowed_tokens=not_twice, min_new_tokens=3, reference=model)
    env = TransformReward(env, lambda r: r) if wrap else env
    agent = PPO(model, env, n_envs=8, n_epochs=1, seed=0)
    agent.learn(20)
    logged = agent.logger.name_to_value
    assert logged["train/approx_kl"] == pytest.approx(0, abs=1e-9)
    assert logged["train/logp_gap"] < 1e-4
    assert logged["train/kl_ref"] == pytest.approx(0, abs=1e-8)


@pytest.mark.filterwarnings("ignore:the env is stepped token by token")
def test_agents_keep_to_the_rules_on_both_clocks_and_learn():
    def share_of_b(completions, **kwargs):
        return [c.count("b") / 4 for c in completions]

    for wrap in (False, True):
        env = make_env(TOKENIZER, share_of_b, prompts=("a", "c"), allowed_tokens=not_twice)
        env = TransformReward(env, lambda r: r) if wrap else env
        agent = GRPO(make_model("llama", len(TOKENIZER), scale=1.0), env, 3e-3, group_size=8, n_envs=32, seed=0)
        agent.learn(2500)
        assert agent.evaluate(env)["reward"] == 0.5  # every other letter a b: more is not allowed


def test_predict_and_generate_keep_to_the_rules():
    env = make_env(TOKENIZER, prompts=("a", "aba"), max_prompt_tokens=4, max_new_tokens=4, allowed_tokens=not_twice)
    agent = GRPO(make_model("llama", len(TOKENIZER), seed=3), env, group_size=2, n_envs=4, seed=0)
    state, start = None, np.array([True])
    for _ in range(20):
        for index in (0, 1):  # the second prompt goes on from what the first one's episode may begin with
            observation, _ = env.reset(options={"index": index})
            done = False
            while not done:
                token, state = agent.predict(observation, state, start)
                observation, _, terminated, truncated, _ = env.step(token)  # raises on a forbidden token
                done = terminated or truncated
                start = np.array([done])
    for prompt, text in zip(["a"] * 20, agent.generate(["a"] * 20), strict=True):
        assert all(x != y for x, y in zip(prompt + text, text, strict=False))
    mask = np.zeros(len(TOKENIZER), dtype=bool)
    mask[C] = True
    assert agent.predict(env.reset()[0], action_masks=mask)[0] == C


def test_a_static_constraint_costs_no_calls_and_shows_in_the_policys_own_methods():
    policy = LanguagePolicy(make_model("llama", len(TOKENIZER)), TOKENIZER)
    env = make_env(TOKENIZER, allowed_tokens=[EOS, A], min_new_tokens=2)
    policy.constraint = env.rules.constraint
    responses, logps = policy.sample([[B]], group_size=16, max_new_tokens=5, generator=torch.Generator().manual_seed(0))
    assert all(r[:2] == [A, A] and set(r) <= {EOS, A} for r in responses)
    assert all(logp[0] == logp[1] == 0 for logp in logps)  # there was no choice
    for got, logp in zip(policy.log_probs([[B]] * 16, responses), logps, strict=True):
        np.testing.assert_allclose(got.detach(), logp, atol=1e-5)


def test_collecting_by_tokens_and_by_responses_scores_alike():
    env = make_env(TOKENIZER, prompts=("a",), max_new_tokens=4, allowed_tokens=not_twice)
    agent = GRPO(make_model("llama", len(TOKENIZER)), env, group_size=2, n_envs=4, seed=0)
    greedy = Sampler(deterministic=True)
    whole = collect(agent.policy, TextGenerationVectorEnv.from_rules(env.rules, 1), 1, greedy, [0])
    with pytest.warns(UserWarning):
        other = GRPO(agent.policy, TransformReward(env, lambda r: r), group_size=2, n_envs=4)
    tokens = collect_by_tokens(agent.policy, other.env, [0], 1, greedy)
    assert whole.responses == tokens.responses
    np.testing.assert_allclose(whole.sampled_logp, tokens.sampled_logp, atol=1e-5)
