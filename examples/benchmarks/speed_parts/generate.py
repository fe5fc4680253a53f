"""Worker process for transformers: rollouts with `generate`, one row per response."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from speed_parts.line import Line
from speed_parts.work import work_of_this_process


def main() -> None:
    """Run jobs until standard input ends."""
    work = work_of_this_process()
    line = Line(work.device)
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32).to(work.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    rows = [text for text in work.texts() for _ in range(work.group)]
    inputs = tokenizer(rows, return_tensors="pt", return_token_type_ids=False).to(work.device)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    line.phases.time(model, "generate", "generate")
    line.ready()
    while line.next_job():
        with work.autocast():
            ids = model.generate(**inputs, **sampling, max_new_tokens=work.new_tokens)
        line.done(int((ids[:, inputs["input_ids"].shape[1] :] != tokenizer.eos_token_id).sum()))


if __name__ == "__main__":
    main()
