"""Check before a long training whether an agent trains on the tokens that it sampled, and on all of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from agents.diagnostics.compare import LOGP_TOLERANCE, largest_gap, likely_cause, logp_tolerance
from agents.diagnostics.conditions import dropout_row, groups_row, kl_row, values_row
from agents.diagnostics.dry_run import Agent, DryStep, collect_episodes, dry_run_copy, take_dry_step, unrecorded
from agents.diagnostics.naive_forward import naive_log_probs
from agents.policy import LanguagePolicy
from agents.rollout import Rollout
from agents.training.optimizers import missing_state_bytes
from agents.training.preserve import preserve_state
from agents.training.trainer import Trainer
from llm_env.arguments import check_int
from llm_env.report import FAILED, NOT_APPLICABLE, NOT_RUN, NOTE, PASSED, CheckRow, Report
from llm_env.rules import Rules


def check_agent(agent: Agent, *, n: int = 64, seed: int = 0, quiet: bool = False) -> Report:
    """Check on fresh episodes whether an agent's sampling and training agree; print a table and return it.

    | row | what is measured | fails |
    | --- | --- | --- |
    | ratio on fresh data | max abs(ratio - 1), `Trainer.compute_old_logprobs` against the loss's log-probs | > 1e-3 |
    | sampler against trainer | largest gap of log-probs, in nats | > 1e-3 |
    | sampler, trainer against a plain forward | the same against one forward a response, alone and unpadded | > 1e-3 |
    | end token in the loss | its weight in responses that it ended | 0 |
    | tokenizer | whether the env's tokenizer is the one beside the model's files | it is not, or it is unknown: a note |
    | end of a turn | whether the token with which the chat template closes a turn ends an episode | it does not |
    | only response tokens in the loss | weights of response tokens and of padding | 0, not 0 |
    | values before each token | largest gap to a plain forward, of the largest value, with a random head | > 1e-3 |
    | dropout is off | gap of log-probs of two training forwards of one batch, in nats | > 1e-6 |
    | groups with equal rewards | their share, from which nothing is learned | never |
    | KL to the reference | of the trainer's log-probs; 0 where the reference has the policy's weights | > 1e-3 |
    | env left as it was | whether the agent's own env was not stepped | never |
    | memory | bytes held in training: weights, gradients, optimizer state, reference, bfloat16 copy; a note | never |

    The tolerances are for float32. Two computations of one log-prob differ by 1e-7 to 1e-4 nats, the more the deeper the model
    and the larger its logits, and values relatively as much; wrong positions, temperatures or tokens make differences of 0.01
    and more. The ratio has the tolerance of the log-probs, since ratio - 1 is their gap. The same forward pass twice gives
    the same bits, except for the order of atomic additions on a GPU, hence 1e-6 for dropout. With `bf16=True`, log-probs may
    differ by 0.3 nats and values by a tenth: run the audit without it to find small faults.

    The agent, its env and the random states are restored: training continues as if nothing had been checked. Reward
    functions are called, and their own state is not restored. Wrapped envs are stepped in a copy.

    Args:
        agent: a `LanguageAgent` with an env.
        n: number of episodes, approximately: whole groups, at least two, and not more than `n_envs`.
        seed: seeds the choice of prompts and the sampling.
        quiet: do not print the table.

    Raises:
        ValueError: If `n` is less than 1, or the agent has no env; and what training would raise.

    Examples:
        >>> import llm_env
        >>> from agents import GRPO
        >>> agent = GRPO(llm_env.PUPIL, "llm_env/Addition-v0", group_size=4, n_envs=16, temperature=2.0)
        >>> report = agent.audit(n=8, quiet=True)
        >>> report.passed, report["ratio on fresh data"].result, report["values before each token"].result
        (True, 'passed', 'not applicable')
    """
    n, seed = check_int("n", n, 1), check_int("seed", seed, 0)
    rules, rng = agent.rules, np.random.default_rng(seed)
    assert agent.env is not None
    generator = torch.Generator(device=agent.policy.device).manual_seed(seed)
    with preserve_state(agent.policy, rng), unrecorded(agent.env):
        copied = dry_run_copy(agent, rng)
        trainer: Trainer = copied.make_trainer()
        rollout, obstacle = collect_episodes(copied, n, replace(agent.sampler(), generator=generator), rng)
        trainer.compute_old_logprobs(rollout)
        trainer.objective.compute_advantages(rollout)
        step = take_dry_step(trainer, rollout, rng.permutation(len(rollout)))
        rows = [
            ratio_row(step),
            *_gap_rows(trainer, rollout, step),
            end_token_row(rules, rollout, step, trainer.mask_truncated),
            tokenizer_row(trainer.policy, rules),
            turn_row(rules),
            response_tokens_row(rules, rollout, step, trainer.mask_truncated),
            values_row(trainer, rollout, generator),
            dropout_row(trainer.policy, rollout, trainer.temperature),
            groups_row(rollout),
            kl_row(trainer.policy, rules.reference, rollout, step.logp, trainer.temperature),
            env_row(obstacle),
            memory_row(agent.policy, rules),
        ]
    report = Report(rows)
    if not quiet:
        print(report)
    return report


def ratio_row(step: DryStep) -> CheckRow:
    """Check that the log-probs in the loss are those of the old policy as long as no weight has changed."""
    check, gap = "ratio on fresh data", largest_gap(step.logp, step.old_logp)
    deviation = float(np.abs(np.expm1(np.clip(gap.difference, -20, 20))))
    if deviation <= LOGP_TOLERANCE:
        return CheckRow(check, PASSED, f"max |ratio - 1| is {deviation:.1e}")
    detail = (
        f"max |ratio - 1| is {deviation:.2g} before any update, at token {gap.token} of episode {gap.row}: log pi_old "
        f"{step.old_logp[gap.row][gap.token]:.3f}, log pi {step.logp[gap.row][gap.token]:.3f}. The old log-probs are not those "
        "of the trained weights (stale, of another temperature, of other rows), or the forward pass is not repeatable; take "
        "them from the training path, after sampling and before the first optimizer step"
    )
    return CheckRow(check, FAILED, detail)


def _gap_rows(trainer: Trainer, rollout: Rollout, step: DryStep) -> list[CheckRow]:
    """Compare the log-probs of sampler, trainer and naive forward passes with each other."""
    sampled = [row[:n].cpu() for row, n in zip(rollout.sampled_logp, rollout.lengths.tolist(), strict=True)]
    naive = _naive(trainer, rollout, trainer.temperature)
    longest = max(map(len, rollout.prompts))
    dropout = ""
    if step.dropping:
        dropout = f"Dropout is on in {len(step.dropping)} modules, such as {step.dropping[0]}; see below"

    def cause(wrong: list[Tensor], padded: list[bool]) -> str:
        return likely_cause(trainer.temperature, wrong, naive, _naive(trainer, rollout, 1.0), padded)

    rows = []
    for check, a, b, explain in (
        ("sampler against trainer", sampled, step.logp, lambda: "The rows below say which of the two is wrong"),
        (
            "sampler against a plain forward",
            sampled,
            naive,
            lambda: cause(sampled, [len(prompt) < longest for prompt in rollout.prompts]),
        ),
        ("trainer against a plain forward", step.logp, naive, lambda: dropout or cause(step.logp, step.padded)),
    ):
        gap = largest_gap(a, b)
        if gap.size <= logp_tolerance(trainer.policy):
            rows.append(CheckRow(check, PASSED, f"max gap {gap.size:.1e} nats"))
            continue
        detail = (
            f"they disagree by up to {gap.size:.2g} nats, as on token {gap.token} of episode {gap.row}: "
            f"{a[gap.row][gap.token]:.3f} and {b[gap.row][gap.token]:.3f}. {explain()}"
        )
        rows.append(CheckRow(check, FAILED, detail))
    return rows


def _naive(trainer: Trainer, rollout: Rollout, temperature: float) -> list[Tensor]:
    rows = zip(rollout.prompts, rollout.responses, rollout.turn_rows, strict=True)
    return [
        naive_log_probs(trainer.policy, trainer.rules, prompt, response, temperature, turns.tolist()).cpu()
        for prompt, response, turns in rows
    ]


def end_token_row(rules: Rules, rollout: Rollout, step: DryStep, mask_truncated: bool) -> CheckRow:
    """Check that the end token has a weight in the loss."""
    check, lengths = "end token in the loss", rollout.lengths.tolist()
    ended = [
        (i, t)
        for i, turns in enumerate(rollout.turn_rows)
        for t in range(lengths[i])
        if turns[t] >= 0 and rollout.responses[i][t] in rules.eos_ids and not (mask_truncated and rollout.truncated[i])
    ]
    if not ended:
        detail = f"none of {len(lengths)} responses ended by the end token within {rules.max_new_tokens}; try a larger n"
        return CheckRow(check, NOT_RUN, detail)
    missing = [(i, t) for i, t in ended if not _padded_weights(step, i, lengths[i])[t] > 0]
    if not missing:
        return CheckRow(check, PASSED, f"in all {len(ended)} responses that it ended")
    detail = (
        f"{len(missing)} of {len(ended)} responses that the end token ended have no weight at it, so that the policy does not "
        f"learn to stop. A mask made by comparing ids with pad_token_id={rules.pad_id} does that where it is an end token "
        f"({sorted(rules.eos_ids)}); make the mask from the responses' lengths"
    )
    return CheckRow(check, FAILED, detail)


def response_tokens_row(rules: Rules, rollout: Rollout, step: DryStep, mask_truncated: bool) -> CheckRow:
    """Check that all response tokens have a weight in the loss, padding has none, and the env got these tokens."""
    check = "only response tokens in the loss"
    if error := _weights_error(rules, rollout, step, mask_truncated) or _completions_error(rules, rollout):
        return CheckRow(check, FAILED, error)
    return CheckRow(check, PASSED, f"in all {len(rollout)} responses")


def _weights_error(rules: Rules, rollout: Rollout, step: DryStep, mask_truncated: bool) -> str:
    for i, n in enumerate(rollout.lengths.tolist()):
        weights = _padded_weights(step, i, n)
        if weights[n:].any():
            after = n + int(weights[n:].nonzero()[0])
            return f"episode {i} has {n} response tokens, but there is a weight at position {after}, after them"
        is_action = torch.as_tensor(rollout.turn_rows[i]) >= 0
        if (weights[:n][~is_action] != 0).any():
            return f"there is a weight in the loss at a token of episode {i} that the env wrote"
        if mask_truncated and bool(rollout.truncated[i]):
            continue
        is_end = torch.tensor([token in rules.eos_ids for token in rollout.responses[i]])  # end tokens have their own row
        missing = (is_action & ~is_end & (weights[:n] <= 0)).nonzero()
        if len(missing):
            return f"response token {int(missing[0])} of episode {i} has no weight in the loss"
    return ""


def _completions_error(rules: Rules, rollout: Rollout) -> str:
    texts = rules.decode(rollout.responses)
    for i, (info, text) in enumerate(zip(rollout.infos, texts, strict=True)):
        if info.get("completion", text) != text:
            return f"the response of episode {i} is {text!r}, but the env was given {info['completion']!r} as actions"
    return ""


def _padded_weights(step: DryStep, episode: int, n: int) -> Tensor:
    """Return the weights of an episode's tokens, zero where the loss was given fewer than its n tokens."""
    weights = step.weights[episode]
    return torch.cat([weights, weights.new_zeros(max(0, n - len(weights)))])


