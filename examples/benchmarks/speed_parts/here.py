"""Worker process for this package: `policy.sample` and `GRPO.learn`."""

from __future__ import annotations

import torch
from tasks import Task

from agents import GRPO
from llm_env import TextGenerationEnv
from llm_env.rewards import RewardSum
from speed_parts.line import Line
from speed_parts.work import BETA, LEARNING_RATE, Work, even_words, work_of_this_process


def grpo_task(work: Work) -> Task:
    """Convert the work to a `Task`, for `sides.py`."""
    env = {
        "prompts": work.texts(),
        "reward": even_words,
        "tokenizer": work.model,
        "max_prompt_tokens": work.prompt,
        "max_new_tokens": work.new_tokens,
        "reference": work.model,
    }
    return Task("speed", work.model, env, work.group, work.batch, LEARNING_RATE, BETA, completions=0, target=0.0)


def grpo_agent(work: Work) -> GRPO:
    """Create the agent with its env."""
    task = grpo_task(work)
    settings = {"group_size": task.group_size, "n_envs": task.batch, "kl_coef": task.kl_coef}
    settings |= {"micro_batch_size": work.batch // work.passes, "bf16": work.dtype == "bfloat16"}
    return GRPO(task.model, TextGenerationEnv(**task.env), task.learning_rate, seed=0, device=work.device, **settings)


def main() -> None:
    """Run jobs until standard input ends."""
    work = work_of_this_process()
    line = Line(work.device)
    agent = grpo_agent(work)
    prompts = [agent.rules.prompts.ids[i].tolist() for i in range(work.problems)]
    generator = torch.Generator(work.device).manual_seed(0)
    line.phases.time(agent.engine, "generate", "generate")
    line.phases.time(agent.policy, "sample", "generate")
    line.phases.time(RewardSum, "__call__", "reward")
    line.phases.time(agent.rules.reference, "log_probs", "reference")
    line.phases.time(agent, "train", "update")
    line.ready()
    while job := line.next_job():
        with work.autocast():
            if job == "rollout":
                responses, _ = agent.policy.sample(prompts, work.group, work.new_tokens, generator=generator)
                tokens = sum(map(len, responses))
            else:
                before = agent.num_timesteps
                agent.learn(1, reset_num_timesteps=False)  # a budget of one token collects one whole rollout
                tokens = agent.num_timesteps - before
        line.done(tokens)


if __name__ == "__main__":
    main()
