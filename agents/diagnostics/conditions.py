"""What must hold besides: values in their place, dropout off, groups that differ, a reference that fits."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from agents.advantages import equal_groups
from agents.audit.gaps import LOGP_TOLERANCE, Gap, active_dropout, gap_of
from agents.audit.plain import values_of
from agents.losses import kl_k3
from agents.rollout import Rollout
from agents.untouched import replaced
from agents.update import score_before_update
from llm_env.report import FAILED, NOT_APPLICABLE, NOTE, PASSED, CheckRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from agents.base import LanguageAgent
    from agents.policy import LanguagePolicy

VALUE_TOLERANCE = 1e-3  # of the largest value
REPEAT_TOLERANCE = 1e-6  # nats


def values_row(agent: LanguageAgent, rollout: Rollout) -> CheckRow:
    """Whether V of a token is read at the position before it, with a random head: a new one is 0 everywhere."""
    check, policy = "values before each token", agent.policy
    if policy.value_head is None:
        return CheckRow(check, NOT_APPLICABLE, "there is no critic")
    head, rollout = copy.deepcopy(policy.value_head), rollout.take(range(len(rollout)))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=agent._generator)
    pairs = list(zip(rollout.prompts, rollout.responses, strict=True))
    with replaced(policy, value_head=head):
        score_before_update(agent, rollout, agent.batch_size or len(rollout))
        plain = [values_of(policy, *pair).cpu() for pair in pairs]
        with torch.no_grad():
            evaluated = policy.evaluate(rollout.prompts, rollout.responses, agent.temperature).values
    if evaluated is None or rollout.old_values is None or rollout.last_values is None:
        return CheckRow(check, FAILED, "there is a value head, but no values come with the log-probs or are noted with them")
    noted = torch.cat([rollout.old_values, rollout.old_values.new_zeros(len(rollout), 1)], 1)
    noted[torch.arange(len(rollout)), rollout.lengths] = rollout.last_values
    scale = max(row.abs().max().item() for row in plain)
    for name, table in (("before the update", noted), ("in the loss", evaluated)):
        rows = [row[: len(values)].cpu() for row, values in zip(table, plain, strict=True)]
        gap = gap_of(rows, plain)
        if not gap.size <= VALUE_TOLERANCE * scale:
            return CheckRow(check, FAILED, _value_detail(name, gap, rows, plain))
    return CheckRow(check, PASSED, f"max gap {gap.size / scale:.1e} of the largest")


def _value_detail(name: str, gap: Gap, rows: list[Tensor], plain: list[Tensor]) -> str:
    got, right = rows[gap.row][gap.token], plain[gap.row][gap.token]
    seen = f"V {name} is {got:.3f} for token {gap.token} of episode {gap.row}, by a plain forward {right:.3f}: "
    pairs = [(row[:n], values[1 : n + 1]) for row, values in zip(rows, plain, strict=True) for n in [len(values) - 2] if n > 0]
    if pairs and gap_of(*zip(*pairs, strict=True)).size < gap.size / 10:
        return seen + "it is V of the state after the token; read the hidden state one position earlier"
    return seen + "it is not read from the state before the token, or the forward pass is wrong (see the trainer above)"


def dropout_row(agent: LanguageAgent, rollout: Rollout) -> CheckRow:
    """Whether a training forward can be repeated."""
    part = rollout.take(range(min(8, len(rollout))))
    first, second = (agent.policy.log_probs(part.prompts, part.responses, agent.temperature) for _ in range(2))
    gap = gap_of([row.detach().cpu() for row in first], [row.detach().cpu() for row in second]).size
    if gap <= REPEAT_TOLERANCE:
        return CheckRow("dropout is off", PASSED, f"two training forwards differ by {gap:.1e} nats")
    active = active_dropout(agent.policy)
    where = f"{len(active)} modules drop out, such as {active[0]}" if active else "something in the forward pass is random"
    detail = f"two training forwards of the same tokens differ by {gap:.2g} nats: {where}; put the model in evaluation mode"
    return CheckRow("dropout is off", FAILED, detail)


def groups_row(rollout: Rollout) -> CheckRow:
    """Whether there is anything to learn from."""
    check, scores, size = "groups with equal rewards", rollout.scores, rollout.group_size
    spread = f"the returns of {len(scores)} episodes have mean {scores.mean():.3g}, std {scores.std(correction=0):.3g}"
    if size == 1:
        return CheckRow(check, NOT_APPLICABLE, f"no groups; {spread}")
    equal = equal_groups(scores, size)
    detail = f"{int(equal.sum())} of {len(equal)} groups of {size}; {spread}"
    if equal.all():
        detail += (
            ". Nothing is learned from a group whose rewards are all equal. Unless these few were so by chance (a larger n "
            "tells), take prompts that the model answers sometimes well and sometimes badly, a larger group_size, or a finer "
            "reward"
        )
    return CheckRow(check, NOTE if equal.any() else PASSED, detail)


def kl_row(agent: LanguageAgent, rollout: Rollout, trained: list[Tensor]) -> CheckRow:
    """Whether the KL to a reference with the policy's weights is 0."""
    check, reference, ref_logp = "KL to the reference", agent.rules.reference, rollout.ref_logp
    if reference is None or ref_logp is None:
        return CheckRow(check, NOT_APPLICABLE, "there is no reference")
    lengths = rollout.lengths.tolist()
    refs = [row[:n].cpu() for row, n in zip(ref_logp, lengths, strict=True)]
    gap = gap_of(trained, refs)
    per_token = kl_k3(torch.cat(trained), torch.cat(refs)).mean().item()
    per_episode = sum((logp - ref).sum().item() for logp, ref in zip(trained, refs, strict=True)) / len(refs)
    seen = f"{per_token:.3g} nats a token (k3), {per_episode:.3g} an episode"
    differing, total = _differing(agent.policy, reference.model)
    if differing:
        detail = f"{seen}; the reference is not the policy: {differing} of {total} weight tensors differ"
        return CheckRow(check, NOTE, detail)
    if gap.size <= LOGP_TOLERANCE:
        return CheckRow(check, PASSED, f"max gap {gap.size:.1e} nats, and the weights are the policy's")
    detail = (
        f"{seen}, though the reference has the policy's weights: log pi {trained[gap.row][gap.token]:.3f} and log "
        f"pi_ref {refs[gap.row][gap.token]:.3f} on token {gap.token} of episode {gap.row}. Look at the temperature (the "
        f"agent's is {agent.temperature:g}, the reference's {reference.temperature:g}), the tokens that the reference is "
        "given, its dropout and its padding"
    )
    return CheckRow(check, FAILED, detail)


def _differing(policy: LanguagePolicy, model: PreTrainedModel) -> tuple[int, int]:
    """How many weights of a policy, its adapter merged in, differ from a model's, and of how many."""
    theirs, adapter = model.state_dict(), policy.adapter
    weights, changes = policy.weights(), 0
    if adapter is not None and adapter.quantized:  # which cannot be merged
        weights, changes = iter(adapter.base.state_dict().items()), adapter.changes()
        if model is adapter.base:
            return changes, len(theirs)
    same = {name: _same(weight, theirs.get(name)) for name, weight in weights}
    return len(same) - sum(same.values()) + len(theirs.keys() - same.keys()) + changes, len(same)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b.to(a.device))
