"""Tiny random towers of transformers: one of each type that is supported, and what they compute."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import torch
import transformers
from graftvit.models.attention.base import Heads
from graftvit.models.families.towers import TOWERS, geometry_for, tower_config
from torch import Tensor, nn

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "dinov3_vit": {"num_register_tokens": 2},
    "internvl_vision": {"layer_scale_init_value": 1.0},
}
"""Settings that show a part of a type."""
SHUFFLED = [kind for kind, tower in TOWERS.items() if not tower.keeps_order]
ORDERED = [kind for kind in TOWERS if kind not in SHUFFLED]


def tower(kind: str, **settings: Any) -> Any:
    """A tower with every parameter drawn at random, so that a forgotten one shows."""
    config = transformers.CONFIG_MAPPING[kind](**{**SIZES, **SETTINGS.get(kind, {}), **settings})
    return drawn(class_of(config)(config))


def drawn(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.3, 0.3, generator=generator)
    return model.eval()


def class_of(config: Any) -> Any:
    """The class of a type of tower, which transformers may not list among its models."""
    module = import_module(type(config).__module__.replace("configuration", "modeling"))
    kinds = transformers.MODEL_MAPPING.get(type(config), None) or [
        each
        for each in vars(module).values()
        if isinstance(each, type)
        and issubclass(each, transformers.PreTrainedModel)
        and each.config_class is type(config)
        and not each.__name__.endswith("PreTrainedModel")
    ]
    return kinds if isinstance(kinds, type) else kinds[0]


def images(count: int = 2, size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(5))


def tokens(model: Any, x: Tensor, **how: Any) -> Tensor:
    """The last hidden state; patches of a model that shuffles them are in the order of the image."""
    if tower_config(model).model_type in SHUFFLED:
        order = torch.arange(geometry_for(model, (x.shape[-2], x.shape[-1])).num_patches)
        how["noise"] = order.to(x).expand(len(x), -1)
    out: Tensor = model(pixel_values=x, **how).last_hidden_state
    return out


@contextmanager
def attending(
    model: Any, definition: Callable[[Heads], Tensor], size: tuple[int, int] = (32, 32)
) -> Iterator[None]:
    """Let every layer of a tower of transformers compute an output (B, H, N, D) by a definition of ours."""

    def function(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **others: Any
    ) -> Any:
        geometry = geometry_for(model, size)
        return definition(Heads(q, k, v, mask, scaling, geometry=geometry)).transpose(1, 2), None

    before = model.config._attn_implementation
    transformers.AttentionInterface.register("definition", function)
    model.set_attn_implementation("definition")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
