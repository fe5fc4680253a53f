"""Extract the final answer of a completion, without its thoughts, as text or as an exact number."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import groupby
from typing import Any

# Every pattern must match in linear time: a policy that is trained on the result could write text that exploits backtracking.

Message = dict[str, Any]
Texts = Sequence[str | Sequence[Message]]  # one per row: text or chat messages
ThinkTags = Sequence[str] | Sequence[Sequence[str]]

THINK_TAGS = (  # opening and closing tag
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),  # gpt-oss
    ("<|channel>thought", "<channel|>"),  # Gemma 4
)
MOST_REPEATS = 10  # of one kind of answer mark; a text with more has no answer


def completion_text(completion: str | Sequence[Message]) -> str:
    """Return the text of a completion.

    A str is returned unchanged. For chat messages, this is the content of the last assistant message. Content may be a str,
    None (empty) or a list of parts; the texts of the parts are joined. A message without a role counts as the assistant's.
    Messages of other roles (user, tool) are ignored. Without an assistant message the text is empty.

    Raises:
        TypeError: If the completion is neither text nor a list of messages.

    >>> completion_text([{"role": "assistant", "content": "72"}, {"role": "tool", "content": "73"}])
    '72'
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, (list, tuple)) or not all(isinstance(message, dict) for message in completion):
        raise TypeError(f"completion={completion!r} must be a str or a list of messages with 'role' and 'content'"[:500])
    answers = [message for message in completion if message.get("role", "assistant") == "assistant"]
    content = answers[-1].get("content") if answers else ""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, (list, tuple)):
        raise TypeError(f"message content {content!r} must be a str, None or a list of parts"[:500])
    parts = (part if isinstance(part, str) else part.get("text") for part in content)
    return "".join(part for part in parts if isinstance(part, str))


def strip_thoughts(text: str, think_tags: ThinkTags = THINK_TAGS, in_thought: bool = False) -> str:
    """Remove the thoughts (reasoning between think tags) from a text.

    The result is the text after the last closing tag, up to the next opening tag. A closing tag without an opening tag also
    ends a thought, since a chat template may put the opening tag into the prompt. A thought that is not closed extends to the
    end of the text.

    Args:
        text: a completion.
        think_tags: (opening, closing) tag, or several such pairs. An empty opening tag means that every completion begins
            inside a thought. `()` removes nothing.
        in_thought: whether the text begins inside a thought. If so, a text without a closing tag is all thought.

    Raises:
        ValueError: If a tag pair is not two str, or its closing tag is empty.

    >>> strip_thoughts("<think>7? No, 3+5=8.</think> 8"), strip_thoughts("7? No.</think> 8"), strip_thoughts("<think>It is 8")
    (' 8', ' 8', '')
    >>> strip_thoughts("It is 7", think_tags=("", "</think>"))
    ''
    """
    pairs = _tag_pairs(think_tags)
    end = max((text.rfind(close) + len(close) for _, close in pairs if close in text), default=None)
    if end is None and (in_thought or any(not opening for opening, _ in pairs)):
        return ""
    text = text[end or 0 :]
    return text[: min((text.find(opening) for opening, _ in pairs if opening and opening in text), default=len(text))]


def _tag_pairs(think_tags: ThinkTags) -> list[tuple[str, str]]:
    pairs: list[Any] = [think_tags] if any(isinstance(tag, str) for tag in think_tags) else list(think_tags)
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(tag, str) for tag in pair) or not pair[1]:
            raise ValueError(f"think_tags={think_tags!r} must be (opening, closing) tag, or pairs of them; closing not empty")
    return [(opening, closing) for opening, closing in pairs]


def answer_text(
    completion: str | Sequence[Message],
    prompt: str | Sequence[Message] | None = None,
    think_tags: ThinkTags = THINK_TAGS,
) -> str:
    r"""Return the text of a completion without its thoughts.

    See `completion_text` and `strip_thoughts`.

    Args:
        completion: text or chat messages.
        prompt: text or chat messages. If it ends with an opening tag, the completion begins inside a thought.
        think_tags: (opening, closing) tag, or several such pairs.

    >>> answer_text("So it is 8.", prompt="<|im_start|>assistant\n<think>\n")
    ''
    """
    if not isinstance(prompt, str):
        prompt = completion_text(prompt[-1:]) if prompt else ""
    begun = tuple(opening for opening, _ in _tag_pairs(think_tags) if opening)
    return strip_thoughts(completion_text(completion), think_tags, in_thought=prompt.rstrip().endswith(begun))


