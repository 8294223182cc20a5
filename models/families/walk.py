"""The walk through any supported model: its family, its sites, and the refusal of every other model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import FunctionType
from typing import Any, NoReturn, cast

import timm
import torch
from timm.layers import to_2tuple
from timm.models import is_model, model_entrypoint, split_model_name_tag
from torch import Tensor, nn

from ..attention.base import Geometry
from ..errors import ConfigError, UnsupportedModelError, check_types
from ..host import AttentionHost
from ..plan_syntax import KEEP
from ..plugins import load_plugins
from .intermediates import REST
from .plain import (
    SUPPORTED,
    TokenLayout,
    attention_blocks,
    fills,
    refuse_copied,
)
from .site import Block, Family, NoAttention, Site, attention_of, size_of, submodule
from .towers import refuse_other


def _find_families() -> Iterator[Family]:
    """Yield the families in the tables `FAMILIES` of the files beside this one; `plain` is the first."""
    names = {file.name for file in iter_modules([str(Path(__file__).parent)])} - {"walk"}
    for name in sorted(names, key=lambda name: (name != "plain", name)):
        yield from getattr(import_module(f"{__package__}.{name}"), "FAMILIES", ())


FAMILIES = list(_find_families())
STAGED = ", ".join(family.name for family in FAMILIES if family.kept != KEEP)
WHOLE = {block: whole for family in FAMILIES for block, whole in family.whole.items()}


@check_types()
def register_family(family: Family) -> None:
    """Add a family of another package: its models are then converted, looked at and taught like others.

    Args:
        family: its description, such as an `Adapter`.

    Raises:
        ConfigError: a registered family has these models already, or it does not say which it has.
    """
    for need in ("name", "models", "blocks", "hosts"):
        if not hasattr(family, need):
            raise ConfigError(f"{type(family).__name__} is a Family without {need}")
    known = {model: each.name for each in FAMILIES for model in each.models}
    taken = next((model for model in family.models if model in known), None)
    if taken is not None:
        raise ConfigError(f"{taken.__name__} is a model of the family {known[taken]} already")
    FAMILIES.append(family)


REFUSED = {
    "DiffParallelScalingBlock": "takes the difference of two softmax maps, and projects them with its MLP",
    "ParallelScalingBlock": "projects queries, keys and values together with its MLP",
    "ParallelThingsBlock": "has several attention layers side by side",
}
"""Why blocks and layers of supported models are refused, by the name of their class."""


def find_family(model: nn.Module) -> Family | None:
    """Return the family of a model whose attention is read, that of the nearest class, or None."""
    found = [family for family in FAMILIES if family.takes(model)]
    if not found:
        if not torch.compiler.is_compiling():
            load_plugins()
        found = [family for family in FAMILIES if family.takes(model)]
    if len(found) < 2:
        return found[0] if found else None
    kinds = (kind for kind in type(model).__mro__ if any(kind in family.models for family in found))
    nearest = next(kinds)
    return next(family for family in found if nearest in family.models)


def any_family(model: nn.Module) -> Family | None:
    """Return the family of a model, of any other model of timm that whose outputs alone are read, or None."""
    return None if is_compiled(model) else find_family(model) or (REST if REST.takes(model) else None)


def family_of(model: nn.Module) -> Family:
    """Return the family of a model, as `any_family` does.

    Raises UnsupportedModelError: the model is of no supported family.
    """
    return any_family(model) or _refuse(model)


def is_compiled(model: nn.Module) -> bool:
    """Return whether a model is what torch.compile returns, which hides the model itself."""
    return "_orig_mod" in getattr(model, "_modules", ())


def refuse_compiled(model: nn.Module) -> None:
    """Raise UnsupportedModelError for what torch.compile returns."""
    if is_compiled(model):
        kind = type(model._modules["_orig_mod"]).__name__
        raise UnsupportedModelError(
            f"this {kind} was compiled by torch.compile: give the model itself, and compile what is made of it"
        )


def _refuse(model: nn.Module) -> NoReturn:
    refuse_compiled(model)
    refuse_other(model)
    outputs = ", though feature, logits and block_output take it" if REST.takes(model) else ""
    raise UnsupportedModelError(
        f"{type(model).__name__} is not a supported model{outputs}; supported are {SUPPORTED}, {STAGED}, and models "
        "that graftvit.models.Adapter reads"
    )


def sites(model: nn.Module) -> list[Site]:
    """Return all blocks of a model in order, never an empty list for a model that has blocks.

    Raises UnsupportedModelError: the model is of no supported family.
    """
    return list(family_of(model).sites(model))


def blocks_of(model: nn.Module) -> list[Block]:
    """Return all blocks of a model in order; of a `DualViT` those of its student.

    Of a model of no supported family, those that look like its blocks.
    """
    if find_family(model) is None:
        student = getattr(model, "_modules", {}).get("student")
        return attention_blocks(model) if student is None else blocks_of(student)
    return [cast(Block, submodule(model, path)) for path in paths_of(model)]


def paths_of(model: nn.Module) -> list[str]:
    """Return the names of all blocks of a model in order; an empty list for a model of no supported family."""
    family = find_family(model)
    return [] if family is None else [path for stage in family.paths(model) for path in stage]


def native_host(model: nn.Module, block: nn.Module) -> AttentionHost:
    """Return the host of the attention of a block of `model`, or a native host for it, which is not put there.

    Raises UnsupportedModelError: the family has no host for such a layer.
    """
    attention = attention_of(block)
    return attention if isinstance(attention, AttentionHost) else family_of(model).host(model, block)


def whole_grid(block: nn.Module) -> nn.Module:
    """Return a block with the same parts whose attention gets the whole grid; blocks that give it that are returned.

    The parts are shared, but the block can get another attention.
    """
    kind = WHOLE.get(type(block))
    return block if kind is None else as_kind(block, kind)


def as_kind(block: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Return a module of another class with the same parts, which can get other parts."""
    twin = kind.__new__(kind)
    twin.__dict__.update(block.__dict__)
    twin.__dict__["_modules"] = dict(block._modules)
    return twin


