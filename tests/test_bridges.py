"""What an env writes between two turns of a chat, token by token, for known templates and every way in which a turn ends."""

import pytest

from llm_env import TextGenerationEnv, TextGenerationVectorEnv
from llm_env.tools import calculator
from tests.chats import ids_of, make_chat_tokenizer
from tests.conftest import refused
from tests.templates import FAMILIES, PHI3, QWEN3, after_results, real_template

NEAR = ["<eos>", "<pad>", "<bos>"]
LIMIT = 90
CALL = {
    "Qwen2.5": '<tool_call>\n{"name": "calculator", "arguments": {"expression": "%s"}}\n</tool_call>',
    "Llama 3.1": '{"name": "calculator", "parameters": {"expression": "%s"}}',
    "Mistral": '[TOOL_CALLS] [{"name": "calculator", "arguments": {"expression": "%s"}}]',
}
for other in ("Qwen3", "Gemma", "Phi-3"):
    CALL[other] = CALL["Qwen2.5"]


class Echo:
    """Says what it heard. Its observations are of different lengths."""

    def reset(self, *, seed=None):
        return "begin", {}

    def step(self, action):
        return f" heard {action!r}"[: 3 + len(action)] + "é", 0.0, False, False, {}


def nothing(completions, **kwargs):
    return [0.0] * len(completions)


def kit(name, template):
    """A family's tokenizer, its ids by hand, and its two end tokens."""
    family = FAMILIES[name]
    special = list(dict.fromkeys([*NEAR, *family.special]))
    tokenizer = make_chat_tokenizer(template=template, special=special)
    return tokenizer, lambda text: ids_of(text, special), [special.index(family.close), special.index(family.other_end)]


TEMPLATES = [pytest.param(name, family.template, id=name) for name, family in FAMILIES.items()]
REAL = [pytest.param(name, None, id=f"the real {family.trl}") for name, family in FAMILIES.items() if family.trl]


def turns_of(text, ids, ends, limit):
    """The same text ended by the template's end token, another end token, a stop string, and (with more text) the limit."""
    close, other = ends
    said = ids(text)
    filled = ids(text + "." * (limit - len(said)))
    return {"close": [*said, close], "other": [*said, other], "stop": [*said, *ids("\n\n")], "limit": filled}


def play(env, venv, turns, after):
    """Both clocks write the same tokens after every turn: those that `after` names by hand."""
    env.reset()
    venv.reset()
    context = env._episodes.prompt(0).tolist()
    assert venv.episodes.prompt(0).tolist() == context
    for turn in turns:
        for token in turn:
            env.step(token)
        venv.step_responses([turn])
        context += [*turn, *after(turn)]
        assert env._episodes.context(0).tolist() == context
        assert venv.episodes.context(0).tolist() == context


def without_close(turn, bridge, close):
    """The rule: what a turn already ends with is not written again."""
    return bridge[1:] if turn[-1] == close else bridge


@pytest.mark.parametrize("name, template", TEMPLATES + REAL)
def test_a_conversation_goes_on_as_the_template_writes_it(name, template):
    tokenizer, ids, ends = kit(name, real_template(FAMILIES[name].trl) if template is None else template)
    kwargs = dict(max_prompt_tokens=400, max_new_tokens=12, max_turns=9, max_observation_tokens=200)
    kwargs |= dict(stop="\n\n", eos_token_ids=ends)
    env = TextGenerationEnv.from_text_env(Echo, tokenizer, **kwargs)
    venv = TextGenerationVectorEnv.from_text_env(1, Echo, tokenizer, **kwargs)
    assert env.rules.chat

    def after(turn):
        text = tokenizer.decode(turn, skip_special_tokens=True)
        observation = Echo().step(text)[0]
        seen = observation.strip() if name in ("Gemma", "Llama 3.1") else observation  # these templates trim
        return without_close(turn, ids(FAMILIES[name].after_user(seen)), ends[0])

    turns = turns_of("Hi é", ids, ends, 12)
    thought = {"thought": [*ids("<think>a"), ends[0]], "empty": [ends[0]], "only another end": [ends[1]]}
    play(env, venv, [*turns.values(), *thought.values()], after)