def answer_texts(
    completions: Texts,
    prompts: Texts | None = None,
    think_tags: ThinkTags = THINK_TAGS,
    prompt_texts: Sequence[str] | None = None,
) -> list[str]:
    """Return the texts of B completions without their thoughts; see `answer_text`.

    Args:
        completions: B texts or lists of chat messages.
        prompts: B texts or lists of chat messages, or None.
        think_tags: (opening, closing) tag, or several such pairs.
        prompt_texts: B prompts as the model reads them. If given, they replace `prompts`, since a chat template may add the
            opening think tag.

    >>> answer_texts(["So it is 8."], [[{"role": "user", "content": "3+5"}]], prompt_texts=["<user>3+5<assistant><think>"])
    ['']
    """
    prompts = prompts if prompt_texts is None else prompt_texts
    rows = zip(completions, [None] * len(completions) if prompts is None else prompts, strict=True)
    return [answer_text(completion, prompt, think_tags) for completion, prompt in rows]


# --- answers as text --------------------------------------------------------------------------------------------------

_MARKS = {  # the content of a mark without a group is the rest of its line
    "####": re.compile(r"####\s*"),
    "tag": re.compile(r"<answer>([^<]*)</answer>"),
    "answer": re.compile(
        r"(?i:\banswer\b)[*_]*\s?(?:(?:to|for)\b[^.:=\n]{1,60}?\s)?(?:is\b|(?:would|should|must) be\b|:|=)(?!\s?not\b)[\s:*_]*"
    ),
    "A:": re.compile(r"^[ \t]*\**A\**:[\s*_]*", re.MULTILINE),
}
_BRACES = re.compile(r"\\(?:boxed|fbox)\s?\{|[{}]")


def _boxes(text: str) -> Iterator[tuple[int, int, str]]:
    r"""Yield start, end and content of every innermost `\boxed{...}` with closed braces."""
    opened: list[tuple[int, int, bool]] = []
    latest = -1
    for brace in _BRACES.finditer(text):
        if brace[0] != "}":
            opened.append((brace.start(), brace.end(), brace[0] != "{"))
        elif opened:
            start, begin, boxed = opened.pop()
            if boxed and start > latest:
                latest = start
                yield start, brace.end(), text[begin : brace.start()]


def _marked(text: str) -> list[tuple[str, str]]:
    """Return kind and content of every answer mark in text order; a mark ends where the next one begins."""
    found: list[tuple[int, int, str, str | None]] = [
        (match.start(), match.end(), kind, match[1] if mark.groups else None)
        for kind, mark in _MARKS.items()
        for match in mark.finditer(text)
    ]
    found += [(start, end, "boxed", content) for start, end, content in _boxes(text)]
    found.sort(key=lambda mark: mark[:3])
    ends = [*(start for start, *_ in found[1:]), len(text)]
    return [
        (kind, (text[begin:end].partition("\n")[0] if content is None else content).strip())
        for (_, begin, kind, content), end in zip(found, ends, strict=False)
    ]


def tagged_answer(text: str, think_tags: ThinkTags = THINK_TAGS) -> str:
    """Return the content of the last `<answer>...</answer>` outside of thoughts.

    Without such a tag, this is the whole text without thoughts. Leading and trailing white space is stripped.

    >>> tagged_answer("<think>1+2, or 2+1?</think> <answer> 1+2 </answer>"), tagged_answer(" 1+2 ")
    ('1+2', '1+2')
    """
    text = strip_thoughts(text, think_tags)
    before, closed, _ = text.rpartition("</answer>")
    _, opened, content = before.rpartition("<answer>")
    return (content if closed and opened else text).strip()