def layout_of(model: nn.Module, site: Site) -> TokenLayout:
    """Return the tokens of the stage of a site.

    Raises UnsupportedModelError: the model has no image size.
    """
    return TokenLayout(family_of(model).prefix(model, site), site.shape.geometry.grid)


def depths(model: nn.Module) -> list[int]:
    """Return the number of blocks of each stage.

    Raises UnsupportedModelError: the model is of no supported family.
    """
    return [len(stage) for stage in family_of(model).paths(model)]


def plan_depth(model: nn.Module) -> int | list[int]:
    """Return the depth as a plan is read for the model: one number where `softmax` keeps a layer, else that of stages.

    Raises UnsupportedModelError: the model is of no supported family.
    """
    found = depths(model)
    return sum(found) if family_of(model).kept == KEEP else found


def check_supported(model: nn.Module, *, copied: bool = False, to: str = "", attention: bool = True) -> None:
    """Raise `UnsupportedModelError` if the model or one of its blocks is not supported.

    A model that copies its teacher's attention is supported only with `copied`: it has no attention of its own to
    convert or to teach.

    Args:
        model: a model of timm or transformers, or one of a registered family.
        copied: also take a model that copies its teacher's attention.
        to: what shall be done, of `Family.cannot`.
        attention: its attention is needed, not only the outputs of its blocks and its whole results.
    """
    refuse_copied(model, copied)
    name, family = type(model).__name__, family_of(model)
    if not family.reads_attention:
        if attention:
            _refuse(model)
        return
    if to in family.cannot:
        raise UnsupportedModelError(
            f"{name} {family.cannot[to]}, which is not supported here; supported are {SUPPORTED}"
        )
    family.check(model)
    _check_layers(model, family)


def _check_layers(model: nn.Module, family: Family) -> None:
    """Raise UnsupportedModelError for a block or an attention layer that is not one of the family's own."""
    name = type(model).__name__
    seen = dict[nn.Module, int]()
    for index, block in enumerate(blocks_of(model)):
        own = attention_of(block)
        layer: nn.Module = getattr(own, "original", own)  # a host has the layer that it replaces
        if isinstance(layer, NoAttention):
            continue
        refuse_compiled(block)
        refuse_compiled(layer)
        if not isinstance(block, family.blocks) or not isinstance(layer, tuple(family.hosts)):
            part = (
                type(block).__name__
                if layer is None
                else f"{type(block).__name__} with {type(layer).__name__}"
            )
            kinds = (type(block).__name__, type(layer).__name__)
            why = next((f": it {REFUSED[kind]}" for kind in kinds if kind in REFUSED), "")
            raise UnsupportedModelError(
                f"block {index} of {name} is a {part}, which is not supported{why}; supported are {SUPPORTED}, "
                "with one softmax attention a block"
            )
        first, changed = seen.setdefault(layer, index), _changed(layer, family)
        if first != index:
            changed = f"is that of block {first}, too: give each its own, such as a copy.deepcopy"
        if changed:
            raise UnsupportedModelError(f"the attention of block {index} of {name} {changed}")


