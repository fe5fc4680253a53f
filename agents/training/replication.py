"""The same weights in all processes before training begins: replicated, or sharded where the launcher says so."""

from __future__ import annotations

import copy

import torch

from agents.distributed.communicator import Communicator
from agents.distributed.fsdp import is_sharded, shard_and_warm_up
from agents.policy import LanguagePolicy
from llm_env.lm.scoring import try_out
from llm_env.reference import BaseReference, Reference


def replicate_policy(policy: LanguagePolicy, communicator: Communicator) -> None:
    """Give all processes the main one's weights, and shard them where the launcher says so."""
    if is_sharded(policy):
        return

    def try_out_all() -> None:
        for model in (policy.lm, policy.critic):
            if model is not None:
                try_out(model)

    def warm_up() -> None:
        try_out_all()
        policy._evaluate([[0]], [[0]], None, 1.0, None)

    communicator.broadcast_weights(policy)
    try_out_all()
    if communicator.sharded and policy.adapter is not None:
        _ = policy.adapter.base_hash  # which checkpoints have, of the base as it is now
    if communicator.sharded and policy.critic is not None:
        # Frozen weights are shared with the policy, and each of the two is sharded by itself.
        policy.critic = copy.deepcopy(policy.critic)
    shard_and_warm_up(communicator, policy, warm_up, "_evaluate", None if policy.adapter is None else policy.adapter.base)


def replicate_reference(reference: Reference | None, communicator: Communicator) -> None:
    """Do the same for a reference with its own model."""
    if reference is None or isinstance(reference, BaseReference) or is_sharded(reference.model):
        return
    model = reference.model

    def warm_up() -> None:
        try_out(model)
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device))

    communicator.broadcast_weights(model)
    shard_and_warm_up(communicator, model, warm_up, "forward")
