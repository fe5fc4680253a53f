"""Read the final answer of a completion: without its thoughts, as text or as an exact number."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import groupby
from typing import Any

# Every pattern here is linear in the length of the text: it was written by a policy that is paid for the result.

Message = dict[str, Any]
Texts = Sequence[str | Sequence[Message]]  # one a row: text, or chat messages
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
MOST_REPEATS = 10  # of one kind of answer mark; more is no solution


def completion_text(completion: str | Sequence[Message]) -> str:
    """Return the text of a completion: a str as it is, of chat messages the content of the last assistant message.

    Content may be a str, None (empty) or a list of parts, of which those with text count. A message without a role is the
    assistant's. Messages of other roles (user, tool) are never read. Without an assistant message the text is empty.

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
    """Return what a text says outside its thoughts: what follows the last closing tag, up to a tag that opens another.

    A chat template may put the opening tag into the prompt, so a closing tag alone ends a thought, too. A thought that is not
    closed reaches to the end of the text.

    Args:
        text: a completion.
        think_tags: (opening, closing) tag, or several such pairs; an empty opening tag says that every completion begins
            inside a thought. `()` for texts without thoughts.
        in_thought: the text begins inside a thought: without a closing tag, all of it is thought.

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
    r"""Return the text of a completion (see `completion_text`) outside its thoughts (see `strip_thoughts`).

    Args:
        completion: text or chat messages.
        prompt: text or chat messages; where it ends in an opening tag, the completion begins inside a thought.
        think_tags: (opening, closing) tag, or several such pairs.

    >>> answer_text("So it is 8.", prompt="<|im_start|>assistant\n<think>\n")
    ''
    """
    if not isinstance(prompt, str):
        prompt = completion_text(prompt[-1:]) if prompt else ""
    begun = tuple(opening for opening, _ in _tag_pairs(think_tags) if opening)
    return strip_thoughts(completion_text(completion), think_tags, in_thought=prompt.rstrip().endswith(begun))


def answer_texts(completions: Texts, prompts: Texts | None = None, think_tags: ThinkTags = THINK_TAGS) -> list[str]:
    """Return `answer_text` of B completions, each with its prompt where `prompts` are given."""
    rows = zip(completions, [None] * len(completions) if prompts is None else prompts, strict=True)
    return [answer_text(completion, prompt, think_tags) for completion, prompt in rows]


# --- answers as text --------------------------------------------------------------------------------------------------

_MARKS = {  # one that has no group marks the rest of its line
    "####": re.compile(r"####\s*"),
    "tag": re.compile(r"<answer>([^<]*)</answer>"),
    "answer": re.compile(
        r"(?i:\banswer\b)[*_]*\s?(?:(?:to|for)\b[^.:=\n]{1,60}?\s)?(?:is\b|(?:would|should|must) be\b|:|=)(?!\s?not\b)[\s:*_]*"
    ),
    "A:": re.compile(r"^[ \t]*\**A\**:[\s*_]*", re.MULTILINE),
}
_BRACES = re.compile(r"\\(?:boxed|fbox)\s?\{|[{}]")


def _boxes(text: str) -> Iterator[tuple[int, int, str]]:
    r"""Start, end and content of every `\boxed{...}` whose braces are closed and that has no other inside."""
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
    """Every answer mark's kind and content, in the order of the text; where one mark ends another begins."""
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
    """Return the content of the last `<answer>...</answer>`, or all of the text where there is none, without thoughts.

    White space around it is stripped.

    >>> tagged_answer("<think>1+2, or 2+1?</think> <answer> 1+2 </answer>"), tagged_answer(" 1+2 ")
    ('1+2', '1+2')
    """
    text = strip_thoughts(text, think_tags)
    before, closed, _ = text.rpartition("</answer>")
    _, opened, content = before.rpartition("<answer>")
    return (content if closed and opened else text).strip()


