"""Check that this package and TRL compute the same loss and gradient.

The check runs in float32, on the same tokens. This package samples the responses. The weights of the policy are then perturbed,
so that ratios differ from 1 and the KL differs from 0. Without this, the loss of GRPO would be 0 for all responses.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from trl import GRPOTrainer

from agents import GRPO
from agents.rollout import Rollout
from speed_parts.here import grpo_agent
from speed_parts.with_trl import grpo_trainer
from speed_parts.work import Work, work_of_this_process

TOLERANCE = 1e-4
ROUNDING = 1e-6  # float32 rounding error of means over terms of order 1 that cancel
MOVE = 0.005  # standard deviation of the perturbation, 1/4 of Llama's initial one: clips some ratios


def check_responses(work: Work, agent: GRPO, rollout: Rollout) -> float:
    """Check lengths and log-probs of a rollout; return the largest difference.

    Log-probs of sampled tokens are compared with those of a plain forward pass per row.

    Raises:
        SystemExit: If a length is wrong, or a difference is `TOLERANCE` or more.
    """
    lengths = {(len(prompt), len(response)) for prompt, response in zip(rollout.prompts, rollout.responses, strict=True)}
    if lengths != {(work.prompt, work.new_tokens)}:
        raise SystemExit(f"(prompt, response) lengths must all be {(work.prompt, work.new_tokens)}; got {lengths}")
    difference = 0.0
    for prompt, response, sampled in zip(rollout.prompts, rollout.responses, rollout.sampled_logp, strict=True):
        ids = torch.tensor([prompt + response], device=work.device)
        with torch.no_grad():
            logits = agent.policy.lm(input_ids=ids, logits_to_keep=work.new_tokens + 1).logits[0, :-1]
        plain = logits.float().log_softmax(-1).gather(-1, ids[0, work.prompt :, None])[:, 0]
        difference = max(difference, (plain - sampled).abs().max().item())
    if not difference < TOLERANCE:
        raise SystemExit(
            f"log-probs of sampled tokens and of a plain forward pass differ by {difference:.2e}, more than {TOLERANCE:g}"
        )
    return difference


def score_by_trl(trainer: GRPOTrainer, rollout: Rollout) -> dict[str, Tensor]:
    """Return TRL's inputs for a rollout: advantages, reference and old log-probs."""

    def given(prompt_ids: list[list[int]], *_: object, **__: object) -> tuple[list[list[int]], None]:
        if [list(prompt) for prompt in prompt_ids] != rollout.prompts:
            raise SystemExit("TRL tokenizes the prompts differently from this package")
        return [list(response) for response in rollout.responses], None

    trainer._generate_single_turn = given
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([{"prompt": info["prompt"]} for info in rollout.infos])
    ids, mask = (torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    with torch.no_grad():
        logp, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, inputs["completion_ids"].shape[1])
    return {**inputs, "old_per_token_logps": logp}


def gradient(model: torch.nn.Module) -> Tensor:
    """Return the gradients of all weights as one float64 vector."""
    return torch.cat([p.grad.flatten().double() for _, p in sorted(model.named_parameters()) if p.grad is not None])


def agree(name: str, here: float, trl: float) -> None:
    """Raise SystemExit if two numbers differ by more than the tolerance."""
    if not math.isclose(here, trl, rel_tol=TOLERANCE, abs_tol=ROUNDING):
        raise SystemExit(f"{name} is {here:.8g} here and {trl:.8g} in TRL: they differ by more than {TOLERANCE:g} (relative)")


def compare(work: Work, folder: str) -> dict[str, float]:
    """Compare advantages, loss and gradient of both sides.

    Raises:
        SystemExit: If they differ by more than the tolerance.
    """
    agent = grpo_agent(work)
    agent.max_grad_norm = float("inf")  # compare unclipped gradients
    rollout = agent.sample_rollout()
    result = {"log_probs": check_responses(work, agent, rollout)}
    agent.make_trainer().compute_old_logprobs(rollout)
    agent.compute_advantages(rollout)
    trainer = grpo_trainer(work, folder, [])
    inputs = score_by_trl(trainer, rollout)
    assert rollout.advantages is not None
    for i, (here, trl) in enumerate(zip(rollout.advantages[:, 0].tolist(), inputs["advantages"].tolist(), strict=True)):
        agree(f"the advantage of response {i}", here, trl)

    with torch.no_grad():
        for parameter in agent.policy.lm.parameters():
            parameter += MOVE * torch.randn_like(parameter)
    trainer.model.load_state_dict(agent.policy.lm.state_dict())
    statistics = agent.make_trainer().step(rollout, np.arange(len(rollout)), is_first_pass=False)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    here, trl = gradient(agent.policy.lm), gradient(trainer.model)
    difference = ((here - trl).norm() / trl.norm()).item()
    agree("the loss", statistics["loss"], loss.item())
    agree("the norm of the gradient", here.norm().item(), trl.norm().item())
    if not difference <= TOLERANCE:
        raise SystemExit(
            f"gradients (norm {here.norm():.8g} here, {trl.norm():.8g} in TRL) differ by {difference:.2e} (relative), "
            f"more than {TOLERANCE:g}"
        )
    clipped = statistics["clip_fraction"]
    return result | {"loss_here": statistics["loss"], "loss_trl": loss.item(), "gradient": difference, "clipped": clipped}


def main() -> None:
    """Compare both sides and print the numbers as JSON."""
    with os.fdopen(os.dup(1), "w") as answers, tempfile.TemporaryDirectory() as folder:
        os.dup2(2, 1)
        print(json.dumps(compare(replace(work_of_this_process(), dtype="float32"), folder)), file=answers)


if __name__ == "__main__":
    main()
