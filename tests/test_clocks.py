"""The same tokens in, the same rewards, ends and infos out: token clock, response clock, single env and vector env."""

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_env import TextGenerationEnv, TextGenerationVectorEnv
from llm_env.lm.scoring import score
from llm_env.reference import AdaptiveKLController, Reference
from tests.conftest import make_model, make_tokenizer

TOKENIZER = make_tokenizer("abc")
EOS, CHARACTERS = 0, "abc"


def first_letter(prompts, completions, level, **kwargs):
    return [level[i] * c.count(p[0]) for i, (p, c) in enumerate(zip(prompts, completions, strict=True))]


def length(completions, **kwargs):
    return [None if not c else len(c) / 3 for c in completions]


def draw_response(data, limit, stop):
    """A response as a sampler gives it: up to and including its end token, stop string or the limit."""
    ids = data.draw(st.lists(st.integers(0, len(TOKENIZER) - 1), min_size=limit, max_size=limit))
    for n in range(1, limit + 1):
        text = "".join(CHARACTERS[i - 3] for i in ids[:n] if i >= 3)
        if ids[n - 1] == EOS or any(s in text for s in stop):
            return ids[:n]
    return ids


def token_clock(venv, responses, logprobs=None):
    """Per row: rewards, (terminated, truncated), last info."""
    rewards, ends, infos = [[] for _ in responses], [None] * len(responses), [None] * len(responses)
    for t in range(max(map(len, responses))):
        live = [i for i, response in enumerate(responses) if t < len(response)]
        actions = np.array([r[t] if t < len(r) else EOS for r in responses])
        extra = {}
        if logprobs is not None:
            extra["logprobs"] = np.array([lp[t] if t < len(lp) else 0.0 for lp in logprobs])
        _, paid, terminated, truncated, info = venv.step(actions, **extra)
        for i in live:
            rewards[i].append(float(paid[i]))
            if terminated[i] or truncated[i]:
                ends[i] = (bool(terminated[i]), bool(truncated[i]))
                infos[i] = {k: v[i].item() if hasattr(v[i], "item") else v[i] for k, v in info.items() if k[0] != "_"}
                infos[i] = {k: v for k, v in infos[i].items() if info[f"_{k}"][i]}
    return rewards, ends, infos


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_both_clocks_and_the_single_env_agree(data):
    prompts = data.draw(st.lists(st.text(CHARACTERS, min_size=1, max_size=4), min_size=1, max_size=5))
    rows = [{"prompt": p, "level": i + 1} for i, p in enumerate(prompts)]
    group_size = data.draw(st.integers(1, 3))
    n = group_size * data.draw(st.integers(1, 3))
    limit = data.draw(st.integers(1, 6))
    stop = data.draw(st.lists(st.text(CHARACTERS, min_size=1, max_size=3), max_size=2))
    kwargs = dict(prompts=rows, reward=[first_letter, length], reward_weights=[1.0, -0.5], tokenizer=TOKENIZER, stop=stop)
    kwargs.update(max_prompt_tokens=4, max_new_tokens=limit)
    by_token, by_response = (TextGenerationVectorEnv(n, **kwargs) for _ in range(2))
    seed = data.draw(st.integers(0, 100))
    for venv in (by_token, by_response):
        observation, _ = venv.reset(seed=seed, options={"group_size": group_size})
    heads = observation["input_ids"][::group_size].repeat(group_size, 0)
    assert (observation["input_ids"] == heads).all()  # a group has one prompt
    responses = [draw_response(data, limit, stop) for _ in range(n)]
    rewards, ends, infos = token_clock(by_token, responses)
    outcome = by_response.step_responses(responses)
    assert [row.tolist() for row in outcome.rewards] == rewards
    assert list(zip(outcome.terminated.tolist(), outcome.truncated.tolist(), strict=True)) == ends
    assert outcome.infos == infos
    single = TextGenerationEnv(**kwargs)
    for i in range(n):
        single.reset(options={"index": infos[i]["prompt_index"]})
        steps = [single.step(token) for token in responses[i]]
        assert [step[1] for step in steps] == rewards[i]
        assert steps[-1][2:4] == ends[i] and steps[-1][4] == infos[i]


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_kl_shaping_agrees_on_both_clocks_and_with_hand_computation(data):
    n, limit, beta = 4, 4, 0.3
    reference = data.draw(st.sampled_from(REFERENCES))
    kwargs = dict(prompts=[{"prompt": p, "level": 1} for p in ("a", "bc", "cab")], reward=first_letter, tokenizer=TOKENIZER)
    kwargs.update(max_prompt_tokens=4, max_new_tokens=limit, reference=reference, kl_coef=beta)
    responses = [draw_response(data, limit, []) for _ in range(n)]
    known = data.draw(st.booleans())
    logprobs = [[data.draw(st.floats(-5, 0)) for _ in response] for response in responses] if known else None
    by_token, by_response = (TextGenerationVectorEnv(n, **kwargs) for _ in range(2))
    by_token.reset(seed=1)
    observation, _ = by_response.reset(seed=1)
    rewards, ends, infos = token_clock(by_token, responses, logprobs)
    outcome = by_response.step_responses(responses, logprobs)
    assert list(zip(outcome.terminated.tolist(), outcome.truncated.tolist(), strict=True)) == ends
    for i, response in enumerate(responses):
        prompt = observation["input_ids"][i][observation["attention_mask"][i] == 1].tolist()
        ref = slow_log_probs(reference.model, prompt, response)
        np.testing.assert_allclose(outcome.ref_logprobs[i], ref, atol=1e-5)
        text = "".join(CHARACTERS[t - 3] for t in response if t >= 3)
        expected = np.array([beta * r for r in ref]) if not known else -beta * (np.array(logprobs[i]) - ref)
        expected[-1] += text.count(CHARACTERS[prompt[0] - 3])
        np.testing.assert_allclose(outcome.rewards[i], expected, atol=1e-5)
        np.testing.assert_allclose(rewards[i], expected, atol=1e-5)
        assert infos[i]["ref_logprob"] == pytest.approx(ref.sum(), abs=1e-4)
        if known:
            assert outcome.infos[i]["kl"] == pytest.approx((np.array(logprobs[i]) - ref).sum(), abs=1e-4)
            assert infos[i]["kl"] == pytest.approx(outcome.infos[i]["kl"], abs=1e-4)


