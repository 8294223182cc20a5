"""Key maps of files that papers published; those that name the parts as timm does need none."""

from __future__ import annotations

from .keymap import KeyMap

RESEARCH_MAPS: tuple[KeyMap, ...] = ()
