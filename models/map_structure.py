"""Which keys each query of an attention layer sees: what two maps must share to be compared or copied."""

from __future__ import annotations

from dataclasses import dataclass

Size = tuple[int, int]


@dataclass(frozen=True)
class MapStructure:
    """How the maps of a layer lie on its grid. Layers of equal structure and grid have maps of the same tokens."""

    window: Size | None = None
    """The rows and columns of the windows within which tokens meet; None where all tokens meet."""
    shift: Size = (0, 0)
    reduction: tuple[str, Size] | None = None
    """How the keys are made of the tokens: ("stride", rows and columns of a key's tokens), or ("pool", rows and columns
    of the keys); None where every token is a key."""

    @property
    def is_whole(self) -> bool:
        """Whether every token attends to every token, as in a plain vision transformer."""
        return self.window is None and self.reduction is None

    @property
    def brief(self) -> str:
        """Say in a few words what a token attends to."""
        if self.window is not None:
            return f"{_words(self.window)} {'shifted windows' if any(self.shift) else 'windows'}"
        if self.reduction is None:
            return "all"
        kind, size = self.reduction
        return f"keys of {_words(size)}" if kind == "stride" else f"{_words(size)} pooled"

    def __str__(self) -> str:
        if self.window is not None:
            shifted = f" shifted by {_words(self.shift)}" if any(self.shift) else ""
            return f"within windows of {_words(self.window)} tokens{shifted}"
        if self.reduction is None:
            return "of all tokens to all tokens"
        kind, size = self.reduction
        return (
            f"to keys of {_words(size)} tokens each" if kind == "stride" else f"to {_words(size)} pooled keys"
        )


def _words(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
