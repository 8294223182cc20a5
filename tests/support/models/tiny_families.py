"""Tiny models of timm's other families, one of each kind, with random weights everywhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn

SIZE, OTHER = (32, 48), (48, 24)


@dataclass(frozen=True)
class Tiny:
    """A kind of model: timm's name and arguments, and what of it is its own."""

    name: str
    arguments: dict[str, Any]
    whole: dict[str, Any] | None = field(default_factory=dict)
    """Arguments with which every layer attends to all tokens; None where there are none."""
    biased: bool = False
    """Its layers have a bias that an operator does not take; `without` gives it up if `gives_up`."""
    gives_up: bool = False
    resizes: bool = True


PLAIN = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
ENCODER = {**PLAIN, "mlp_ratio": 2.0}
TINY = {
    "sam": Tiny(
        "samvit_base_patch16_224",
        {**PLAIN, "window_size": 3, "global_attn_indexes": (1,), "neck_chans": 12},
        whole={"window_size": 0},
        biased=True, gives_up=True,
    ),
    "relpos": Tiny("vit_relpos_base_patch32_plus_rpn_256", PLAIN, biased=True),
    "relpos_mlp": Tiny(
        "vit_relpos_small_patch16_224", {**PLAIN, "rel_pos_type": "mlp", "class_token": True}, biased=True
    ),
    "srelpos": Tiny("vit_srelpos_small_patch16_224", {**PLAIN, "qk_norm": True}, biased=True),
    "qwen3": Tiny("qwen3_vit_88m", {**ENCODER, "pos_embed_grid_size": 4}),
    "deepseek": Tiny("deepseek_vit_412m", ENCODER),
}  # fmt: skip


def arguments(kind: str, size: tuple[int, int] = SIZE, **more: Any) -> dict[str, Any]:
    """Return the arguments of timm's constructor."""
    return {**TINY[kind].arguments, "img_size": size, **more}


def tiny(
    kind: str, size: tuple[int, int] = SIZE, *, seed: int = 0, dtype: torch.dtype = torch.float32, **more: Any
) -> nn.Module:
    """Return a tiny model with random weights everywhere, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(TINY[kind].name, **arguments(kind, size, **more))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def whole(kind: str, **more: Any) -> nn.Module:
    """Return a tiny model in float64 whose layers attend to all tokens."""
    return tiny(kind, dtype=torch.float64, **{**(TINY[kind].whole or {}), **more})


WHOLE = [kind for kind, each in TINY.items() if each.whole is not None]
