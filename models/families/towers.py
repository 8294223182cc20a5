"""Vision towers of `transformers`: models that somebody holds in memory, without an import of that package.

Every tower of the table calls the function that `config._attn_implementation` names with q, k and v (B, H, N, D) after
norms and rotary embedding, and projects what it returns. A host takes the place of such a layer: it has the layer's
parameters under the same names, runs the layer's own `forward`, and is given to the one function that is registered
here, which calls the host's operator.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from ..attention.base import QKV, AttentionOperator, Geometry, Heads, LayerShape, Operator, Projections
from ..attention.softmax import Softmax
from ..converted import ConvertedAttention, TokenGrid
from ..errors import ConfigError, UnsupportedModelError
from ..host import AttentionHost
from ..layer_plan import Choice, check_choice, create_operator
from ..plan_syntax import KEEP, NONE, parse_plan, plan_text
from .site import Site, submodule

LIBRARY = "transformers"
INTERFACE = "graftvit"
"""The name of our function among transformers' implementations of attention."""
PLAN = "graftvit_plan"
"""The setting of a tower's configuration that has its layer plan."""
NORMS = ("q_norm", "k_norm")
"""Children of an attention layer that act on queries and keys."""


@dataclass(frozen=True)
class Tower:
    """Where a type of tower keeps its parts, in the names of its modules and of its configuration."""

    layers: str = "encoder.layers"
    """The end of the path of the list of layers."""
    attention: str = "self_attn"
    """The attention layer within a layer."""
    prefix: tuple[str, ...] = ("cls",)
    """The kinds of prefix tokens, without registers."""
    registers: str = ""
    """The setting with the number of register tokens."""
    keeps_order: bool = True
    """Whether the patches stay in the order of the image."""

    def prefix_kinds(self, config: Any) -> tuple[str, ...]:
        """Return the kinds of prefix tokens: "cls", "dist", "reg0", …"""
        count = int(getattr(config, self.registers)) if self.registers else 0
        return (*self.prefix, *(f"reg{index}" for index in range(count)))


CLIP = Tower()
VIT = Tower("layers", "attention")
DINO = Tower("encoder.layer", "attention")
TOWERS = {
    "vit": VIT,
    "deit": Tower("layers", "attention", ("cls", "dist")),
    "beit": VIT,
    "ijepa": Tower("layers", "attention", ()),
    "vit_mae": Tower("layers", "attention", keeps_order=False),
    "vit_msn": VIT,
    "dinov2": DINO,
    "dinov2_with_registers": Tower("encoder.layer", "attention", registers="num_register_tokens"),
    "dinov3_vit": Tower("layer", "attention", registers="num_register_tokens"),
    "tipsv2_vision_model": Tower("encoder.layer", "attention", registers="num_register_tokens"),
    "internvl_vision": DINO,
    "aimv2_vision_model": Tower(attention="attention", prefix=()),
    "siglip_vision_model": Tower(prefix=()),
    "janus_vision_model": Tower(prefix=()),
    "clip_vision_model": CLIP,
    "metaclip_2_vision_model": CLIP,
    "chinese_clip_vision_model": CLIP,
    "altclip_vision_model": CLIP,
    "clipseg_vision_model": CLIP,
    "mlcd_vision_model": CLIP,
    "kosmos_2_vision_model": CLIP,
    "git_vision_model": CLIP,
    "owlvit_vision_model": CLIP,
    "owlv2_vision_model": CLIP,
}
"""By the type in the configuration of the tower. A new type is a row, if its layers call `AttentionInterface`."""


# Find the parts of a tower.


def is_transformers(model: nn.Module) -> bool:
    """Return whether a model is one of transformers, which is not imported for that."""
    library: Any = sys.modules.get(LIBRARY)
    return library is not None and isinstance(model, library.PreTrainedModel)


def tower_config(model: nn.Module) -> Any:
    """Return the configuration of the vision tower of a model of transformers."""
    config: Any = model.config
    return getattr(config, "vision_config", config)


