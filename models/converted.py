"""Converted layers: permanent hosts, whose operators are part of the model."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .attention.base import QKV, AttentionOperator, Fit, Geometry
from .errors import CheckpointError, ConfigError
from .families import (
    FAMILIES,
    NoAttention,
    Site,
    attention_of,
    blocks_of,
    family_of,
    find_family,
    image_size,
    sites,
    widths,
)
from .host import BIAS, REDUCTION, AttentionHost, GridHost
from .layer_plan import Choice, canonical, check_choice, resolved
from .map_structure import MapStructure, Size
from .merges import deformable_merges, merge_layers, merges_deformably
from .plan_syntax import AS_IT_IS, DEFORMABLE, KEEP, NONE, parse_choice, plan_text
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
        self.model, self.family = model, family_of(model)
        self.geometry = geometry
        self.plan_size = plan_size

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], patches: Any) -> None:
        grid = self.family.grid_of(self.model, next(iter(inputs), None), patches)
        if grid is not None:
            self.geometry = Geometry(self.geometry.num_prefix, grid)
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

    def structure(self, grid: Size) -> MapStructure:
        """Return that each query sees all keys, as operators do."""
        return MapStructure()

    def native_pairs(self, geometry: Geometry) -> tuple[int, int]:
        """Return the numbers of all tokens: an operator that is softmax has no windows and no reduced keys."""
        return geometry.num_tokens, geometry.num_tokens

    def merge(self, out_BHND: Tensor, x: Any = None) -> Tensor:
        return super().merge(self.gated(out_BHND, x), x)

    def gated(self, out_BHND: Tensor, x: Any) -> Tensor:
        """Return the output of the heads through the operator's gate, if it has one."""
        gate = self.operator.output_gate
        return out_BHND if gate is None else gate(out_BHND, x)

    def mark(self) -> None:
        """Add the mark, on the layer's device, to the state dict."""
        device = next(self.original.parameters()).device
        self.operator.register_buffer("choice", as_mark(self.resolved, device))

    @property
    def resolved(self) -> Choice:
        """The choice with the counts that the conversion took from the image size: they stay when it changes."""
        return resolved(self.choice, self.operator)

    @property
    def is_marked(self) -> bool:
        """Whether the state dict has the mark: of a converted model, not of one whose architecture has a plan."""
        return "choice" in self.operator._buffers

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        mark = state_dict.get(f"{prefix}{MARK}")
        after = tuple(f"{prefix}{name}." for name in self.after_heads)
        is_whole = any(key.startswith(after) and ".lora_" not in key for key in state_dict)
        if self.is_marked and (is_whole or mark is not None):
            refuse_other("the state dict", prefix.removesuffix("."), read_mark(prefix, mark), self)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class ConvertedGrid(GridHost, ConvertedAttention):
    """A converted layer whose block passes the grid; `original` is timm's layer without the parts that were dropped."""

    def __init__(
        self,
        original: nn.Module,
        operator: AttentionOperator,
        choice: Choice,
        tokens: TokenGrid,
        kept: Sequence[str],
    ) -> None:
        ConvertedAttention.__init__(self, original, operator, choice, tokens)
        self.is_native = False
        self.kept = tuple(kept)
        self.gave_up: tuple[str, ...] = ()
        """The parts of the layer that the conversion was told to give up: of `without`."""

    def merge(self, out_BHND: Tensor, x: Any = None) -> Tensor:
        return super().merge(self.gated(out_BHND, x), x)

    structure = ConvertedAttention.structure
    native_pairs = ConvertedAttention.native_pairs


def converted_kind(host: type[AttentionHost]) -> type[ConvertedAttention]:
    """Return the class of converted layers for a kind of host, which is such a host, too.

    It is an attribute of this file, so that a pickled model finds it.
    """
    base = ConvertedGrid if issubclass(host, GridHost) else ConvertedAttention
    if issubclass(base, host):
        return base
    name = f"Converted{host.__name__.removesuffix('Host')}"
    known = globals().get(name)
    if known is None or not issubclass(known, host):
        known = globals()[name] = type(name, (base, host), {"__doc__": host.__doc__, "__module__": __name__})
    return known


for _family in FAMILIES:
    for _host in _family.hosts.values():
        converted_kind(_host)


def as_mark(choice: Choice, device: torch.device | None = None) -> Tensor:
    """Return an operator and its options as text in bytes."""
    return torch.tensor(list(str(canonical(choice)).encode()), dtype=torch.uint8, device=device)


def is_mark(key: str) -> bool:
    """Return whether a key of a state dict is that of a mark."""
    return key.endswith(f".{MARK}")


