"""TRL's environments as text environments, and tasks of this package as TRL environments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from llm_env.adapters.base import Adapter, Prompt, Step, numbers
from llm_env.dialogue.text_env import Text
from llm_env.rewards.calls import wait_for
from llm_env.tools.formats import ToolFormat, as_tool_format
from llm_env.tools.toolset import ToolSet

NOT_TOOLS = ("reset", "get_reward", "close")


class TRLEnv(Adapter):
    """A class for TRL's `environment_factory` as a `llm_env.TextEnv`, unchanged.

    Its public methods, but for `reset` and `get_reward`, are tools; `reset(**columns)` gets the row of the dataset, and what it
    returns is added to the last user message. A turn without a call ends the episode. However the episode ends, it pays
    `get_reward()` where there is one (give reward functions to `from_text_env` otherwise; they get the columns). TRL's
    `max_tool_calling_iterations=n` is `max_turns=n + 1` here, but that the calls of the last turn are made, too.

    Args:
        factory: makes an environment.
        dataset: rows with `prompt` (a text or messages) and columns; a row is the one of its seed, modulo their number. None
            for environments whose `reset` returns the prompt.
        tool_format: how calls are written: a name in `llm_env.tools.formats.FORMATS` or a `ToolFormat`. `"plain"` describes the
            tools in the prompt. The others leave that to the chat template, as TRL does, and prompts are messages: use the one
            whose calls the template writes (`"hermes"` for Qwen 2.5 and 3).
        prompt: see `llm_env.adapters.base.Adapter`; it is given the text of a prompt.
    """

    keeps_special_tokens = True  # some formats mark calls with them

    def __init__(
        self,
        factory: Callable[[], Any],
        dataset: Sequence[dict[str, Any]] | None = None,
        tool_format: str | ToolFormat = "plain",
        *,
        prompt: Prompt = None,
    ) -> None:
        super().__init__(prompt)
        self.env, self.dataset = factory(), dataset
        if not callable(getattr(self.env, "reset", None)):
            raise TypeError(f"{type(self.env).__name__} has no reset; give a class for TRL's environment_factory")
        if dataset is not None and not len(dataset):
            raise ValueError("dataset has no rows")
        methods = inspect.getmembers(self.env, callable)
        tools = [method for name, method in methods if not name.startswith("_") and name not in NOT_TOOLS]
        self.tools, self._is_chat = ToolSet(tools), False
        self.format = as_tool_format(tool_format)

    def reset(self, *, seed: int | None = None) -> tuple[Text, dict[str, Any]]:
        """Start the episode of a row; the info has its columns, and the tools if the template describes them."""
        row = {} if self.dataset is None else dict(self.dataset[(seed or 0) % len(self.dataset)])
        said = self.env.reset(**row)
        prompt = row.pop("prompt", "")
        instructions = self.format.instructions(self.tools.schemas)
        self._is_chat = isinstance(prompt, list) or not instructions
        if not self._is_chat:
            return self._whole(prompt, said, instructions), row
        messages = [dict(each) for each in prompt] if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        last = next((each for each in reversed(messages) if each.get("role") == "user"), messages[-1])
        last["content"] = self._whole(last["content"], said, instructions)
        return messages, row if instructions else {**row, "tools": self.tools.schemas}

    def _whole(self, prompt: str, said: Any, instructions: str) -> str:
        text = f"{prompt}{'' if said is None else said}"
        return self._first(f"{instructions}\n\n{text}" if instructions else text)

    def _advance(self, action: Any) -> Step:
        """Make the calls of a turn; without one the episode ends."""
        _, calls = self.format.parse(action)
        if not calls:
            return "", self.final_reward(), True, False, {}
        results = self.tools.run(calls)
        info = {"tool_calls": len(calls), "tool_errors": sum(result.failed for result in results)}
        return self.format.observation(results, self._is_chat), 0.0, False, False, info

    def final_reward(self) -> float:
        """Return `get_reward()`, also where a limit ends the episode; 0 if the environment has none."""
        if not hasattr(self.env, "get_reward"):
            return 0.0
        reward = self.env.get_reward()
        return float(wait_for(reward, None) if inspect.isawaitable(reward) else reward)


def as_trl_environment(env: Any) -> Callable[[], Any]:
    """Return a factory for TRL's `environment_factory` of a text env or an env of this package made from one.

    TRL's episodes of several turns are tool calls: the environment has one tool, `act(text)`, which takes a turn and returns
    the observation; `reset` returns the first one, for the dataset's column `seed` (or the next seed); `get_reward` returns the
    sum of the rewards.

    Args:
        env: a function that makes a `llm_env.TextEnv`, or an env of `from_text_env`.

    Raises:
        TypeError: If it is neither.
    """
    make = _maker(env)

    class TextEnvironment:
        """A text environment as TRL's trainer plays it."""

        def __init__(self) -> None:
            self._env, self._next_seed = make(), 0
            self._reward, self._is_over = 0.0, True

        def reset(self, seed: int | None = None, **columns: Any) -> str:
            """Start an episode and return its first observation."""
            if seed is None:
                seed, self._next_seed = self._next_seed, self._next_seed + 1
            observation, _ = self._env.reset(seed=seed)
            self._reward, self._is_over = 0.0, False
            return _content(observation)

        def act(self, text: str) -> str:
            """Take a turn in the environment and read its answer.

            Args:
                text: What to say to the environment.

            Returns:
                The environment's answer.
            """
            if self._is_over:
                return "The episode has ended."
            observation, reward, terminated, truncated, _ = self._env.step(text)
            self._reward += float(reward)
            self._is_over = terminated or truncated
            return _content(observation) or ("The episode has ended." if self._is_over else "")

        def get_reward(self) -> float:
            """Return the sum of the rewards."""
            return self._reward

    return TextEnvironment