def tokenizer_row(policy: LanguagePolicy, rules: Rules) -> CheckRow:
    """Check that the env's token ids are those that the model was trained with, as far as its files tell."""
    check, original = "tokenizer", policy.original_tokenizer
    if original is None:
        return CheckRow(check, NOTE, "which tokenizer the model was trained with is not known: it was given as an object")
    own, other = original.get_vocab(), rules.tokenizer.get_vocab()
    if own == other:
        return CheckRow(check, PASSED, f"the model's own, {len(own)} tokens")
    differing = sorted(set(own.items()) - set(other.items()))
    if not differing:
        return CheckRow(check, NOTE, f"the model's own {len(own)} tokens and {len(other) - len(own)} more")
    detail = f"{len(differing)} of the model's {len(own)} tokens have other ids, for instance {differing[:3]}"
    return CheckRow(check, FAILED, f"{detail}; make the env with tokenizer=<the model's path>")


def turn_row(rules: Rules) -> CheckRow:
    """Check that the token with which the chat template closes a turn ends an episode."""
    check = "end of a turn"
    if not rules.prompts.has_chats:
        return CheckRow(check, NOT_APPLICABLE, "no prompt is a chat")
    problem = rules.endless_turn()
    return CheckRow(check, FAILED if problem else PASSED, problem)


