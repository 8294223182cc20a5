"""The one table of key maps, in the order in which they are tried."""

from __future__ import annotations

from .keymap import KeyMap
from .research import RESEARCH_MAPS
from .transformers.key_maps import TRANSFORMERS_MAPS

KEY_MAPS: tuple[KeyMap, ...] = (*TRANSFORMERS_MAPS, *RESEARCH_MAPS)
