"""Reading the final answer of a solution, in the forms that people and language models write it in."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

# Every pattern here is linear in the length of the text: what it reads was written by a policy that is paid for it.
_MARKS = {  # one that has no group marks the rest of its line
    "####": re.compile(r"####\s*"),
    "boxed": re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}"),
    "tag": re.compile(r"<answer>([^<]*)</answer>"),
    "answer": re.compile(
        r"(?i:\banswer\b)[*_]*\s?(?:(?:to|for)\b[^.:=\n]{1,60}?\s)?(?:is\b|(?:would|should|must) be\b|:|=)(?!\s?not\b)[\s:*_]*"
    ),
    "A:": re.compile(r"^[ \t]*\**A\**:[\s*_]*", re.MULTILINE),
}
_END_OF_CLAUSE = re.compile(r"[.,;]\s|\bbecause\b|\bsince\b")

_LATEX = (
    (re.compile(r"\\[!,]|\\(?=[$%])"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<=[0-9])\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}"), r" \1/\2"),  # a mixed number
    (re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}"), r"\1/\2"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"(?<=[A-Za-z])\^\{?[0-9]+\}?"), ""),  # the square of a unit
)
_SIGNS = str.maketrans({"\u2212": "-", "\u00a0": " ", "\u202f": " ", "½": " 1/2", "¼": " 1/4", "¾": " 3/4"})

_DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
_NUMBER = re.compile(
    r"(?:(?<![\w)%])(?<![0-9)%]\s)(?P<sign>[-+]))?"  # between two numbers it is no sign
    r"(?:[$€£]\s?(?P<inner_sign>-)?)?"
    rf"(?:(?P<whole>[0-9]+) (?=[0-9]+\s?/\s?[0-9]))?(?P<numerator>{_DIGITS})(?:\s?/\s?(?P<denominator>{_DIGITS}))?"
)
_WORDING = re.compile(r"[^\W\d_]|[=≈→>]")


def _marked(text: str) -> list[tuple[str, str]]:
    """Every answer mark with what it marks, in the order of the text; where one mark ends another begins."""
    found = sorted((match.start(), kind, match) for kind, mark in _MARKS.items() for match in mark.finditer(text))
    ends = [*(start for start, _, _ in found), len(text)][1:] if found else []
    contents = [
        match[1] if match.re.groups else text[match.end() : end].partition("\n")[0]
        for (_, _, match), end in zip(found, ends, strict=True)
    ]
    return [(kind, content.strip()) for (_, kind, _), content in zip(found, contents, strict=True)]


def tagged_answer(text: str) -> str:
    """What stands in the last `<answer>...</answer>`, or all of the text where there is none; stripped of white space.

    >>> tagged_answer("<think>1+2, or 2+1?</think> <answer> 1+2 </answer>"), tagged_answer(" 1+2 ")
    ('1+2', '1+2')
    """
    before, closed, _ = text.rpartition("</answer>")
    _, opened, content = before.rpartition("<answer>")
    return (content if closed and opened else text).strip()


def final_answer(text: str) -> str:
    r"""The final answer of a solution: what its last answer mark marks, or all of it where there is none.

    Marks are `#### ...`, `\boxed{...}`, `<answer>...</answer>`, "answer is ...", "answer: ..." and a line "A: ...".

    >>> final_answer("48/2 = 24 clips in May. 48+24 = 72.\n#### 72")
    '72'
    >>> final_answer(" 72 ")
    '72'
    """
    marked = _marked(text)
    return marked[-1][1] if marked else text.strip()


def parse_number(text: str) -> Fraction | None:
    r"""The number that a text answers with, exactly; or None.

    It is the number after the last answer mark (see `final_answer`), in the first clause there and on the right of an
    equals sign; in a text without a mark, the last number. Money, units, thousands commas, signs, decimals, fractions,
    mixed numbers, percent ("50%" is 50) and their LaTeX are understood.

    A text that names several numbers answers with none of them: one that is nothing but numbers, a mark that marks a list
    of numbers, and one kind of mark set more than twice.

    >>> parse_number("It costs $1,234.50."), parse_number("-3/4"), parse_number("3 1/2 cups"), parse_number("none")
    (Fraction(2469, 2), Fraction(-3, 4), Fraction(7, 2), None)
    >>> parse_number("**Answer:** 72, which is 3 more than 69."), parse_number(r"\boxed{\$1{,}072 \text{ a day}}")
    (Fraction(72, 1), Fraction(1072, 1))
    >>> parse_number("71 72 73") is None
    True
    """
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    text = text.translate(_SIGNS)
    marked = [(kind, content) for kind, content in _marked(text) if not _is_heading(kind, content)]
    if not marked:
        return None if _lists_numbers(text) else _value(_last_number(text))
    numbers = [(kind, content) for kind, content in marked if _marked_number(content)]
    if not numbers or max(Counter(kind for kind, _ in numbers).values()) > 2:
        return None
    content = numbers[-1][1]
    return None if _lists_numbers(content) else _value(_marked_number(content))


def _marked_number(content: str) -> re.Match[str] | None:
    clause = _END_OF_CLAUSE.split(content, maxsplit=1)[0]
    return _NUMBER.search(clause.rpartition("=")[2]) or _NUMBER.search(clause)


def _is_heading(kind: str, content: str) -> bool:
    """Whether `#### ...` is Markdown for a heading ("#### Step 1", "#### 2. The rest") and no answer."""
    return kind == "####" and (content.lstrip("*_$ ")[:1].isalpha() or re.match(r"\**[0-9]+[.)]\s+\S", content) is not None)


def _lists_numbers(text: str) -> bool:
    """Whether the text is several numbers and nothing else: no word but "or" and "and", no calculation with a result."""
    rest, count = _NUMBER.subn(" ", text)
    return count > 1 and _WORDING.search(re.sub(r"\b(?:or|and)\b", " ", rest)) is None


def _last_number(text: str) -> re.Match[str] | None:
    last = None
    for last in _NUMBER.finditer(text):  # noqa: B007
        pass
    return last


def _value(number: re.Match[str] | None) -> Fraction | None:
    if number is None:
        return None
    part = {name: (digits or "").replace(",", "") for name, digits in number.groupdict().items()}
    try:
        value = Fraction(part["numerator"]) / Fraction(part["denominator"] or 1)
        if part["whole"] and value < 1:  # "3 1/2"; but "2 40/4" are two numbers
            value += int(part["whole"])
    except (ZeroDivisionError, ValueError):  # Python refuses to read numbers of thousands of digits
        return None
    return -value if "-" in (part["sign"], part["inner_sign"]) else value
