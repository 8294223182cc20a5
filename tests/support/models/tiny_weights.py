"""Small stand-ins for published weights: random numbers, with timm's description of the weights that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf


def write_stand_in(name: str, folder: Path, arguments: Mapping[str, Any], classes: int) -> str:
    """A timm folder as people publish them, and its name as a source.

    Mean, deviation, crop, interpolation and license are those of the weights `name`; so is whether there is a head,
    which has `classes` outputs.
    """
    torch.manual_seed(11)
    described = timm.get_pretrained_cfg(name)
    assert described is not None, name
    outputs = classes if described.num_classes else 0
    model = timm.create_model(name, num_classes=outputs, **arguments)
    with torch.no_grad():
        for parameter, values in model.named_parameters():
            if "qkv.weight" in parameter:
                values.mul_(10)  # attention that is far from uniform
    size = (arguments.get("in_chans", 3), *_pair(arguments.get("img_size", described.input_size[1])))
    config = {key: value for key, value in described.to_dict().items() if key not in ("url", "hf_hub_id")}
    config |= {"input_size": size, "num_classes": outputs}
    save_for_hf(
        model,
        str(folder),
        model_config={"pretrained_cfg": config},
        model_args=dict(arguments),
        safe_serialization=True,
    )
    return f"local-dir:{folder}"


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
