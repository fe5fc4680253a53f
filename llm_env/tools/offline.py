"""Two tools that need no network: a calculator, and a search over texts."""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

LONGEST_EXPRESSION = 500
LARGEST_EXPONENT = 1000
MOST_DIGITS = 1000
_WORD = re.compile(r"\w+")


def calculator(expression: str) -> str:
    """Compute an arithmetic expression exactly.

    Args:
        expression: Numbers, parentheses and the operators +, -, *, / and **, such as "(12 + 3.5) * 4".

    Returns:
        The value: a whole number, or a decimal number with up to 12 significant digits.
    """
    if not isinstance(expression, str):
        raise TypeError(f"expression={expression!r} must be a text")
    if len(expression) > LONGEST_EXPRESSION:
        raise ValueError(f"the expression has {len(expression)} characters; at most {LONGEST_EXPRESSION} are allowed")
    try:
        tree = ast.parse(expression.strip().replace("^", "**"), mode="eval").body
        value = _value(tree)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression!r} is not an arithmetic expression") from error
    except ZeroDivisionError as error:
        raise ValueError("division by zero") from error
    if value.denominator == 1:
        return str(value.numerator)
    try:
        return f"{float(value):.12g}"
    except OverflowError as error:
        raise ValueError("the result is too large") from error


def _value(node: ast.expr) -> Fraction:
    """Return the value of a parsed expression. Nothing is evaluated as code."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        if isinstance(node.value, float) and not math.isfinite(node.value):
            raise ValueError("a number is too large")
        return _sized(Fraction(str(node.value)))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Add):
            return _sized(left + right)
        if isinstance(node.op, ast.Sub):
            return _sized(left - right)
        if isinstance(node.op, ast.Mult):
            return _sized(left * right)
        if isinstance(node.op, ast.Div):
            return _sized(left / right)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
    raise ValueError("only numbers, parentheses and + - * / ** are allowed")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) > LARGEST_EXPONENT:
        raise ValueError(f"exponents must be whole numbers from -{LARGEST_EXPONENT} to {LARGEST_EXPONENT}")
    digits = max(_digits(base.numerator), _digits(base.denominator))
    if digits * abs(exponent.numerator) > MOST_DIGITS:
        raise ValueError("the result is too large")
    return _sized(base**exponent.numerator)


def _digits(number: int) -> float:
    return abs(number).bit_length() * math.log10(2)


def _sized(value: Fraction) -> Fraction:
    if max(_digits(value.numerator), _digits(value.denominator)) > MOST_DIGITS:
        raise ValueError("the result is too large")
    return value


def make_search(texts: Sequence[str], results: int = 3) -> Callable[[str], str]:
    """Return a tool that searches texts for words.

    The texts are ranked by BM25 (Robertson and Zaragoza 2009, https://doi.org/10.1561/1500000019; k1=1.2, b=0.75). Texts
    without any word of the query are not found; equal scores keep the order of the texts.

    Args:
        texts: the texts.
        results: maximum number of texts in a result.

    Raises:
        ValueError, TypeError: If `texts` is empty or has anything but str, or `results` is below 1.

    Examples:
        >>> search = make_search(["Paris is in France.", "Rome is in Italy."], results=1)
        >>> search("Where is Rome?")
        'Rome is in Italy.'
    """
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
        raise TypeError("texts must be a list of str with at least one entry")
    if results < 1:
        raise ValueError(f"results={results} must be at least 1")
    documents = list(texts)
    counts = [Counter(_WORD.findall(text.lower())) for text in documents]
    lengths = [sum(count.values()) for count in counts]
    mean = sum(lengths) / len(lengths) or 1.0
    frequencies = Counter(word for count in counts for word in count)

    def score(words: set[str], i: int) -> float:
        total = 0.0
        for word in sorted(words & counts[i].keys()):
            rarity = math.log(1 + (len(documents) - frequencies[word] + 0.5) / (frequencies[word] + 0.5))
            total += rarity * counts[i][word] * 2.2 / (counts[i][word] + 1.2 * (0.25 + 0.75 * lengths[i] / mean))
        return total

    def search(query: str) -> str:
        """Search a collection of texts.

        Args:
            query: Words to search for.

        Returns:
            The texts that fit best, one per line.
        """
        words = set(_WORD.findall(query.lower()))
        scores = [score(words, i) for i in range(len(documents))]
        best = sorted((i for i in range(len(documents)) if scores[i] > 0), key=lambda i: (-scores[i], i))[:results]
        return "\n".join(documents[i] for i in best) or "nothing found"

    return search
