"""Key maps of Hugging Face transformers."""

from __future__ import annotations

from .keymap import KeyMap

TRANSFORMERS_MAPS: tuple[KeyMap, ...] = ()