def env_row(obstacle: str) -> CheckRow:
    """Report whether the agent's own env was stepped."""
    check = "env left as it was"
    if not obstacle:
        return CheckRow(check, PASSED)
    detail = f"the env cannot be copied ({obstacle}): its own episodes were stepped, and the state of its wrappers has changed"
    return CheckRow(check, NOTE, detail)


def memory_row(policy: LanguagePolicy, rules: Rules) -> CheckRow:
    """Report the memory that training holds at all times, between rollouts and updates.

    Gradients and the optimizer's state are there after the first update. A rollout's cache and the activations of an update
    come on top: `examples/benchmarks/gpu_memory.md` has their formulas.
    """
    parameters, optimizer = list(policy.parameters()), policy.optimizer
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    reference = getattr(rules.reference, "model", None)
    shared = {id(parameter) for parameter in parameters}
    of_reference = [] if reference is None else [p for p in reference.parameters() if id(p) not in shared]
    copy = sum(2 * p.numel() for p in policy.lm.parameters()) if policy.samples_in_bf16 else 0
    sizes = {
        "weights": sum(p.nbytes for p in parameters),
        "gradients": sum(p.nbytes for p in trained),
        "optimizer state": sum(state.nbytes for state in states) + missing_state_bytes(optimizer),
        "reference": sum(p.nbytes for p in of_reference),
        "copy to sample with": copy,
    }
    parts = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in sizes.items() if size)
    return CheckRow("memory", NOTE, f"{sum(sizes.values()) / 1e6:,.1f} MB are held: {parts}")
