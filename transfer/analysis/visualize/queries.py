"""Who asks: a prefix token, or the token at a place of the image, in the grid of every stage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ....models.errors import ConfigError
from ....models.families import TokenLayout

PIXEL = re.compile(r"(\d+)x(\d+)")
Size = tuple[int, int]


@dataclass(frozen=True)
class Query:
    """A token that asks, as a word of `--query`."""

    word: str
    place: tuple[float, float] | None
    """Where in the image, down and to the right, in parts of its height and width; None for a prefix token."""

    def token(self, layout: TokenLayout) -> int | None:
        """Return the number of the token in a layer with these tokens; None if it has no such prefix token."""
        if self.place is None:
            return layout.prefix.index(self.word) if self.word in layout.prefix else None
        row, column = (int(part * side) for part, side in zip(self.place, layout.grid, strict=True))
        return layout.num_prefix + row * layout.grid[1] + column

    def title(self, layouts: Sequence[TokenLayout]) -> str:
        """Return who asks, in words; `layouts` are those of the layers."""
        asked = next((layout for layout in layouts if self.token(layout) is not None), layouts[0])
        token = self.token(asked)
        if token is not None and (self.place is None or _have_one_grid(layouts)):
            return ("the " if self.place is None else "") + token_name(token, asked)
        row, column = self.word.split("x")
        return f"the pixel at row {row}, column {column}"


def read_query(word: str, layouts: Sequence[TokenLayout], image: Size) -> Query:
    """Read a query: a prefix token (`cls`, `reg0`), a place `ROWxCOLUMN` in pixels, or a patch by its number.

    Patches are numbered row by row from 0, in models whose layers all have one grid.

    Raises ConfigError for one that is not there.
    """
    names = list(dict.fromkeys(name for layout in layouts for name in layout.prefix))
    if word in names:
        return Query(word, None)
    pixel = PIXEL.fullmatch(word)
    if pixel is not None and int(pixel[1]) < image[0] and int(pixel[2]) < image[1]:
        return Query(word, ((int(pixel[1]) + 0.5) / image[0], (int(pixel[2]) + 0.5) / image[1]))
    rows, columns = layouts[0].grid
    numbered = _have_one_grid(layouts)
    if numbered and word.isdecimal() and int(word) < rows * columns:
        row, column = divmod(int(word), columns)
        return Query(word, ((row + 0.5) / rows, (column + 0.5) / columns))
    valid = ", ".join([*([f"patches 0 to {rows * columns - 1}"] if numbered else []), *names])
    raise ConfigError(
        f"--query {word!r}: valid are {valid}{', and ' if valid else ''}places in pixels, 0x0 to "
        f"{image[0] - 1}x{image[1] - 1} (row x column)"
    )


def default_query(layouts: Sequence[TokenLayout], image: Size) -> Query:
    """Return the class token, or the patch in the middle of a model without one; of a pyramid the middle pixel."""
    if not _have_one_grid(layouts):
        return read_query(f"{image[0] // 2}x{image[1] // 2}", layouts, image)
    height, width = layouts[0].grid
    word = "cls" if "cls" in layouts[0].prefix else str((height // 2) * width + width // 2)
    return read_query(word, layouts, image)


def token_name(token: int, layout: TokenLayout) -> str:
    """Return the name of a token in titles."""
    if token < layout.num_prefix:
        return {"cls": "class token"}.get(layout.prefix[token], layout.prefix[token])
    row, column = divmod(token - layout.num_prefix, layout.grid[1])
    return f"patch {token - layout.num_prefix} (row {row}, column {column})"


def _have_one_grid(layouts: Sequence[TokenLayout]) -> bool:
    return len({layout.grid for layout in layouts}) == 1
