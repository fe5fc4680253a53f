"""Engines, which draw responses in the policy's place: what one must do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from agents.policy import LanguagePolicy
from agents.rollout import Responses
from agents.sampler import Sampler
from llm_env.rules import Rules


class WeightsLost(ConnectionError):
    """The engine drew with other weights than it was last given: it began anew, or somebody else gave it theirs."""


@runtime_checkable
class Engine(Protocol):
    """What draws responses for an agent.

    Attributes:
        tolerance: how far, in nats, its log-prob of a token may be from the policy's after a push.
    """

    tolerance: float

    def start(self, policy: LanguagePolicy, rules: Rules) -> None:
        """Get ready for this policy under these rules; again where the agent is given another env.

        Raises:
            ValueError: the engine cannot serve them.
        """

    def push(self, policy: LanguagePolicy) -> None:
        """Take over the policy's weights; whatever was computed with older ones is forgotten."""

    def respond(
        self,
        prompts: Sequence[Sequence[int]],
        rules: Rules,
        sampler: Sampler,
        group_size: int = 1,
        max_new_tokens: int | None = None,
    ) -> Responses:
        """What `LanguagePolicy.respond` does, with the weights of the last push.

        Args:
            prompts: N lists of token ids.
            rules: give the end token, stop strings, allowed tokens and the length limit.
            sampler: how a token is drawn; all randomness comes from its generator.
            group_size: G.
            max_new_tokens: a limit in the place of the rules'.

        Returns:
            N * G responses, those to prompt i at i*G..i*G+G-1, each up to and including the token that ended it, and the
            log-probs of their tokens under the whole tempered distribution, in nats, one float32 array a response.

        Raises:
            WeightsLost: the weights are no longer those of the last push.
            ConnectionError: the engine cannot be reached.
        """

    def close(self) -> None:
        """Give back what the engine holds. It can be started again."""


def as_engine(engine: Any, engine_kwargs: dict[str, Any] | None) -> Engine | None:
    """The engine that the arguments of an agent name; None where the policy draws for itself.

    Raises:
        ValueError, TypeError: they name none.
    """
    if engine is None or isinstance(engine, str):
        if engine is None and engine_kwargs:
            raise ValueError(f"engine_kwargs={engine_kwargs} without an engine; set engine='vllm', or leave them out")
        if engine not in (None, "vllm"):
            raise ValueError(f"engine={engine!r} is not known; set 'vllm', an agents.engines.Engine of your own, or None")
        if engine is None:
            return None
        from agents.vllm_engine import VLLMEngine  # which imports from here

        if not isinstance(engine_kwargs or {}, dict):
            raise TypeError(f"engine_kwargs={engine_kwargs!r} must be a dict, such as {{'base_url': 'http://localhost:8000'}}")
        return VLLMEngine(**engine_kwargs or {})
    if isinstance(engine, type) or not isinstance(engine, Engine):
        needs = "tolerance, start, push, respond and close"
        raise TypeError(f"engine is a {type(engine).__name__}, which is no agents.engines.Engine: it must have {needs}")
    if engine_kwargs:
        raise ValueError(f"engine_kwargs={engine_kwargs} are for engine='vllm'; set up your {type(engine).__name__} itself")
    return engine


def check_engine(engine: Any, rules: Rules, by_response: bool, sharded: bool) -> None:
    """Refuse an env from which an engine cannot collect, and weights that it cannot be given.

    Raises:
        ValueError: wrappers need every token to be drawn by itself, or tokens are allowed by a function; or no process has the
            whole weights.
    """
    if engine is None:
        return
    if sharded:
        raise ValueError("an engine is given whole weights, but they are sharded (FSDP2); leave engine out, or do not shard")
    if not by_response:
        raise ValueError(
            "an engine draws whole responses, but the env's wrappers want one token at a time; leave engine out, or give the "
            "bare env"
        )
    if rules.constraint is not None and rules.constraint.fixed is None:
        raise ValueError(
            "an engine cannot ask the function allowed_tokens before every token; give ids or a mask, or leave engine out"
        )
