"""Turn the content of a file into weights under timm's names."""

from __future__ import annotations

from ...models.errors import Json
from ..sources import Part
from ..weight_files import Weights
from .containers import unwrap
from .hf_families import check_model_type, not_of_type
from .hf_key_maps import TRANSFORMERS_MAPS
from .keymap import KeyMap, apply, recognize
from .research import RESEARCH_MAPS

KEY_MAPS: tuple[KeyMap, ...] = (*TRANSFORMERS_MAPS, *RESEARCH_MAPS)
"""The one table of key maps, in the order in which they are tried."""


def read_weights(content: Weights, part: Part | None = None, config: Json | None = None) -> Weights:
    """Return the weights in a file: unwrap the requested part, and rename its keys by the table of key maps.

    `part` None is the one that the kind of file is published for. `config` is what lay beside the file.

    Raises CheckpointError: the file is of no known kind, has no such part, or is half of one, or `config` is of a
    model that is not supported.
    """
    check_model_type(content.origin, config or {})
    weights = unwrap(content, part)
    found = recognize(weights.tensors, KEY_MAPS)
    if found is None and config and "model_type" in config:
        raise not_of_type(weights, config)
    return weights if found is None else apply(found, weights, config or {})