def tower_of(model: nn.Module) -> Tower:
    """Return the row of a model of transformers.

    Raises UnsupportedModelError: its type is not in the table, or it takes text as well.
    """
    name, kind = type(model).__name__, str(tower_config(model).model_type)
    if "input_ids" in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"{name} takes text as well as images: give its vision tower alone, such as model.vision_model"
        )
    if kind not in TOWERS:
        raise UnsupportedModelError(
            f"{name} is a model of transformers of type {kind!r}, which is not supported; supported are "
            f"{', '.join(TOWERS)}"
        )
    return TOWERS[kind]


def layer_paths(model: nn.Module) -> list[str]:
    """Return the names of the layers in order.

    Raises UnsupportedModelError: they are not where the table says, or have another attention.
    """
    tower, config = tower_of(model), tower_config(model)
    for path, found in model.named_modules():
        if isinstance(found, nn.ModuleList) and f".{path}".endswith(f".{tower.layers}"):
            layers = [layer._modules.get(tower.attention) for layer in found]
            if len(layers) == config.num_hidden_layers and all(map(_is_attention, layers)):
                return [f"{path}.{index}" for index in range(len(layers))]
    version = sys.modules[LIBRARY].__version__
    raise UnsupportedModelError(
        f"{type(model).__name__} has no layers `{tower.layers}` with `{tower.attention}` in transformers {version}, as "
        "it has in 5.24: install that or a newer one"
    )


def _is_attention(layer: nn.Module | None) -> bool:
    return layer is not None and all(f"{part}_proj" in layer._modules for part in QKV)


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attention layers of a tower, or what is in their places, by their names in the model."""
    name = tower_of(model).attention
    paths = [f"{path}.{name}" for path in layer_paths(model)]
    return {path: submodule(model, path) for path in paths}


def put_attention(model: nn.Module, path: str, attention: nn.Module) -> None:
    """Put a module in the place of an attention layer."""
    parent, _, name = path.rpartition(".")
    submodule(model, parent)._modules[name] = attention


def embedding_of(model: nn.Module) -> nn.Conv2d:
    """Return the convolution that makes patches of images, the first module that sees them."""
    patch = pair(tower_config(model).patch_size)
    return next(each for each in model.modules() if isinstance(each, nn.Conv2d) and each.kernel_size == patch)


def image_size(model: nn.Module) -> tuple[int, int]:
    """Return the height and width of the images that a tower was configured for."""
    return pair(tower_config(model).image_size)


def geometry_for(model: nn.Module, size: tuple[int, int]) -> Geometry:
    """Return the tokens for images of a size (height, width)."""
    embedding = embedding_of(model)
    rows, columns = (
        (side - kernel) // stride + 1
        for side, kernel, stride in zip(size, embedding.kernel_size, embedding.stride, strict=True)
    )
    return Geometry(len(tower_of(model).prefix_kinds(tower_config(model))), (rows, columns))


def pair(size: Any) -> tuple[int, int]:
    """Return height and width of one number or two."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def tower_sites(model: nn.Module) -> Iterator[Site]:
    """Yield the layers of a tower with the tokens and heads of their attention."""
    geometry = geometry_for(model, image_size(model))
    for index, path in enumerate(layer_paths(model)):
        layer: Any = submodule(model, f"{path}.{tower_of(model).attention}")
        heads, head_dim = sizes_of(layer)
        yield Site(
            index, str(index), 0, index, path, int(layer.q_proj.in_features), heads, head_dim, geometry
        )


def sizes_of(layer: Any) -> tuple[int, int]:
    """Return the number of heads of an attention layer, and the width of a head."""
    head_dim = int(layer.head_dim)
    return int(layer.q_proj.out_features) // head_dim, head_dim


