"""Read the LaTeX of an attention program back into its text, by the signs alone."""

from __future__ import annotations

import re

TOKEN = re.compile(
    r"\\operatorname\{(?P<word>[A-Za-z]+(?:_\{\w\})?)\}|\\left(?:\(|\||\[)|\\right(?:\)|\||\])|\\frac|\\sqrt|\\max"
    r"|\\odot|\\sigma|\\phi|\\bar\{\\sigma\}|\\top|\\,|\\;|10\^\{-6\}|[QKV1c0{}^+,-]"
)
WORDS = {
    "norm_{c}": "l2", "norm_{r}": "l2t", "norm_{1}": "l1", "share": "sumnorm", "Z": "zscore", "cos": "cosine",
}  # fmt: skip
SIGNS = {r"\sigma": "sigmoid", r"\phi": "elu1", r"\bar{\sigma}": "cosigmoid"}
BETWEEN = {"+": "add", "-": "sub", r"\odot": "mul"}


def read_latex(text: str) -> str:
    """Return the program of a formula, whose text need not be canonical."""
    reader = _Reader(text)
    found = reader.formula()
    assert not reader.tokens, f"{reader.tokens} stands after the end"
    return found


class _Reader:
    def __init__(self, text: str) -> None:
        found = list(TOKEN.finditer(text))
        assert not TOKEN.sub("", text).strip(), f"{text} has other signs"
        self.tokens = [each["word"] or each[0] for each in found]

    def take(self, *wanted: str) -> str:
        for each in wanted:
            assert self.tokens[0] == each, f"{self.tokens[:5]} in place of {each}"
            del self.tokens[0]
        return wanted[-1]

    def starts(self, *wanted: str) -> bool:
        return tuple(self.tokens[: len(wanted)]) == wanted

    def formula(self) -> str:
        """Read at most one sign between two operands."""
        if self.starts("-"):
            self.take("-")
            return f"neg({self.operand()})"
        if self.starts("{"):
            left = self.transposed()
            return f"tn({left} {self.operand()})" if self.begins() else f"t({left})"
        left = self.operand()
        if self.starts(r"\,"):
            self.take(r"\,")
            if self.starts("{"):
                return f"nt({left} {self.transposed()})"
            return f"mm({left} {self.operand()})"
        if self.tokens and self.tokens[0] in BETWEEN and not self.starts("+", "10^{-6}"):
            return f"{BETWEEN[self.tokens.pop(0)]}({left} {self.operand()})"
        return left

    def begins(self) -> bool:
        """Whether an operand follows."""
        return bool(self.tokens) and (
            self.tokens[0] in ("Q", "K", "V", "1", r"\frac", r"\sqrt", *SIGNS)
            or self.tokens[0].startswith(r"\left")
            or (self.tokens[0][0].isalpha() and self.tokens[0] != "c")
        )

    def transposed(self) -> str:
        self.take("{")
        inner = self.operand()
        self.take("}", "^", "{", r"\top", "}")
        return inner

    def operand(self) -> str:
        sign = self.tokens.pop(0)
        if sign in ("Q", "K", "V", "1"):
            return "one" if sign == "1" else sign.lower()
        if sign == r"\left(":
            inner = self.formula()
            self.take(r"\right)")
            return inner
        if sign == r"\left|":
            inner = self.formula()
            self.take(r"\right|")
            return f"abs({inner})"
        if sign == r"\left[":
            left = self.formula()
            self.take(r"\;")
            inner = f"cat({left} {self.formula()})"
            self.take(r"\right]")
            return inner
        if sign == r"\frac":
            return self.fraction()
        if sign == r"\sqrt":
            self.take("{", r"\max", r"\left(")
            inner = self.formula()
            self.take(",", "0", r"\right)", "}")
            return f"sqrt({inner})"
        return self.called(SIGNS.get(sign) or WORDS.get(sign, sign))

    def fraction(self) -> str:
        self.take("{")
        above = self.formula()
        self.take("}", "{")
        if self.starts(r"\sqrt", "{", "c"):
            self.take(r"\sqrt", "{", "c", "}", "}")
            return f"scale({above})"
        assert above == "one"
        below = self.formula()
        self.take("+", "10^{-6}", "}")
        return f"recip({below})"

    def called(self, name: str) -> str:
        self.take(r"\left(")
        operands = [self.formula()]
        while self.starts(","):
            self.take(",")
            operands.append(self.formula())
        self.take(r"\right)")
        return f"{name}({' '.join(operands)})"
