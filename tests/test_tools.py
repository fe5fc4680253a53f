"""Tools: how calls are parsed, made, answered, counted and paid; and `agent.chat`."""

import ast
import asyncio
import json
import threading

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3 import PPO as SB3PPO
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from agents import GRPO, PPO
from llm_env import TextGenerationEnv, TextGenerationVectorEnv, check_reward, rescore
from llm_env.rewards import exact_match, numeric_answer
from llm_env.tools import (
    HermesFormat,
    LlamaFormat,
    MistralFormat,
    PlainFormat,
    ToolCall,
    ToolFormat,
    ToolResult,
    ToolSet,
    XMLFormat,
    calculator,
    make_search,
)
from tests.chats import ids_of, make_chat_tokenizer
from tests.conftest import make_model, make_tokenizer, refused
from tests.templates import FAMILIES, QWEN25
from tests.test_bridges import kit
from tests.test_turn_agents import Kept

END = 4
CALL = '<tool_call>{"name": "%s", "arguments": %s}</tool_call>'
ASK = [{"prompt": [{"role": "user", "content": "6*7?"}], "answer": "42"}]


def call(name, **arguments):
    return CALL % (name, json.dumps(arguments))


def zero(completions, **kwargs):
    return [0.0] * len(completions)


def make(prompts=ASK, reward=zero, tools=(calculator,), kind=TextGenerationEnv, template=QWEN25, **kwargs):
    limits = dict(max_prompt_tokens=2000, max_new_tokens=200, max_observation_tokens=200, max_turns=4, eos_token_ids=[0, END])
    num_envs = [1] if kind is TextGenerationVectorEnv else []
    return kind(
        *num_envs, prompts, reward, make_chat_tokenizer(template=template), tools=tools and list(tools), **{**limits, **kwargs}
    )


def say(env, *turns):
    """Play an episode in which the policy says these turns; return the last info."""
    env.reset()
    for turn in turns:
        for token in [*ids_of(turn), END]:
            *_, terminated, truncated, info = env.step(token)
    assert terminated or truncated
    return info


