"""Every causal architecture of transformers: sampling, training and predict against a plain, unpadded forward pass a row."""

import numpy as np
import pytest
import torch

import llm_env
from agents import GRPO, PPO, LanguagePolicy
from agents.sampling.caching import decodes_with_cache, skips_hidden_slots
from agents.sampling.generate import next_logits
from agents.sampling.shared_prefix import decodes_shared
from llm_env.lm.capabilities import describable, padding_side, takes_left_padding
from llm_env.lm.inputs import without_cache
from llm_env.lm.models import check_causal
from llm_env.lm.scoring import head_of, score
from llm_env.lm.sharing import supports_sharing
from tests.architectures import NAMES, V, build
from tests.conftest import make_tokenizer

TOKENIZER = make_tokenizer("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+-*/=")
assert len(TOKENIZER) == V
PROMPTS = [[7, 8, 9], [(11 * i) % 50 + 5 for i in range(14)], [20, 3, 41, 33, 8, 17], [30, 31, 32]]
GROUP, NEW = 3, 12
CLOSE = {"atol": 1e-4, "rtol": 1e-4}

NOT_CAUSAL = "is not causal"
MORE_THAN_IDS = "computes nothing from token ids alone"
QUICK = (  # the others are slow together
    "bart falcon_h1 gpt_neo hrm_text llama minimax mixtral openai-gpt opt prophetnet recurrent_gemma roberta rwkv whisper xlstm"
).split()
REFUSED = {
    "cpmant": NOT_CAUSAL,  # its prompt and padding are seen by all tokens
    "musicgen": MORE_THAN_IDS,  # several codebooks
    "musicgen_melody": MORE_THAN_IDS,
    "prophetnet": NOT_CAUSAL,  # what its n-gram streams see depends on the length of the row
    "reformer": NOT_CAUSAL,  # how its hashes are sorted into chunks depends on later tokens
    "xlm": NOT_CAUSAL,  # tokens that are its padding shorten the row
    "xlnet": NOT_CAUSAL,  # without a permutation mask it sees all tokens
}
NOT_BUILT = {
    "gemma3n": "timm",
    "gemma4_assistant": "hidden_size_per_layer_input must be 0",  # drafts for another model, from its states
    "gemma4_unified_assistant": "layer types producing a cache",  # likewise
}


@torch.no_grad()
def plain(model, prompt, response):
    """Log-probs (n,) of a response's tokens and hidden states (n + 1, H), from one forward pass alone."""
    ids, uncached = torch.tensor([[*prompt, *response]]), without_cache(model)
    logp = model(input_ids=ids, **uncached).logits[0, len(prompt) - 1 : -1, :V].float().log_softmax(-1)
    if model.base_model is model:
        states = model(input_ids=ids, **uncached, output_hidden_states=True).hidden_states[-1]
    else:
        states = model.base_model(input_ids=ids, **uncached).last_hidden_state
    return logp[range(len(response)), response], states[0, len(prompt) - 1 :]


def check(model):
    policy = LanguagePolicy(model, TOKENIZER)
    prompts = [prompt for prompt in PROMPTS for _ in range(GROUP)]
    responses, logps = policy.sample(
        PROMPTS,
        GROUP,
        NEW,
        completes_stop=lambda ids: len(ids) > sum(ids) % NEW,
        generator=torch.Generator().manual_seed(0),
    )
    assert len(set(map(len, responses))) > 1
    rows = list(zip(prompts, responses, strict=True))
    expected = [plain(policy.lm, *row) for row in rows]
    for logp, (alone, _) in zip(logps, expected, strict=True):
        np.testing.assert_allclose(logp, alone.numpy(), atol=1e-4, err_msg="sampling")
    with torch.no_grad():
        scored = score(policy.lm, prompts, responses, V, states=True)
    for i, (alone, states) in enumerate(expected):
        torch.testing.assert_close(scored.logp[i, : len(alone)], alone, **CLOSE, msg=lambda m: f"training: {m}")
        torch.testing.assert_close(scored.states[i, : len(states)], states, **CLOSE, msg=lambda m: f"states: {m}")
    check_predict(policy, rows)


