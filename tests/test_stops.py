"""Stop strings over real kinds of tokenizers: special tokens by id, spaces that decoders swallow, texts that cannot be."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm_env import TextGenerationEnv
from llm_env.stops import can_be_written
from tests.chats import BOS, END, START, ids_of, make_chat_tokenizer


def length(completions, **kwargs):
    return [float(len(c)) for c in completions]


def ends_at(stop, tokens, tokenizer):
    """The number of the token that terminates the episode, or None; and the completion."""
    env = TextGenerationEnv(["a"], length, tokenizer, stop=stop, max_new_tokens=len(tokens) + 1)
    env.reset(seed=0)
    for i, token in enumerate(tokens):
        _, _, terminated, _, info = env.step(token)
        if terminated:
            return i, info["completion"]
    return None, None


CASES = [
    ("<|im_end|>", [*ids_of("hi"), END], (2, "hi")),
    (["zz", "<|im_end|>"], [*ids_of("hi"), END], (2, "hi")),
    ("<|im_end|>\n", [*ids_of("hi"), END, *ids_of("x")], (None, None)),
    ("<|im_end|>\n", [*ids_of("hi"), END, *ids_of("\nx")], (3, "hi\n")),
    ("a<|im_start|>b", [*ids_of("ba"), START, *ids_of("bc")], (3, "bab")),
    ("<|im_end|><|im_start|>", [END, BOS, START], (2, "")),
    # Plain characters that look like the special token are not it.
    ("<|im_end|>", [token for c in "<|im_end|>" for token in ids_of(c)], (None, None)),
    # A special token that no stop string has is nothing between two characters.
    ("ab", [*ids_of("a"), START, *ids_of("b")], (2, "ab")),
    ("é", ids_of("é"), (1, "é")),
    (" x", ids_of(" x"), (1, " x")),
]


@pytest.mark.parametrize(("stop", "tokens", "expected"), CASES)
def test_special_tokens_match_by_id(stop, tokens, expected):
    assert ends_at(stop, tokens, make_chat_tokenizer()) == expected


def sentencepiece_like():
    """Words with a mark for the space before them, which the decoder takes from the first one, as Llama's does."""
    words = ["<eos>", "<unk>", "a", "\u2581a", "\u2581stop", "stop", "\u2581go", "s", "t", "o", "p", "\u2581"]
    inner = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=1))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("stop", "words", "expected"),
    [
        (" stop", ["\u2581stop"], (0, "stop")),  # first of the response: its space is not in the completion
        (" stop", ["\u2581go", "\u2581stop"], (1, "go stop")),
        (" stop", ["\u2581go", "stop", "\u2581go"], (None, None)),
        ("stop", ["\u2581go", "stop"], (1, "gostop")),
        (" go stop", ["\u2581go", "\u2581stop"], (1, "go stop")),
        (" stop", ["\u2581go"] * 40 + ["\u2581stop"], (40, "go " * 40 + "stop")),
    ],
)
def test_the_space_before_a_word_counts_where_decoders_swallow_it(stop, words, expected):
    tokenizer = sentencepiece_like()
    assert tokenizer.decode(tokenizer.convert_tokens_to_ids(["\u2581stop"])) == "stop"
    assert ends_at(stop, tokenizer.convert_tokens_to_ids(words), tokenizer) == expected


def test_a_stop_string_that_cannot_appear_is_refused(tokenizer):
    for stop in ("z", ["a", "aZ"], "a\n"):
        with pytest.raises(
            ValueError, match=r"the stop string '.*' can never appear: no tokens of the tokenizer make the text"
        ):
            TextGenerationEnv(["a"], length, tokenizer, stop=stop)
    TextGenerationEnv(["a"], length, tokenizer, stop=["a", "hgfedc", "<eos>"])
    TextGenerationEnv(["a"], length, make_chat_tokenizer(), stop=["z", "a\u0301\U0001f600", "\u4e2d"])  # bytes can be all


def test_what_comes_after_an_end_token_never_comes():
    with pytest.raises(ValueError, match=r"can never appear: an episode ends at its end token '<eos>'"):
        ends_at("<eos>\nUser:", ids_of("a"), make_chat_tokenizer())
    assert ends_at("a<eos>", [*ids_of("a"), 0], make_chat_tokenizer())[0] == 1


def test_what_can_be_written_is_found_by_hand():
    for text, pieces, possible in (
        ("ab", ["a", "b"], True),
        ("ab", ["a", " b"], False),
        ("ab", ["xa", "by"], True),
        ("abc", ["ab", "bc"], False),
        ("abc", ["ab", "ca"], True),
        ("abcd", ["a", "bc", "d"], True),
        ("abcd", ["a", "bc"], False),
        ("aab", ["a", "ab"], True),
        ("b", ["abc"], True),
        ("b", [""], False),
    ):
        assert can_be_written(text, pieces) == possible, text


def test_words_that_are_joined_by_spaces_make_no_other_text():
    vocabulary = {token: i for i, token in enumerate(["<eos>", "a", "b", "ab"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    assert tokenizer.decode([1, 2]) == "a b"
    assert ends_at("b a", [2, 1], tokenizer)[0] == 1 and ends_at(["ab"], [1, 2, 3], tokenizer)[0] == 2
    with pytest.raises(ValueError, match="can never appear"):
        ends_at("ba", [2, 1], tokenizer)


def test_the_real_stories_model_swallows_spaces(stories):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    (once,) = tokenizer.convert_tokens_to_ids(["\u2581Once"])
    assert tokenizer.decode([once]) == "Once"
    assert ends_at(" Once", [once], tokenizer)[0] == 0
