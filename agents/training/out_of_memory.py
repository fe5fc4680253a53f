"""Name a smaller token budget when a pass of the update runs out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from agents.policy import LanguagePolicy
from llm_env.lm.micro_batches import padded_tokens
from llm_env.lm.shared_prompt import Rows
from llm_env.lm.sharing import BatchShape, groups_of
from llm_env.rules import Rules

CPU_ALLOCATOR = "DefaultCPUAllocator"  # raises a RuntimeError with this name in its message


@contextmanager
def suggest_token_budget(policy: LanguagePolicy, rules: Rules, prompts: Rows, responses: Rows) -> Iterator[None]:
    """Add a smaller `max_tokens_per_batch` to an out-of-memory error of a forward or backward pass.

    The gradients are dropped. The weights are unchanged, because a pass writes to gradients only.

    Args:
        policy: the policy that computes the pass.
        rules: the env's rules; their longest episode is the smallest budget that an agent accepts.
        prompts: B lists of token ids.
        responses: B lists of token ids.

    Raises:
        torch.OutOfMemoryError: If the GPU has not enough memory for the pass.
        RuntimeError: If the CPU has not enough memory for the pass.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and CPU_ALLOCATOR not in str(error):
            raise
        policy.zero_grad()
        extent = BatchShape.of(*groups_of(prompts, responses))
        positions = padded_tokens(policy.lm, extent.longest_prompt + extent.longest, policy.prefix_sharing)(extent)
        budget = max(rules.longest_prompt + rules.max_episode_tokens, positions // 2)
        remedy = f"Set max_tokens_per_batch={budget}"
        if budget >= positions:
            remedy = "Lower max_new_tokens, shorten the prompts or set gradient_checkpointing=True"
        error.args = (
            f"a pass over {extent.rows} episodes, {positions} tokens with padding, ran out of memory; this optimizer step has "
            f"changed no weights. {remedy}. {error}",
        )
        raise