def final_answer(text: str, think_tags: ThinkTags = THINK_TAGS) -> str:
    r"""Return the final answer of a solution: the content of its last answer mark.

    Thoughts are removed first. Answer marks are `#### ...`, `\boxed{...}`, `<answer>...</answer>`, "answer is ...",
    "answer: ..." and a line "A: ...". Without an answer mark, the whole text is the answer.

    >>> final_answer("48/2 = 24 clips in May. 48+24 = 72.\n#### 72")
    '72'
    >>> final_answer("<think>The answer is 7?</think> 72 ")
    '72'
    """
    text = strip_thoughts(text, think_tags)
    marked = _marked(text)
    return marked[-1][1] if marked else text.strip()


# --- answers as numbers -----------------------------------------------------------------------------------------------

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"),  # hyphens, the figure and the en dash, minus signs
        **dict.fromkeys("\u00a0\u2009\u202f", " "),
        "\u2044": "/",
        "⋅": "·",
        "∙": "·",
        "⇒": "→",
    }
)
_FRACTIONS = dict(zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "1/2 1/3 2/3 1/4 3/4 1/5 2/5 3/5 4/5 1/6 5/6 1/8 3/8 5/8 7/8".split(), strict=True))
_SYMBOLS = {
    "times": "×", "cdot": "·", "div": "÷", "pm": "±", "mp": "±", "pi": "π", "sqrt": "√", "infty": "∞", "approx": "≈", "to": "→",
    "rightarrow": "→", "Rightarrow": "→", "implies": "→", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠",
    "in": "∈", "notin": "∉", "setminus": "\u2216", "cup": "\u222a", "cap": "∩",
}  # fmt: skip


def _follows_word(match: re.Match[str]) -> bool:
    return match.string[max(0, match.start() - 1) : match.start()].isalnum()


_UNIT = (  # of measures with two parts: 2 hours 30 minutes, 5 ft 3 in
    r"(?:(?:year|month|week|day|hour|hr|minute|min|second|sec|mile|yard|foot|feet|ft|inch(?:es)?|kilometer|meter|centimeter"
    r"|km|cm|mm|stone|pound|lb|ounce|oz|kilogram|gram|kg|dollar|cent|euro|degree)s?|[hms])(?![A-Za-z])\.?"
)
_LAST_UNIT = rf"(?:{_UNIT}|in(?![A-Za-z]))"
_MINUS_LEADS = r"-[\s~]{0,9}(?=[({$€£¥₹]{0,3}[.0-9])"  # a minus sign, possibly separated from its number
_BRACKETED_NUMBER: tuple[re.Pattern[str], Callable[[re.Match[str]], str]] = (  # -(5)
    re.compile(
        r"(?<![\w)%\]}])(?<![0-9)%]\s)-[({\[]\s{0,3}(?P<sign>-?)(?P<number>[$€£¥₹]?[0-9.][0-9.,/ ]*%?[A-Za-z ]{0,30})[)}\]]"
        r"(?!\s?[\^!])"
    ),
    lambda m: ("" if m["sign"] else "-") + m["number"],
)
_PLAIN: tuple[tuple[re.Pattern[str], Any], ...] = (
    (re.compile(f"[{''.join(_FRACTIONS)}]"), lambda m: " " * _follows_word(m) + _FRACTIONS[m[0]]),
    (re.compile(r"[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+"), lambda m: "^" + m[0].translate(_SUPERSCRIPTS)),
    (re.compile(r"\\\\(?=\s{1,9}\S|[-0-9])"), " & "),  # the end of a row
    (re.compile(r"\{-\}"), "-"),
    (re.compile(r"(\\[(\[]|(?<!\S)\${1,2})\s{0,9}-\s{1,9}(?=[0-9.({\\])"), r"\1-"),  # a formula that begins with a minus sign
    (re.compile(r"\\[!,]|\\(?=[$%])|\\(?:left|right)(?![A-Za-z])\.?"), ""),
    (re.compile(r"\\[;:>()\[\] ]|\\(?:displaystyle|textstyle|q?quad|therefore|because)(?![A-Za-z])"), " "),
    (re.compile(r"\\(?:text\w*|mathrm|mathbf|mbox)\s?\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[dtc]?frac\s?(?:\{([^{}]+)\}|([0-9]))\s?(?:\{([^{}]+)\}|([0-9]))"), r"\\frac{\1\2}{\3\4}"),
    (re.compile(r"(?<=[0-9]) ?\\frac\{([^{}]+)\}\{([^{}]+)\}"), r" \1/\2"),  # a mixed number
    (re.compile(r"\\frac\{([^{}]+)\}\{([^{}]+)\}"), r"\1/\2"),
    (re.compile(rf"\\({'|'.join(_SYMBOLS)})(?![A-Za-z])"), lambda m: _SYMBOLS[m[1]]),
    (re.compile(r"\^\s?(?:\{\s?\\circ\s?\}|\\circ(?![A-Za-z]))|\s?°"), " "),
    (re.compile(r"(?<=[A-Za-z])[ ]{0,2}\^(?:\{-?[0-9]+\}|-?[0-9]+)"), ""),  # the square of a unit
    (re.compile(r"(?<=[0-9])\*\*(?=-?[0-9])"), "^"),
    (re.compile(r"(?<=[0-9]):00(?![\w:])"), ""),  # on the hour
    (re.compile(r"\b(?i:minus|negative)\s(?=[0-9$€£.])"), "-"),
    (re.compile(r"=>"), "→"),
    (re.compile(r"[<>!]="), lambda m: {"<": "≤", ">": "≥", "!": "≠"}[m[0][0]]),
    (re.compile(rf"((?:=|→|->|≈|:|[({{]|\b(?:is|be|equals|or|and)\b)[ \t*_$({{]{{0,9}}){_MINUS_LEADS}"), r"\1-"),
    _BRACKETED_NUMBER,
    (re.compile(rf"([0-9]\s?{_UNIT}),\s(?=(?:and\s)?[0-9.]+\s?{_LAST_UNIT})"), r"\1 "),  # 2 years, 3 months
)

_DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
_EXPONENT = r" ?\^ ?(?:\{ ?(?P<{0}_braced>[-+]?[0-9]+) ?\}|(?P<{0}>[-+]?[0-9]+))"
_NUMBER = re.compile(
    r"(?:(?<![\w)%])(?<![0-9)%]\s)(?P<sign>[-+]))?"  # between two numbers it is an operator, not a sign
    r"(?P<money>[$€£¥₹]\s?(?P<inner_sign>-)?)?"
    rf"(?:(?P<whole>[0-9]+) (?=[0-9]+\s?/\s?[0-9]))?(?P<numerator>{_DIGITS})"
    r"(?:"
    r"[eE](?P<e>[-+]?[0-9]+)(?!\w)"
    rf"| ?[×·x*] ?10{_EXPONENT.replace('{0}', 'ten')}"
    rf"|{_EXPONENT.replace('{0}', 'power')}"
    rf"|\s?/\s?(?P<denominator>{_DIGITS})"
    r")?"
    r"(?P<scales>(?:(?:[ ]{0,4}|-)(?i:hundred|thousand|million|billion|trillion)s?\b){1,2})?"
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
LARGEST_EXPONENT = 1000  # of a number in scientific notation, and of a power
LONGEST_POWER = 4300  # digits

_VARIABLE = r"(?:[xyz]{1,3}|[ne]|a[bc]|bc|abc|[α-ω]|i(?!\s[a-z]))(?!\w|-[A-Za-z]{2})"  # not "5 x-rays"
_FUNCTION = r"(?:log|ln|lg|exp|sin|cos|tan|sec|csc|cot|sinh|cosh|tanh|arcsin|arccos|arctan|sqrt|cbrt|mod)"
_GOES_ON = re.compile(  # text after a number that shows it to be part of a larger expression
    r"!|:[0-9]|\s:\s?[0-9]|,[0-9]|,\s?[-+]?∞|\.[0-9]|\.\\[a-z]"
    r"|[a-fijknopqrtuvwxyzBDEGHIJKMNOPQRSTUXYZ](?![A-Za-z])"  # 2n, but not the units in 5 m, g, s, h, l, L, A, C, F, V, W
    r"|\((?=[-0-9a-zπ√])(?![a-z]{3})"
    r"|[-+]a(?!\w)"
    rf"|\s?{_UNIT}(?:[, ]{{1,2}}(?:and )?|(?<=[hms]))[0-9]+(?:\.[0-9]+)?\s?{_LAST_UNIT}"
    r"|[)\]}%*_\"'`$| ]{0,6}(?:"
    r"\{?[0-9]|[-+]\s?[-($\[{]{0,2}[0-9.√π]|[-+]\s?[b-hj-zB-HJ-Z](?![A-Za-z])|[-+]\s?i(?!['\w]|\s[a-z])|\\\}"
    rf"|{_VARIABLE}|pi(?!\w)|{_FUNCTION}(?:_\{{?[0-9]+\}}?)?\s?[({{]?(?:[0-9√π\\]|[A-Za-z](?![A-Za-z]))|[×÷·√π∞^±&∑∫≤≥≠]"
    rf"|/\s?[-(\[]?(?:[0-9√π(\\]|{_VARIABLE})"
    r"|[<>](?:\s|[-0-9])"
    r"|(?:times|over|to|through|x|choose|divided by|multiplied by)\s[-$(]?[0-9]"
    r"|(?:squared|cubed|factorial|to the power|plus|minus)\b"
    r"|\\\\\s*\S"
    r"|\\(?!(?:checkmark|blacksquare|square|qed|dots|ldots|cdots|hline|end|text|rm|bf)"
    r"(?![A-Za-z]))[A-Za-z]"
    r")"
    r"|\)\s?\(|\s?[A-Za-z]+\s?[-+×÷*]\s?[$(]?[0-9]"  # 5 apples + 3 apples
)
_LEADS_IN = re.compile(  # text before a number that shows it to be part of a larger expression
    r"(?:"
    r"\S\s?[+/×÷·][ \t($\[{]*|(?:[0-9)%\]}$]|(?<![A-Za-z])[A-Za-z])\s?[+/×÷·][\s($\[{]*|&\s*"
    r"|[√∛±∑∫^|≤≥≠][\s($\[{]*(?<![|]\s)"
    r"|[0-9]:|∞,\s?|[0-9)%}]\s?-\s?[($]*|(?<![A-Za-z])[A-Za-z]\s?-\s?[($]*"
    r"|[0-9)%}](?:\s?\*\s|\*{1,2})[($]*|[A-Za-z]\*[($]*"
    r"|[\w)]\s?<\s?|[\w)][ \t]>\s?|\A[\s*_$({\[]{0,9}[<>][\s*_$({\[]{0,9}|(?<![<\w/])[A-Za-z]>\s?"
    rf"|(?<![A-Za-z]){_FUNCTION}(?:_?\{{?[0-9]*\}}?)?[ ]?[({{]*[ ]?|\b(?:root|factorial|logarithm|square|cube) of\s[($]*"
    r"|[∈∉\u2216\u222a∩\u211d\u2124\u211a\u2115][\s({\[]{0,5}|\bin\s?[({\[]{1,2}\s?|\\\{\s?|[0-9],|-[({\[]{1,3}\s?"
    r"|\}\{|[A-Za-z]\(|[0-9]\s(?:or|x|times|plus|minus|over|choose|divided by|multiplied by)\s[$(]*"
    r"|\bbetween\s(?:[$0-9.,]{1,20}\sand\s)?[$(]*"
    r"|\\(?!(?:boxed|fbox|mathbf|bm|boldsymbol|underline|emph)"
    r"(?![A-Za-z]))[A-Za-z]{1,20}\s?[{(\[]{0,2}\s?"
    r")\Z"
)
_SECOND_PART = (re.compile(rf"[0-9]\s?{_UNIT}[, ]{{1,2}}(?:and\s)?\Z"), re.compile(rf"\s?{_LAST_UNIT}"))  # text before, after
_NEGATED = re.compile(
    r"(?:\bnot|n't|n\u2019t)\s(?:(?:equal to|exactly|just|simply|actually)\s)?(?:[A-Za-z]\s?[=≠]\s?)?[$(*_\s]{0,5}\Z",
    re.IGNORECASE,
)
_DENIES = re.compile(r"[\s*_$({\[]*(?:no(?!\.\s?[0-9])|none|not|never|neither|undefined|impossible)\b", re.IGNORECASE)
_CONTEXT = 40  # number of characters before a number that are searched
_PART_OF_WORD = re.compile(r"[A-Za-z_][-_{]?\Z|[A-Za-z]_\{\Z")  # CO2, x_1, covid-19

_END_OF_CLAUSE = re.compile(r"[.,;]\s|\bbecause\b|\bsince\b")
_EXPLANATION = re.compile(
    r"\b(?:where|given|when|if|i\.e)\b|\b(?:for|at|with)\s(?=\$?[A-Za-z]\s?=)"
    r"|\bas\s(?=\$?(?:[0-9.,]{1,20}\s?[-+*/×÷]|[A-Za-z]\s?=))"
)
_EXPLANATION_OF_FIRST = re.compile(rf":\s|\bwhich\b|{_EXPLANATION.pattern}")  # for a number without words before it
_RESULT = re.compile(r"=|→|->")
_OR = re.compile(r"\bor\s(?=(?:[A-Za-z]\s?=\s?)?[-$]{0,2}[.0-9])")
_NAME = r"(?:[A-Z]{2,3}|[A-Za-z](?:_\{?\w{1,9}\}?)?)"
_ASSIGNED = re.compile(rf"(?<![A-Za-z\\=])(?<!=\s)({_NAME})\s?=")
_NAMED = re.compile(
    r"(?<![\w\\(])[A-Za-z]{1,3}(?:_\{?\w{1,9}\}?)?(?:\(\w\))?'?\s?=(?=\s?[-+$({]{0,3}\s?[.0-9])"
)  # x = 5, f(3) = 7
_BRACKETED = re.compile(r"[(\[{]([^()\[\]{}]*)[)\]}]")
_LEADING_MINUS = re.compile(rf"\A([\s*_$({{\[]{{0,9}}){_MINUS_LEADS}")
_ASIDE = re.compile(r"(?<=[\w%$}*])\s\([^()]*\)|(?<=[\w%$}*])\s\[[^\[\]]*\]")
_WORDING = re.compile(r"[^\W\d_]|[=≈→>]")


def parse_number(text: str, think_tags: ThinkTags = THINK_TAGS) -> Fraction | None:
    r"""Parse the exact number that a text gives as its answer.

    Thoughts are removed first (see `strip_thoughts`). The answer is the content of the last answer mark (see `final_answer`).
    From this content the first clause is read, without explanations in parentheses or after "as", "where" and the like. If the
    clause has an equals sign, the right side is read. In a text without an answer mark, the last number is the answer.

    These forms are accepted:

    - integers and decimals, with or without thousands commas
    - fractions and mixed numbers (`3 1/2`, `3½`)
    - scientific notation (`1e-05`, `1.5E+10`, `3 \times 10^8`, `3 × 10⁸`) and powers of a number (`10^6`)
    - scales ("5 million") and percent ("50%" is 50)
    - a sign (hyphen, minus, en dash, "negative")
    - money and units ("$18", "72 clips", "5 km/h", "20 cm^2")
    - the LaTeX of these (`\frac12`, `\dfrac{1}{2}`, `1{,}072`, `\text{...}`)

    None is returned for an expression of which a number is only a part: `2\sqrt{3}`, `3\pi`, `2x`, `x^2+1`, `5!`, `log 5`, a
    calculation without a result (`3+4`), a range (`10–15`), a ratio or a time (`3:30`).

    None is also returned for a text with several answers: only numbers ("71, 72"), different numbers joined by "or", one kind
    of mark whose value changes more than once, or one kind of mark that occurs more than ten times. Repeats of the same value
    count as one answer.

    >>> parse_number("It costs $1,234.50."), parse_number("-3/4"), parse_number("3 1/2 cups"), parse_number("none")
    (Fraction(2469, 2), Fraction(-3, 4), Fraction(7, 2), None)
    >>> parse_number("**Answer:** 72, which is 3 more than 69."), parse_number(r"\boxed{\$1{,}072 \text{ a day}}")
    (Fraction(72, 1), Fraction(1072, 1))
    >>> parse_number(r"<think>7? 8?</think> So \boxed{8}. Check: \boxed{8.0}.")
    Fraction(8, 1)
    >>> parse_number("1e-05"), parse_number(r"\boxed{2\sqrt{3}}")
    (Fraction(1, 100000), None)
    >>> parse_number("71 72 73") is None
    True
    """
    text = strip_thoughts(text, think_tags)
    text = _plain(text)
    marked = [(kind, content) for kind, content in _marked(text) if not _is_heading(kind, content)]
    if not marked:
        return _last_number(text)
    answers: dict[str, list[Fraction | None]] = {}  # by kind of mark, the last first
    for kind, content in reversed(marked):
        if values := _marked_values(kind, content):
            answers.setdefault(kind, []).append(values[0] if len(values) == 1 else None)
            if len(answers[kind]) > MOST_REPEATS:
                return None
    if any(sum(1 for _ in groupby(repeats)) > 2 for repeats in answers.values()):
        return None
    return next((repeats[0] for repeats in answers.values()), None)  # the first key is the kind of the last mark


def reference_text(reference: Any) -> str:
    """Convert a reference answer to text.

    Raises:
        ValueError: If the reference is a number with more digits than Python converts to text.

    >>> from decimal import Decimal
    >>> reference_text(Decimal("0.50")), reference_text(72), reference_text("#### 72")
    ('0.50', '72', '#### 72')
    """
    try:
        return str(reference)
    except ValueError as error:
        raise ValueError(
            f"the column 'answer' holds a number ({type(reference).__name__}) of more than {sys.get_int_max_str_digits()} "
            "digits, which Python does not convert to text; use a smaller number, or text with exact_match"
        ) from error


def parse_gold(reference: Any, think_tags: ThinkTags = THINK_TAGS) -> Fraction | None:
    """Parse the exact number that a reference gives as its answer; see `parse_number`.

    A reference has no Markdown bullets, so a minus at its start is a sign ("- 5" is -5).

    Raises:
        ValueError: If the reference is a number with more digits than Python converts to text.

    >>> parse_gold("- 5"), parse_gold(0.5), parse_gold("48 + 24 = 72 #### 72")
    (Fraction(-5, 1), Fraction(1, 2), Fraction(72, 1))
    """
    text = _plain(strip_thoughts(reference_text(reference), think_tags)).strip()
    return parse_number(_with_sign(text), ())


def parse_number_only(text: str) -> Fraction | None:
    r"""Parse a text that is one number without a unit; return None for other texts.

    >>> parse_number_only(r"- \frac{1}{2}"), parse_number_only("1,072"), parse_number_only("5 m"), parse_number_only("x = 5")
    (Fraction(-1, 2), Fraction(1072, 1), None, None)
    """
    number = None if ":" in text or "%" in text else _NUMBER.fullmatch(_with_sign(_plain(text).strip()))
    return _value(number) if number else None


def _plain(text: str) -> str:
    """Replace LaTeX and typographic variants with plain text; idempotent."""
    text = text.translate(_CHARACTERS)
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    return text


def _with_sign(content: str) -> str:
    """Join a minus sign at the start of the content to its number."""
    return _BRACKETED_NUMBER[0].sub(_BRACKETED_NUMBER[1], _LEADING_MINUS.sub(r"\1-", content, count=1))


def _is_heading(kind: str, content: str) -> bool:
    """Return whether `#### ...` is a Markdown heading ("#### Step 1", "#### 2. The rest"), not an answer."""
    return kind == "####" and (content.lstrip("*_$ ")[:1].isalpha() or re.match(r"\**[0-9]+[.)]\s+\S", content) is not None)


def _marked_values(kind: str, content: str) -> list[Fraction | None]:
    """Return the distinct values in a mark's content.

    A value is None if it is not a number. The list is empty if the content is not about numbers.
    """
    content = _with_sign(content)
    if kind == "answer":  # an exclamation mark at the end of the sentence is not a factorial
        content = re.sub(r"!+(?=[\s*_]*$|[*_]*\s+[A-Z])", ".", content)
    stated = _ASIDE.sub(lambda aside: aside[0] if _NUMBER.fullmatch(aside[0][2:-1].strip()) else "", content)
    if not _NUMBER.search(stated):
        stated = content
    if _lists_numbers(stated) or _lists_numbers(_NAMED.sub(" ", stated)) or _DENIES.match(stated) or any(_tuples(stated)):
        return [None] if _NUMBER.search(stated) or kind in ("boxed", "tag") else []
    clause = _END_OF_CLAUSE.split(stated, maxsplit=1)[0]
    first = next(_numbers(clause), None)
    if first is None:
        return [None] if kind in ("boxed", "tag") and content else []
    leads = re.search(r"[A-Za-z]{2}", clause[: first.start()]) is None
    explanation = (_EXPLANATION_OF_FIRST if leads else _EXPLANATION).search(clause, first.end())
    if explanation:
        clause = clause[: explanation.start()]
    if "∞" in stated or len(set(_ASSIGNED.findall(stated if kind == "boxed" else clause))) > 1:
        return [None]
    return list(dict.fromkeys(_value_in(part) for part in _OR.split(clause) if next(_numbers(part), None)))


def _value_in(clause: str) -> Fraction | None:
    """Return the value of the last side of an equation that contains a number.

    A number before "≈" is exact and takes precedence over the rounded number after it.
    """
    for side in reversed(_RESULT.split(clause)):
        sides = [number for number in (next(_numbers(part), None) for part in side.split("≈")) if number]
        if sides:
            return next((value for value in map(_value, sides) if value is not None), None)
    return None


def _tuples(text: str) -> Iterator[re.Match[str]]:
    """Yield the brackets in a text that contain several separated numbers: (1, 2) or [1;2]."""
    for bracketed in _BRACKETED.finditer(text):
        content = bracketed[1].rstrip("\\ ").lstrip()
        parts = re.split(r"\s?[,;]\s?", content)
        if len(parts) > 1 and not _NUMBER.fullmatch(content) and all(_NUMBER.fullmatch(part) for part in parts):
            yield bracketed


def _lists_numbers(text: str) -> bool:
    """Return whether a text consists of several numbers only.

    Such a text has no word except "or" and "and", and no calculation with a result.
    """
    rest, count = _NUMBER.subn(" ", text)
    return count > 1 and _WORDING.search(re.sub(r"\b(?:or|and)\b", " ", rest)) is None


def _last_number(text: str) -> Fraction | None:
    """Return the value of the last number of a text without answer marks."""
    stated = _ASIDE.sub("", text)
    if _lists_numbers(text) or _lists_numbers(_NAMED.sub(" ", stated)):
        return None
    for part in (stated, text):
        last = None
        for number in _numbers(part):
            if not _is_negated(number):
                last = number
        if last:
            return None if any(start < last.start() < end for start, end in map(re.Match.span, _tuples(part))) else _value(last)
    return None


def _is_negated(number: re.Match[str]) -> bool:
    """Return whether the text says that the answer is not this number ("it is not 5")."""
    return _NEGATED.search(number.string, max(0, number.start() - _CONTEXT), number.start()) is not None


def _numbers(text: str) -> Iterator[re.Match[str]]:
    """Yield the numbers in a text, except digits in a word (CO2) or a name (x_1)."""
    for number in _NUMBER.finditer(text):
        begin = number.start()
        if number["money"] or number["sign"] or not _PART_OF_WORD.search(text, max(0, begin - 3), begin):
            yield number


def _value(number: re.Match[str]) -> Fraction | None:
    """Return the exact value of a number, or None if it is part of an expression or too large."""
    text, begin = number.string, number.start()
    context = max(0, begin - _CONTEXT), begin
    if _GOES_ON.match(text, number.end()) or _LEADS_IN.search(text, *context) or _is_negated(number):
        return None
    if _SECOND_PART[0].search(text, *context) and _SECOND_PART[1].match(text, number.end()):
        return None
    part = {name: (digits or "").replace(",", "") for name, digits in number.groupdict().items()}
    exponent = part["e"] or part["ten"] or part["ten_braced"] or part["power"] or part["power_braced"] or "0"
    if len(exponent) > 5 or abs(int(exponent)) > LARGEST_EXPONENT:
        return None
    is_power = bool(part["power"] or part["power_braced"])
    if is_power and len(part["numerator"]) * abs(int(exponent)) > LONGEST_POWER:
        return None
    try:
        value = Fraction(part["numerator"]) / Fraction(part["denominator"] or 1)
        value = value ** int(exponent) if is_power else value * Fraction(10) ** int(exponent)
        whole = int(part["whole"] or 0)
    except (ZeroDivisionError, ValueError):  # Python raises ValueError for integers with thousands of digits
        return None
    if part["whole"]:
        if value >= 1:  # "2 40/4" is two numbers, not a mixed number
            return None
        value += whole
    for scale in re.findall("|".join(_SCALES), part["scales"].lower()):
        value *= 10 ** _SCALES[scale]
    return -value if "-" in (part["sign"], part["inner_sign"]) else value
