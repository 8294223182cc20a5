"""How often Python searches for garbage while a command runs."""

from __future__ import annotations

import atexit
import gc


def collect_seldom() -> None:
    """Let this process search for garbage seldom, and not at its end.

    To import torch and timm makes a million objects and no garbage: searching them, and clearing them one by one at
    the end, takes as long as the imports themselves.
    """
    gc.set_threshold(20_000, 20, 20)
    atexit.register(_clear_nothing)


def _clear_nothing() -> None:
    """Keep what is there out of the last search, unless a library would print that it was not cleared.

    Libraries built with nanobind do so, such as triton since torch 2.15. Their classes have a metaclass of this name.
    """
    if not any(kind.__name__.startswith("nb_type") for kind in type.__subclasses__(type)):
        gc.freeze()