def multiply(a: int, b: int = 2) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The product of the two integers.
    """
    return a * b


# --- parsers ----------------------------------------------------------------------------------------------------------------

A = ToolCall("add", {"a": 1, "b": "two"})
JSON = '{"name": "add", "arguments": {"a": 1, "b": "two"}}'
PARSED = [
    (HermesFormat(), f"<tool_call>\n{JSON}\n</tool_call>", "", [A]),
    (
        HermesFormat(),
        f"Let me see.\n<tool_call>{JSON}</tool_call><tool_call>{JSON}</tool_call> Wait.",
        "Let me see.\n Wait.",
        [A, A],
    ),
    (HermesFormat(), f"<think>I could <tool_call>{JSON}</tool_call></think>No.", None, []),
    (HermesFormat(), f"<think>I add.</think>\n<tool_call>{JSON}</tool_call>", "<think>I add.</think>", [A]),
    (HermesFormat(), f"<tool_call>{JSON}", "", [A]),  # the limit or a stop string cut the closing tag
    (HermesFormat(), '<tool_call>{"name": "f"}</tool_call>', "", [ToolCall("f")]),
    (HermesFormat(), '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [ToolCall("f", {"x": 1})]),
    (HermesFormat(), "The answer is {3}.", None, []),
    (PlainFormat(), f"<tool_call>{JSON}</tool_call>", "", [A]),
    (LlamaFormat(), '{"name": "add", "parameters": {"a": 1, "b": "two"}}', "", [A]),
    (LlamaFormat(), '<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": "two"}}', "", [A]),
    (LlamaFormat(), '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', "", [ToolCall("f"), ToolCall("g")]),
    (LlamaFormat(), '<|python_tag|>add.call(a=1, b="two")', "", [A]),
    (LlamaFormat(), 'Well: <|python_tag|>add.call(a=1, b="two")', "Well:", [A]),
    (LlamaFormat(), '{"type": "function", "name": "f", "parameters": {}}', "", [ToolCall("f")]),
    (LlamaFormat(), '{"function": {"name": "f", "arguments": {}}}', "", [ToolCall("f")]),
    (LlamaFormat(), "The set {1, 2} has two elements.", None, []),
    (LlamaFormat(), '{"a": 1} is JSON', None, []),
    (MistralFormat(), f"[TOOL_CALLS] [{JSON}]", "", [A]),
    (MistralFormat(), '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "abcdefghi"}]', "", [ToolCall("f", id="abcdefghi")]),
    (MistralFormat(), "[1, 2]", None, []),
    (
        XMLFormat(),
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\ntwo\nlines\n</parameter>\n</function>\n</tool_call>",
        "",
        [ToolCall("add", {"a": "1", "b": "two\nlines"}, are_texts=True)],
    ),
    (XMLFormat(), "So <tool_call><function=f></function>", "So", [ToolCall("f", are_texts=True)]),
    (XMLFormat(), "1 < 2", None, []),
]


@pytest.mark.parametrize("tool_format, text, content, calls", PARSED)
def test_calls_are_parsed(tool_format, text, content, calls):
    assert tool_format.parse(text) == (text if content is None else content, calls)


BAD_CALLS = [
    (HermesFormat(), "<tool_call>add(1, 2)</tool_call>", "is not valid JSON"),
    (HermesFormat(), "<tool_call>{}</tool_call>", "must be an object with 'name' and 'arguments'"),
    (HermesFormat(), "<tool_call>[1]</tool_call>", "must be an object with 'name' and 'arguments'"),
    (HermesFormat(), '<tool_call>{"name": 3}</tool_call>', "must be an object with 'name' and 'arguments'"),
    (HermesFormat(), '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "the arguments [1] of f must be an object"),
    (HermesFormat(), "<tool_call>" + "[" * 100_000 + "</tool_call>", "is not valid JSON"),
    (HermesFormat(), "<tool_call></tool_call>", "is not valid JSON"),
    (LlamaFormat(), '{"name": "f", "parameters": {', "is not valid JSON"),
    (LlamaFormat(), "<|python_tag|>import os", "must be JSON, or name.call(argument=value)"),
    (LlamaFormat(), "<|python_tag|>f.call(a=open('x'))", "must be JSON, or name.call(argument=value)"),
    (LlamaFormat(), "<|python_tag|>", "must be JSON"),
    (MistralFormat(), "[TOOL_CALLS] what", "is not valid JSON"),
    (MistralFormat(), "[TOOL_CALLS] []", "must be an object"),
    (XMLFormat(), "<tool_call>{}</tool_call>", "is not <function=name>"),
    (XMLFormat(), "<tool_call><function=f>x=1</function></tool_call>", "is not <function=name>"),
]


@pytest.mark.parametrize("tool_format, text, message", BAD_CALLS)
def test_malformed_calls_are_answered(tool_format, text, message):
    *_, (bad,) = tool_format.parse(text)
    assert message in bad.error and len(bad.error) < 500
    (result,) = ToolSet([calculator]).run([bad])
    assert result.failed and ast.literal_eval(result.content) == {"error": bad.error}


# --- running tools ----------------------------------------------------------------------------------------------------------


async def wait_and_double(number: int) -> int:
    """Double a number.

    Args:
        number: The number.
    """
    await asyncio.sleep(0)
    return 2 * number


def divide(a: float, b: float) -> float:
    """Divide. There is no number for b = 0.

    Args:
        a: Dividend.
        b: Divisor.
    """
    if not b:
        raise ArithmeticError("no number")
    return a / b


def test_tools_run_and_their_errors_are_shown_as_in_trl():
    tools = ToolSet([multiply, wait_and_double, divide])
    assert tools.names == ["multiply", "wait_and_double", "divide"]
    assert tools.schemas[0]["function"]["parameters"]["required"] == ["a"]
    calls = [
        ToolCall("multiply", {"a": 3, "b": 4}),
        ToolCall("wait_and_double", {"number": 21}),
        ToolCall("divide", {"a": 1, "b": 0}),
        ToolCall("divide", {"x": 1}),
        ToolCall("power", {}),
        ToolCall("", error="what?"),
        ToolCall("multiply", {"a": "7", "b": "3"}, are_texts=True),
    ]
    results = tools.run(calls)
    assert [result.content for result in results[:3]] == ["12", "42", str({"error": "no number"})]
    assert "unexpected keyword argument 'x'" in results[3].content
    assert results[4].content == str({"error": "Tool power not found; the tools are multiply, wait_and_double, divide."})
    assert results[5].content == str({"error": "what?"}) and results[6].content == "21"
    assert [result.failed for result in results] == [False, False, True, True, True, True, False]


def test_a_tool_cannot_change_the_call_that_rewards_see():
    def spoil(items: list[int]) -> str:
        """Spoil.

        Args:
            items: Numbers.
        """
        items.clear()
        return "done"

    made = ToolCall("spoil", {"items": [1, 2]})
    assert ToolSet([spoil]).run([made])[0].content == "done" and made.arguments == {"items": [1, 2]}


def test_a_tool_that_takes_too_long_is_answered():
    """No clock: the tool waits for an event that is set after its time-out."""
    event = threading.Event()

    def wait(seconds: int) -> str:
        """Wait.

        Args:
            seconds: How long.
        """
        event.wait()
        return "done"

    async def sleep(seconds: int) -> str:
        """Sleep.

        Args:
            seconds: How long.
        """
        await asyncio.Event().wait()
        return "done"

    tools = ToolSet([wait, sleep], timeout=0.01)
    for name in ("wait", "sleep"):
        (result,) = tools.run([ToolCall(name, {"seconds": 1})])
        assert result.failed and "0.01" in result.content
    event.set()


def returns_none(text: str):
    """Log.

    Args:
        text: The text.
    """


def returns_object(text: str):
    """Make.

    Args:
        text: The text.
    """
    return object()


@pytest.mark.parametrize("tool", [returns_none, returns_object])
def test_a_result_that_is_no_text_is_an_error_for_the_model(tool):
    (result,) = ToolSet([tool]).run([ToolCall(tool.__name__, {"text": "a"})])
    assert result.failed and "which is no text" in result.content


def no_hints(a):
    """Do.

    Args:
        a: What.
    """


def no_docstring(a: int) -> int:
    return a


def no_description(a: int, b: int) -> int:
    """Do.

    Args:
        a: What.
    """
    return a


def hints_none(a: int) -> None:
    """Do.

    Args:
        a: What.
    """


def hints_bytes(a: int) -> bytes:
    """Do.

    Args:
        a: What.
    """
    return b""


class Opaque:
    pass


def hints_object(a: int) -> Opaque:
    """Do.

    Args:
        a: What.
    """
    return Opaque()


BAD_TOOLS = [
    ([no_hints], "the tool 'no_hints' cannot be described to a model.*type hint"),
    ([no_docstring], "the tool 'no_docstring' cannot be described to a model.*docstring"),
    ([no_description], "the tool 'no_description' cannot be described to a model.*b"),
    ([multiply, calculator, multiply], "two tools have the name 'multiply'"),
    ([hints_none], "'hints_none' returns NoneType by its type hint"),
    ([hints_bytes], "'hints_bytes' returns bytes by its type hint"),
    ([hints_object], "'hints_object' returns Opaque by its type hint"),
    ([3], "tools has a int, 3; it must be a function"),
    ([], "must be a list of functions"),
    (multiply, "must be a list of functions"),
    ("multiply", "must be a list of functions"),
]


@pytest.mark.parametrize("tools, match", BAD_TOOLS)
def test_bad_tools_are_named_before_training(tools, match):
    refused(TextGenerationEnv, ASK, zero, make_chat_tokenizer(), tools=tools, match=match)


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"tool_format": "yaml"}, "tool_format='yaml' must be one of"),
        ({"tool_format": 3}, "tool_format is a int"),
        ({"tool_timeout": 0}, "tool_timeout=0 must be a positive number"),
        ({"tools": None, "tool_format": "plain"}, "tool_format='plain' needs tools"),
        ({"tools": None, "tool_timeout": 1.0}, "tool_timeout=1.0 needs tools"),
        ({"prompts": [{"prompt": [{"content": "hi"}]}]}, "row 0: a message has the keys"),
        ({"prompts": [{"prompt": ["hi"]}]}, "row 0: a message is a str"),
        ({"prompts": [{"prompt": []}]}, "row 0"),
        ({"template": None}, "the tokenizer has no chat template"),
    ],
)
def test_other_bad_arguments_are_refused(kwargs, match):
    refused(make, **{"tools": [calculator], **kwargs}, match=match)


def test_tools_are_not_for_text_envs():
    from tests.text_envs import Letters

    refused(
        TextGenerationEnv.from_text_env,
        Letters,
        make_tokenizer("abcdefgh"),
        tools=[calculator],
        match="a text env answers every turn itself",
    )


# --- the two tools that ship ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression, value",
    [
        ("2+3*4", "14"),
        ("(1 + 2) * -3", "-9"),
        ("7/2", "3.5"),
        ("1/3", "0.333333333333"),
        ("0.1 + 0.2", "0.3"),
        ("2**10", "1024"),
        ("2^-2", "0.25"),
        ("123456789*987654321", "121932631112635269"),
        ("1e3", "1000"),
        ("6/2", "3"),
    ],
)
def test_the_calculator_is_exact(expression, value):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["", "2+", "a+1", "__import__('os')", "(1).real", "[1]", "1<2", "1,2", "9**9**9", "10**5000", "1/0", "2**0.5", "1" * 501,
     "True", "1j", "1e999", "'a'*9", "(" * 300, "lambda: 1", "0**-1", 3],
)  # fmt: skip
def test_the_calculator_computes_nothing_else(expression):
    with pytest.raises((ValueError, TypeError)):
        calculator(expression)


def test_the_search_ranks_texts_by_bm25():
    texts = ["the cat sat on the mat", "a dog", "the dog chased the cat", ""]
    search = make_search(texts, results=2)
    assert search("Dog?").splitlines() == ["a dog", "the dog chased the cat"]  # the shorter text first
    assert search("cat dog").splitlines()[0] == "the dog chased the cat"  # both words
    assert search("the").splitlines() == ["the dog chased the cat", "the cat sat on the mat"]  # twice in 5 or 6 words
    assert search("zebra") == search("") == "nothing found"
    assert ToolSet([search]).names == ["search"]
    # by hand: "dog" is in 2 of 4 texts, "a dog" has 2 words where the mean is 13 / 4
    rarity = np.log(1 + (4 - 2 + 0.5) / (2 + 0.5))
    scores = [rarity * 2.2 / (1 + 1.2 * (0.25 + 0.75 * n / (13 / 4))) for n in (2, 5)]
    assert scores[0] > scores[1] > 0
    for bad in ([], "text", [1]):
        refused(make_search, bad)
    refused(make_search, texts, results=0)


# --- episodes ---------------------------------------------------------------------------------------------------------------


def test_rewards_get_the_messages_of_an_episode_as_from_trl():
    seen = {}

    def look(prompts, completions, completion_ids, answer, **kwargs):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids)
        return [1.0] * len(completions)

    env = make(reward=look, tools=[calculator, multiply])
    both = "Both. " + call("calculator", expression="6*7") + call("multiply", a=6, b=7)
    info = say(env, both, "It is 42.")
    assert seen["prompts"] == [ASK[0]["prompt"]]
    entry = lambda name, number, **arguments: {  # noqa: E731
        "type": "function",
        "id": f"call{number:05d}",
        "function": {"name": name, "arguments": arguments},
    }
    calls = [entry("calculator", 0, expression="6*7"), entry("multiply", 1, a=6, b=7)]
    assert seen["completions"] == [
        [
            {"role": "assistant", "content": "Both.", "tool_calls": calls},
            {"role": "tool", "name": "calculator", "tool_call_id": "call00000", "content": "42"},
            {"role": "tool", "name": "multiply", "tool_call_id": "call00001", "content": "42"},
            {"role": "assistant", "content": "It is 42."},
        ]
    ]
    shown = "\n<|im_start|>user\n<tool_response>\n42\n</tool_response>\n<tool_response>\n42\n</tool_response><|im_end|>\n"
    after = shown + "<|im_start|>assistant\n"
    assert seen["ids"] == [[*ids_of(both), END, *ids_of(after), *ids_of("It is 42."), END]]
    assert (info["turns"], info["tool_calls"], info["tool_errors"]) == (2, 2, 0)
    assert info["observation_tokens"] == len(ids_of(after)) and info["reward/look"] == 1.0


def test_a_turn_without_a_call_ends_the_episode_and_is_one_of_one_turn():
    info = say(make(), "42")
    assert (info["turns"], info["tool_calls"], info["observation_tokens"]) == (1, 0, 0) and "truncated_by" not in info


def test_failed_calls_are_counted_and_training_goes_on():
    info = say(make(), call("calculator", expression="1/0"), "<tool_call>what", call("root", x=2), "42")
    assert (info["turns"], info["tool_calls"], info["tool_errors"]) == (4, 3, 3) and "truncated_by" not in info


def test_special_tokens_mark_calls_but_are_in_no_message():
    seen = []

    def look(completions, **kwargs):
        seen.extend(completions)
        return [0.0]

    tokenizer, ids, ends = kit("Llama 3.1", FAMILIES["Llama 3.1"].template)
    limits = dict(max_prompt_tokens=2000, max_new_tokens=100, max_observation_tokens=200, max_turns=2, eos_token_ids=ends)
    env = TextGenerationEnv(ASK, look, tokenizer, tools=[calculator], **limits)
    env.reset()
    for token in [*ids('Hm<pad><|python_tag|>calculator.call(expression="6*7")'), ends[1]]:
        env.step(token)
    for token in [*ids("42<pad>"), ends[0]]:
        env.step(token)
    ((first, result, last),) = seen
    assert first["content"] == "Hm" and first["tool_calls"][0]["function"]["arguments"] == {"expression": "6*7"}
    assert result["content"] == "42" and last == {"role": "assistant", "content": "42"}


def test_the_same_sentence_without_the_token_is_no_call():
    """In Llama 3.1 the tag is a token; its letters are text."""
    tokenizer, ids, ends = kit("Llama 3.1", FAMILIES["Llama 3.1"].template)
    env = TextGenerationEnv(
        ASK, zero, tokenizer, tools=[calculator], max_prompt_tokens=2000, max_new_tokens=100, max_turns=2, eos_token_ids=ends
    )
    env.reset()
    for token in [*ids('calculator.call(expression="6*7")'), ends[0]]:
        *_, terminated, _, info = env.step(token)
    assert terminated and info["tool_calls"] == 0


def test_max_turns_and_overflow_truncate_and_are_told_apart():
    turn = call("calculator", expression="6*7")
    info = say(make(max_turns=2), turn, turn)
    assert info["truncated_by"] == "max_turns" and info["final_observation_fits"] and info["tool_calls"] == 2
    observation = len(ids_of("\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n"))
    used = len(ids_of(turn)) + 1
    room = used + observation + 3
    env = make(max_new_tokens=used, max_episode_tokens=room)
    info = say(env, turn, "42")  # exactly as long as allowed
    assert "truncated_by" not in info
    info = say(make(max_new_tokens=used, max_episode_tokens=room - 3), turn)
    assert (info["truncated_by"], info["final_observation_fits"]) == ("max_episode_tokens", True)
    info = say(make(max_new_tokens=used, max_episode_tokens=room - 4), turn)
    assert (info["truncated_by"], info["final_observation_fits"], info["observation_tokens"]) == (
        "max_episode_tokens",
        False,
        0,
    )
    env.reset()
    for token in [*ids_of(turn), END, *ids_of("420")]:  # no room for the end token
        *_, truncated, info = env.step(token)
    assert truncated and info["truncated_by"] == "max_episode_tokens"


def test_a_conversation_that_cannot_fit_the_model_is_refused():
    model = make_model("llama", 261)  # 128 positions
    env = make(
        max_prompt_tokens=100, prompts=["6*7="], tool_format=Short(), max_new_tokens=8, max_observation_tokens=8, max_turns=20
    )
    refused(GRPO, model, env, n_envs=8, match="128")


def test_a_turn_that_is_cut_is_given_to_the_tools_if_asked():
    turn = ids_of(call("calculator", expression="6*7"))
    for limit, calls in (("truncate", 0), ("continue", 1)):
        env = make(turn_limit=limit, max_new_tokens=len(turn))
        env.reset()
        for token in turn:
            *_, truncated, _ = env.step(token)
        assert truncated == (limit == "truncate") and env._episodes.turns[0][0].is_cut
        assert (env._episodes.turns[0][0].transition is not None) == bool(calls)


def test_a_repeated_step_runs_no_tool_twice():
    ran = []

    def count(x: int) -> str:
        """Count.

        Args:
            x: A number.
        """
        ran.append(x)
        return "ok"

    def fails_once(completions, **kwargs):
        if len(ran) == 1 and not failed:
            failed.append(True)
            raise RuntimeError("the judge is down")
        return [0.0] * len(completions)

    failed = []
    env = make(kind=TextGenerationVectorEnv, tools=[count], reward=fails_once, max_turns=1)
    env.reset()
    turn = [*ids_of(call("count", x=5)), END]
    with pytest.raises(ValueError, match="the judge is down"):
        env.step_responses([turn])
    step = env.step_responses([turn])
    assert ran == [5] and step.truncated[0] and step.infos[0]["tool_calls"] == 1


def test_shipped_rewards_do_not_read_results():
    """The tool says the answer; only the model's last message counts."""
    env = make(reward=[exact_match, numeric_answer])
    turn = call("calculator", expression="6*7")
    wrong, right = say(env, turn, "41"), say(env, turn, "42")
    assert (wrong["reward/exact_match"], wrong["reward/numeric_answer"]) == (0.0, 0.0)
    assert (right["reward/exact_match"], right["reward/numeric_answer"]) == (1.0, 1.0)
    env = make(reward=[exact_match, numeric_answer], max_turns=1)
    cut = say(env, turn)  # the episode ends with the result
    assert (cut["reward/exact_match"], cut["reward/numeric_answer"]) == (0.0, 0.0)