PROJECTIONS = ("qkv", "q", "kv", "q_proj", "k_proj", "v_proj", "proj")


def _changed(attention: nn.Module, family: Family) -> str:
    """Say what of an attention layer is not its library's, and would not be computed by a host; empty for nothing."""
    own, kinds = type(attention), [kind for kind in family.hosts if kind is not nn.Module]
    base = next((kind.__name__ for kind in kinds if kind in own.__mro__), "")
    if base and (own not in kinds or "forward" in vars(attention)):
        what = f"is a {own.__name__}" if own not in kinds else "has a forward of its own"
        return f"{what} in place of {base}'s, which would be lost: describe such a model by graftvit.models.Adapter"
    plain = AttentionHost in family.hosts.values()  # other hosts read projections of their own kinds
    for name in PROJECTIONS if plain else ():
        child = attention._modules.get(name)
        if child is not None and not isinstance(getattr(child, "weight", None), Tensor):
            return (
                f"has a {type(child).__name__} as `{name}`, without a weight of its own: put a layer with one "
                "there, as by merging adapters into it"
            )
    return ""


def refuse_hooks(model: nn.Module, role: str) -> None:
    """Raise UnsupportedModelError: an attention layer has hooks, which its host or another operator would not run."""
    for index, block in enumerate(blocks_of(model)):
        layer = attention_of(block)
        layer = getattr(layer, "original", layer)
        for part in (layer, getattr(layer, "attn_drop", None), getattr(layer, "softmax", None)):
            if isinstance(part, nn.Module) and (part._forward_hooks or part._forward_pre_hooks):
                raise UnsupportedModelError(
                    f"the attention of block {index} of the {role} has hooks, which would not run: remove them, or "
                    "put them on the block"
                )


def replaced_methods(model: nn.Module) -> dict[str, Any]:
    """Return what took the place of a method on one of a model's modules, by name: `blocks.0.forward`.

    Another method of the module itself, which its class chose, is not among them.
    """
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in model.named_modules()
        if not is_compiled(module)
        for name, value in vars(module).items()
        if callable(value)
        and callable(getattr(type(module), name, None))
        and getattr(value, "__func__", value) not in vars(type(module)).values()
    }


def refuse_replaced(model: nn.Module, *, functions: bool = False) -> None:
    """Raise UnsupportedModelError if a method between a model and its blocks was replaced, as by torch.compile.

    What is put in the place of a block would not run. With `functions` it is refused anywhere, but only if it is a
    plain function, which a copy of the model shares with it.
    """
    paths = [f".{path}." for path in paths_of(model)]
    for name, value in replaced_methods(model).items():
        owner = f".{name}".rpartition(".")[0] + "."
        if isinstance(value, FunctionType) if functions else any(path.startswith(owner) for path in paths):
            raise UnsupportedModelError(
                f"{name} of {type(model).__name__} was replaced, as by torch.compile, and would go on running the "
                "layers that the model has now: delete this attribute, and compile by model.compile()"
            )


# Sizes of any model of timm, of a family or not.


def image_size(model: nn.Module) -> tuple[int, int] | None:
    """Return the height and width of the images that a model was built for; None if unknown.

    A model that takes images of any size has a size once it was resized or converted.
    """
    family = find_family(model)
    return size_of(getattr(model, "patch_embed", None)) if family is None else family.known_size(model)


def patch_size(model: nn.Module) -> tuple[int, int]:
    """Return the height and width of a patch; one pixel if unknown, or if patches overlap, which fill any image."""
    family = find_family(model)
    if family is not None:
        return family.patch_size(model)
    size = getattr(getattr(model, "patch_embed", None), "patch_size", None) or (1, 1)
    height, width = to_2tuple(size)
    return int(height), int(width)


def position_grid(model: nn.Module) -> tuple[int, int]:
    """Return the rows and columns of the patches that a model's `pos_embed` is of."""
    return (find_family(model) or FAMILIES[0]).position_grid(model)


def image_channels(model: nn.Module) -> int:
    """Return the channels of the images that a model takes."""
    return (find_family(model) or FAMILIES[0]).channels(model)


