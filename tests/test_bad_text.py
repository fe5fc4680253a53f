"""Text that is none: half characters, empty prompts, characters cut into byte tokens."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_env import TextGenerationEnv, TextGenerationVectorEnv, rescore
from llm_env.rewards import exact_match
from tests.conftest import make_tokenizer, refused

TOKENIZER, EOS = make_tokenizer("abc"), 0


def count_a(completions):
    return [float(c.count("a")) for c in completions]


HALF = "a\ud800"
CHAT = copy.deepcopy(TOKENIZER)
CHAT.chat_template = (
    "{% for m in messages %}{% if not m['content'] is string %}{{ raise_exception('no text') }}{% endif %}"
    "{{ m['content'] | trim }}{% endfor %}"
)


def chat(*contents):
    return [{"prompt": "never seen"}, {"messages": [{"role": "user", "content": c} for c in contents]}]


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        (["a", HALF], ValueError, r"row 1 of the prompts is no valid text: character 1 is '\\ud800'.*replace"),
        ([{"prompt": HALF}], ValueError, "row 0 of the prompts is no valid text"),
        (chat("b", HALF), ValueError, "row 1 of the prompts is no valid text: character 2"),
        (chat(""), ValueError, "row 1 of the prompts is empty"),
        (chat(" \n", " "), ValueError, "row 1 of the prompts is empty"),
        (chat(), ValueError, "row 1: the chat template raised ValueError"),
        (chat(3), ValueError, "row 1: the chat template raised TemplateError: no text"),
        ([{"messages": ["a"]}], TypeError, "row 0: a message is a str; it must be a dict"),
        ([{"messages": [[{"role": "user", "content": "a"}]]}], TypeError, "row 0: a message is a list"),
        ([{"prompt": None, "messages": []}], ValueError, "row 0 of the prompts holds None as its 'prompt'"),
        ([{"prompt": 3}], TypeError, "row 0: 'prompt' is a int"),
        ([{"prompt": "a", 1: 2, "x": 3}], TypeError, "row 0 of the prompts has the key 1; keys are the names of columns"),
        ([None], TypeError, "row 0 of the prompts is a NoneType"),
        ([b"a"], TypeError, "row 0 of the prompts is a bytes"),
        (b"abc", TypeError, "prompts is a bytes"),
        ({"prompt": ["a"]}, TypeError, "prompts is a dict"),
        ({"a"}, TypeError, "prompts is a set"),
        (None, TypeError, "prompts is a NoneType"),
        (float("nan"), TypeError, "prompts is a float"),
        ((x for x in "ab"), TypeError, "prompts is a generator"),
        (np.array([["a"]]), TypeError, "row 0 of the prompts is a list"),
        (np.array("a"), ValueError, "prompts='a' is neither a list nor"),
        (type("Frame", (dict,), {})(a=[1]).items(), TypeError, "prompts is a dict_items"),
        (
            type("Table", (), {"__len__": lambda s: 2, "__getitem__": lambda s, k: {"prompt": "ab"}[k]})(),
            TypeError,
            "Table whose item 0",
        ),
    ],
)
def test_prompts_that_are_none(prompts, error, message):
    refused(TextGenerationEnv, prompts, exact_match, CHAT, max_prompt_tokens=99, error=error, match=message)


def test_arrays_and_other_sequences_of_text_are_prompts():
    from collections import deque

    for prompts in (np.array(["a", "b"]), deque(["a", "b"]), ("a", "b"), np.array([{"prompt": "a"}, {"prompt": "b"}])):
        assert TextGenerationEnv(prompts, count_a, TOKENIZER).rules.prompts.texts == ["a", "b"]


def test_half_a_character_in_a_jsonl_is_refused_as_a_prompt_and_kept_as_a_column(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "a\\ud800"}\n')
    refused(TextGenerationEnv, str(path), count_a, TOKENIZER, match="row 1 of the prompts is no valid text")
    path.write_text('{"prompt": "\\ud83d\\ude00a", "gold": "x\\ud800", "none": "", "no": []}\n')  # a whole pair is a character
    seen = []

    def see(completions, gold, none, no):
        seen.append((gold, none, no))
        return [1.0] * len(gold)

    record = tmp_path / "record.jsonl"
    env = TextGenerationEnv(str(path), see, TOKENIZER, record=record)
    assert env.rules.prompts.texts == ["\U0001f600a"]
    env.reset()
    env.step(EOS)
    assert [row["score"] for row in rescore(record, see)] == [1.0]
    assert seen == [(["x\ud800"], [""], [[]])] * 2


@pytest.mark.parametrize("stop", ["\ud800", ["a", "b\udfff"], 3, b"a", [None], [b"a"], "", ["a", ""], {"a": 1}, 1.0, [["a"]]])
def test_stop_strings_that_are_none(stop):
    refused(TextGenerationEnv, ["a"], count_a, TOKENIZER, stop=stop, error=ValueError, match="stop")


def byte_tokenizer(*merges):
    """GPT-2's kind: a token a byte, and one for each pair of bytes in `merges`, wherever characters begin and end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    words = [letters[byte] for byte in range(256)]
    pairs = [(letters[a], letters[b]) for a, b in merges]
    vocabulary = {word: i for i, word in enumerate([*words, *(a + b for a, b in pairs)])}
    backend = Tokenizer(models.BPE(vocabulary, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


MERGES = [(0xA9, 0x61), (0x82, 0xAC), (0x61, 0xC3)]  # the end of e acute with an a; the end of the euro sign; an a with half
BYTES = byte_tokenizer(*MERGES)
END, PAD = BYTES.convert_tokens_to_ids(["<eos>", "<pad>"])
PIECES = [bytes([byte]) for byte in range(256)] + [bytes(pair) for pair in MERGES]
TEXT = st.text(st.sampled_from("aé€😀b"), max_size=8).map(lambda text: list(text.encode()))


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(TEXT | st.lists(st.integers(0, 258), max_size=3) | st.just([PAD] * 12), max_size=4),
    stop=st.lists(st.text("aé€😀b", min_size=1, max_size=3), max_size=2),
)
def test_characters_cut_into_byte_tokens(parts, stop):
    """Against Python's own decoder: broken UTF-8 is U+FFFD, and a stop string ends with the token that completes it."""
    ids, seen = [token for part in parts for token in part], []

    def see(completions, completion_ids):
        seen.append((completions[0], completion_ids[0]))
        return [1.0]

    env = TextGenerationEnv(["é"], see, BYTES, stop=stop, max_new_tokens=len(ids) + 1, observation="flat")
    assert env.reset()[0].tolist()[:3] == [0xC3, 0xA9, -1]
    texts = [b"".join(PIECES[i] for i in ids[:n] if i < END).decode("utf-8", "replace") for n in range(len(ids) + 1)]
    expected = next((n for n in range(1, len(texts)) if any(s in texts[n] for s in stop)), len(ids) + 1)
    for n, token in enumerate([*ids, END], start=1):
        _, reward, terminated, truncated, info = env.step(token)
        assert (terminated, truncated, reward) == ((True, False, 1.0) if n == expected else (False, False, 0.0))
        if terminated:
            break
    text = texts[min(expected, len(ids))]
    assert info["completion"] == text and seen == [(text, [*ids, END][:expected])]
    responses = TextGenerationVectorEnv.from_rules(env.rules, 1)
    responses.reset()
    if expected <= len(ids):
        refused(responses.step_responses, [[*ids[:expected], 0]], match="has 1 tokens after its end")
    assert responses.step_responses([[*ids, END][:expected]]).infos[0]["completion"] == text


def test_a_stop_string_is_seen_across_any_number_of_tokens_without_text():
    env = TextGenerationEnv(["a"], count_a, BYTES, stop="ab", max_new_tokens=99)
    env.reset()
    ends = [env.step(token)[2] for token in [ord("a"), *[PAD] * 50, ord("b")]]
    assert ends == [False] * 51 + [True]
