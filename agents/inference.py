"""Using an agent: the next token, texts, and an exam over every prompt of an env."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from agents.audit import check_agent
from agents.checkpoint import Checkpointed
from agents.checks import check_counts, check_positions, check_tokenizers, check_tokens
from agents.distributed import placed
from agents.generation import StepState
from agents.rollout import clock_of, collect, collect_by_tokens
from agents.sampler import Sampler
from agents.sharded import wholeness
from agents.vec_env import as_vec_env, rules_of_vec_env
from llm_env import TextGenerationVectorEnv
from llm_env.arguments import check_text
from llm_env.observations import Observation
from llm_env.reference import BaseReference
from llm_env.report import Report


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
    def generate(self, prompts: Sequence[str], deterministic: bool = False, max_new_tokens: int | None = None) -> list[str]:
        """Answers to prompts, as text.

        Args:
            prompts: list of str.
            deterministic: greedy decoding; otherwise drawn at the agent's temperature.
            max_new_tokens: the env's limit by default, 64 without an env. The env's stop strings apply.

        Raises:
            TypeError: the prompts are no list of str.
            ValueError: a prompt is no valid text, has no tokens, or is too long for the model; the message names it.
        """
        check_counts(max_new_tokens=max_new_tokens)
        if isinstance(prompts, str):
            raise TypeError(f"prompts is a str; give a list, [{prompts!r}]")
        if not isinstance(prompts, (list, tuple, np.ndarray)):
            raise TypeError(f"prompts is a {type(prompts).__name__}; give a list of str")
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise TypeError(f"prompt {i} is a {type(prompt).__name__}; give a list of str")
            check_text(prompt, f"prompt {i}")
        if not len(prompts):
            return []
        tokenizer = self.policy.tokenizer
        if tokenizer is None:
            raise ValueError("the policy has no tokenizer: pass policy_kwargs={'tokenizer': ...}, or give the agent an env")
        rules = rules_of_vec_env(self.env) if self.env is not None else None
        limit = max_new_tokens or (rules.max_new_tokens if rules is not None else 64)
        contexts = tokenizer(list(prompts), verbose=False)["input_ids"]
        if not all(contexts):
            empty = [bool(context) for context in contexts].index(False)
            raise ValueError(f"prompt {empty} is empty ({prompts[empty]!r} has no tokens); a model needs at least one")
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
        return tokenizer.batch_decode(responses, skip_special_tokens=True, clean_up_tokenization_spaces=False)

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