def test_trl_rewards_run_unchanged_on_conversations():
    rewards = pytest.importorskip("trl.rewards")
    overlong = rewards.get_soft_overlong_punishment(150, 100)
    env = make(reward=[rewards.think_format_reward, overlong])
    turns = ["<think>\nA sum.\n</think>\n" + call("calculator", expression="6*7"), "42"]
    info = say(env, *turns)
    tokens = sum(len(ids_of(turn)) + 1 for turn in turns) + info["observation_tokens"]
    assert info["reward/think_format_reward"] == 1.0 and 50 < tokens < 250
    assert info["reward/soft_overlong_punishment"] == pytest.approx(max(-1.0, min(0.0, (50 - tokens) / 100)))


def test_process_rewards_are_refused_with_tools():
    from llm_env.rewards import process_reward

    refused(make, reward=process_reward(zero), match="not supported with tools")


def test_check_reward_speaks_messages_of_tools():
    def counts_calls(completions, **kwargs):
        return [float(sum(len(m.get("tool_calls", [])) for m in c)) for c in completions]

    assert check_reward(make(reward=counts_calls), quiet=True)


class Short(ToolFormat):
    """`?` and a sum: a call of two kinds of characters."""

    def parse(self, text):
        said, mark, asked = text.partition("?")
        return (text, []) if not mark else (said, [ToolCall("calculator", {"expression": asked})])

    def observation(self, results, is_chat):
        return "=" + results[0].content[:6]


