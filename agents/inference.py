"""Using an agent: the next token, texts, and an exam over every prompt of an env."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from agents.audit import check_agent
from agents.checkpoint import Checkpointed
from agents.checks import agree_on_ends, check_counts, check_positions, check_tokenizers, check_tokens
from agents.distributed import placed
from agents.generation import StepState
from agents.rollout import clock_of, collect, collect_by_tokens
from agents.sampler import Sampler
from agents.sharded import wholeness
from agents.vec_env import as_vec_env, rules_of_vec_env
from llm_env import TextGenerationVectorEnv
from llm_env.dialogue.chat import PromptFormat
from llm_env.observations import Observation
from llm_env.reference import BaseReference
from llm_env.report import Report
from llm_env.rules import Rules


class Inference(Checkpointed):
    """What an agent does besides learning."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float

    def sampler(self, deterministic: bool = False) -> Sampler:
        """How the agent draws tokens in training."""
        return Sampler(self.temperature, self.top_k, self.top_p, deterministic, self._generator, self.min_p)

    def predict(  # type: ignore[override]
        self,
        observation: Observation,
        state: StepState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, StepState | None]:
        """The next token for an observation or a batch of them, and the state (the KV cache) for the next call.

        See `LanguagePolicy.predict`; tokens are drawn at the agent's temperature.
        """
        return self.policy.predict(
            observation,
            state,
            episode_start,
            deterministic,
            action_masks=action_masks,
            temperature=self.temperature,
            generator=self._generator,
        )

    @placed
    def generate(self, prompts: Sequence[Any], deterministic: bool = False, max_new_tokens: int | None = None) -> list[str]:
        """Answer prompts, given as text or as chats, with text.

        Prompts become token ids as in training: with the env's chat template and its arguments, or without an env the
        tokenizer's own.

        Args:
            prompts: a list of str, of chats (lists of messages), or of rows as an env takes them (dicts with `prompt`, and
                perhaps `tools` and `chat_template_kwargs`).
            deterministic: greedy decoding; otherwise drawn at the agent's temperature.
            max_new_tokens: the env's limit by default, 64 without an env. The env's end tokens and stop strings apply.

        Raises:
            TypeError: If the prompts are no such list.
            ValueError: If a prompt is no valid text, has no tokens, or is too long for the model; the message names it.
        """
        check_counts(max_new_tokens=max_new_tokens)
        if isinstance(prompts, str):
            raise TypeError(f"prompts is a str; give a list, [{prompts!r}]")
        if not isinstance(prompts, (list, tuple, np.ndarray)):
            raise TypeError(f"prompts is a {type(prompts).__name__}; give a list of str or of chats")
        if not len(prompts):
            return []
        rules = rules_of_vec_env(self.env) if self.env is not None else None
        tokenizer = self.policy.tokenizer if rules is None else rules.tokenizer
        if tokenizer is None:
            raise ValueError("the policy has no tokenizer: pass policy_kwargs={'tokenizer': ...}, or give the agent an env")
        contexts = self._contexts(prompts, self.policy.prompt_format() if rules is None else rules.prompts.format, rules)
        limit = max_new_tokens or (rules.max_new_tokens if rules is not None else 64)
        check_tokens(contexts, limit, self.policy.vocab_size, self.policy.max_positions)
        responses, _ = self.policy.sample(
            contexts,
            1,
            limit,
            self.temperature,
            deterministic=deterministic,
            generator=self._generator,
            completes_stop=rules.completes_stop if rules is not None and rules.stop else None,
        )
        if rules is not None:
            return rules.decode(responses)
        return tokenizer.batch_decode(responses, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @staticmethod
    def _contexts(prompts: Sequence[Any], format: PromptFormat, rules: Rules | None) -> list[list[int]]:
        """Return the token ids of prompts; of one of the env's own, rendered, those that it has there."""
        rows = [row if isinstance(row, dict) else {"prompt": row} for row in prompts]
        for i, row in enumerate(rows):
            if "role" in row and not {"prompt", "messages"} & set(row):
                raise TypeError(f"prompt {i} is a dict, one message of a chat; give a list of chats, [messages]")
            content = row.get("prompt", "")
            if not isinstance(content, str) and not (
                isinstance(content, (list, tuple)) and all(isinstance(message, dict) for message in content)
            ):
                raise TypeError(f"prompt {i} is a {type(prompts[i]).__name__}; give a list of str or of chats")
        rendered = [format.render(row, i, "prompt") for i, row in enumerate(rows)]
        contexts = format.encode(rendered)
        if rules is not None:
            known = [rules.prompts.ids_of_text(prompt.text) for prompt in rendered]
            contexts = [context if ids is None else ids for context, ids in zip(contexts, known, strict=True)]
        if not all(contexts):
            empty = [bool(context) for context in contexts].index(False)
            raise ValueError(f"prompt {empty} is empty ({rendered[empty].text!r} has no tokens); a model needs at least one")
        return contexts

    @placed
    def evaluate(self, env: Any, deterministic: bool = True, batch_size: int = 256) -> dict[str, float]:
        """Answer every prompt of an env once.

        Args:
            env: a text env or its id, for instance `gym.make("llm_env/Addition-v0", split="test")`.
            deterministic: greedy decoding.
            batch_size: prompts at a time.

        Returns:
            Means over the prompts: `reward` (the return), `length` in tokens, `success_rate` where the env defines success,
            and `reward/<name>` for every component.

        Raises:
            ValueError: If the env's tokens or lengths do not fit the model.
        """
        vec_env = as_vec_env(env, 1)
        rules = rules_of_vec_env(vec_env)
        check_tokenizers(self.policy, rules)
        check_positions(self.policy, rules)
        agree_on_ends(self.policy, vec_env)
        rules.record_apart(self.world.rank)
        if isinstance(rules.reference, BaseReference) and not rules.reference.bound and self.policy.adapter is not None:
            rules.reference.bind(self.policy.base, wholeness(self.policy))
        collected: dict[str, list[float]] = {}
        for begin in range(0, len(rules.prompts), batch_size):
            indexes = list(range(begin, min(begin + batch_size, len(rules.prompts))))
            if clock_of(vec_env) is None:
                rollout = collect_by_tokens(self.policy, vec_env, indexes, 1, self.sampler(deterministic), self.world)
            else:
                venv = TextGenerationVectorEnv.from_rules(rules, len(indexes))
                rollout = collect(self.policy, venv, 1, self.sampler(deterministic), {"index": indexes}, self.world)
            for info, score, length in zip(rollout.infos, rollout.scores.tolist(), rollout.lengths, strict=True):
                row = {"reward": score, "length": float(length), **{k: info[k] for k in info if k.startswith("reward/")}}
                if "is_success" in info:
                    row["success_rate"] = float(info["is_success"])
                for key, value in row.items():
                    collected.setdefault(key, []).append(value)
        return {key: float(np.mean(values)) for key, values in collected.items()}

    def audit(self, *, n: int = 64, seed: int = 0, quiet: bool = False) -> Report:
        """Measure on fresh episodes whether sampling and training fit together; see `agents.check_agent`."""
        return check_agent(self, n=n, seed=seed, quiet=quiet)  # type: ignore[arg-type]