def marks_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the marks of all converted layers by their keys, whether the state dict has them or not."""
    return {f"{path}.{MARK}": as_mark(layer.resolved) for path, layer in _named_layers(model).items()}


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
            refuse_other(origin, path, read_mark(path, mark), layer)


def _named_layers(model: nn.Module) -> dict[str, ConvertedAttention]:
    return {path: each for path, each in model.named_modules() if isinstance(each, ConvertedAttention)}


def read_mark(path: str, mark: Tensor | None) -> Choice:
    """Return the choice of a mark; without one the layer is as it was. `path` is that of the layer, for errors.

    Raises CheckpointError: it names no operator that there is.
    """
    if mark is None:
        return Choice(AS_IT_IS)
    key = f"{path.removesuffix('.')}.{MARK}"
    if not _is_text(mark):
        raise CheckpointError(f"{key} is damaged: it is no short text in bytes")
    try:
        choice = parse_choice(bytes(mark.tolist()).decode())
        check_choice(choice)
    except (UnicodeDecodeError, ConfigError) as error:
        raise CheckpointError(
            f"{key} names no operator: {error}; if the weights are an average that includes buffers, as of timm's "
            "ModelEmaV2, use ModelEmaV3, or load the state dict of the model and copy the averaged parameters"
        ) from error
    return canonical(choice)


def _is_text(mark: object) -> bool:
    return (
        isinstance(mark, Tensor)
        and mark.layout == torch.strided
        and mark.dtype == torch.uint8
        and mark.ndim == 1
        and 0 < len(mark) <= MOST_BYTES
        and not mark.is_meta
    )


def refuse_other(origin: str, path: str, theirs: Choice, layer: ConvertedAttention | None) -> None:
    """Raise CheckpointError unless the operator of the weights is that of the layer; None is a layer as it was."""
    ours = Choice(AS_IT_IS) if layer is None else layer.resolved
    if theirs != ours:
        words = ("softmax attention" if each.operator == AS_IT_IS else str(each) for each in (theirs, ours))
        raise CheckpointError(
            f"{origin} has weights of {next(words)} in {path}, where the model has {next(words)}: convert "
            "the model first by the plan that the weights were made with (graftvit.convert), then load them"
        )


def converted_layers(model: nn.Module) -> dict[int, ConvertedAttention]:
    """Return the converted layers by number. A layer whose attention was removed has no operator and is not one.

    Args:
        model: any model.
    """
    layers = enumerate(attention_of(block) for block in blocks_of(model))
    return {index: layer for index, layer in layers if isinstance(layer, ConvertedAttention)}


def choices_of(model: nn.Module) -> list[Choice]:
    """Return the choice of each layer as a plan names it."""
    kept = _kept(model)
    return [_choice_of(attention_of(block), kept) for block in blocks_of(model)]


def _kept(model: nn.Module) -> Choice:
    """Return how a plan names a layer that is not converted."""
    family = find_family(model)
    return Choice(KEEP if family is None else family.kept)


def _choice_of(layer: object, kept: Choice) -> Choice:
    if isinstance(layer, NoAttention):
        return Choice(NONE)
    return layer.choice if isinstance(layer, ConvertedAttention) else kept


def plan_of(model: nn.Module) -> str | None:
    """Return the layer plan of a converted model; None for other models.

    Args:
        model: any model.
    """
    kept = _kept(model)
    changed = merges_deformably(model) or any(choice != kept for choice in choices_of(model))
    return whole_plan(model) if changed else None


def drop_other_operators(
    model: nn.Module, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return weights of a converted model without those of operators that `model` has not.

    Also returns the reason of each key left out. Such a layer of `model` starts as a layer that was just converted.
    """
    found, reasons = dict(tensors), dict[str, str]()
    layers = converted_layers(model)
    for site, choice in zip(sites(model), choices_of(model), strict=True):
        path, layer = site.layer_path(model), layers.get(site.index)
        new = canonical(choice) if layer is None else layer.resolved
        mark = found.get(f"{path}.{MARK}")
        old = None if mark is None else read_mark(path, mark)
        for key in [key for key in found if old not in (None, new) and key.startswith(f"{path}.operator.")]:
            reasons[key] = f"{new} takes the place of {old}"
            del found[key]
    return found, reasons


def whole_plan(model: nn.Module, keep: Collection[int] = ()) -> str:
    """Return the layer plan of any model, with these layers kept as they were before the conversion."""
    kept = _kept(model)
    choices = (kept if index in keep else choice for index, choice in enumerate(choices_of(model)))
    return plan_text(tuple(choices), DEFORMABLE if merges_deformably(model) else AS_IT_IS)