LETTERS = make_tokenizer("0123456789+-?=", pad=True)


def short(**kwargs):
    """Prompts of text, and a call that a random model writes often."""
    limits = dict(max_prompt_tokens=8, max_new_tokens=4, max_observation_tokens=8, max_turns=3)
    return TextGenerationEnv(
        [f"{i}+{i}=" for i in range(10)], last_length, LETTERS, tools=[calculator], tool_format=Short(), **{**limits, **kwargs}
    )


def last_length(completions, **kwargs):
    return [len(c[-1]["content"]) / 4 - 0.1 * len(c) for c in completions]


def test_the_checkers_of_gymnasium_and_sb3_pass():
    gymnasium_check_env(short(), skip_render_check=True)
    sb3_check_env(short(observation="flat"))


def test_a_task_takes_tools():
    env = gym.make("llm_env/Addition-v0", tools=[calculator], tool_format=Short(), max_turns=2, max_observation_tokens=8)
    env.reset(options={"index": 3})
    a, b = env.unwrapped.rules.prompts.texts[3].rstrip("=").split("+")
    tokenizer = env.unwrapped.rules.tokenizer
    for token in tokenizer.convert_tokens_to_ids([*str(int(a) + int(b)), "<eos>"]):
        *_, terminated, _, info = env.step(token)
    assert terminated and info["is_success"] and info["tool_calls"] == 0


