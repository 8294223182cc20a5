"""What a student's own `modeling_graftvit.py` has beside its model: `load`, and the classes for transformers.

`one_file.py` writes that file, and puts what it knows of the model into `MODEL` and `ARCHITECTURES`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..models.families.walk import CONSTRUCTORS, construct
from .fit import set_norm_eps
from .provenance import KEY, NORM_EPS, architecture_of

MODEL = ""
"""The model that the file builds: the `architecture_of` its config.json."""
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {}
"""The constructors of architectures that timm does not have itself."""
CONSTRUCTORS.update(ARCHITECTURES)


def build(config: Mapping[str, Any]) -> nn.Module:
    """Return the model that a `config.json` describes, with fresh weights. Raises ValueError: it is another model."""
    if architecture_of(config) != MODEL:
        raise ValueError(f"this file is of another model: it builds {MODEL}, not {architecture_of(config)}")
    name, made = config["architecture"], config.get(KEY, {})
    model = construct(
        name, pretrained_cfg={**config["pretrained_cfg"], "architecture": name}, **config["model_args"]
    )
    if made.get(NORM_EPS) is not None:
        set_norm_eps(model, made[NORM_EPS])
    return model


def load(folder: str | PathLike[str]) -> nn.Module:
    """Return the model of a folder with `config.json` and its weights, in float32 and in eval mode."""
    model = build(json.loads(Path(folder, "config.json").read_text(encoding="utf-8")))
    tensors = dict[str, Tensor]()
    for path in sorted(Path(folder).glob("model*.safetensors")):
        tensors |= load_file(path)
    model.load_state_dict(tensors)
    return model.eval()


def _constants(module: nn.Module) -> dict[str, Tensor]:
    buffers = dict(module.named_buffers(recurse=False))
    return {name: buffers[name] for name in module._non_persistent_buffers_set & buffers.keys()}


with suppress(ImportError):  # `load` needs no transformers
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import ImageClassifierOutput

    class GraftViTConfig(PretrainedConfig):
        """The content of `config.json`."""

        model_type = "graftvit"

    class GraftViTModel(PreTrainedModel):
        """A student, for `transformers.AutoModel`: its `logits` are its features where it has no classes."""

        config_class = GraftViTConfig
        base_model_prefix = "model"
        main_input_name = "pixel_values"

        def __init__(self, config: GraftViTConfig) -> None:
            super().__init__(config)
            with torch.device("cpu"):  # and not on the meta device, where a buffer has no values
                self.model = build(config.to_dict())
            self.constants = {module: _constants(module) for module in self.modules()}
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            """Give a module its constants again: transformers has emptied what is in no file."""
            for name, value in self.constants.get(module, {}).items():
                module.get_buffer(name).copy_(value)

        def forward(self, pixel_values: Tensor, **_: Any) -> ImageClassifierOutput:
            """Return the logits of images (B, C, H, W)."""
            return ImageClassifierOutput(logits=self.model(pixel_values))