def new_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that the conversion added: those of the operators and of deformable merges.

    Args:
        model: a converted model; others have none.
    """
    added: list[nn.Module] = [layer.operator for layer in converted_layers(model).values()]
    added += merge_layers(model)
    return [parameter for module in added for parameter in module.parameters()]


def start_fresh(model: nn.Module) -> None:
    """Initialize the operators of a model whose other weights are fresh, instead of a conversion's start."""
    for layer in converted_layers(model).values():
        layer.operator.start_fresh()


def plan_size(model: nn.Module) -> tuple[int, int] | None:
    """Return the image size (height, width) that the operators were created for; None if it is the model's own."""
    removed = (layer for layer in map(attention_of, blocks_of(model)) if isinstance(layer, NoAttention))
    sizes = {layer.tokens.plan_size for layer in converted_layers(model).values()}
    sizes = (sizes | {layer.plan_size for layer in removed}) - {image_size(model)}
    return sizes.pop() if sizes else None


# The parts that a conversion drops where a family does not keep all: in the layer, and in weights of the original.

FUSED = ("qkv", "kv")
"""Projections whose rows are equal parts, in the order of the name."""


def dropped_names(
    kept: Collection[str], keeps_bias: bool, reduction: Collection[str] = REDUCTION
) -> list[str]:
    """Return the names of the parameters and modules that a layer loses, which keeps these parts of q, k and v."""
    names = [*reduction, *(() if keeps_bias else BIAS)]
    names += [f"{part}_bias" for part in QKV if part not in kept]
    return names if "q" in kept else [*names, "q", "logit_scale"]


def kept_rows(tensor: Tensor, name: str, kept: Collection[str]) -> Tensor:
    """Return the rows of a fused projection `name` that belong to the kept parts."""
    rows = tensor.chunk(len(name))
    return torch.cat([part for part, letter in zip(rows, name, strict=True) if letter in kept])


def drop_parts(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return weights of the original model without what a converted one lacks, and the reason of each key left out.

    Weights of a model that was converted by the same plan, and those of a family that keeps all, stay as they are.
    """
    found, reasons = dict(tensors), dict[str, str]()
    family = find_family(model)
    if family is None or family.keeps_all:
        return found, reasons
    own = model.state_dict()
    for path in deformable_merges(model):
        if not any(key.startswith(f"{path}.dconv.") for key in found):
            for key in [key for key in found if key.startswith(f"{path}.")]:
                reasons[key] = "deformable merging replaces it"
                del found[key]
    for site in sites(model):
        layer, path = site.layer(model), site.layer_path(model)
        reason = _reason(layer)
        if not reason:
            continue
        for key in [key for key in found if key not in own and _is_dropped(key, site, path, layer)]:
            reasons[key] = reason
            del found[key]
        for name in FUSED:
            _cut(found, own, f"{path}.{name}.", name, layer)
    return found, reasons


def _reason(layer: Any) -> str:
    if isinstance(layer, NoAttention):
        return "the layer has no attention"
    choice = getattr(layer, "choice", None)
    return "" if choice is None else f"{choice} does not need it"


def _is_dropped(key: str, site: Site, path: str, layer: Any) -> bool:
    """Return whether a conversion drops this part of a block; a part that timm's layer has not is not one of them."""
    if isinstance(layer, NoAttention):
        return key.startswith((f"{path}.", f"{site.path}.norm1."))
    prefix = f"{path}."
    name = key.removeprefix(prefix).partition(".")[0]
    return key.startswith(prefix) and name in (*dropped_names((), False, layer.reduction), *FUSED)


def _cut(tensors: dict[str, Tensor], own: Mapping[str, Tensor], prefix: str, name: str, layer: Any) -> None:
    """Cut the rows of a fused projection in `tensors` to those of the converted layer."""
    kept: Sequence[str] = getattr(layer, "kept", QKV)
    full = len(name) * widths(layer.original.proj)[1] if hasattr(layer, "original") else 0
    for key in [f"{prefix}weight", f"{prefix}bias"]:
        if key in tensors and key in own and len(tensors[key]) == full != len(own[key]):
            tensors[key] = kept_rows(tensors[key], name, kept)


# The weights that a converted model starts from: all, all but attention, or none of the teacher's.

KeptWeights = Literal["all", "mlp", "none"]


def initialize(model: nn.Module, layers: Collection[int], weights: str) -> None:
    """Keep the weights of `model` selected by `weights`, initialize the rest; `layers` are the converted layers."""
    if weights == "none":
        family_of(model).initialize(model)
    elif weights == "mlp":
        fresh, blocks = blocks_of(_fresh(model)), blocks_of(model)
        for index in layers:
            attention_of(blocks[index]).load_state_dict(attention_of(fresh[index]).state_dict())


def _fresh(model: nn.Module) -> nn.Module:
    """Return a copy that timm has initialized with the family's own scales."""
    fresh = copy.deepcopy(model)
    family_of(model).initialize(fresh)
    return fresh