def test_both_clocks_agree_on_random_episodes():
    rng = np.random.default_rng(0)
    env, venv = short(turn_limit="continue"), TextGenerationVectorEnv.from_rules(short(turn_limit="continue").rules, 1)
    kinds = set()
    for _ in range(200):
        env.reset(seed=int(rng.integers(99)))
        index = int(env._episodes.prompt_indexes[0])
        venv.reset(options={"index": [index]})
        done = False
        while not done:
            turn, ended = [], False
            while not ended and not done:
                token = int(rng.choice([0, *range(3, len(LETTERS)), 15, 15]))
                before = len(env._episodes.turns[0])
                _, _, terminated, truncated, info = env.step(token)
                turn.append(token)
                done = terminated or truncated
                ended = len(env._episodes.turns[0]) > before
            step = venv.step_responses([turn])
            assert (step.terminated[0], step.truncated[0]) == (terminated, truncated)
        assert venv.episodes.response(0).tolist() == env._episodes.response(0).tolist()
        told = ("turns", "tool_calls", "tool_errors", "completion", "transcript", "reward/last_length", "truncated_by")
        assert all(step.infos[0].get(key) == info.get(key) for key in told)
        kinds.add((info["turns"], info["tool_calls"] > 0, info["tool_errors"] > 0, info.get("truncated_by")))
    assert len(kinds) > 6