REFERENCES = [Reference(make_model(family, len(TOKENIZER))) for family in ("llama", "gpt2")]


def slow_log_probs(model, prompt, response):
    """One unpadded forward pass a token, in float64."""
    import torch

    model = model.double()
    result = []
    for t, token in enumerate(response):
        logits = model(torch.tensor([[*prompt, *response[:t]]])).logits[0, -1]
        result.append(logits.log_softmax(-1)[token].item())
    model.float()
    return np.array(result)


def test_the_reference_pads_by_hand_as_well():
    model = REFERENCES[1].model  # GPT-2: absolute positions, wrong by more than half a nat without position_ids
    prompts, responses = [[3], [4, 5, 3, 4]], [[3, 4, 5], [4]]
    got = REFERENCES[1].log_probs(prompts, responses) if hasattr(REFERENCES[1], "_vocab_size") else None
    if got is None:
        REFERENCES[1].check_vocabulary(len(TOKENIZER))
        got = REFERENCES[1].log_probs(prompts, responses)
    for row, prompt, response in zip(got, prompts, responses, strict=True):
        np.testing.assert_allclose(row, slow_log_probs(model, prompt, response), atol=1e-5)
    scored = score(model, prompts, responses, len(TOKENIZER))
    assert scored.logp.shape == (2, 3) and scored.mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_reference_model_is_copied_so_that_training_does_not_move_it():
    import torch

    model = make_model("llama", len(TOKENIZER))
    reference = Reference(model)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    assert not torch.equal(next(model.parameters()), next(reference.model.parameters()))
    assert all(p.requires_grad for p in model.parameters()) and not any(p.requires_grad for p in reference.model.parameters())


def test_the_adaptive_coefficient_by_hand():
    controller = AdaptiveKLController(0.15, target=6.0, horizon=10_000)
    controller.update(kl=9.0, n=256)  # error 0.5, clipped to 0.2
    assert controller.value == pytest.approx(0.15 * (1 + 0.2 * 256 / 10_000))
    controller.update(kl=5.4, n=100)  # error -0.1
    assert controller.value == pytest.approx(0.15 * (1 + 0.2 * 256 / 10_000) * (1 - 0.1 * 100 / 10_000))
    controller.update(kl=-3.0, n=100)  # error -1.5, clipped to -0.2
    assert controller.value == pytest.approx(0.15 * (1 + 0.00512) * (1 - 0.001) * (1 - 0.002))