@torch.no_grad()
def check_predict(policy, rows):
    """Three episodes at a time, which begin anew at different steps, with `next_logits` as `predict` calls it."""
    waiting = [(list(prompt), list(response)) for prompt, response in rows[::-2]]
    under_way, state = [waiting.pop() for _ in range(3)], None
    contexts = [list(prompt) for prompt, _ in under_way]
    for _ in range(NEW):
        logits, state = next_logits(policy.lm, [list(context) for context in contexts], state)
        for i, context in enumerate(contexts):
            alone = policy.lm(input_ids=torch.tensor([context]), **without_cache(policy.lm)).logits[0, -1, :V]
            torch.testing.assert_close(
                logits[i, :V].log_softmax(-1), alone.log_softmax(-1), **CLOSE, msg=lambda m: f"predict: {m}"
            )
            at = len(context) - len(under_way[i][0])
            if at < len(under_way[i][1]):
                context.append(under_way[i][1][at])
            elif waiting:
                under_way[i] = waiting.pop()
                contexts[i] = list(under_way[i][0])
            else:
                context.append(7)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NAMES])
def test_log_probs_are_those_of_a_plain_forward_or_the_model_is_refused(name):
    if name in NOT_BUILT:
        with pytest.raises(Exception, match=NOT_BUILT[name]):
            build(name)
    elif name in REFUSED:
        model = build(name)
        with pytest.raises(TypeError, match=f"^(policy: )?{type(model).__name__} {REFUSED[name]}"):
            check(model)
    else:
        check(build(name))


# --- what the trials find ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "left", "side", "cache", "gaps"),
    [
        ("llama", True, "left", True, True),
        ("gpt2", True, "left", True, True),
        ("opt", True, "left", True, True),
        ("gpt_neo", True, "right", True, False),  # a window that its config calls otherwise
        ("bloom", True, "right", True, False),  # attention of its own
        ("mamba", True, "right", False, False),
        ("falcon_h1", True, "right", False, False),  # its cache repeats keys, but not states
        ("minimax", True, "right", False, False),
        ("openai-gpt", True, "right", False, False),
        ("moshi", True, "right", False, False),  # takes a cache, and computes other logits with it
        ("bart", False, "right", True, False),
        ("roberta", False, "right", False, False),  # its positions begin at 2, and leave out its padding token
        ("whisper", False, "right", True, False),
        ("deepseek_v4", False, "right", False, False),  # compresses tokens in blocks
        ("rwkv", False, "right", False, False),
        ("recurrent_gemma", False, "right", False, False),
        ("xlstm", False, "right", False, False),
    ],
)
def test_what_models_can_do(name, left, side, cache, gaps):
    model = build(name)
    found = takes_left_padding(model), padding_side(model), decodes_with_cache(model), skips_hidden_slots(model)
    assert found == (left, side, cache, gaps)


def test_a_body_that_shares_prompts_is_not_a_model_that_decodes_so():
    """Whisper's decoder takes positions, its language model does not; HRM computes each layer several times."""
    whisper, hrm = build("whisper"), build("hrm_text")
    assert supports_sharing(whisper.base_model, 20) and not decodes_shared(whisper)
    assert not describable(hrm.base_model) and not supports_sharing(hrm.base_model, 20)
    assert supports_sharing(build("llama").base_model, 20) and decodes_shared(build("llama"))


@pytest.mark.parametrize("name", ["recurrent_gemma", "rwkv", "bart", "xlstm"])
def test_fresh_weights_hide_nothing_from_the_trial(name):
    """Nearly uniform distributions, biases of 0, and for token 0, which is what rows are padded with, an embedding of 0."""
    model = build(name, noise=False)
    assert not takes_left_padding(model) and not takes_left_padding(model.base_model)


def test_weights_that_are_not_finite_tell_nothing():
    model = build("bart")
    weight = next(model.parameters())
    kept = weight.detach().clone()
    weight.data.fill_(torch.nan)
    assert not takes_left_padding(model) and not decodes_with_cache(model)
    weight.data.copy_(kept)
    assert not takes_left_padding(model) and decodes_with_cache(model)


