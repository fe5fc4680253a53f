"""GSM8K task: grade-school math word problems with a numeric answer.

Source: Cobbe et al. 2021, arXiv 2110.14168.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from llm_env.prompts import read_jsonl
from llm_env.pupil import PUPIL
from llm_env.rewards import numeric_answer
from llm_env.rules import SplitTaskOptions

TEMPLATE = "{question}\nThink step by step and end with `#### ` and the answer.\n"


def gsm8k(
    path: str | Path | None = None, template: str = TEMPLATE, chat: bool = False, **overrides: Unpack[SplitTaskOptions]
) -> dict[str, Any]:
    """Return arguments of `TextGenerationEnv` for `llm_env/GSM8K-v0`.

    Args:
        path: path of a `.jsonl` file, required. Every row has the texts `question` and `answer`; the answer ends with
            `#### <number>`.
        template: template of the prompt; `{question}` is replaced by the question.
        chat: whether to pass the prompt as a user message through the tokenizer's chat template. Default False.
        overrides: arguments of `TextGenerationEnv` that override those of the task. Set at least `tokenizer`.

    Raises:
        ValueError: If `path` is None, or a row has no text `question` or `answer`.
    """
    if path is None:
        raise ValueError("llm_env/GSM8K-v0 needs path=..., the path of a GSM8K-format .jsonl file (columns question, answer)")
    rows = []
    for number, row in enumerate(read_jsonl(path), start=1):
        if missing := [key for key in ("question", "answer") if not isinstance(row.get(key), str)]:
            raise ValueError(f"{path}:{number} has no text under {missing}; a GSM8K row has 'question' and 'answer'")
        prompt = template.replace("{question}", row["question"])
        rows.append({"prompt": [{"role": "user", "content": prompt}] if chat else prompt, "answer": row["answer"]})
    defaults: dict[str, Any] = {
        "prompts": rows,
        "reward": numeric_answer,
        "tokenizer": PUPIL,
        "success": "numeric_answer",
        "max_prompt_tokens": 1024,
        "max_new_tokens": 512,
    }
    return {**defaults, **overrides}