# The function that transformers calls, and the layer that it is called for.


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return the output (B, N, H, D) of an attention layer for q, k and v (B, H, N, D): a host's operator, or softmax.

    `attention_mask` is added to the logits: a relative position bias, (1, H, N, N).

    Raises UnsupportedModelError: a mask of true and false, which hides tokens.
    """
    if attention_mask is not None and not attention_mask.is_floating_point():
        raise UnsupportedModelError(
            f"{type(getattr(module, 'original', module)).__name__} hides tokens by a mask, which a tower whose "
            "layers are hosted or converted does not support: give images without padding"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    heads = Heads(query, key, value, attention_mask, scale, dropout, getattr(module, "geometry", None))
    out = module.see(heads) if isinstance(module, TowerHost) else Softmax()(heads)
    return out.transpose(1, 2), None


def _padding(attention_mask: Tensor | None = None, **others: Any) -> Tensor | None:
    """Return the mask that a user gave: transformers makes one of all tokens where it exports a model."""
    return attention_mask


def register() -> None:
    """Register `attend` with transformers, which has been imported."""
    library: Any = sys.modules[LIBRARY]
    library.AttentionInterface.register(INTERFACE, attend)
    library.AttentionMaskInterface.register(INTERFACE, _padding)


class _Seen(Exception):  # noqa: N818 - it carries a result, no error
    """Leaves the `forward` of a layer with what its operator would get."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.heads = heads


class TowerHost(AttentionHost):
    """An attention layer of a tower with any operator; `forward` is the layer's own."""

    _looks = False
    """Whether a call only looks for the projections."""

    def __init__(self, original: nn.Module, operator: Operator | None = None) -> None:
        nn.Module.__init__(self)
        module = vars(nn.Module())
        vars(self).update({name: value for name, value in vars(original).items() if name not in module})
        self._parameters, self._buffers = original._parameters, original._buffers
        self._non_persistent_buffers_set = original._non_persistent_buffers_set
        self._modules = {name: child for name, child in original._modules.items() if name != "operator"}
        self.training = original.training
        self._original = (original,)
        self.operator = operator or Softmax()
        layer: Any = original
        self.config = copy.copy(layer.config)  # its own: the model's says how other layers attend
        self.config._attn_implementation = INTERFACE
        parts = (*(f"{part}_proj" for part in QKV), *NORMS)
        self.after_heads = tuple(name for name in original._modules if name not in (*parts, "operator"))
        register()

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """Return what transformers' layer does, with the operator in place of its softmax."""
        return type(self.original).forward(cast(Any, self), *inputs, **keywords)

    def see(self, heads: Heads) -> Tensor:
        """Return the output (B, H, N, D) for the projections of a call."""
        if self._looks:
            raise _Seen(heads)
        return self.attend(heads)

    def heads_of(self, *inputs: Any, **keywords: Any) -> Heads:
        """Return the projections for the arguments with which transformers' layer is called."""
        self._looks = True
        try:
            self.forward(*inputs, **keywords)
        except _Seen as seen:
            return seen.heads
        finally:
            self._looks = False
        raise UnsupportedModelError(
            f"{type(self.original).__name__} does not call transformers' AttentionInterface"
        )

    def merge(self, out_BHND: Tensor, x: Tensor) -> Any:
        """Join the heads and project them back; return it as transformers' layer does."""
        out = out_BHND.transpose(1, 2).flatten(2)
        for name in self.after_heads:
            out = self._child(name, out)
        return out, None


# Convert the layers of a tower.

M = TypeVar("M", bound=nn.Module)


class TowerGrid(TokenGrid):
    """The geometry that all layers of a tower share, read from the patches (B, C, rows, columns) of each batch."""

    def __call__(self, module: nn.Module, inputs: object, patches: Tensor) -> None:
        self.geometry = Geometry(self.geometry.num_prefix, (patches.shape[2], patches.shape[3]))


class ConvertedTower(ConvertedAttention, TowerHost):
    """A converted layer of a tower."""


def convert_tower(model: M, plan: str | Mapping[Any, str], *, weights: str = "all") -> M:
    """Return a copy of a tower with the operators of `plan`, of the same class, as `conversion.convert` describes."""
    student = softmax_only(copy.deepcopy(model))
    choices = parse_plan(plan, len(layer_paths(student)))
    for choice in choices:
        if choice.operator == NONE:
            raise ConfigError(
                "plan: 'none' takes the attention out of a layer of a pyramid; a plain vision transformer has no other "
                "layers in which tokens meet: name an operator, such as uniform"
            )
        check_choice(choice)
    initialize(student, [index for index, choice in enumerate(choices) if choice.operator != KEEP], weights)
    put_operators(student, choices, fresh=weights == "none")
    return student


