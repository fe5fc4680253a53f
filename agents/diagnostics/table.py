"""An audit of an agent on its own model and env, before hours are spent: does it train on what it sampled, and on all of it?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from agents.audit.conditions import dropout_row, groups_row, kl_row, values_row
from agents.audit.dry_run import fresh_episodes, take_step
from agents.audit.gaps import LOGP_TOLERANCE, gap_of, likely_cause
from agents.audit.plain import token_log_probs
from agents.rollout import Rollout
from agents.untouched import untouched
from agents.update import score_before_update
from llm_env.arguments import whole
from llm_env.report import FAILED, NOT_APPLICABLE, NOT_RUN, NOTE, PASSED, CheckRow, Report
from llm_env.rules import Rules

if TYPE_CHECKING:
    from agents.base import LanguageAgent


def check_agent(agent: LanguageAgent, *, n: int = 64, seed: int = 0, quiet: bool = False) -> Report:
    """Measure on some fresh episodes whether an agent's sampling and training fit together; print a table and return it.

    | row | what is measured | fails |
    | --- | --- | --- |
    | ratio on fresh data | max abs(ratio - 1), log-probs of `score_before_update` against those of the loss | > 1e-3 |
    | sampler against trainer | largest gap of log-probs, in nats | > 1e-3 |
    | sampler, trainer against a plain forward | the same against one forward a response, alone and unpadded | > 1e-3 |
    | end token in the loss | its weight in responses that it ended | 0 |
    | end of a turn | whether the token with which the chat template closes a turn ends an episode | it does not |
    | only response tokens in the loss | weights of response tokens and of padding | 0 or not 0 |
    | values before each token | largest gap to a plain forward, of the largest value, with a random head | > 1e-3 |
    | dropout is off | gap of log-probs of two training forwards of one batch, in nats | > 1e-6 |
    | groups with equal rewards | their share, from which nothing is learned | never |
    | KL to the reference | of the trainer's log-probs; 0 where the reference has the policy's weights | > 1e-3 |
    | env left as it was | whether the agent's own env could stay out of this | never |

    The tolerances are for float32: two ways to the same log-prob differ by 1e-7 to 1e-4 nats, the more the deeper the model
    and the larger its logits, and values relatively as much, while wrong positions, temperatures or tokens
    make differences of 0.01 and more. The ratio has the tolerance of the log-probs, since ratio - 1 is their gap. The same
    forward pass twice gives the same bits, but for the order of atomic additions on a GPU, hence 1e-6 for dropout.

    The agent, its env and the random states are left as they were: the training that follows is that which would have been.
    Reward functions are called, and what they keep in mind themselves, they keep. Wrapped envs are played in a copy.

    Args:
        agent: with an env.
        n: how many episodes, about: whole groups, at least two, and not more than `n_envs`.
        seed: of the prompts and of sampling.
        quiet: do not print.

    Raises:
        ValueError: `n` is less than 1, or the agent has no env; or what a training would raise.

    Examples:
        >>> import llm_env
        >>> from agents import GRPO
        >>> agent = GRPO(llm_env.PUPIL, "llm_env/Addition-v0", group_size=4, n_envs=16, temperature=2.0)
        >>> report = agent.audit(n=8, quiet=True)
        >>> report.passed, report["ratio on fresh data"].result, report["values before each token"].result
        (True, 'passed', 'not applicable')
    """
    n, seed = whole("n", n, 1), whole("seed", seed, 0)
    agent.rules  # noqa: B018 - raises without an env
    with untouched(agent, seed):
        rollout, obstacle = fresh_episodes(agent, n)
        audit = _Audit(agent, rollout)
        rows = [audit.ratio(), *audit.gaps(), audit.end_token(), _turn_row(agent.rules), audit.only_responses()]
        rows += [values_row(agent, rollout), dropout_row(agent, rollout), groups_row(rollout)]
        rows += [kl_row(agent, rollout, audit.trained)]
    rows.append(_env_row(obstacle))
    report = Report(rows)
    if not quiet:
        print(report)
    return report


def _turn_row(rules: Rules) -> CheckRow:
    check = "end of a turn"
    if all(messages is None for messages in rules.prompts.messages):
        return CheckRow(check, NOT_APPLICABLE, "no prompt is a chat")
    problem = rules.endless_turn()
    return CheckRow(check, FAILED if problem else PASSED, problem)


def _env_row(obstacle: str) -> CheckRow:
    check = "env left as it was"
    if not obstacle:
        return CheckRow(check, PASSED)
    detail = (
        f"the env cannot be copied ({obstacle}): the episodes were played in it, so that what its wrappers keep has moved on"
    )
    return CheckRow(check, NOTE, detail)


class _Audit:
    """The checks, over one rollout of B episodes that nobody has trained on."""

    def __init__(self, agent: LanguageAgent, rollout: Rollout) -> None:
        self.agent, self.policy, self.rules = agent, agent.policy, agent.rules
        score_before_update(agent, rollout, agent.batch_size or len(rollout))
        self.rollout = rollout
        agent.compute_advantages(rollout)
        self.order = agent.np_random.permutation(len(rollout))
        self.shuffled = take_step(agent, rollout, self.order)  # as training cuts it
        places = np.argsort(self.order).tolist()
        self.trained = [self.shuffled.logp[place] for place in places]
        self.padded = [self.shuffled.padded[place] for place in places]
        self.weights = [self.shuffled.weights[place] for place in places]
        self.plain = self._plain(agent.temperature)

    @torch.no_grad()
    def _plain(self, temperature: float) -> list[Tensor]:
        """B tensors (n_i,), log pi of the responses' tokens by plain forwards."""
        pairs = zip(self.rollout.prompts, self.rollout.responses, strict=True)
        return [token_log_probs(self.policy, self.rules, *pair, temperature).cpu() for pair in pairs]

    def ratio(self) -> CheckRow:
        """Whether the first step of a minibatch in another order finds the log-probs that were noted for it."""
        step = self.shuffled
        gap = gap_of(step.logp, step.old_logp)
        deviation = float(np.abs(np.expm1(np.clip(gap.signed, -20, 20))))
        if deviation <= LOGP_TOLERANCE:
            return CheckRow("ratio on fresh data", PASSED, f"max |ratio - 1| is {deviation:.1e}")
        row, token = self.order[gap.row], gap.token
        detail = (
            f"max |ratio - 1| is {deviation:.2g} before any update, at token {token} of episode {row}: log pi_old "
            f"{step.old_logp[gap.row][token]:.3f}, log pi {step.logp[gap.row][token]:.3f}. The old log-probs are not those of "
            "the weights that are trained (stale, of another temperature, of other rows), or the forward pass is not "
            "repeatable; take them from the training path, after sampling and before the first optimizer step"
        )
        return CheckRow("ratio on fresh data", FAILED, detail)

    def gaps(self) -> list[CheckRow]:
        """Sampler, trainer and plain forward against each other."""
        sampled = [row[:n].cpu() for row, n in zip(self.rollout.sampled_logp, self.rollout.lengths.tolist(), strict=True)]
        longest = max(map(len, self.rollout.prompts))
        left = [len(prompt) < longest for prompt in self.rollout.prompts]
        return [
            self._gap_row("sampler against trainer", sampled, self.trained, None),
            self._gap_row("sampler against a plain forward", sampled, self.plain, left),
            self._gap_row("trainer against a plain forward", self.trained, self.plain, self.padded),
        ]

    def _gap_row(self, check: str, a: list[Tensor], b: list[Tensor], padded: list[bool] | None) -> CheckRow:
        gap = gap_of(a, b)
        if gap.size <= LOGP_TOLERANCE:
            return CheckRow(check, PASSED, f"max gap {gap.size:.1e} nats")
        detail = (
            f"they disagree by up to {gap.size:.2g} nats, as on token {gap.token} of episode {gap.row}: "
            f"{a[gap.row][gap.token]:.3f} and {b[gap.row][gap.token]:.3f}. "
        )
        if padded is None:
            return CheckRow(check, FAILED, detail + "The rows below say which of the two is wrong; both go through float32")
        if self.shuffled.dropping and check.startswith("trainer"):
            cause = f"Dropout is on in {len(self.shuffled.dropping)} modules, such as {self.shuffled.dropping[0]}; see below"
        else:
            cause = likely_cause(self.agent, a, b, self._plain(1.0), padded)
        return CheckRow(check, FAILED, detail + cause)

    def end_token(self) -> CheckRow:
        """Whether the end token has a weight in the loss."""
        check = "end token in the loss"
        lengths, ends = self.rollout.lengths.tolist(), self.rules.eos_ids
        ended = [i for i, response in enumerate(self.rollout.responses) if response[-1] in ends]
        if not ended:
            detail = (
                f"none of {len(lengths)} responses ended by the end token within {self.rules.max_new_tokens}; try a larger n"
            )
            return CheckRow(check, NOT_RUN, detail)
        without = [i for i in ended if not self._weights(i)[lengths[i] - 1] > 0]
        if not without:
            return CheckRow(check, PASSED, f"in all {len(ended)} responses that it ended")
        detail = (
            f"{len(without)} of {len(ended)} responses that the end token ended have no weight at it, so that nobody learns to "
            f"stop. A mask made by comparing ids with pad_token_id={self.rules.pad_id} does that where it is an end token "
            f"({sorted(ends)}); make the mask from the responses' lengths"
        )
        return CheckRow(check, FAILED, detail)

    def _weights(self, episode: int) -> Tensor:
        """The weights of an episode's tokens, of no fewer positions than it has tokens."""
        weights = self.weights[episode].cpu()
        return torch.cat([weights, weights.new_zeros(max(0, len(self.rollout.responses[episode]) - len(weights)))])

    def only_responses(self) -> CheckRow:
        """Check that the loss has weights on all response tokens and on no others."""
        check = "only response tokens in the loss"
        if wrong := self._wrong_weights() or self._wrong_split():
            return CheckRow(check, FAILED, wrong)
        return CheckRow(check, PASSED, f"in all {len(self.rollout)} responses")

    def _wrong_weights(self) -> str:
        lengths, ends = self.rollout.lengths.tolist(), self.rules.eos_ids
        for i, n in enumerate(lengths):
            weights = self._weights(i)
            if weights[n:].any():
                after = n + int(weights[n:].nonzero()[0])
                return f"episode {i} has {n} response tokens, but there is a weight at position {after}, after them"
            left_out = getattr(self.agent, "mask_truncated", False) and bool(self.rollout.truncated[i])
            body = n - 1 if self.rollout.responses[i][-1] in ends else n  # the end token has a row of its own
            if not left_out and not (weights[:body] > 0).all():
                return f"response token {int((weights[:body] <= 0).nonzero()[0])} of episode {i} has no weight in the loss"
        return ""

    def _wrong_split(self) -> str:
        texts = self.rules.decode(self.rollout.responses)
        for i, (info, text) in enumerate(zip(self.rollout.infos, texts, strict=True)):
            if info.get("completion", text) != text:
                return f"the response of episode {i} is {text!r}, but the env was given {info['completion']!r} as actions"
        return ""