@pytest.mark.parametrize("name, template", TEMPLATES + REAL)
def test_results_of_tools_come_as_the_template_writes_them(name, template):
    tokenizer, ids, ends = kit(name, real_template(FAMILIES[name].trl) if template is None else template)
    prompts = [{"prompt": [{"role": "user", "content": "How much?"}]}]
    kwargs = dict(tools=[calculator], max_prompt_tokens=4000, max_new_tokens=LIMIT, max_turns=9, max_observation_tokens=300)
    kwargs |= dict(stop="\n\n", eos_token_ids=ends, turn_limit="continue")
    env = TextGenerationEnv(prompts, nothing, tokenizer, **kwargs)
    venv = TextGenerationVectorEnv(1, prompts, nothing, tokenizer, **kwargs)
    results = iter(["12.5", "-3", str({"error": "division by zero"}), "7"])
    calls = iter(range(100))

    def after(turn):
        shown = after_results(name, [next(results)])
        return without_close(turn, ids(shown.replace("call00000", f"call{next(calls):05d}")), ends[0])

    bodies = [CALL[name] % sum for sum in ("10*1.25", "4 - 7", "1/0", "3+4")]
    kinds = ["close", "other", "stop", "limit"]
    turns = [turns_of(body, ids, ends, LIMIT)[kind] for body, kind in zip(bodies, kinds, strict=True)]
    if name in ("Mistral", "Llama 3.1"):  # JSON, after which nothing may come but space
        turns[-1] = ids(bodies[-1] + " " * (LIMIT - len(ids(bodies[-1]))))
    play(env, venv, turns, after)


def test_without_a_template_nothing_is_written_but_the_observation():
    tokenizer = make_chat_tokenizer(template=None)
    env = TextGenerationEnv.from_text_env(
        Echo, tokenizer, max_prompt_tokens=10, max_new_tokens=6, max_turns=9, max_observation_tokens=20, stop="\n\n"
    )
    venv = TextGenerationVectorEnv.from_text_env(
        1, Echo, tokenizer, max_prompt_tokens=10, max_new_tokens=6, max_turns=9, max_observation_tokens=20, stop="\n\n"
    )
    turns = [[*ids_of("Hi"), 0], ids_of("Hi\n\n"), ids_of("Hi there"[:6])]
    play(env, venv, turns, lambda turn: ids_of(Echo().step(tokenizer.decode(turn, skip_special_tokens=True))[0]))


def test_a_template_that_drops_the_results_of_tools_is_refused():
    tokenizer, *_ = kit("Phi-3", PHI3)
    refused(
        TextGenerationEnv,
        [{"prompt": [{"role": "user", "content": "How much?"}]}],
        nothing,
        tokenizer,
        tools=[calculator],
        tool_format="hermes",
        match="does not show a tool message after an assistant message.*tool_format='plain'",
    )


class ToolObservation:
    """Its observations are of the role tool."""

    def reset(self, *, seed=None):
        return [{"role": "user", "content": "begin"}], {}

    def step(self, action):
        return [{"role": "tool", "content": "12"}], 0.0, False, False, {}


@pytest.mark.parametrize("name", ["Phi-3", "Gemma"])
def test_an_observation_of_a_role_that_the_template_lacks_is_refused_before_training(name):
    tokenizer, *_ = kit(name, FAMILIES[name].template)
    refused(
        TextGenerationEnv.from_text_env,
        ToolObservation,
        tokenizer,
        max_new_tokens=4,
        error=(ValueError, RuntimeError),
        match="tool message|no role tool|does not show",
    )


def test_a_template_that_changes_what_follows_a_turn_is_refused():
    template = QWEN3.replace(
        "{%- if add_generation_prompt %}", "{{ messages[1].content | length if messages[1] }}{%- if add_generation_prompt %}"
    )
    tokenizer, *_ = kit("Qwen3", template)
    refused(TextGenerationEnv.from_text_env, Echo, tokenizer, match="must not depend on its text")


def test_the_instructions_of_a_plain_format_go_where_the_template_has_room():
    """After a system message, in front of the user message otherwise, and in front of a prompt of text."""
    tokenizer, *_ = kit("Gemma", FAMILIES["Gemma"].template)
    chat = [{"role": "user", "content": "How much?"}]
    env = TextGenerationEnv([{"prompt": chat}], nothing, tokenizer, tools=[calculator], max_prompt_tokens=2000)
    (text,) = env.rules.prompts.texts
    assert text.startswith("<bos><start_of_turn>user\nYou can call these tools:\n") and text.count("calculator") == 1
    assert text.endswith("How much?<end_of_turn>\n<start_of_turn>model\n")

    tokenizer, *_ = kit("Phi-3", PHI3)
    chat = [{"role": "system", "content": "Be short."}, *chat]
    env = TextGenerationEnv([{"prompt": chat}, "2+3="], nothing, tokenizer, tools=[calculator], max_prompt_tokens=2000)
    system, plain = env.rules.prompts.texts
    assert system.startswith("<|system|>\nBe short.\n\nYou can call these tools:\n") and system.count("calculator") == 1
    assert plain.startswith("You can call these tools:\n") and plain.endswith("\n\n2+3=")
    assert env.rules.prompts.messages[0] == chat, "reward functions get the prompt as it was given"
