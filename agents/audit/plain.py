"""The slow way: one plain forward of the model for each response, alone and unpadded, against which the fast ways are held.

Nothing here goes through `llm_env.lm.scoring` or `agents.generation`, so that a fault that they share shows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from agents.policy import LanguagePolicy
from llm_env.lm.inputs import without_cache
from llm_env.rules import Rules


def token_log_probs(
    policy: LanguagePolicy, rules: Rules, prompt: Sequence[int], response: Sequence[int], temperature: float
) -> Tensor:
    """Log pi of the response's tokens, each drawn among those that the env allows, (n,) float32, in nats."""
    policy.lm.eval()
    ids = torch.tensor([[*prompt, *response]], device=policy.lm.device)
    logits = policy.lm(input_ids=ids, **without_cache(policy.lm)).logits[0, len(prompt) - 1 : -1, : rules.vocab_size]
    logits = logits.float() / temperature
    if rules.constraint is not None:
        allowed = np.stack([rules.constraint.next(prompt, response[:t]) for t in range(len(response))])
        logits = logits.masked_fill(torch.as_tensor(~allowed, device=logits.device), -torch.inf)
    # As the training path rounds: where p is near 1, the float32 gradient of log_softmax is another by much of its norm.
    return logits[torch.arange(len(response)), ids[0, len(prompt) :]] - logits.logsumexp(-1)


@torch.no_grad()
def values_of(policy: LanguagePolicy, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """V of the state before each token of the response and after its last, (n + 1,) float32."""
    critic = getattr(policy, "critic", None)
    model = policy.lm if critic is None else critic
    model.eval()
    ids = torch.tensor([[*prompt, *response]], device=policy.lm.device)
    hidden = _last_states(model, ids)[0, len(prompt) - 1 :]
    assert policy.value_head is not None
    return policy.value_head(hidden.float())[:, 0]


def _last_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the hidden states (B, L, H) that a head reads, which some models (Gemma 3n) do not list with the layers'."""
    if model.base_model is model and hasattr(model, "lm_head"):
        return model(input_ids=ids, **without_cache(model), output_hidden_states=True).hidden_states[-1]
    return model.base_model(input_ids=ids, **without_cache(model)).last_hidden_state


def policy_gradient(
    policy: LanguagePolicy,
    rules: Rules,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    factors: Sequence[Tensor],
    temperature: float,
) -> list[Tensor | None]:
    """The gradient of -sum of factor * log pi over the responses' tokens, one tensor (or None) a trained weight.

    Args:
        policy: its gradients are written over.
        rules: the env's.
        prompts: B lists of token ids.
        responses: B lists of token ids.
        factors: B tensors (n,), the advantage of each token times its weight in the loss.
        temperature: divides the logits.
    """
    policy.zero_grad()
    for prompt, response, factor in zip(prompts, responses, factors, strict=True):
        logp = token_log_probs(policy, rules, prompt, response, temperature)
        (-(logp * factor).sum()).backward()
    return gradient_of(policy)


def gradient_of(policy: LanguagePolicy) -> list[Tensor | None]:
    """The gradient of every trained weight, moved to the CPU: several are held at a time; None where there is none."""
    return [None if p.grad is None else p.grad.detach().cpu() for p in policy.parameters() if p.requires_grad]


def distance(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float:
    """The norm of the difference of two gradients over the norm of the first."""
    difference = sum(_square(x, y) for x, y in zip(a, b, strict=True))
    return (difference / max(sum(_square(x, None) for x in a), 1e-60)) ** 0.5


def _square(x: Tensor | None, y: Tensor | None) -> float:
    """Sum of (x - y)^2, None standing for zeros."""
    if x is None or y is None:
        x, y = (y, None) if x is None else (x, None)
        return 0.0 if x is None else x.double().square().sum().item()
    return (x - y).double().square().sum().item()
