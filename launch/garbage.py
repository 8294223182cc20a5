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
    atexit.register(gc.freeze)