def begin_at_zero(model, size=0.0):
    """Scale the head so that logits hardly differ, or not at all; what scales it back."""
    weight = model.get_output_embeddings().weight
    kept = weight.detach().clone()
    weight.data.mul_(size)
    return lambda: weight.data.copy_(kept)


@pytest.mark.parametrize("name", ["rwkv", "recurrent_gemma", "bart", "openai-gpt", "llama"])
def test_outputs_without_spread_tell_nothing(name):
    """A head that begins at zero: what holds for it is not kept for what it becomes."""
    model = build(name, tie_word_embeddings=False)
    restore = begin_at_zero(model)
    policy = LanguagePolicy(model, TOKENIZER)
    responses, logps = policy.sample(PROMPTS, 1, 4)
    trained = [logp.detach() for logp in policy.log_probs(PROMPTS, responses)]
    for logp in [*logps, *trained]:
        np.testing.assert_allclose(logp, -np.log(V), rtol=1e-5)  # uniform
    restore()
    check(model)
    found = [trial(model) for trial in (takes_left_padding, decodes_with_cache, decodes_shared)]
    assert found == [trial(build(name)) for trial in (takes_left_padding, decodes_with_cache, decodes_shared)]


def test_hidden_states_without_spread_tell_nothing():
    model = build("llama", tie_word_embeddings=False)
    weight = model.model.norm.weight
    kept = weight.detach().clone()
    weight.data.zero_()
    assert not supports_sharing(model.base_model, 2) and not takes_left_padding(model.base_model)
    weight.data.copy_(kept)
    assert supports_sharing(model.base_model, 2) and takes_left_padding(model.base_model)


def test_a_cap_on_logits_is_seen_once_there_are_any():
    class Capped(type(build("llama"))):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits.tanh()
            return outputs

    model = Capped(build("llama", tie_word_embeddings=False).config).eval()
    restore = begin_at_zero(model)
    assert head_of(model) is None
    restore()
    assert head_of(model) is None
    check(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "bart", "rwkv"])
def test_rounding_is_no_look_at_later_tokens(name, dtype):
    """Logits that a bias makes all but constant: tokens differ by less than the bias rounds."""
    for size in (0.0, 1e-7, 1e-6, 1e-5, 1e-4):
        model = build(name, tie_word_embeddings=False)
        begin_at_zero(model, size)
        model.get_output_embeddings().bias = torch.nn.Parameter(
            torch.linspace(-20, 20, len(model.get_output_embeddings().weight))
        )
        check_causal(model.to(dtype), "policy")


def test_a_model_that_sees_later_tokens_is_refused_once_it_shows():
    model = build("bert", is_decoder=False, tie_word_embeddings=False)
    restore = begin_at_zero(model)
    assert not takes_left_padding(model)
    restore()
    with pytest.raises(TypeError, match="is not causal"):
        takes_left_padding(model)


def test_trials_are_made_once_a_model_and_leave_it_as_it_was(monkeypatch):
    model = build("rwkv").train()
    model.rwkv.blocks[0].eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    check(model)
    assert torch.equal(torch.rand(3), expected)
    modes = build("rwkv").train()
    modes.rwkv.blocks[0].eval()
    takes_left_padding(modes), decodes_with_cache(modes), describable(modes.base_model)
    assert modes.training and not modes.rwkv.blocks[0].training and modes.rwkv.blocks[1].training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    def no_more(*args, **kwargs):
        raise AssertionError("a second trial")

    monkeypatch.setattr(type(modes), "forward", no_more)
    monkeypatch.setattr(type(modes.base_model), "forward", no_more)
    takes_left_padding(modes), decodes_with_cache(modes), padding_side(modes)


# --- training on them --------------------------------------------------------------------------------------------------------


def count_of_a(completions, **_):
    return [float(text.count("a")) for text in completions]


def env_of(**arguments):
    prompts = [TOKENIZER.decode(prompt) for prompt in PROMPTS]
    return llm_env.TextGenerationEnv(prompts, count_of_a, TOKENIZER, max_new_tokens=6, **arguments)