@pytest.mark.parametrize("kind, kwargs", [(GRPO, {"group_size": 4}), (PPO, {"gae_level": "turn"})])
def test_agents_train_with_tools_and_log_calls(kind, kwargs, tmp_path):
    from stable_baselines3.common.logger import Logger

    kept, path = Kept(), tmp_path / "episodes.jsonl"
    model = make_model("llama", len(LETTERS), scale=1.0)
    agent = kind(model, short(record=path, turn_limit="continue"), n_envs=16, batch_size=8, seed=0, **kwargs)
    assert agent.audit(n=8, quiet=True).passed
    agent.set_logger(Logger(None, [kept]))
    agent.learn(300)
    rows = [row for row in kept.rows if "rollout/tool_calls" in row]
    assert rows and all(0 <= row["rollout/tool_errors"] <= row["rollout/tool_calls"] for row in rows)
    assert max(row["rollout/turns"] for row in rows) > 1 and all("time/env" in row for row in rows)
    assert all(0 <= row["rollout/overflow"] <= 1 for row in rows)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    spoken = [message for record in records for message in record["completion"]]
    assert {message["role"] for message in spoken} == {"assistant", "tool"}
    again = rescore(path, last_length)
    assert [new["score"] for new in again] == pytest.approx([old["score"] for old in records])


def test_the_observations_of_tools_are_no_actions():
    agent = GRPO(make_model("llama", len(LETTERS), scale=1.0), short(turn_limit="continue"), n_envs=32, group_size=4, seed=0)
    rollout = agent.sample_rollout()
    shown = sum(info["observation_tokens"] for info in rollout.infos)
    assert shown > 0 and sum(int((turns < 0).sum()) for turns in rollout.turn_rows) == shown


def test_sb3_plays_with_tools():
    agent = SB3PPO("MlpPolicy", short(observation="flat"), n_steps=32, batch_size=32, n_epochs=1, seed=0)
    agent.learn(64)


