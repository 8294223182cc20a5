"""Converted layers: permanent hosts, whose operators are part of the model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention.base import AttentionOperator, Fit, Geometry
from .errors import CheckpointError, ConfigError
from .families import NoAttention, blocks_of, image_size, is_pyramid, sites
from .host import AttentionHost
from .layer_plan import AS_IT_IS, DEFORMABLE, KEEP, NONE, Choice, parse_choice, plan_text
from .merges import merge_layers, merges_deformably
from .operators import canonical, check_choice
from .replay import replay_blocks

MARK = "operator.choice"
"""Key, within a converted layer, of a buffer with the operator and its options as text. By it weights say what they
are of: many operators have no parameters, and their weights would load into softmax attention without a word."""
MOST_BYTES = 10_000
"""The longest mark; a longer one is damaged."""


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

    def mark(self) -> None:
        """Add the mark to the state dict."""
        self.operator.register_buffer("choice", self.own_mark())

    def own_mark(self) -> Tensor:
        """Return the mark, on the layer's device."""
        return as_mark(self.choice, next(self.original.parameters()).device)

    @property
    def is_marked(self) -> bool:
        """Whether the state dict has the mark: of a converted model, not of one whose architecture has a plan."""
        return "choice" in self.operator._buffers

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        mark = state_dict.get(f"{prefix}{MARK}")
        is_whole = any(key.startswith(f"{prefix}proj.") and ".lora_" not in key for key in state_dict)
        if self.is_marked and (is_whole or mark is not None):
            refuse_other("the state dict", prefix.removesuffix("."), read_mark(prefix, mark), self.choice)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def as_mark(choice: Choice, device: torch.device | None = None) -> Tensor:
    """Return an operator and its options as text in bytes."""
    return torch.tensor(list(str(canonical(choice)).encode()), dtype=torch.uint8, device=device)


def is_mark(key: str) -> bool:
    """Return whether a key of a state dict is that of a mark."""
    return key.endswith(f".attn.{MARK}")


def marks_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the marks of all converted layers by their keys, whether the state dict has them or not."""
    return {f"{path}.{MARK}": layer.own_mark() for path, layer in _named_layers(model).items()}


def refuse_other_operators(
    model: nn.Module, tensors: Mapping[str, Tensor], origin: str, *, starts: bool
) -> None:
    """Raise CheckpointError where weights are of a layer with another operator than the model's.

    With `starts` they may be of softmax attention, which the model was converted from.
    """
    layers = _named_layers(model)
    given = [key.removesuffix(f".{MARK}") for key in tensors if is_mark(key)]
    for path in dict.fromkeys([*layers, *given]):
        layer, mark = layers.get(path), tensors.get(f"{path}.{MARK}")
        if mark is not None or (layer is not None and layer.is_marked and not starts):
            refuse_other(origin, path, read_mark(path, mark), None if layer is None else layer.choice)


def _named_layers(model: nn.Module) -> dict[str, ConvertedAttention]:
    return {path: each for path, each in model.named_modules() if isinstance(each, ConvertedAttention)}


def read_mark(path: str, mark: Tensor | None) -> Choice:
    """Return the choice of a mark; without one the layer is as it was. `path` is that of the layer, for errors.

    Raises CheckpointError: it names no operator that there is.
    """
    if mark is None:
        return Choice(AS_IT_IS)
    key = f"{path.removesuffix('.')}.{MARK}"
    if mark.dtype != torch.uint8 or mark.ndim != 1 or not 0 < len(mark) <= MOST_BYTES or mark.is_meta:
        raise CheckpointError(f"{key} is damaged: it is no short text in bytes")
    try:
        choice = parse_choice(bytes(mark.tolist()).decode())
        check_choice(choice)
    except (UnicodeDecodeError, ConfigError) as error:
        raise CheckpointError(f"{key} names no operator: {error}") from error
    return canonical(choice)


def refuse_other(origin: str, path: str, theirs: Choice, own: Choice | None) -> None:
    """Raise CheckpointError unless the operator of the weights is that of the layer; None is a layer as it was."""
    ours = Choice(AS_IT_IS) if own is None else canonical(own)
    if theirs != ours:
        words = ("softmax attention" if each.operator == AS_IT_IS else str(each) for each in (theirs, ours))
        raise CheckpointError(
            f"{origin} has weights of {next(words)} in {path}, where the model has {next(words)}: load them into a "
            "model with those operators, which `graftvit.load` makes from a saved folder, and convert afterwards"
        )


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
    model: nn.Module, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return weights of a converted model without those of operators that `model` has not.

    Also returns the reason of each key left out. Such a layer of `model` starts as a layer that was just converted.
    """
    found, reasons = dict(tensors), dict[str, str]()
    for site, choice in zip(sites(model), choices_of(model), strict=True):
        path, new = f"{site.path}.attn", canonical(choice)
        mark = found.get(f"{path}.{MARK}")
        old = None if mark is None else read_mark(path, mark)
        for key in [key for key in found if old not in (None, new) and key.startswith(f"{path}.operator.")]:
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
