"""Compute log-probs and values by one plain forward pass a response, alone and unpadded.

Nothing here uses `llm_env.lm.scoring` or the sampling code, so that an error that both share is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from agents.policy import LanguagePolicy
from llm_env.lm.inputs import without_cache
from llm_env.rules import Rules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def naive_log_probs(
    policy: LanguagePolicy,
    rules: Rules,
    prompt: Sequence[int],
    response: Sequence[int],
    temperature: float,
    turn_ids: Sequence[int] | None = None,
) -> Tensor:
    """Compute log pi of a response's action tokens, each sampled among those that the env allows.

    Args:
        policy: its model is called directly.
        rules: vocabulary and allowed tokens.
        prompt: token ids.
        response: n token ids.
        temperature: divides the logits.
        turn_ids: n ints, the turn of each token, -1 for tokens that the env wrote; by default all are one turn.

    Returns:
        (n,) float32, in nats; 0 at tokens that the env wrote.
    """
    turns = [0] * len(response) if turn_ids is None else list(turn_ids)
    policy.lm.eval()
    ids = torch.tensor([[*prompt, *response]], device=policy.lm.device)
    logits = policy.lm(input_ids=ids, **without_cache(policy.lm)).logits[0, len(prompt) - 1 : -1, : rules.vocab_size]
    logits = logits.float() / temperature
    if rules.constraint is not None:
        allowed = np.ones((len(response), rules.vocab_size), dtype=bool)
        for t, turn in enumerate(turns):
            if turn >= 0:
                begin = turns.index(turn)
                allowed[t] = rules.constraint.next([*prompt, *response[:begin]], response[begin:t])
        logits = logits.masked_fill(torch.as_tensor(~allowed, device=logits.device), -torch.inf)
    logp = logits[torch.arange(len(response)), ids[0, len(prompt) :]] - logits.logsumexp(-1)
    return logp * (torch.tensor(turns, device=logp.device) >= 0)


@torch.no_grad()
def naive_values(policy: LanguagePolicy, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Compute V of the state before each of n response tokens and after the last one, (n + 1,) float32."""
    critic = getattr(policy, "critic", None)
    model = policy.lm if critic is None else critic
    model.eval()
    ids = torch.tensor([[*prompt, *response]], device=policy.lm.device)
    hidden = _last_hidden_states(model, ids)[0, len(prompt) - 1 :]
    assert policy.value_head is not None
    return policy.value_head(hidden.float())[:, 0]


def _last_hidden_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the hidden states (B, L, H) that a head reads; some models (Gemma 3n) do not list them with the layers'."""
    if model.base_model is model and hasattr(model, "lm_head"):
        return model(input_ids=ids, **without_cache(model), output_hidden_states=True).hidden_states[-1]
    return model.base_model(input_ids=ids, **without_cache(model)).last_hidden_state
