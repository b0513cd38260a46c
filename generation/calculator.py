"""The calculator of GSM8K's marks: `<<48/2=` is completed to `<<48/2=24>>`. Text is parsed, never evaluated as code.

    sum     = product { ("+" | "-") product }
    product = unary { ("*" | "/") unary }
    unary   = { "-" | "+" } atom { "%" }
    atom    = number | "(" sum ")"          number: 12  1,080  .5  3.  (commas only between groups of three)

Numbers are exact (fractions.Fraction) until they are written. Length and depth are bounded, and there is no power, so
what a model writes can cost neither time nor memory.
"""

import re
from collections.abc import Callable
from fractions import Fraction

MAX_LENGTH = 120  # characters of an expression; the longest in GSM8K has 28 with its value
MAX_DEPTH = 20  # of parentheses and signs
MAX_DECIMALS = 4  # a longer fraction is rounded: 1/3 is written 0.3333
TOO_LARGE = 10**15

TOKEN = re.compile(r"\s*(\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])|\d+\.?\d*(?![,\d])|\.\d+|[-+*/()%])")
MARK = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
OPEN_MARK = re.compile(r"<<([^<>=]*)=([^<>=]*>?)$")


class _Nonsense(Exception):
    """The text is no expression."""


class _Parser:
    """A recursive descent over the tokens of one expression; each method reads one rule of the grammar above."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.place, self.depth = tokens, 0, 0

    def peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.place += 1
        return token

    def nested(self, rule: Callable[[], Fraction]) -> Fraction:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Nonsense
        value = rule()
        self.depth -= 1
        return value

    def sum(self) -> Fraction:
        value = self.product()
        while self.peek() in ("+", "-"):
            value = value + self.product() if self.take() == "+" else value - self.product()
        return value

    def product(self) -> Fraction:
        value = self.unary()
        while self.peek() in ("*", "/"):
            value = value * self.unary() if self.take() == "*" else value / self.unary()
        return value

    def unary(self) -> Fraction:
        if self.peek() in ("-", "+"):
            sign = -1 if self.take() == "-" else 1
            return sign * self.nested(self.unary)
        value = self.atom()
        while self.peek() == "%":
            self.take()
            value /= 100
        return value

    def atom(self) -> Fraction:
        token = self.take()
        if token == "(":
            value = self.nested(self.sum)
            if self.take() != ")":
                raise _Nonsense
            return value
        if not token or token in "+-*/)%":
            raise _Nonsense
        return Fraction(token.replace(",", "").rstrip("."))


def tokens_of(expression: str) -> list[str] | None:
    """Split an expression into numbers and signs; None where another character stands."""
    tokens, place, text = [], 0, expression.strip()
    while place < len(text):
        match = TOKEN.match(text, place)
        if match is None:
            return None
        tokens.append(match[1])
        place = match.end()
    return tokens


def value_of(expression: str) -> Fraction | None:
    """Return the exact value; None for nonsense, a division by zero, or what is too long or too deep."""
    if len(expression) > MAX_LENGTH or not expression.isascii():
        return None
    tokens = tokens_of(expression)
    if not tokens:
        return None
    parser = _Parser(tokens)
    try:
        value = parser.sum()
    except (_Nonsense, ZeroDivisionError):
        return None
    return value if parser.place == len(tokens) else None


def spelled(value: Fraction) -> str | None:
    """Write a value as GSM8K mostly does: no point for an integer, no trailing zeros, 0.5 and not .5.

    Rounded half away from zero to MAX_DECIMALS; None from 10^15 on, and where a value would be rounded to 0.
    """
    if abs(value) >= TOO_LARGE:
        return None
    scale = 10**MAX_DECIMALS
    rounded = (2 * abs(value.numerator) * scale + value.denominator) // (2 * value.denominator)
    if rounded == 0 and value != 0:
        return None
    whole, rest = divmod(rounded, scale)
    decimals = f"{rest:0{MAX_DECIMALS}d}".rstrip("0")
    return ("-" if value < 0 else "") + str(whole) + (f".{decimals}" if decimals else "")


def calculate(expression: str) -> str | None:
    """Return the value of an expression as it is written into a mark; None where it has none."""
    value = value_of(expression)
    return None if value is None else spelled(value)


def completion(text: str) -> str | None:
    """Return what has to follow a text that ends inside a mark, after its `=`: `value>>` or the rest of it.

    None where the text does not end so, where the expression has no value, or where what already stands after the `=`
    is no beginning of the right value (a token may hold `=` together with the first digits).
    """
    match = OPEN_MARK.search(text[-2 * MAX_LENGTH :])
    answer = calculate(match[1]) if match else None
    if match is None or answer is None:
        return None
    whole, begun = f"{answer}>>", match[2].lstrip()
    return whole[len(begun) :] if whole.startswith(begun) and begun != whole else None