def check_size(model: nn.Module, size: tuple[int, int]) -> None:
    """Raise UnsupportedModelError if a model that takes images of one size is given others."""
    family = family_of(model)
    fixed = family.image_size(model) if family.is_strict(model) else None
    if fixed is not None and size != fixed:
        raise UnsupportedModelError(
            f"images of {size[0]}x{size[1]} are given, and {type(model).__name__} takes {fixed[0]}x{fixed[1]} alone"
        )
    if fixed is None and not fills(getattr(model, "patch_embed", None), size):
        check_patches(model, size)


# Create a timm model at an image size, also where timm's constructor takes none.

CONSTRUCTORS: dict[str, Callable[..., nn.Module]] = {}
"""By name: constructors of a student's own file, which timm does not know."""
constructed: ContextVar[set[str] | None] = ContextVar("constructed", default=None)
"""The set that gets the names that are built."""


def find_constructor(architecture: str) -> Callable[..., nn.Module] | None:
    """Return the constructor of an architecture, whose name may have a tag; None for an unknown one."""
    name = split_model_name_tag(architecture)[0]
    return CONSTRUCTORS.get(name) or (model_entrypoint(name) if is_model(name) else None)


def construct(name: str, /, **arguments: Any) -> nn.Module:
    """Return `timm.create_model(name, **arguments)` without pretrained weights, also of a student's own file."""
    names = constructed.get()
    if names is not None:
        names.add(split_model_name_tag(name)[0])
    if name in CONSTRUCTORS:
        return CONSTRUCTORS[name](**{key: value for key, value in arguments.items() if value is not None})
    model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    return model


def create_timm_model(name: str, /, **arguments: Any) -> nn.Module:
    """Return `timm.create_model(name, **arguments)` without pretrained weights.

    A family whose constructor does not take `img_size`, or only checks it, is created and then resized.
    """
    family = family_named(name)
    late = not _takes_size(name) if family is None else not family.sized_when_built
    size = arguments.pop("img_size", None) if late else None
    model = construct(name, **arguments)
    if size is not None:
        size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        family_of(model).resize(model, size)
    return model


def constructor_arguments(architecture: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return `arguments` as timm's own constructor takes them: without `img_size` where it has no such argument."""
    family = family_named(architecture)
    takes_size = _takes_size(architecture) if family is None else family.takes_size
    return {key: value for key, value in arguments.items() if takes_size or key != "img_size"}


def _takes_size(architecture: str) -> bool:
    """Return whether timm's constructor of a model of no family takes `img_size`; true for a name that timm has not."""
    constructor = find_constructor(architecture)
    if constructor is None:
        return True
    known = vars(import_module(constructor.__module__)).values()
    kinds = [each for each in known if inspect.isclass(each) and hasattr(each, "forward_intermediates")]
    return not kinds or any("img_size" in inspect.signature(kind).parameters for kind in kinds)


def family_named(architecture: str) -> Family | None:
    """Return the family of a timm name; None for a name of no supported family."""
    module = getattr(find_constructor(architecture), "__module__", "")
    return next((each for each in FAMILIES if any(model.__module__ == module for model in each.models)), None)


# The refusal of image sizes that leave a model without tokens, or with broken patches.


def check_patches(model: nn.Module, size: tuple[int, int] | None = None) -> None:
    """Raise UnsupportedModelError if images of `size` (default: the model's own) have no patch, or a broken one."""
    size = image_size(model) if size is None else size
    patch = patch_size(model)
    if size is not None and any(side < least for side, least in zip(size, patch, strict=True)):
        raise UnsupportedModelError(
            f"images of {size[0]}x{size[1]} have no whole patch of {patch[0]}x{patch[1]}: give a larger img_size"
        )
    if size is not None and not fills(getattr(model, "patch_embed", None), size):
        raise UnsupportedModelError(
            f"images of {size[0]}x{size[1]} are not whole patches of {patch[0]}x{patch[1]}, which a model with "
            "dynamic_img_size needs: give another img_size"
        )
    family = find_family(model)
    if size is not None and family is not None:
        _check_stages(family.geometries(model, size), size)


def _check_stages(stages: list[Geometry], size: tuple[int, int]) -> None:
    empty = next((number for number, stage in enumerate(stages, 1) if min(stage.grid) < 1), None)
    if empty is not None:
        raise UnsupportedModelError(
            f"images of {size[0]}x{size[1]} leave no token in stage {empty}: give a larger img_size"
        )
