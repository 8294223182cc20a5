"""Adapters: models of any library or of one's own, whose attention layers are read by a few functions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attention.base import QKV, Geometry, Heads
from ..errors import ConfigError, GraftError, UnsupportedModelError, check_types
from ..host import AttentionHost
from ..plan_syntax import KEEP
from .site import OWN_PLACES, Family, Site, attention_of, evaluating, shallow, submodule


class AdaptedHost(AttentionHost):
    """An attention layer that an adapter reads; its block calls it with the tokens first."""

    adapter: Adapter

    @property
    def drop_rate(self) -> float:
        return float(getattr(self.original, "dropout", 0.0))

    def forward(self, x: Tensor, *others: Any, **options: Any) -> Any:
        """Attend over tokens (B, N, C), and return what the layer returns to its block.

        Raises UnsupportedModelError: the block gives another tensor, such as a mask.
        """
        if any(isinstance(each, Tensor) and each is not x for each in (*others, *options.values())):
            raise UnsupportedModelError(
                f"{type(self.original).__name__} is called with a mask or another tensor beside its tokens, which an "
                "adapter does not read: give the model images alone"
            )
        return self.merge(self.attend(self.heads_of(x)), x)

    def heads_of(self, *inputs: Any, **keywords: Any) -> Heads:
        x: Tensor = inputs[0] if inputs else next(iter(keywords.values()))
        self.adapter.check_count(x, self.geometry)
        found = dict(zip(QKV, self.adapter.qkv(self.original, x), strict=True))
        heads = {
            part: found[part].unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in self.operator.needs
        }
        return Heads(
            q=heads.get("q"),
            k=heads.get("k"),
            v=heads.get("v"),
            bias=None if self.adapter.bias is None else self.adapter.bias(self.original),
            scale=(found["q"].shape[-1] // self.num_heads) ** -0.5,
            dropout=self.drop_rate if self.training else 0.0,
            geometry=self.geometry,
        )

    def merge(self, out_BHND: Tensor, x: Tensor) -> Any:
        """Join the heads and return what the layer returns."""
        return self.adapter.out(self.original, out_BHND.transpose(1, 2).flatten(2))


class _ReachedError(Exception):
    """The first block is called, with these tokens."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens


def _stop(block: nn.Module, given: tuple[Tensor, ...]) -> None:
    raise _ReachedError(given[0])