def test_overflow_is_counted():
    from stable_baselines3.common.logger import Logger

    def shares(**kwargs):
        kept = Kept()
        agent = GRPO(make_model("llama", len(LETTERS), scale=1.0), short(**kwargs), n_envs=16, group_size=4, seed=0)
        agent.set_logger(Logger(None, [kept]))
        agent.learn(100)
        return [row["rollout/overflow"] for row in kept.rows if "rollout/overflow" in row]

    ask = LETTERS.convert_tokens_to_ids("?")
    tight = shares(turn_limit="continue", max_turns=3, max_episode_tokens=4, allowed_tokens=[ask])
    assert tight and set(tight) == {1.0}
    assert set(shares(turn_limit="continue", max_turns=1, allowed_tokens=[ask])) == {0.0}


# --- agent.chat -------------------------------------------------------------------------------------------------------------


class Planned:
    """Instead of sampling: the turns that a model says, and the contexts in which it was asked."""

    def __init__(self, monkeypatch, *turns):
        self.turns, self.contexts = list(turns), []
        from agents.engines import base

        monkeypatch.setattr(base, "sample_responses", self.sample)
        monkeypatch.setattr(base, "keeps_cache", lambda *args: False)  # a turn at a time

    def sample(self, lm, contexts, sampler, **kwargs):
        (context,) = contexts
        self.contexts.append(list(context))
        turn = self.turns.pop(0)
        return [turn], [np.zeros(len(turn), np.float32)]


def chat_agent(**kwargs):
    env = make(**kwargs)
    return GRPO(make_model("llama", 261, max_position_embeddings=4096), env, n_envs=8, seed=0, group_size=4), env


def test_chat_runs_tools_and_goes_on_with_the_tokens_that_were_sampled(monkeypatch):
    agent, env = chat_agent(tools=[calculator, multiply])
    ask, two = call("calculator", expression="6*7"), call("multiply", a=6, b=7) + call("multiply", a=1)
    said = [[*ids_of(ask), END], [*ids_of(two), END], [*ids_of("<think>So.</think>42"), END], [*ids_of("Bye"), 0]]
    planned = Planned(monkeypatch, *said)
    first = [{"role": "user", "content": "6*7?"}]
    new = agent.chat(first)
    assert [message["role"] for message in new] == ["assistant", "tool", "assistant", "tool", "tool", "assistant"]
    assert new[1]["content"] == "42" and [m["content"] for m in new[3:5]] == ["42", "2"]
    assert new[5] == {"role": "assistant", "content": "<think>So.</think>42"}

    # the contexts are those of training: the env writes the same tokens after the same turns
    env.reset()
    expected = [env._episodes.prompt(0).tolist()]
    for turn in said[:2]:
        for token in turn:
            env.step(token)
        expected.append(env._episodes.context(0).tolist())
    assert planned.contexts == expected

    # and the conversation goes on after the sampled tokens, thoughts included
    second = agent.chat([*first, *new, {"role": "user", "content": "Thanks"}])
    bridge = "\n<|im_start|>user\nThanks<|im_end|>\n<|im_start|>assistant\n"
    assert planned.contexts[3] == [*expected[2], *said[2], *ids_of(bridge)]
    assert second == [{"role": "assistant", "content": "Bye"}]


def test_chat_after_the_last_turn_that_max_turns_allows(monkeypatch):
    agent, _ = chat_agent(max_turns=1)
    turn = [*ids_of(call("calculator", expression="6*7")), END]
    planned = Planned(monkeypatch, turn, [*ids_of("42"), END])
    new = agent.chat(ASK[0]["prompt"])
    assert [message["role"] for message in new] == ["assistant", "tool"]
    agent.chat([*ASK[0]["prompt"], *new, {"role": "user", "content": "And?"}])
    shown = "\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
    assert planned.contexts[1] == [*planned.contexts[0], *turn, *ids_of(shown + "<|im_start|>assistant\n")]


def test_chat_of_a_text_env_is_the_context_of_training(monkeypatch):
    from tests.test_turns import Talk

    tokenizer = make_chat_tokenizer()
    env = TextGenerationEnv.from_text_env(
        Talk, tokenizer, max_prompt_tokens=60, max_new_tokens=8, max_turns=3, max_observation_tokens=60, eos_token_ids=[0, END]
    )
    agent = GRPO(make_model("llama", 261, max_position_embeddings=512), env, n_envs=8, seed=0, group_size=4)
    turns = [[*ids_of("ab"), END], ids_of("abcdefgh"), [*ids_of("c"), END]]
    planned = Planned(monkeypatch, *turns)
    messages = [{"role": "user", "content": "hi"}]
    env.reset()
    for turn in turns:
        assert env._episodes.context(0).tolist() != planned.contexts
        (new,) = agent.chat(messages)
        assert planned.contexts[-1] == env._episodes.context(0).tolist()
        for token in turn:
            env.step(token)
        messages += [new, {"role": "user", "content": f"you said {new['content']}"}]
    assert len(planned.contexts) == 3

    # an answer that another agent gave is tokenized
    other = GRPO(make_model("llama", 261, max_position_embeddings=512), env, n_envs=8, seed=0, group_size=4)
    planned = Planned(monkeypatch, [END])
    other.chat(messages[:3])
    after = "<|im_end|>\n<|im_start|>user\nyou said ab<|im_end|>\n<|im_start|>assistant\n"
    assert planned.contexts[0] == [*ids_of("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nab"), *ids_of(after)]