def put_operators(model: nn.Module, choices: Sequence[Choice], *, fresh: bool = False) -> None:
    """Convert the layers of a tower in place, and write the plan into its configuration."""
    tokens = TowerGrid(model, geometry_for(model, image_size(model)), image_size(model))
    first: dict[str, AttentionOperator] = {}
    for index, (path, original) in enumerate(attention_layers(model).items()):
        choice = choices[index]
        if choice.operator == KEEP:
            continue
        operator = create_operator(choice, LayerShape(*sizes_of(original), tokens.geometry))
        if fresh:
            operator.start_fresh()
        if first.setdefault(str(choice), operator) is not operator:
            operator.share(first[str(choice)])
        check_layer(model, original, operator, choice, index)
        operator.adopt(Projections(original))
        layer = ConvertedTower(original, operator.to(next(original.parameters())), choice, tokens)
        layer.mark()
        put_attention(model, path, layer)
    embedding_of(model).register_forward_hook(tokens)
    register()
    theirs: Any = model
    theirs.set_attn_implementation(INTERFACE)
    setattr(theirs.config, PLAN, plan_text(tuple(choices)))


def with_operators(kind: type[nn.Module], plan: str) -> type[nn.Module]:
    """Return a class of transformers whose models are converted when they are built, to load a converted tower."""

    def build(self: nn.Module, config: Any, *inputs: Any, **keywords: Any) -> None:
        kind.__init__(self, config, *inputs, **keywords)
        put_operators(self, parse_plan(plan, len(layer_paths(self))))

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})


def softmax_only(model: M) -> M:
    """Put the original layers back into a tower in place of converted ones, and return it."""
    for path, layer in attention_layers(model).items():
        if isinstance(layer, TowerHost):
            put_attention(model, path, layer.original)
    hooks = embedding_of(model)._forward_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, TowerGrid)]:
        del hooks[key]
    return model


def initialize(model: nn.Module, layers: Sequence[int], weights: str) -> None:
    """Keep the weights of a tower that `weights` selects, as of `conversion.convert`, and draw the others."""
    if weights == "all":
        return
    fresh = type(model)(cast(Any, model).config)
    if weights == "none":
        model.load_state_dict(fresh.state_dict())
        return
    own, drawn = (list(attention_layers(each).values()) for each in (model, fresh))
    for index in layers:
        own[index].load_state_dict(drawn[index].state_dict())


def check_layer(
    model: nn.Module, attention: Any, operator: AttentionOperator, choice: Choice, index: int
) -> None:
    """Raise UnsupportedModelError if a layer has a part that the operator does not support."""
    keep, traits, config = f"keep it ('{index}: softmax')", operator.traits, tower_config(model)
    has_bias = any(
        getattr(config, name, False)
        for name in ("use_relative_position_bias", "use_shared_relative_position_bias")
    )
    if has_bias and not traits.bias:
        raise UnsupportedModelError(
            f"plan: layer {index} has a relative position bias, which {choice.operator} does not support; {keep}"
        )
    drop = dropout_of(attention)
    if drop > 0 and not traits.dropout:
        raise UnsupportedModelError(
            f"plan: layer {index} drops {drop:g} of its attention in training, and {choice.operator} has no map to "
            f"drop from; set the dropout of the configuration to 0, or {keep}"
        )
    if traits.needs_grid and not tower_of(model).keeps_order:
        raise UnsupportedModelError(
            f"plan: {choice.operator} needs the whole token grid, and {type(model).__name__} shows the layers a part "
            f"of the patches in a random order; {keep}"
        )


def dropout_of(attention: Any) -> float:
    """Return the part of its map that an attention layer drops in training."""
    found = getattr(attention, "attention_dropout", getattr(attention, "dropout", 0.0))
    return float(found if isinstance(found, int | float) else getattr(found, "p", 0.0))
