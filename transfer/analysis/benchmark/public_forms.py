"""Public implementations of operators, on the same projections: packages of the extra `peers`.

A package's own projections are left out. Its sizes are those of our operator: features, keys, landmarks, tokens of a
window. What else differs is said where the implementation is made.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ....models.attention.base import AttentionOperator, Heads
from ....models.errors import ConfigError

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


class Public(NamedTuple):
    """A public implementation: its package, and how it is made for an operator and its heads."""

    package: str
    module: str
    make: Callable[[Any, Any, Heads], tuple[Call, nn.Module]]


def public_form(
    name: str, operator: AttentionOperator, heads: Heads
) -> tuple[str, Call, list[Tensor]] | None:
    """Return the package, its function of q, k and v (B, H, N, D), and its parameters.

    Return None for an operator that is not in `PUBLIC`.

    Raises ConfigError: the package is not installed.
    """
    if name not in PUBLIC:
        return None
    public = PUBLIC[name]
    try:
        package = import_module(public.module)
    except Exception as error:  # a package may fail in any way
        missing = isinstance(error, ModuleNotFoundError) and error.name == public.module.partition(".")[0]
        why = "is not installed" if missing else f"cannot be imported ({error})"
        raise ConfigError(
            f"--peers: {name} is compared with {public.package}, which {why}; pip install 'graftvit[peers]'"
        ) from error
    call, module = public.make(package, operator, heads)
    module.to(heads.known.device, heads.known.dtype).eval()
    return public.package, call, list(module.parameters())


def _linear(package: Any, operator: Any, heads: Heads) -> tuple[Call, nn.Module]:
    """Without the centered keys."""
    module = package.LinearAttention()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = module(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2)

    return call, module


def _performer(package: Any, operator: Any, heads: Heads) -> tuple[Call, nn.Module]:
    width = heads.known.shape[-1]
    module = package.FastAttention(width, nb_features=operator.feature.width)
    return module, module


def _linformer(package: Any, operator: Any, heads: Heads) -> tuple[Call, nn.Module]:
    """Without the counts of the keys."""
    _, num_heads, tokens, width = heads.known.shape
    module = package.LinformerSelfAttention(
        num_heads * width, tokens, k=operator.num_keys, heads=num_heads, dim_head=width
    )
    module.to_out = nn.Identity()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [x.transpose(1, 2).flatten(2) for x in (q, k, v)]
        module.to_q, module.to_k, module.to_v = (Given(x) for x in rows)
        return _heads(module(rows[0]), num_heads)

    return call, module


def _nystrom(package: Any, operator: Any, heads: Heads) -> tuple[Call, nn.Module]:
    """With segments of the sequence as landmarks, and a convolution along it as long as a side of ours."""
    _, num_heads, _, width = heads.known.shape
    cells = operator.cells(heads.tokens())
    module = package.NystromAttention(
        num_heads * width,
        dim_head=width,
        heads=num_heads,
        num_landmarks=cells[0] * cells[1],
        pinv_iterations=operator.iterations,
        residual_conv_kernel=operator.conv.size,
    )
    module.to_out = nn.Identity()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [x.transpose(1, 2).flatten(2) for x in (q, k, v)]
        # The package pads its input, from which it then projects, to whole segments.
        padding = (0, 0, -q.shape[2] % module.num_landmarks, 0)
        module.to_qkv = Given(Three([F.pad(x, padding) for x in rows] if padding[2] else rows))
        return _heads(module(rows[0]), num_heads)

    return call, module


def _window(package: Any, operator: Any, heads: Heads) -> tuple[Call, nn.Module]:
    """With windows of the sequence, of as many tokens."""
    module = package.LocalAttention(
        operator.tables.window**2,
        look_backward=0,
        look_forward=0,
        autopad=True,
        use_rotary_pos_emb=False,
    )
    return module, module


PUBLIC = {
    "linear": Public("kornia", "kornia.feature.loftr.loftr_module.linear_attention", _linear),
    "performer": Public("performer-pytorch", "performer_pytorch", _performer),
    "linformer": Public("linformer", "linformer.linformer", _linformer),
    "nystrom": Public("nystrom-attention", "nystrom_attention.nystrom_attention", _nystrom),
    "window": Public("local-attention", "local_attention", _window),
}
"""By operator with default options."""


class Three(NamedTuple):
    """Queries, keys and values in place of the tensor that a package would cut into them."""

    parts: list[Tensor]

    def chunk(self, count: int, dim: int) -> list[Tensor]:
        """Return the parts."""
        return self.parts


class Given(nn.Module):
    """A projection whose result is given."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Any:
        """Return what was given."""
        return self.value


def _heads(x_BNC: Tensor, num_heads: int) -> Tensor:
    x_BNHD: Tensor = x_BNC.unflatten(2, (num_heads, -1))
    return x_BNHD.transpose(1, 2)
