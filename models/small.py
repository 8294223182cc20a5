"""Small vision transformers that timm does not define: for images of CIFAR's size, and one with many tokens at 160.

Importing this package's models registers them with timm: `--model vit_cifar_tiny`, `student.model: vit_cifar_tiny`,
`timm.create_model("vit_cifar_tiny")`. Heads are 64 wide, as in DeiT's models of the same names.

| name                   | image | patch | tokens | width | depth | heads | parameters | multiply-adds |
| ---------------------- | ----- | ----- | ------ | ----- | ----- | ----- | ---------- | ------------- |
| vit_cifar_nano         |  32   |   4   |   65   |  128  |   6   |   2   |     1.21 M |        0.08 G |
| vit_cifar_tiny         |  32   |   4   |   65   |  192  |  12   |   3   |     5.36 M |        0.37 G |
| vit_cifar_small        |  32   |   4   |   65   |  384  |  12   |   6   |    21.34 M |        1.42 G |
| vit_tiny_d8_patch8_160 | 160   |   8   |  401   |  192  |   8   |   3   |     3.68 M |        1.93 G |

Counted with ten classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from .errors import JsonDict
from .families.plain import VisionTransformer
from .pvt_models import as_constructor, described

COMMON: JsonDict = {"num_classes": 10, "fixed_input_size": True, "crop_pct": 1.0}
CIFAR = described(
    input_size=(3, 32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), **COMMON
)
SHAPES: dict[str, JsonDict] = {
    "vit_cifar_nano": {"patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 2},
    "vit_cifar_tiny": {"patch_size": 4, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_cifar_small": {"patch_size": 4, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_tiny_d8_patch8_160": {"patch_size": 8, "embed_dim": 192, "depth": 8, "num_heads": 3},
}
default_cfgs = generate_default_cfgs(
    {**dict.fromkeys(SHAPES, CIFAR), "vit_tiny_d8_patch8_160": described(input_size=(3, 160, 160), **COMMON)}
)


def _create(name: str, shape: JsonDict, /, pretrained: bool = False, **given: Any) -> nn.Module:
    return build_model_with_cfg(VisionTransformer, name, pretrained, **{**shape, **given})


for _name, _shape in SHAPES.items():
    register_model(as_constructor(_create, _name, _shape))


# Build models on the meta device, where they have shapes and no memory.

_FILLING = {
    Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, Tensor.clamp_,
    Tensor.mul_, Tensor.add_, Tensor.fill_, Tensor.zero_,
}  # fmt: skip
"""What initializations are made of. They leave a tensor without memory as it is, in most of a constructor's time."""
_INITIALIZING = {
    nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_, nn.init.constant_,
}  # fmt: skip
"""Of torch's initializations, those that a mode is asked about; they name their tensor `tensor`."""


class _NoFilling(TorchFunctionMode):
    """Skip the initialization of tensors on the meta device."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _INITIALIZING and kwargs and kwargs["tensor"].is_meta:
            return kwargs["tensor"]
        given = [*args[1:], *(kwargs or {}).values()]
        if func in _FILLING and args[0].is_meta and not any(isinstance(value, Tensor) for value in given):
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_memory() -> Iterator[None]:
    """Build the models inside on the meta device, four times as fast as that device alone does."""
    with torch.device("meta"), _NoFilling():
        yield


@contextmanager
def without_parameters() -> Iterator[None]:
    """Build the models inside with parameters on the meta device; buffers have their values."""

    def empty(
        module: nn.Module, name: str, parameter: nn.Parameter | None
    ) -> Any:  # torch's own type says None
        return parameter if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(empty)
    try:
        with _NoFilling():
            yield
    finally:
        hook.remove()
