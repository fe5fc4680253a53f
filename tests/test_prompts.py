import json
from collections import Counter

import numpy as np
import pytest

from llm_env import PromptSource, TextGenerationEnv
from llm_env.prompts import PromptCursor, PromptTable, read_jsonl, split_of
from llm_env.tasks.addition import AdditionProblems, addition


def table(prompts, tokenizer, limit=8, **kwargs):
    return PromptTable(prompts, tokenizer, limit, **kwargs)


class Letters(PromptSource):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"prompt": "abcdefgh"[index], "answer": index}


@pytest.mark.parametrize(
    "prompts", [["ab", "c"], [{"prompt": "ab"}, {"prompt": "c"}], ({"prompt": "ab", "x": 1}, {"prompt": "c", "x": 2})]
)
def test_lists_of_text_and_of_dicts(prompts, tokenizer):
    rows = table(prompts, tokenizer)
    assert rows.texts == ["ab", "c"]
    assert [ids.tolist() for ids in rows.ids] == [[3, 4], [5]]  # <eos>, <pad>, <unk>, a, b, c


def test_columns_of_a_source(tokenizer):
    rows = table(Letters(), tokenizer)
    assert len(rows) == 8 and rows.columns == ["answer"] and rows.column("answer", [2, 5]) == [2, 5]


def test_jsonl_keeps_unicode_line_separators(tmp_path, tokenizer):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b", "answer": 1}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_jsonl(path) == [{"prompt": "a\u2028b", "answer": 1}]
    assert table(str(path), tokenizer).columns == ["answer"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n\n{"prompt": "b"}\n', r"\.jsonl:2 is empty"),
        ('{"prompt": "a"}\n{"prompt": "b"\n', r"\.jsonl:2 is not valid JSON"),
        ('["a"]\n', r"\.jsonl:1 holds a list"),
        ("", "holds no rows"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', r"\.jsonl:2 is not UTF-8"),
    ],
)
def test_a_broken_jsonl_names_the_line(content, message, tmp_path, tokenizer):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        table(str(path), tokenizer)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n', encoding="utf-8-sig")
    assert read_jsonl(path) == [{"prompt": "a"}]


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "prompts is empty"),
        ("Once upon a time", ValueError, "neither a list nor the path"),
        (3, TypeError, "prompts is a int"),
        ([{"question": "a"}], ValueError, r"row 0 .*\['question'\].*neither 'prompt' nor 'messages'"),
        (["a", 3], TypeError, "row 1 of the prompts is a int"),
        (["a", ""], ValueError, "row 1 of the prompts is empty"),
        (["a", "abcdefgh0"], ValueError, "row 1 of the prompts has 9 tokens, more than max_prompt_tokens=8"),
        ([{"messages": [{"role": "user", "content": "a"}]}], ValueError, "row 0 holds chat messages.*no chat template"),
    ],
)
def test_bad_prompts_name_the_row(prompts, error, message, tokenizer):
    with pytest.raises(error, match=message):
        table(prompts, tokenizer)


def test_long_prompts_are_dropped_and_counted_when_asked(tokenizer, caplog):
    rows = table(["a", "abcdefgh0", "b"], tokenizer, long_prompts="drop")
    assert rows.texts == ["a", "b"] and rows.dropped == 1
    assert "dropped 1 of 3 prompts" in caplog.text


@pytest.mark.parametrize("key", ["messages", "prompt"])
def test_chats_go_through_the_template(key, tokenizer):
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}={% endfor %}"
    rows = table([{key: [{"role": "user", "content": "ab"}], "answer": 1}], tokenizer)
    assert rows.texts == ["ab="] and rows.ids[0].tolist() == tokenizer("ab=")["input_ids"]


def test_splits_are_disjoint_and_a_tenth():
    texts = [AdditionProblems()[i]["prompt"] for i in range(10_000)]
    test = {text for text in texts if split_of(text) == "test"}
    assert 900 < len(test) < 1100
    train_env, test_env = (TextGenerationEnv(**addition(split=split)) for split in ("train", "test"))
    assert set(test_env.rules.prompts.texts) == test
    assert set(train_env.rules.prompts.texts) == set(texts) - test


def test_a_cursor_visits_every_prompt_once_before_any_again():
    rng = np.random.default_rng(0)
    cursor = PromptCursor(7, lambda: rng)
    drawn = [cursor.next() for _ in range(21)]
    assert all(sorted(drawn[i : i + 7]) == list(range(7)) for i in (0, 7, 14))
    assert drawn[:7] != drawn[7:14]


def test_a_cursor_draws_every_order_equally_often():
    rng = np.random.default_rng(0)
    cursor = PromptCursor(3, lambda: rng)
    counts = Counter(tuple(cursor.next() for _ in range(3)) for _ in range(6000))
    assert len(counts) == 6
    assert all(abs(count - 1000) < 5 * (6000 / 6 * 5 / 6) ** 0.5 for count in counts.values())


def test_a_cursor_goes_on_from_its_state():
    rng = np.random.default_rng(0)
    cursor = PromptCursor(50, lambda: rng)
    for _ in range(20):
        cursor.next()
    state, rng_state = cursor.state_dict(), rng.bit_generator.state
    expected = [cursor.next() for _ in range(60)]
    other = np.random.default_rng(1)
    other.bit_generator.state = rng_state
    resumed = PromptCursor(50, lambda: other)
    resumed.load_state_dict(state)
    assert [resumed.next() for _ in range(60)] == expected
    with pytest.raises(ValueError, match="50 prompts, this env has 51"):
        PromptCursor(51, lambda: other).load_state_dict(state)