@pytest.mark.parametrize("name", ["rwkv", "bart", "opt"])
def test_gradients_are_those_of_plain_forwards(name):
    model, responses = build(name), [[5, 6, 7], [8], [9] * 5, [10, 11]]
    factors = [0.3, -0.7, 1.0, 0.2]
    loss = 0.0
    for factor, prompt, response in zip(factors, PROMPTS, responses, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *response]]), **without_cache(model)).logits[
            0, len(prompt) - 1 : -1, :V
        ]
        loss = loss + factor * logits.log_softmax(-1)[range(len(response)), response].sum()
    expected = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    scored = score(model, PROMPTS, responses, V)
    got = (torch.tensor(factors) * scored.logp.sum(1)).sum()
    scale = max(gradient.norm() for gradient in expected if gradient is not None)
    for a, b in zip(torch.autograd.grad(got, list(model.parameters()), allow_unused=True), expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6 * scale


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [GRPO, PPO])
@pytest.mark.parametrize("name", ["rwkv", "bart", "openai-gpt", "minimax"])
def test_an_agent_trains_and_its_audit_passes(name, kind):
    """With a reference, and for PPO a value head, micro-batches of rows of different lengths and a state that is carried."""
    settings = {"group_size": 2} if kind is GRPO else {}
    agent = kind(
        build(name),
        env_of(reference=build(name, seed=1), kl_coef=0.1),
        n_envs=8,
        seed=0,
        max_tokens_per_batch=64,
        policy_kwargs={"tokenizer": TOKENIZER},
        **settings,
    )
    agent.learn(48)
    report = agent.audit(n=8, quiet=True)
    assert report.passed, str(report)


@pytest.mark.parametrize("separate", [False, True])
def test_the_value_head_is_as_wide_as_the_states_that_it_reads(separate):
    """OPT-350m embeds tokens in 16 of 32 dimensions, and its head reads 16."""
    policy = LanguagePolicy(build("opt"), TOKENIZER, value_head=True, separate_critic=separate)
    assert policy.lm.config.hidden_size == 32 and policy.value_head.in_features == 16
    torch.nn.init.normal_(policy.value_head.weight)
    values = policy.evaluate_actions(PROMPTS[:2], [[5, 6], [7, 8, 9]]).values
    for row, prompt, response in zip(values, PROMPTS, [[5, 6], [7, 8, 9]], strict=False):
        states = policy.lm.model(input_ids=torch.tensor([[*prompt, *response]])).last_hidden_state[0, len(prompt) - 1 :]
        torch.testing.assert_close(row[: len(response) + 1], policy.value_head(states)[:, 0], **CLOSE)


def test_ppo_trains_a_model_whose_config_names_another_width():
    agent = PPO(build("opt"), env_of(), n_envs=8, seed=0, policy_kwargs={"tokenizer": TOKENIZER})
    agent.learn(48)
    assert agent.policy.value_head.weight.shape == (1, 16)


def test_a_model_that_sees_later_tokens_is_refused_before_training():
    model = build("bert", is_decoder=False)
    with pytest.raises(TypeError, match=r"policy: BertLMHeadModel is not causal.*is_decoder=True"):
        GRPO(model, env_of(), group_size=2, n_envs=4, policy_kwargs={"tokenizer": TOKENIZER})


def test_a_loss_of_routers_by_another_name_is_refused():
    with pytest.raises(ValueError, match=r"config\.output_router_logits=True.*weight 0\.01"):
        LanguagePolicy(build("jetmoe", output_router_logits=True), TOKENIZER)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_a_loss_of_routers_that_nothing_adds_is_refused(name):
    """TRL adds `router_aux_loss_coef` times it; without weight there is nothing to add."""
    with pytest.raises(ValueError, match=r"config\.output_router_logits=True.*Set config\.output_router_logits=False"):
        LanguagePolicy(build(name, output_router_logits=True), TOKENIZER)
    LanguagePolicy(build(name, output_router_logits=True, router_aux_loss_coef=0.0), TOKENIZER)
    policy = LanguagePolicy(build(name), TOKENIZER)
    agent = GRPO(policy, env_of(), group_size=2, n_envs=4)
    policy.lm.config.output_router_logits = True
    with pytest.raises(ValueError, match=r"config\.output_router_logits=True"):
        agent.learn(4)