def test_the_env_leaves_the_coefficient_to_the_agent():
    controller = AdaptiveKLController(0.1, target=1.0, horizon=10)
    kwargs = dict(prompts=[{"prompt": "a", "level": 1}], reward=first_letter, tokenizer=TOKENIZER, max_prompt_tokens=4)
    venv = TextGenerationVectorEnv(2, max_new_tokens=2, reference=REFERENCES[0], kl_coef=controller, **kwargs)
    venv.reset(seed=0)
    outcome = venv.step_responses([[3, 4], [3, 3]], [[0.0, 0.0], [0.0, 0.0]])  # log pi = 0: the KL is far above the target
    assert min(info["kl"] for info in outcome.infos) > 1.2
    assert controller.value == 0.1


def venv_of(n=4, prompts="abc", mode=AutoresetMode.NEXT_STEP, limit=3):
    rows = [{"prompt": p, "level": 1} for p in prompts]
    return TextGenerationVectorEnv(
        n, rows, first_letter, TOKENIZER, max_prompt_tokens=2, max_new_tokens=limit, autoreset_mode=mode
    )


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_autoreset_modes(mode):
    venv = venv_of(2, prompts="a", mode=mode)
    venv.reset(seed=0)
    observation, rewards, terminated, truncated, infos = venv.step(np.array([3, EOS]))
    assert terminated.tolist() == [False, True] and truncated.tolist() == [False, False]
    if mode is AutoresetMode.SAME_STEP:
        assert observation["attention_mask"].sum(1).tolist() == [2, 1]
        assert infos["_final_obs"].tolist() == [False, True]
        assert infos["final_obs"][1]["attention_mask"].sum() == 2 and infos["final_obs"][0] is None
        assert infos["final_info"]["completion"].tolist() == [None, ""]
        assert infos["final_info"]["_completion"].tolist() == [False, True]
    else:
        assert observation["attention_mask"].sum(1).tolist() == [2, 2]
        assert infos["completion"].tolist() == [None, ""] and infos["_completion"].tolist() == [False, True]
    if mode is AutoresetMode.DISABLED:
        with pytest.raises(ValueError, match=r"row 1 has ended.*call reset\(\)"):
            venv.step(np.array([3, 3]))
        observation, _ = venv.reset(options={"reset_mask": np.array([False, True])})
        assert observation["attention_mask"].sum(1).tolist() == [2, 1]
    observation, rewards, terminated, truncated, infos = venv.step(np.array([EOS, 3]))
    assert rewards.tolist() == [1.0, 0.0] and terminated.tolist() == [True, False]
    second = 1 if mode is AutoresetMode.NEXT_STEP else 2  # NEXT_STEP spent row 1's action on its reset
    assert observation["attention_mask"].sum(1).tolist()[1] == second
    assert venv.metadata["autoreset_mode"] is mode


def test_row_i_meets_the_prompts_of_a_single_env_seeded_with_seed_plus_i():
    venv = venv_of(4, prompts=CHARACTERS)
    firsts = [venv.reset(seed=7)[0]["input_ids"][:, 0]] + [venv.reset()[0]["input_ids"][:, 0] for _ in range(5)]
    for i in range(4):
        single = TextGenerationEnv(
            [{"prompt": p, "level": 1} for p in CHARACTERS], first_letter, TOKENIZER, max_prompt_tokens=2, max_new_tokens=3
        )
        order = [single.reset(seed=7 + i)[0]["input_ids"][0]] + [single.reset()[0]["input_ids"][0] for _ in range(5)]
        assert [first[i] for first in firsts] == order


def test_group_resets_use_every_prompt_once_an_epoch():
    venv = venv_of(4, prompts=["a", "b", "c", "ab", "ac", "bc"])
    venv.reset(seed=0)
    seen = []
    for _ in range(3):
        venv.reset(options={"group_size": 2})
        seen += venv.episodes.prompt_indexes[::2].tolist()
    assert sorted(seen) == [0, 1, 2, 3, 4, 5]