def test_chat_samples_from_the_model_and_says_the_same_when_greedy():
    agent, _ = chat_agent(max_new_tokens=6)
    (new,) = agent.chat(ASK[0]["prompt"], deterministic=True)
    assert new["content"] == agent.generate([ASK[0]["prompt"]], deterministic=True)[0]
    assert new["content"] == agent.play(deterministic=True).info["completion"]


def test_chat_without_turns_renders_the_whole_conversation():
    tokenizer = make_chat_tokenizer()
    env = TextGenerationEnv(ASK, zero, tokenizer, max_new_tokens=6, max_prompt_tokens=100, eos_token_ids=[0, END])
    agent = GRPO(make_model("llama", 261, max_position_embeddings=512), env, n_envs=8, seed=0, group_size=4)
    chat = [*ASK[0]["prompt"], {"role": "assistant", "content": "42"}, {"role": "user", "content": "Sure?"}]
    assert agent.chat(chat, True) == [{"role": "assistant", "content": agent.generate([chat], True)[0]}]


def test_chat_refuses_what_is_no_conversation():
    agent, _ = chat_agent(max_new_tokens=6)
    user = {"role": "user", "content": "hi"}
    for bad in ("hi", [], None, ["hi"], [{"role": "user"}], [user, {"role": "assistant", "content": "ho"}]):
        refused(agent.chat, bad)
    made = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    refused(agent.chat, [user, made, {"role": "tool", "content": "1"}], match="this agent did not write it")
    refused(agent.chat, [{"role": "assistant", "content": "ho"}, user], match="begins with a system or user message")
    refused(agent.chat, [{"role": "user", "content": "hi " * 2000}], match="4096")
    texts = GRPO(make_model("llama", len(LETTERS)), short(), n_envs=8, seed=0, group_size=4)
    refused(texts.chat, [user], match="use agent.generate or agent.play")


def test_an_agent_that_has_chatted_can_be_saved(tmp_path):
    agent, _ = chat_agent(max_new_tokens=6)
    agent.chat(ASK[0]["prompt"])
    agent.save(tmp_path / "agent")
    again = GRPO.load(tmp_path / "agent", env=make(max_new_tokens=6))
    assert again.chat(ASK[0]["prompt"], True) == agent.chat(ASK[0]["prompt"], True)
    agent.policy.save_pretrained(tmp_path / "model")
    exported = GRPO(str(tmp_path / "model"), make(max_new_tokens=6), n_envs=8, group_size=4)
    assert exported.chat(ASK[0]["prompt"], True) == agent.chat(ASK[0]["prompt"], True)


def test_results_have_messages_and_formats_have_a_default():
    result = ToolResult(ToolCall("f", id="abc"), "1")
    assert result.message() == {"role": "tool", "name": "f", "tool_call_id": "abc", "content": "1"}
    assert ToolFormat().observation([result], True) == [result.message()] and ToolFormat().instructions([]) == ""
    with pytest.raises(NotImplementedError):
        ToolFormat().parse("")


# --- the manual's client of a server ----------------------------------------------------------------------------------------


def test_the_readme_asks_a_server_in_the_context_of_training(monkeypatch):
    """Its function sends the token ids that the env would have as context."""
    import io
    import re
    import urllib.request
    from pathlib import Path

    page = (Path(__file__).parents[1] / "docs" / "tools.md").read_text()
    (block,) = [each for each in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def converse" in each]
    names = {}
    exec(block, names)
    from tests.test_turns import Talk

    tokenizer = make_chat_tokenizer()
    limits = dict(max_prompt_tokens=60, max_new_tokens=8, max_turns=3, max_observation_tokens=60, eos_token_ids=[0, END])
    env = TextGenerationEnv.from_text_env(Talk, tokenizer, **limits)
    turns, asked = [[*ids_of("ab"), END], ids_of("abcdefgh")], []

    def answer(request):
        body = json.loads(request.data)
        assert request.full_url == "http://server/v1/completions" and body["stop_token_ids"] == [0, END]
        asked.append(body["prompt"])
        return io.BytesIO(json.dumps({"choices": [{"token_ids": turns[len(asked) - 1]}]}).encode())

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    said = names["converse"]("http://server", "m", env, [{"role": "user", "content": "hi"}], lambda text: f"you said {text}")
    env.reset()
    for turn, text in zip(turns, said, strict=False):
        assert text == tokenizer.decode(turn, skip_special_tokens=True)
        assert asked[-1] == env._episodes.context(0).tolist()
        for token in turn:
            env.step(token)
    assert len(asked) == 2
