"""The attributes of timm's models that we read, as types, because `nn.Module` does not declare them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from ..json_types import JsonDict


class Block(nn.Module):
    """The attributes of timm's transformer blocks that we read."""

    attn: Any
    """timm's attention layer, or the host that replaces it."""
    mlp: Any
    norm1: nn.Module


class ViT(nn.Module):
    """The attributes of timm's vision transformers that we read: a type like `Block`, never instantiated."""

    patch_embed: Any
    pos_embed: nn.Parameter | None
    cls_token: nn.Parameter | None
    blocks: nn.Module
    global_pool: str
    default_cfg: JsonDict
    num_classes: int
    num_features: int
    forward_features: Callable[[Tensor], Tensor]
    get_classifier: Callable[[], nn.Module | tuple[nn.Module, ...]]
    init_weights: Callable[[], None]
    set_grad_checkpointing: Callable[[bool], None]
    set_input_size: Callable[..., None]
    teacher: Any
    """The part of the teacher in a student that copies attention, which also has `teacher_input` and `copied`."""
    teacher_input: Any
    copied: Any


def vit(model: nn.Module) -> ViT:
    """Return the same model, typed with the attributes of timm's vision transformers."""
    return cast(ViT, model)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode inside the block; then restore the mode of each module."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
