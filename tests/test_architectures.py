"""Every causal architecture of transformers: sampling, training and predict against a plain, unpadded forward pass a row."""

import numpy as np
import pytest
import torch

from agents import LanguagePolicy
from agents.generation import next_logits
from llm_env.inputs import without_cache
from llm_env.scoring import score
from tests.architectures import NAMES, V, build
from tests.conftest import make_tokenizer

TOKENIZER = make_tokenizer("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+-*/=")
assert len(TOKENIZER) == V
PROMPTS = [[7, 8, 9], [(11 * i) % 50 + 5 for i in range(14)], [20, 3, 41, 33, 8, 17], [30, 31, 32]]
GROUP, NEW = 3, 12
CLOSE = {"atol": 1e-4, "rtol": 1e-4}

NOT_CAUSAL = "is not causal"
MORE_THAN_IDS = "computes nothing from token ids alone"
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


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_log_probs_are_those_of_a_plain_forward_or_the_model_is_refused(name):
    if name in NOT_BUILT:
        with pytest.raises(Exception, match=NOT_BUILT[name]):
            build(name)
    elif name in REFUSED:
        model = build(name)
        with pytest.raises(ValueError, match=f"^{type(model).__name__} {REFUSED[name]}"):
            check(model)
    else:
        check(build(name))