def final_answer(text: str, think_tags: ThinkTags = THINK_TAGS) -> str:
    r"""Return the final answer of a solution: the content of its last answer mark, or all of it, without thoughts.

    Marks are `#### ...`, `\boxed{...}`, `<answer>...</answer>`, "answer is ...", "answer: ..." and a line "A: ...".

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
        **{
            character: f" {fraction}"
            for character, fraction in zip(
                "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "1/2 1/3 2/3 1/4 3/4 1/5 2/5 3/5 4/5 1/6 5/6 1/8 3/8 5/8 7/8".split(), strict=True
            )
        },
        "\u2044": "/",
        "⋅": "·",
        "∙": "·",
        "⇒": "→",
    }
)
_SYMBOLS = {
    "times": "×", "cdot": "·", "div": "÷", "pm": "±", "mp": "±", "pi": "π", "sqrt": "√", "infty": "∞", "approx": "≈", "to": "→",
    "rightarrow": "→", "Rightarrow": "→", "implies": "→", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠",
}  # fmt: skip
_PLAIN = (
    (re.compile(r"[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+"), lambda m: "^" + m[0].translate(_SUPERSCRIPTS)),
    (re.compile(r"\\\\(?=\s{1,9}\S|[-0-9])"), " & "),  # the end of a row
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
)

_DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
_EXPONENT = r" ?\^ ?(?:\{ ?(?P<{0}_braced>[-+]?[0-9]+) ?\}|(?P<{0}>[-+]?[0-9]+))"
_NUMBER = re.compile(
    r"(?:(?<![\w)%])(?<![0-9)%]\s)(?P<sign>[-+]))?"  # between two numbers it is no sign
    r"(?P<money>[$€£¥₹]\s?(?P<inner_sign>-)?)?"
    rf"(?:(?P<whole>[0-9]+) (?=[0-9]+\s?/\s?[0-9]))?(?P<numerator>{_DIGITS})"
    r"(?:"
    r"[eE](?P<e>[-+]?[0-9]+)(?!\w)"
    rf"| ?[×·x*] ?10{_EXPONENT.replace('{0}', 'ten')}"
    rf"|{_EXPONENT.replace('{0}', 'power')}"
    rf"|\s?/\s?(?P<denominator>{_DIGITS})"
    r")?"
    r"(?: (?P<scale>hundred|thousand|million|billion|trillion)s?\b)?"
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
LARGEST_EXPONENT = 1000  # of a number in scientific notation, and of a power
LONGEST_POWER = 4300  # digits

_VARIABLE = r"(?:[xyz]{1,3}|[ne]|a[bc]|bc|abc|[α-ω])(?!\w|-[A-Za-z]{2})"  # but 5 x-rays
_FUNCTION = r"(?:log|ln|lg|exp|sin|cos|tan|sec|csc|cot|sinh|cosh|tanh|arcsin|arccos|arctan|sqrt|cbrt|mod)"
_GOES_ON = re.compile(  # what follows a number that is only a part of something
    r"!|:[0-9]|\s:\s?[0-9]|,[0-9]|,\s?[-+]?∞|\.[0-9]|\.\\[a-z]"
    r"|[a-fijknopqrtuvwxyzBDEGHIJKMNOPQRSTUXYZ](?![A-Za-z])"  # 2n; but 5 m, g, s, h, l, L, A, C, F, V, W
    r"|\((?=[-0-9a-zπ√])(?![a-z]{3})"
    r"|[)\]}%*_\"'`$| ]{0,6}(?:"
    r"\{?[0-9]|[-+]\s?[-($\[{]{0,2}[0-9.√π]|[-+]\s?[b-hj-zB-HJ-Z](?![A-Za-z])"
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
_LEADS_IN = re.compile(  # what precedes such a number
    r"(?:"
    r"\S\s?[+/×÷·][\s($\[{]*|&\s*"
    r"|[√∛±∑∫^|≤≥≠][\s($\[{]*(?<![|]\s)"
    r"|[0-9]:|∞,\s?|[0-9)%}]\s?-\s?[($]*|(?<![A-Za-z])[A-Za-z]\s?-\s?[($]*"
    r"|[0-9)%}](?:\s?\*\s|\*{1,2})[($]*|[A-Za-z]\*[($]*"
    r"|[\w)]\s?<\s?|[\w)]\s>\s?|(?<![<\w/])[A-Za-z]>\s?"
    rf"|(?<![A-Za-z]){_FUNCTION}(?:_?\{{?[0-9]*\}}?)?\s?[({{]*\s?|\b(?:root|factorial|logarithm|square|cube) of\s[($]*"
    r"|\}\{|[A-Za-z]\(|[0-9]\s(?:or|x|times|plus|minus|over|choose|divided by|multiplied by)\s[$(]*"
    r"|\bbetween\s(?:[$0-9.,]{1,20}\sand\s)?[$(]*"
    r"|\\(?!(?:boxed|fbox|mathbf|bm|boldsymbol|underline|emph)"
    r"(?![A-Za-z]))[A-Za-z]{1,20}\s?[{(\[]{0,2}\s?"
    r")$"
)
_CONTEXT = 40  # characters before a number that are looked at
_PART_OF_WORD = re.compile(r"[A-Za-z_][-_{]?$|[A-Za-z]_\{$")  # CO2, x_1, covid-19

_END_OF_CLAUSE = re.compile(r"[.,;]\s|\bbecause\b|\bsince\b")
_EXPLANATION = re.compile(
    r"\b(?:where|given|when|if|i\.e)\b|\b(?:for|at|with)\s(?=\$?[A-Za-z]\s?=)"
    r"|\bas\s(?=\$?(?:[0-9.,]{1,20}\s?[-+*/×÷]|[A-Za-z]\s?=))"
)
_EXPLANATION_OF_FIRST = re.compile(rf":\s|\bwhich\b|{_EXPLANATION.pattern}")  # of a number that nothing is said before
_RESULT = re.compile(r"=|→|->")
_OR = re.compile(r"\bor\s(?=(?:[A-Za-z]\s?=\s?)?[-$]{0,2}[.0-9])")
_ASSIGNED = re.compile(r"(?<![A-Za-z\\])([A-Za-z])\s?=")
_ASIDE = re.compile(r"(?<=[\w%$}*])\s\([^()]*\)|(?<=[\w%$}*])\s\[[^\[\]]*\]")
_WORDING = re.compile(r"[^\W\d_]|[=≈→>]")


def parse_number(text: str, think_tags: ThinkTags = THINK_TAGS) -> Fraction | None:
    r"""Return the number that a text answers with, exactly; or None.

    Thoughts are removed first (see `strip_thoughts`). The answer is the content of the last answer mark (see `final_answer`):
    its first clause, without explanations in parentheses or after "as", "where", ..., on the right of an equals sign. In a
    text without a mark it is the last number.

    Read are integers and decimals with thousands commas, fractions, mixed numbers (`3 1/2`, `3½`), scientific notation
    (`1e-05`, `1.5E+10`, `3 \times 10^8`, `3 × 10⁸`), powers of a number (`10^6`), scales ("5 million"), percent ("50%" is 50),
    a sign (hyphen, minus, en dash, "negative"), money and units ("$18", "72 clips", "5 km/h", "20 cm^2"), and their LaTeX
    (`\frac12`, `\dfrac{1}{2}`, `1{,}072`, `\text{...}`).

    None is returned for what merely contains a number: `2\sqrt{3}`, `3\pi`, `2x`, `x^2+1`, `5!`, `log 5`, a calculation without
    result (`3+4`), a range (`10–15`), a ratio or time (`3:30`). And for texts that give several answers: nothing but numbers
    ("71, 72"), different numbers joined by "or", one kind of mark with more than two different values in a row, or set more
    than ten times. Repeats of an equal value are one answer.

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
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    text = text.translate(_CHARACTERS)
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
    return next((repeats[0] for repeats in answers.values()), None)  # the first kind met is the last mark's


