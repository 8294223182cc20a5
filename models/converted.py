"""Converted layers: permanent hosts, whose operators are part of the model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from .attention.base import AttentionOperator, Fit, Geometry
from .families import NoAttention, blocks_of, depths, image_size, is_pyramid, sites
from .host import AttentionHost
from .layer_plan import AS_IT_IS, DEFORMABLE, KEEP, NONE, Choice, parse_plan, plan_text
from .merges import merge_layers, merges_deformably
from .replay import replay_blocks


class TokenGrid:
    """The geometry that all layers of a model share. As a hook it reads the geometry from the patches of each batch,
    for models of any image size. `plan_size` is the image size (height, width) that the operators were created for."""

    def __init__(self, model: nn.Module, geometry: Geometry, plan_size: tuple[int, int] | None) -> None:
        self.model = model
        self.geometry = geometry
        self.plan_size = plan_size

    def __call__(self, module: nn.Module, inputs: object, patches: Tensor) -> None:
        if patches.ndim == 4:  # (B, height, width, C)
            self.geometry = Geometry(self.geometry.num_prefix, (patches.shape[1], patches.shape[2]))
            replay_blocks(self.model, GridMoment(self, self.geometry))


@dataclass(frozen=True)
class GridMoment:
    """The geometry of one forward pass."""

    tokens: TokenGrid
    geometry: Geometry

    def is_now(self) -> bool:
        return self.tokens.geometry is self.geometry

    @contextmanager
    def again(self) -> Iterator[None]:
        before, self.tokens.geometry = self.tokens.geometry, self.geometry
        try:
            yield
        finally:
            self.tokens.geometry = before


class ConvertedAttention(AttentionHost):
    """A permanent host: its operator and the operator's parameters are part of the model."""

    permanent = True
    operator: AttentionOperator

    def __init__(
        self, original: nn.Module, operator: AttentionOperator, choice: Choice, tokens: TokenGrid
    ) -> None:
        super().__init__(original, operator)
        self.choice = choice
        self.tokens = tokens
        self.calibration: tuple[float, float] | None = None
        """Relative output error on the calibration batch, before and after it; both follow the fit of the operator."""
        self.fit: Fit | None = None
        """What fitting the operator changed, if it needs a fit."""

    @property
    def geometry(self) -> Geometry:  # type: ignore[override]
        return self.tokens.geometry


def converted_layers(model: nn.Module) -> dict[int, ConvertedAttention]:
    """Return the converted layers by number. A layer whose attention was removed has no operator and is not one."""
    layers = enumerate(getattr(block, "attn", None) for block in blocks_of(model))
    return {index: layer for index, layer in layers if isinstance(layer, ConvertedAttention)}


def choices_of(model: nn.Module) -> list[Choice]:
    """Return the choice of each layer as a plan names it."""
    kept = Choice(AS_IT_IS if is_pyramid(model) else KEEP)
    return [_choice_of(getattr(block, "attn", None), kept) for block in blocks_of(model)]


def _choice_of(layer: object, kept: Choice) -> Choice:
    if isinstance(layer, NoAttention):
        return Choice(NONE)
    return layer.choice if isinstance(layer, ConvertedAttention) else kept


def plan_of(model: nn.Module) -> str | None:
    """Return the layer plan of a converted model; None for other models."""
    kept = AS_IT_IS if is_pyramid(model) else KEEP
    changed = merges_deformably(model) or any(choice.operator != kept for choice in choices_of(model))
    return whole_plan(model) if changed else None


def drop_other_operators(
    model: nn.Module, tensors: Mapping[str, Tensor], plan: str | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return weights of a model that was converted by `plan` without those of operators that `model` has not.

    Also returns the reason of each key left out. Such a layer of `model` starts as a layer that was just converted.
    """
    found, reasons = dict(tensors), dict[str, str]()
    if plan is None:
        return found, reasons
    before = parse_plan(plan, depths(model) if is_pyramid(model) else len(blocks_of(model)))
    for site, old, new in zip(sites(model), before, choices_of(model), strict=True):
        prefix = f"{site.path}.attn.operator."
        for key in [key for key in found if old != new and key.startswith(prefix)]:
            reasons[key] = f"{new} takes the place of {old}"
            del found[key]
    return found, reasons


def whole_plan(model: nn.Module, keep: Collection[int] = ()) -> str:
    """Return the layer plan of any model, with these layers kept as they were before the conversion."""
    kept = Choice(AS_IT_IS if is_pyramid(model) else KEEP)
    choices = (kept if index in keep else choice for index, choice in enumerate(choices_of(model)))
    return plan_text(tuple(choices), DEFORMABLE if merges_deformably(model) else AS_IT_IS)


def new_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that the conversion added: those of the operators and of deformable merges."""
    added: list[nn.Module] = [layer.operator for layer in converted_layers(model).values()]
    if is_pyramid(model):
        added += merge_layers(model)
    return [parameter for module in added for parameter in module.parameters()]


def start_fresh(model: nn.Module) -> None:
    """Initialize the operators of a model whose other weights are fresh, instead of a conversion's start."""
    for layer in converted_layers(model).values():
        layer.operator.start_fresh()


def plan_size(model: nn.Module) -> tuple[int, int] | None:
    """Return the image size (height, width) that the operators were created for; None if it is the model's own."""
    removed = (
        block.attn for block in blocks_of(model) if isinstance(getattr(block, "attn", None), NoAttention)
    )
    sizes = {layer.tokens.plan_size for layer in converted_layers(model).values()}
    sizes = (sizes | {layer.plan_size for layer in removed}) - {image_size(model)}
    return sizes.pop() if sizes else None
