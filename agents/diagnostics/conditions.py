"""Check what training needs besides equal log-probs: values, dropout, rewards that differ, a reference that fits."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from agents.advantages import equal_groups
from agents.diagnostics.compare import Gap, active_dropout, largest_gap, logp_tolerance
from agents.diagnostics.naive_forward import naive_values
from agents.losses import kl_k3
from agents.policy import LanguagePolicy
from agents.rollout import Rollout
from agents.training.trainer import Trainer
from llm_env.reference import Reference
from llm_env.report import FAILED, NOT_APPLICABLE, NOTE, PASSED, CheckRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VALUE_TOLERANCE, VALUE_TOLERANCE_BF16 = 1e-3, 0.1  # of the largest value
REPEAT_TOLERANCE = 1e-6  # nats


def values_row(trainer: Trainer, rollout: Rollout, generator: torch.Generator) -> CheckRow:
    """Check that V of a token is read at the position before it.

    Args:
        trainer: computes the values.
        rollout: B episodes.
        generator: draws a random value head; a new head is 0 everywhere.
    """
    check, policy = "values before each token", copy.copy(trainer.policy)
    if policy.value_head is None:
        return CheckRow(check, NOT_APPLICABLE, "there is no critic")
    head = copy.deepcopy(policy.value_head)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=generator)
    policy._modules = {**policy._modules, "value_head": head}
    scored = rollout.select(range(len(rollout)))
    replace(trainer, policy=policy).compute_old_logprobs(scored)
    read = [np.append(np.flatnonzero(turns >= 0), len(turns)) for turns in rollout.turn_rows]  # positions with a value
    triples = zip(rollout.prompts, rollout.responses, read, strict=True)
    naive = [naive_values(policy, prompt, response).cpu()[at] for prompt, response, at in triples]
    with torch.no_grad():
        evaluated = policy.evaluate_actions(rollout.prompts, rollout.responses, trainer.temperature, rollout.turn_lists).values
    if evaluated is None or scored.old_values is None or scored.last_values is None:
        return CheckRow(check, FAILED, "there is a value head, but evaluate_actions or compute_old_logprobs gives no values")
    before = torch.cat([scored.old_values, scored.old_values.new_zeros(len(rollout), 1)], 1)
    before[torch.arange(len(rollout)), rollout.lengths] = scored.last_values
    scale = max(row.abs().max().item() for row in naive)
    gap = Gap()
    for name, table in (("before the update", before), ("in the loss", evaluated)):
        rows = [row.cpu()[at] for row, at in zip(table, read, strict=True)]
        gap = largest_gap(rows, naive)
        if not gap.size <= (VALUE_TOLERANCE_BF16 if policy.bf16 else VALUE_TOLERANCE) * scale:
            return CheckRow(check, FAILED, _describe_values(name, gap, rows, naive))
    return CheckRow(check, PASSED, f"max gap {gap.size / scale:.1e} of the largest")


def _describe_values(name: str, gap: Gap, rows: list[Tensor], naive: list[Tensor]) -> str:
    value, expected = rows[gap.row][gap.token], naive[gap.row][gap.token]
    seen = f"V {name} is {value:.3f} for token {gap.token} of episode {gap.row}, by a plain forward {expected:.3f}: "
    pairs = [(row[:n], values[1 : n + 1]) for row, values in zip(rows, naive, strict=True) for n in [len(values) - 2] if n > 0]
    if pairs and largest_gap(*zip(*pairs, strict=True)).size < gap.size / 10:
        return seen + "it is V of the state after the token; read the hidden state one position earlier"
    return seen + "it is not read from the state before the token, or the forward pass is wrong (see the trainer above)"


def dropout_row(policy: LanguagePolicy, rollout: Rollout, temperature: float) -> CheckRow:
    """Check that two training forward passes give the same log-probs."""
    batch = rollout.select(range(min(8, len(rollout))))
    first, second = (policy.log_probs(batch.prompts, batch.responses, temperature) for _ in range(2))
    gap = largest_gap([row.detach().cpu() for row in first], [row.detach().cpu() for row in second]).size
    if gap <= REPEAT_TOLERANCE:
        return CheckRow("dropout is off", PASSED, f"two training forwards differ by {gap:.1e} nats")
    active = active_dropout(policy)
    where = f"{len(active)} modules drop out, such as {active[0]}" if active else "something in the forward pass is random"
    detail = f"two training forwards of the same tokens differ by {gap:.2g} nats: {where}; put the model in evaluation mode"
    return CheckRow("dropout is off", FAILED, detail)


def groups_row(rollout: Rollout) -> CheckRow:
    """Report the groups whose rewards are all equal, from which nothing is learned."""
    check, scores, size = "groups with equal rewards", rollout.scores, rollout.group_size
    spread = f"the returns of {len(scores)} episodes have mean {scores.mean():.3g}, std {scores.std(correction=0):.3g}"
    if size == 1:
        return CheckRow(check, NOT_APPLICABLE, f"no groups; {spread}")
    equal = equal_groups(scores, size)
    detail = f"{int(equal.sum())} of {len(equal)} groups of {size}; {spread}"
    if equal.all():
        detail += (
            ". Nothing is learned from a group whose rewards are all equal. Unless these few were so by chance (try a larger "
            "n), take prompts that the model answers sometimes well and sometimes badly, a larger group_size, or a finer reward"
        )
    return CheckRow(check, NOTE if equal.any() else PASSED, detail)


def kl_row(
    policy: LanguagePolicy, reference: Reference | None, rollout: Rollout, logp: list[Tensor], temperature: float
) -> CheckRow:
    """Check that the KL to a reference with the policy's weights is 0.

    Args:
        policy: the policy.
        reference: the env's; None for none.
        rollout: B episodes with `ref_logp`.
        logp: B tensors (n_i,), log pi by the training path, in nats.
        temperature: the agent's.
    """
    check = "KL to the reference"
    if reference is None or rollout.ref_logp is None:
        return CheckRow(check, NOT_APPLICABLE, "there is no reference")
    ref_logp = [row[:n].cpu() for row, n in zip(rollout.ref_logp, rollout.lengths.tolist(), strict=True)]
    gap = largest_gap(logp, ref_logp)
    actions = torch.as_tensor(np.concatenate(rollout.turn_rows)) >= 0
    per_token = kl_k3(torch.cat(logp), torch.cat(ref_logp))[actions].mean().item()
    per_episode = sum((p - q).sum().item() for p, q in zip(logp, ref_logp, strict=True)) / len(ref_logp)
    kl = f"{per_token:.3g} nats a token (k3), {per_episode:.3g} an episode"
    differing, total = _count_differing(policy, reference.model)
    if differing:
        detail = f"{kl}; the reference is not the policy: {differing} of {total} weight tensors differ"
        return CheckRow(check, NOTE, detail)
    if gap.size <= logp_tolerance(policy):
        return CheckRow(check, PASSED, f"max gap {gap.size:.1e} nats, and the weights are the policy's")
    detail = (
        f"{kl}, though the reference has the policy's weights: log pi {logp[gap.row][gap.token]:.3f} and log pi_ref "
        f"{ref_logp[gap.row][gap.token]:.3f} on token {gap.token} of episode {gap.row}. Check the temperature (the agent's is "
        f"{temperature:g}, the reference's {reference.temperature:g}), the tokens that the reference is given, its dropout and "
        "its padding"
    )
    return CheckRow(check, FAILED, detail)


def _count_differing(policy: LanguagePolicy, model: PreTrainedModel) -> tuple[int, int]:
    """Return how many weights of a policy, its adapter merged, differ from a model's, and how many there are."""
    of_model, adapter = model.state_dict(), policy.adapter
    weights, changes = policy.weights(), 0
    if adapter is not None and adapter.quantized:  # which cannot be merged
        weights, changes = iter(adapter.base.state_dict().items()), adapter.changes()
        if model is adapter.base:
            return changes, len(of_model)
    same = {name: _is_same(weight, of_model.get(name)) for name, weight in weights}
    return len(same) - sum(same.values()) + len(of_model.keys() - same.keys()) + changes, len(same)


def _is_same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b.to(a.device))