class Adapter(Family):
    """A family of models whose layers are softmax attention over all tokens: softmax(s Q Kᵀ + b) V, s = D^-1/2.

    Args:
        model: Class of the models.
        layers: Path of the blocks, with `*` at the end, such as "encoder.layers.*".
        attention: Name of the attention layer in a block, which calls it with the tokens (B, N, C) first.
        qkv: From such a layer and its tokens to q, k and v, (B, N, H·D) each.
        out: From such a layer and the joined heads (B, N, H·D) to what the layer returns.
        grid: From a model and the height and width of its images to rows and columns of patches.
        image_size: From a model to the height and width of its images.
        embedding: Path of the module that sees the images first.
        prefix: Kinds of the tokens before the patches, such as ("cls",).
        num_heads: Attribute of the layer with the number of heads.
        bias: From a layer to what is added to its logits, (1, H, N, N), or None.

    A model that was converted is saved and loaded by its state dict: build it, convert it by the same plan, load.
    """

    blocks = (nn.Module,)
    kept = KEEP
    keeps_all = True
    cannot: ClassVar = {
        "none": "has no other layers in which tokens meet: name an operator, such as uniform",
        "without": "has no part to give up: leave it out",
        **dict.fromkeys(("copying", "mirroring", "measuring", "masking"), "is read by an adapter"),
    }

    @check_types("model")
    def __init__(
        self,
        model: type[nn.Module],
        *,
        layers: str,
        attention: str,
        qkv: Callable[[Any, Tensor], Sequence[Tensor]],
        out: Callable[[Any, Tensor], Any],
        grid: Callable[[Any, tuple[int, int]], tuple[int, int]],
        image_size: Callable[[Any], tuple[int, int]],
        embedding: str,
        prefix: tuple[str, ...] = ("cls",),
        num_heads: str = "num_heads",
        bias: Callable[[Any], Tensor | None] | None = None,
    ) -> None:
        self.name, self.models = model.__name__, (model,)
        self.layers, self.first = layers.removesuffix(".*"), embedding
        self.qkv, self.out, self.bias = qkv, out, bias
        self.grid, self.size = grid, image_size
        self.kinds, self.counted_as = prefix, num_heads
        own = {"adapter": self, "counted_as": num_heads, "__doc__": AdaptedHost.__doc__}
        host = type(f"{self.name}Host", (AdaptedHost,), own)
        self.hosts = {nn.Module: host}  # type: ignore[misc]
        self.attention = attention
        if not isinstance(prefix, tuple):
            raise ConfigError(
                f"prefix={prefix!r} of the adapter of {self.name}: give a tuple, such as ({prefix!r},)"
            )

    def paths(self, model: nn.Module) -> list[list[str]]:
        try:
            children = dict(submodule(model, self.layers).named_children())
        except (KeyError, AttributeError) as error:
            raise UnsupportedModelError(
                f"{self.name} has no {self.layers}: correct layers={self.layers + '.*'!r} of its adapter"
            ) from error
        for name, block in children.items():
            if self.attention not in block._modules:
                raise UnsupportedModelError(
                    f"{self.layers}.{name} of {self.name} has no {self.attention}, but {', '.join(block._modules)}: "
                    f"correct attention={self.attention!r} of its adapter"
                )
            OWN_PLACES[type(block)] = self.attention
        return [[f"{self.layers}.{name}" for name in children]]

    def sites(self, model: nn.Module) -> Iterator[Site]:
        with self._reading():
            found = list(super().sites(model))
        yield from found

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Raise UnsupportedModelError for what a function of the adapter raises inside."""
        try:
            yield
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, GraftError):
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UnsupportedModelError(
                f"the adapter of {self.name} cannot read a block: {reason}"
            ) from error

    def check(self, model: nn.Module) -> None:
        """Raise UnsupportedModelError unless the first block computes the same with its attention hosted."""
        self.embedding(model)
        block = submodule(model, self.paths(model)[0][0])
        if isinstance(attention_of(block), AttentionHost) or next(block.parameters()).is_meta:
            return
        with self._reading():
            [geometry] = self.geometries(model, self.image_size(model))
            tokens = self._tokens(model, block)
            self.check_count(tokens, geometry)
            expected, found = self._outputs(model, block, tokens)
        least = 1e-3 * float(expected.abs().max())
        if not torch.allclose(found, expected, rtol=1e-2, atol=least):
            raise UnsupportedModelError(
                f"the adapter of {self.name} does not compute what the attention of a block does: check its qkv, out "
                "and bias; logits are q·k / √D"
            )

    def _tokens(self, model: nn.Module, block: nn.Module) -> Tensor:
        """Return the tokens (1, N, C) that the first block gets for an image of the model's size."""
        seen: list[Any] = []
        shape = (1, self.channels(model), *self.image_size(model))
        image = torch.arange(math.prod(shape)).sin().view(shape).to(next(model.parameters()))
        embedding = self.embedding(model).register_forward_pre_hook(lambda _, given: seen.extend(given))
        first = block.register_forward_pre_hook(_stop)
        try:
            with torch.no_grad(), evaluating(model):
                model(image)
        except _ReachedError as reached:
            if seen and seen[0].ndim == image.ndim:
                return reached.tokens
        finally:
            embedding.remove()
            first.remove()
        raise UnsupportedModelError(
            f"{self.first} of {self.name} does not get the images before the first block gets its tokens: correct "
            f"embedding={self.first!r} of its adapter"
        )

    def _outputs(self, model: nn.Module, block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output of a block for some tokens, and that with its attention hosted."""
        if tokens.dtype.itemsize < torch.float32.itemsize:
            block, tokens = copy.deepcopy(block).float(), tokens.float()
        with torch.no_grad(), evaluating(block):
            twin = shallow(block)
            twin._modules[self.attention] = self.host(model, block)
            expected: Tensor = block(tokens)
            found: Tensor = twin(tokens)
        return expected, found

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        height, width = self.size(model)
        return int(height), int(width)

    known_size = fixed_size = image_size

    def is_strict(self, model: nn.Module) -> bool:
        return True

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        rows, columns = self.grid(model, size)
        return [Geometry(len(self.kinds), (int(rows), int(columns)))]

    def takes_any_grid(self, model: nn.Module) -> bool:
        return True

    def grid_of(self, model: nn.Module, images: Any, patches: Any) -> tuple[int, int]:
        [geometry] = self.geometries(model, (images.shape[-2], images.shape[-1]))
        return geometry.grid

    def check_count(self, x_BNC: Tensor, geometry: Geometry | None) -> None:
        """Raise UnsupportedModelError if a block gets other tokens than the adapter says; None if that is not known."""
        if geometry is not None and x_BNC.shape[1] != geometry.num_tokens:
            rows, columns = geometry.grid
            raise UnsupportedModelError(
                f"a block of {self.name} gets {x_BNC.shape[1]} tokens, and its adapter says {rows}x{columns} patches "
                f"and {geometry.num_prefix} tokens before them: check its grid and prefix"
            )

    def resize(self, model: nn.Module, size: tuple[int, int]) -> None:
        raise UnsupportedModelError(
            f"{self.name} is read by an adapter, which cannot resize it: build it at its size"
        )

    def prefix(self, model: nn.Module, site: Site) -> tuple[str, ...]:
        return self.kinds

    def has_bias(self, model: nn.Module, site: Site) -> bool:
        layer = site.layer(model)
        return self.bias is not None and self.bias(getattr(layer, "original", layer)) is not None

    def sizes(self, block: nn.Module) -> tuple[int, int, int]:
        layer = attention_of(block)
        weight = next(each for each in layer.parameters() if each.ndim == 2)
        q, _, _ = self.qkv(getattr(layer, "original", layer), weight.new_zeros(1, 1, weight.shape[1]))
        heads = int(getattr(getattr(layer, "original", layer), self.counted_as))
        return int(weight.shape[1]), heads, int(q.shape[-1]) // heads

    def attention_input(self, block: nn.Module) -> None:
        return None

    def embedding(self, model: nn.Module) -> nn.Module:
        try:
            return submodule(model, self.first)
        except (KeyError, AttributeError) as error:
            raise UnsupportedModelError(
                f"{self.name} has no {self.first}: correct embedding={self.first!r} of its adapter"
            ) from error

    def channels(self, model: nn.Module) -> int:
        """Return the channels of the first convolution in the embedding, 3 without one."""
        found = (each for each in self.embedding(model).modules() if isinstance(each, nn.Conv2d))
        return next((each.in_channels for each in found), 3)

    def features(self, model: nn.Module, images: Tensor) -> Any:
        return model(images)

    def head(self, model: nn.Module, features: Any, *, pre_logits: bool = False) -> Tensor:
        """Return the output of the model, its logits; an adapter does not say what goes into the classifier."""
        if pre_logits:
            raise self._no_features()
        return features

    def num_classes(self, model: nn.Module) -> int:
        return int(getattr(model, "num_classes", 0))

    def classifiers(self, model: nn.Module) -> dict[str, nn.Module]:
        raise self._no_features()

    def feature_widths(self, model: nn.Module) -> tuple[int, int]:
        raise self._no_features()

    def _no_features(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.name} is read by an adapter, which gives its attention and its output alone: use another method "
            "than feature"
        )
