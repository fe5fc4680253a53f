"""The engines by name, and the checks of what a user gives for one."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from agents.engines.weight_sync import ExternalEngine, SyncedEngine
from llm_env.rules import Rules

ENGINES = {"vllm": "agents.engines.vllm.engine:VLLMEngine"}  # by name, imported when it is used


def make_engine(engine: str | ExternalEngine, engine_kwargs: dict[str, Any] | None) -> SyncedEngine:
    """Make the engine that an agent's arguments name.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If `engine` is no external engine.
        ImportError: If the engine's package is not installed.
    """
    check_engine(engine, engine_kwargs)
    if not isinstance(engine, str):
        return SyncedEngine(engine)
    module, _, name = ENGINES[engine].partition(":")
    return SyncedEngine(getattr(import_module(module), name)(**engine_kwargs or {}))


def check_engine(engine: Any, engine_kwargs: Any) -> None:
    """Check the arguments of `make_engine`.

    Raises:
        ValueError: If the name is unknown, or `engine_kwargs` were given without a name.
        TypeError: If `engine` is no external engine.
    """
    if engine is None and engine_kwargs:
        raise ValueError(f"engine_kwargs={engine_kwargs} without an engine; set engine='vllm', or leave them out")
    if isinstance(engine, str):
        if engine not in ENGINES:
            known = ", ".join(map(repr, ENGINES))
            raise ValueError(
                f"engine={engine!r} must be one of {known}, an object like agents.engines.weight_sync.ExternalEngine, or None"
            )
        if not isinstance(engine_kwargs or {}, dict):
            raise TypeError(f"engine_kwargs={engine_kwargs!r} must be a dict, such as {{'base_url': 'http://localhost:8000'}}")
    elif engine is not None:
        if isinstance(engine, type) or not isinstance(engine, ExternalEngine):
            raise TypeError(
                f"engine is a {type(engine).__name__}, which is no agents.engines.weight_sync.ExternalEngine; it must have "
                "tolerance, takes_uniforms, start, update_weights, generate and close"
            )
        if engine_kwargs:
            raise ValueError(f"engine_kwargs={engine_kwargs} are for engine='vllm'; set up your {type(engine).__name__} itself")


def check_engine_env(engine: Any, rules: Rules, by_response: bool, sharded: bool) -> None:
    """Check that an external engine can collect from an env, and can be given the weights.

    Raises:
        ValueError: If wrappers need the token clock, a function says which tokens are allowed, or no process has the whole
            weights.
    """
    if engine is None:
        return
    if sharded:
        raise ValueError("an engine is given whole weights, but they are sharded (FSDP2); leave engine out, or do not shard")
    if not by_response:
        raise ValueError(
            "an engine generates whole responses, but the env's wrappers take one token at a time; leave engine out, or give "
            "the env without wrappers"
        )
    if rules.constraint is not None and rules.constraint.fixed is None:
        raise ValueError(
            "an engine cannot call the function allowed_tokens before every token; give ids or a mask, or leave engine out"
        )