def _maker(env: Any) -> Callable[[], Any]:
    rules = getattr(getattr(env, "unwrapped", env), "rules", None)
    if rules is not None:
        if rules.text_env is None:
            raise TypeError("the env has prompts, no text env; give TRL its prompts and reward functions as they are")
        return rules.text_env.new
    if not callable(env):
        raise TypeError(f"env={env!r} must be a function that makes a text env, or an env of from_text_env")
    return env


def _content(observation: Text) -> str:
    return observation if isinstance(observation, str) else "\n".join(str(message["content"]) for message in observation)


def as_text_env(env: Any) -> Any:
    """Return a `llm_env.TextEnv` that plays an env of this package: prompts and replies as texts.

    Seed i is prompt i. A turn is a text; an end token is added to it. The info is that of the env.

    Args:
        env: a `TextGenerationEnv` or vector env.
    """
    return _TextEnvOfTokens(env)


class _TextEnvOfTokens:
    """Plays a token env by texts, through a vector env of one row over the same rules."""

    def __init__(self, env: Any) -> None:
        from llm_env.vector_env import TextGenerationVectorEnv

        rules = getattr(env, "unwrapped", env).rules
        self.venv = TextGenerationVectorEnv.from_rules(rules, 1)

    def reset(self, *, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        """Start the episode of prompt number `seed`, modulo their number."""
        rules = self.venv.rules
        index = (seed or 0) % len(rules.prompts)
        self.venv.reset(options={"index": [index]})
        return rules.decode([self.venv.episodes.prompt(0).tolist()])[0], {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take a turn."""
        rules = self.venv.rules
        ids = rules.tokenizer(action, add_special_tokens=False)["input_ids"][: rules.max_new_tokens - 1]
        step = self.venv.step_responses([[*ids, rules.eos_id]])
        observation = rules.decode([step.observations[0].tolist()])[0]
        info = step.infos[0]
        return observation, float(step.rewards[0].sum()), bool(step.terminated[0]), bool(step.truncated[0]), numbers(info)
