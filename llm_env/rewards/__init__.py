"""Reward functions in TRL's convention, and how several become one number.

A reward function is any callable `f(prompts, completions, **columns) -> list[float]`: `prompts` and `completions` are
lists of one length, every column of the prompts comes as a keyword with a list of that length, and so does
`completion_ids` (lists of token ids). Of a prompt that is text both are str; of one that is a chat the prompt is its list of
messages and the completion `[{"role": "assistant", "content": ...}]`. As in TRL there are `trainer_state` (see `TrainerState`),
`log_metric(name, value)`, whose mean is logged as `rollout/<name>`, and `log_extra(column, values)`, which goes into the last
infos and the record. A function that names `prompt_texts` gets the prompts as text, chats as their template renders them. Of
all else a function is given what its signature names, or all of them with `**kwargs`.
It returns one number a completion; None says "not applicable to this one". A process reward returns, for a completion, a list
of steps `(end, score)`, `end` being the index of the step's last token among `completion_ids`; each is paid with that token.
Functions may be asynchronous. Slow or failing ones are put into a `llm_env.rewards.pool.PooledReward`.
"""

from llm_env.rewards.answers import final_answer, parse_number
from llm_env.rewards.functions import exact_match, math_answer, numeric_answer
from llm_env.rewards.pool import PooledReward
from llm_env.rewards.reward_check import check_reward
from llm_env.rewards.sums import EXTRA, METRIC, NOTES, RewardFunction, RewardSum, Scores, TrainerState, process_reward

__all__ = [
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