def test_the_order_of_prompts_goes_on_from_a_state_dict():
    venv, other = venv_of(), venv_of()
    venv.reset(seed=0)
    venv.reset(options={"group_size": 2})
    state = venv.state_dict()

    def go_on(v):
        grouped = [v.reset(options={"group_size": 2})[0]["input_ids"].tolist() for _ in range(5)]
        return grouped, [v.reset()[0]["input_ids"].tolist() for _ in range(5)]

    expected = go_on(venv)
    other.load_state_dict(state)
    assert go_on(other) == expected
    with pytest.raises(ValueError, match="the saved state has 4 rows and 3 prompts, this env num_envs=3 and 3"):
        venv_of(3).load_state_dict(state)


def test_a_failed_reset_changes_nothing():
    venv = venv_of(2, prompts="a", limit=3)
    venv.reset(seed=0)
    before, *_ = venv.step(np.array([3, 3]))
    with pytest.raises(ValueError, match="index=99 is out of range"):
        venv.reset(options={"index": [0, 99]})
    assert all(np.array_equal(before[key], value) for key, value in venv.episodes.observation().items())


def test_a_reset_of_some_rows_seeds_these_only():
    venv, whole = venv_of(3), venv_of(3)
    for v in (venv, whole):
        v.reset(seed=5)
    mask = np.array([False, True, False])
    venv.reset(seed=[9, 9, 9], options={"reset_mask": mask})
    expected = [row.tolist() for row in whole.reset()[0]["input_ids"]]
    got = [row.tolist() for row in venv.reset()[0]["input_ids"]]
    assert [got[0], got[2]] == [expected[0], expected[2]]


def test_an_open_response_goes_on_and_an_empty_one_waits():
    venv = venv_of(2, prompts="a")
    venv.reset(seed=0)
    first = venv.step_responses([[3, 3], [EOS]])
    assert first.terminated.tolist() == [False, True] and first.infos[0] == {}
    assert first.rewards[0].tolist() == [0.0, 0.0]
    second = venv.step_responses([[3], []])
    assert second.truncated.tolist() == [True, False] and second.terminated.tolist() == [False, False]
    assert second.rewards[0].tolist() == [3.0] and second.rewards[1].tolist() == []


@pytest.mark.parametrize(
    ("responses", "logprobs", "message"),
    [
        ([[3]], None, "1 responses for num_envs=2"),
        ([[3, EOS, 4], [3]], None, "row 0 has 1 tokens after its end at token 1"),
        ([[3], [3, 3, 3, 3]], None, "row 1 has 4 tokens, more than max_new_tokens=3"),
        ([[3], [99]], None, "action 99 in row 1 is not a token id"),
        ([[3], [[3]]], None, "response 1 must be a flat sequence"),
        ([[3], [0.5]], None, "response 1 must be a flat sequence"),
        ([[3], [3]], [[0.0], []], "logprobs must have one number per token"),
        ([[3], [3]], [[0.0], [float("nan")]], r"logprobs\[1\] must be finite; position \[0\]"),
    ],
)
def test_bad_responses_change_nothing(responses, logprobs, message):
    venv = venv_of(2, prompts="a")
    before, _ = venv.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        venv.step_responses(responses, logprobs)
    after = venv.episodes.observation()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert venv.step_responses([[EOS], [EOS]]).terminated.all()


def test_bad_steps_and_resets():
    venv = venv_of(4)
    venv.reset(seed=0)
    with pytest.raises(ValueError, match="actions must be 4 integers"):
        venv.step(np.array([3, 3]))
    with pytest.raises(ValueError, match="group_size=3 must divide num_envs=4; try num_envs=6"):
        venv.reset(options={"group_size": 3})
    with pytest.raises(ValueError, match="reset_mask"):
        venv.reset(options={"reset_mask": np.zeros(4, dtype=bool)})
    with pytest.raises(ValueError, match="holds 3 indexes; it must be a number or hold 2 of them"):
        venv.reset(options={"group_size": 2, "index": [0, 1, 2]})
    with pytest.raises(ValueError, match="seed has 2 numbers for num_envs=4"):
        venv.reset(seed=[0, 1])
    with pytest.raises(ValueError, match="num_envs=0 must be a whole number of at least 1"):
        venv_of(0)
