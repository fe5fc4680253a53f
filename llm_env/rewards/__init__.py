"""Reward functions in TRL's convention, and their weighted sum.

A reward function is any callable `f(prompts, completions, **columns) -> list[float]`. All arguments are passed by keyword:

- `prompts`, `completions`: lists of length B. If a prompt is text, it and its completion are str. If it is a chat, the prompt
  is its list of messages and the completion is `[{"role": "assistant", "content": ...}]`. With a text env, a completion is the
  list of all messages after the prompt: the assistant's turns, and the observations between them.
- `completion_ids`: B lists of token ids.
- every column of the prompts: a list of B values.
- `prompt_texts`: the prompts as text, with chats rendered by the chat template. Passed only if the signature names it.
- `trainer_state`: see `TrainerState`.
- `log_metric(name, value)`: the mean is logged as `rollout/<name>`.
- `log_extra(column, values)`: the values are added to the infos of the last step and to the record.

A function receives the arguments that its signature names. With `**kwargs` it receives all except `prompt_texts`.

A reward function returns one number per completion, or None if it does not apply to a completion. A process reward returns a
list of steps `(end, score)` per completion. `end` is the index of the step's last token in `completion_ids`; the score is paid
at that token. Functions may be asynchronous. Wrap slow or failing functions in `llm_env.rewards.pool.PooledReward`.
"""

from llm_env.rewards.answers import final_answer, parse_number
from llm_env.rewards.functions import exact_match, math_answer, numeric_answer
from llm_env.rewards.pool import PooledReward
from llm_env.rewards.reward_check import check_reward
from llm_env.rewards.sums import (
    ENV_REWARD,
    EXTRA,
    METRIC,
    NOTES,
    RewardFunction,
    RewardSum,
    Scores,
    TrainerState,
    process_reward,
)

__all__ = [
    "ENV_REWARD",
    "EXTRA",
    "METRIC",
    "NOTES",
    "PooledReward",
    "RewardFunction",
    "RewardSum",
    "Scores",
    "TrainerState",
    "check_reward",
    "exact_match",
    "final_answer",
    "math_answer",
    "numeric_answer",
    "parse_number",
    "process_reward",
]
