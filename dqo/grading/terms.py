r"""Expressions in LaTeX or plain text, read as sums of terms: `\frac{3\sqrt{3}}{4}` and `3\sqrt3/4` become the same tuples.

Constants are added and multiplied, and the order of a sum does not matter; no other algebra is done. What may be
read in two ways, such as `1/2x` or `2 3`, is not read.
"""

from __future__ import annotations

import re
from fractions import Fraction

TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|\S", re.DOTALL)
_DEEPEST = 60  # groups inside of groups
_SYMBOL = re.compile(
    r"[^\W\d_]|\\(?:pi|infty|alpha|beta|gamma|delta|epsilon|varepsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|varphi|psi|omega|Gamma|"
    r"Delta|Phi|Omega|emptyset|varnothing)"
)
_FUNCTION = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)|\\(?:ln|log|exp)")
_CLOSING = {"(": ")", "{": "}"}

# (constant, terms); a term is (coefficient, factors), a factor a tuple that begins with its kind
Sum = tuple[Fraction, tuple]


class Unreadable(ValueError):
    pass


def read_sum(text: str) -> Sum | None:
    """The expression as a sum of terms; None where it cannot be read. `text` should be short: time grows as its square."""
    try:
        reader = _Reader(TOKEN.findall(text))
        found = reader.sum()
    except ValueError:  # or numbers longer than Python reads
        return None
    return found if not reader.peek() else None


def constant_of(found: Sum | str) -> Fraction | None:
    """The number that a sum is; None for other sums, and for what could not be read as one."""
    return None if isinstance(found, str) or found[1] else found[0]


def _of(factor: tuple) -> Sum:
    return Fraction(0), ((Fraction(1), (factor,)),)


class _Product:
    """A term that grows from the left."""

    def __init__(self) -> None:
        self.coefficient = Fraction(1)
        self.factors: tuple[tuple, ...] = ()

    def times(self, found: Sum, plain: bool) -> None:
        """`plain`: a symbol or a number without brackets, or after a sign of multiplication."""
        constant, terms = found
        if not terms and (plain or not self.factors):
            self.coefficient *= constant
        elif len(terms) == 1 and not constant and (plain or not self.factors):
            self.coefficient *= terms[0][0]
            self.factors += terms[0][1]
        else:
            self.factors += (("sum", found),)

    def over(self, found: Sum) -> None:
        if not found[1]:
            if not found[0]:
                raise Unreadable("a division by zero")
            self.coefficient /= found[0]
        else:
            self.factors += (("over", found),)

    def sum(self) -> Sum:
        if not self.factors or not self.coefficient:
            return self.coefficient, ()
        if self.coefficient == 1 and len(self.factors) == 1 and self.factors[0][0] == "sum":
            return self.factors[0][1]
        return Fraction(0), ((self.coefficient, self.factors),)


class _Reader:
    """Recursive descent: sum = [sign] term {sign term}; term = power {[* or /] power}; power = base {^ base or _ base or !}."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.at, self.depth = tokens, 0, 0

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else ""

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1] if self.at <= len(self.tokens) else ""

    def sum(self) -> Sum:
        constant, terms = Fraction(0), []
        sign = self.take() if self.peek() in ("+", "-", "\\pm") else "+"
        while True:
            number, found = self.term()
            if sign == "\\pm":
                found, number = ((Fraction(1), (("pm", (number, found)),)),), Fraction(0)
            direction = -1 if sign == "-" else 1
            constant += direction * number
            terms += [(direction * coefficient, factors) for coefficient, factors in found]
            if self.peek() not in ("+", "-", "\\pm"):
                return constant, tuple(sorted(terms, key=repr))
            sign = self.take()

    def term(self) -> Sum:
        product, divided, operator = _Product(), False, "first"
        while True:
            first = self.peek()
            found, kind = self.power()
            if operator == "/":
                product.over(found)
            elif operator == "" and (divided or kind == "number"):
                raise Unreadable("1/2x or x 2")  # means two things, or none
            else:
                product.times(found, plain=operator != "" or kind == "symbol")
            divided = divided or operator == "/" or kind == "mixed"
            token = self.peek()
            if token in ("*", "/"):
                operator = self.take()
            elif not token or token in ("+", "-", "\\pm", ")", "}"):
                return product.sum()
            else:
                operator = ""
                if _FUNCTION.fullmatch(first):
                    divided = True  # what follows f(x) might be meant to be inside

    def power(self) -> tuple[Sum, str]:
        found, kind = self.base()
        while self.peek() in ("^", "_", "!"):
            if kind == "mixed":
                raise Unreadable("a power of a mixed number")
            operator = self.take()
            sign = self.take() if operator == "^" and self.peek() == "-" else ""
            upper = () if operator == "!" else self.argument(whole_number=True)
            found, kind = _of((operator, found, sign, upper)), "symbol"
        return found, kind

    def group(self) -> Sum:
        closer = _CLOSING[self.take()]
        self.depth += 1
        if self.depth > _DEEPEST:
            raise Unreadable("too deep")
        found = self.sum()
        if self.take() != closer:
            raise Unreadable("a bracket that is not closed")
        self.depth -= 1
        return found

    def argument(self, whole_number: bool = False) -> Sum:
        """Of a command: a group, or one token; of a number its first digit, which is what LaTeX takes."""
        token = self.peek()
        if token in _CLOSING:
            return self.group()
        if token[:1].isdecimal() and len(token) > 1 and not whole_number:
            self.tokens[self.at] = token[1:]
            return Fraction(token[0]), ()
        return self.symbol()

    def symbol(self) -> Sum:
        token = self.take()
        if token[:1].isdecimal() or token[:1] == "." and len(token) > 1:
            return Fraction(token), ()
        if _SYMBOL.fullmatch(token):
            return _of(("symbol", token))
        raise Unreadable(token)

    def base(self) -> tuple[Sum, str]:
        token = self.peek()
        if token in _CLOSING:
            return self.group(), "group"
        if token == "\\frac":
            self.take()
            fraction = _Product()
            fraction.times(self.argument(), plain=True)
            fraction.over(self.argument())
            return fraction.sum(), "group"
        if token == "\\sqrt":
            self.take()
            degree = ""
            if self.peek() == "[":
                degree = self.peek(1)
                if self.peek(2) != "]":
                    raise Unreadable("the degree of a root")
                self.at += 3
            return _of((token, degree, self.argument())), "symbol"
        if _FUNCTION.fullmatch(token):
            self.take()
            inside = self.group() if self.peek() == "(" else self.term()
            return _of((token, inside)), "symbol"
        found = self.symbol()
        if token[:1].isdecimal() or token[:1] == ".":
            return self.mixed(found, token)
        return found, "symbol"

    def mixed(self, whole: Sum, token: str) -> tuple[Sum, str]:
        r"""A number, with the proper fraction that follows it: 2 1/4 or 2\frac{1}{4}."""
        start, part = self.at, None
        if token.isdecimal() and self.peek() == "\\frac":
            part = constant_of(self.base()[0])
        elif token.isdecimal() and self.peek().isdecimal() and self.peek(1) == "/" and self.peek(2).isdecimal():
            part = Fraction(int(self.peek()), int(self.peek(2)) or 1)
            self.at += 3
        if part is not None and 0 < part < 1:
            return (whole[0] + part, ()), "mixed"
        self.at = start
        return whole, "number"