def _is_heading(kind: str, content: str) -> bool:
    """Whether `#### ...` is Markdown for a heading ("#### Step 1", "#### 2. The rest") and no answer."""
    return kind == "####" and (content.lstrip("*_$ ")[:1].isalpha() or re.match(r"\**[0-9]+[.)]\s+\S", content) is not None)


def _marked_values(kind: str, content: str) -> list[Fraction | None]:
    """The different values that a mark's content gives, None for what is no number; empty if it does not speak of numbers."""
    if kind == "answer":  # in a sentence, which may end with an exclamation mark
        content = re.sub(r"!+(?=[\s*_]*$|[*_]*\s+[A-Z])", ".", content)
    stated = _ASIDE.sub(lambda aside: aside[0] if _NUMBER.fullmatch(aside[0][2:-1].strip()) else "", content)
    if not _NUMBER.search(stated):
        stated = content
    if _lists_numbers(stated):
        return [None]
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
    """The value of the last side of an equation that has a number; a number before "≈" is exact, and comes first."""
    for side in reversed(_RESULT.split(clause)):
        sides = [number for number in (next(_numbers(part), None) for part in side.split("≈")) if number]
        if sides:
            return next((value for value in map(_value, sides) if value is not None), None)
    return None


def _lists_numbers(text: str) -> bool:
    """Whether the text is several numbers and nothing else: no word but "or" and "and", no calculation with a result."""
    rest, count = _NUMBER.subn(" ", text)
    return count > 1 and _WORDING.search(re.sub(r"\b(?:or|and)\b", " ", rest)) is None


def _last_number(text: str) -> Fraction | None:
    """The value of the last number of a text without answer marks."""
    if _lists_numbers(text):
        return None
    last = None
    for last in _numbers(_ASIDE.sub("", text)):  # noqa: B007
        pass
    if last is None:
        for last in _numbers(text):  # noqa: B007
            pass
    return _value(last) if last else None


def _numbers(text: str) -> Iterator[re.Match[str]]:
    """The numbers of a text, without digits that belong to a word (CO2) or a name (x_1)."""
    for number in _NUMBER.finditer(text):
        begin = number.start()
        if number["money"] or number["sign"] or not _PART_OF_WORD.search(text, max(0, begin - 3), begin):
            yield number


def _value(number: re.Match[str]) -> Fraction | None:
    """The value of a number that stands for itself, exactly; None if it is a part of an expression, or too large."""
    text, begin = number.string, number.start()
    if _GOES_ON.match(text, number.end()) or _LEADS_IN.search(text, max(0, begin - _CONTEXT), begin):
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
    except (ZeroDivisionError, ValueError):  # Python refuses to read numbers of thousands of digits
        return None
    if part["whole"]:
        if value >= 1:  # "2 40/4" are two numbers
            return None
        value += int(part["whole"])
    if part["scale"]:
        value *= 10 ** _SCALES[part["scale"]]
    return -value if "-" in (part["sign"], part["inner_sign"]) else value
