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
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..attention.base import QKV, Geometry, Heads, Operator
from ..attention.softmax import Softmax
from ..errors import UnsupportedModelError
from ..host import AttentionHost
from ..plan_syntax import KEEP
from .site import Family, Hosts, Site, attention_of, attention_place, submodule

LIBRARY = "transformers"
INTERFACE = "graftvit"
"""The name of our function among transformers' implementations of attention."""
PLAN = "graftvit_plan"
"""The setting of a tower's configuration that has its layer plan."""
CLASSIFIERS = (("head", "classifier"), ("head", "cls_classifier"), ("head_dist", "distillation_classifier"))
"""The names of classifiers, ours and those of transformers. DeiT has two."""
NORMS = ("q_norm", "k_norm")
"""Children of an attention layer that act on queries and keys."""


@dataclass(frozen=True)
class Tower:
    """Where a type of tower keeps its parts, in the names of its modules and of its configuration."""

    layers: str = "encoder.layers"
    """The end of the path of the list of layers."""
    prefix: tuple[str, ...] = ("cls",)
    """The kinds of prefix tokens, without registers."""
    registers: str = ""
    """The setting with the number of register tokens."""
    keeps_order: bool = True
    """Whether the patches stay in the order of the image."""
    takes_any_size: bool = False
    """Whether it takes images of any size, without being told to interpolate its positions."""

    def prefix_kinds(self, config: Any) -> tuple[str, ...]:
        """Return the kinds of prefix tokens: "cls", "dist", "reg0", …"""
        count = int(getattr(config, self.registers)) if self.registers else 0
        return (*self.prefix, *(f"reg{index}" for index in range(count)))


REGISTERS = "num_register_tokens"
CLIP = Tower()
VIT = Tower("layers")
DINO = Tower("encoder.layer", takes_any_size=True)
TOWERS = {
    "vit": VIT,
    "deit": Tower("layers", ("cls", "dist")),
    "beit": VIT,
    "ijepa": Tower("layers", ()),
    "vit_mae": Tower("layers", keeps_order=False),
    "vit_msn": VIT,
    "dinov2": DINO,
    "dinov2_with_registers": Tower("encoder.layer", registers=REGISTERS, takes_any_size=True),
    "dinov3_vit": Tower("layer", registers=REGISTERS, takes_any_size=True),
    "tipsv2_vision_model": Tower("encoder.layer", registers=REGISTERS),
    "internvl_vision": Tower("encoder.layer"),
    "aimv2_vision_model": Tower(prefix=()),
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


def is_transformers(kind: type) -> bool:
    """Return whether a class is of a model of transformers, which is not imported for that."""
    library: Any = sys.modules.get(LIBRARY)
    return library is not None and issubclass(kind, library.PreTrainedModel)


def tower_config(model: nn.Module) -> Any:
    """Return the configuration of the vision tower of a model of transformers."""
    config: Any = model.config
    return getattr(config, "vision_config", config)


def tower_of(model: nn.Module) -> Tower:
    """Return the row of a tower."""
    return TOWERS[tower_config(model).model_type]


VALID = "Dinov2Model or ViTForImageClassification"


def why_not(kind: Any) -> str:
    """Return why a class of transformers is not supported; empty for one that is."""
    config = kind.config_class
    vision = getattr(config, "sub_configs", {}).get("vision_config", config)
    name = str(getattr(vision, "model_type", ""))
    inputs = inspect.signature(kind.forward).parameters
    if "pixel_values" not in inputs:
        return f"{kind.__name__} of transformers takes no images: give a vision tower, such as {VALID}"
    if hasattr(kind, "forward_with_filtered_kwargs"):
        return (
            f"{kind.__name__} of transformers gives maps of some of its layers, and neither all tokens nor classes: "
            "load the same weights as the tower itself, by AutoModel.from_pretrained"
        )
    if "input_ids" in inputs:
        return f"{kind.__name__} takes text as well as images: give its vision tower alone, such as model.vision_model"
    if name not in TOWERS:
        return (
            f"{kind.__name__} is a model of transformers of type {name!r}, which is not supported; supported are "
            f"{', '.join(TOWERS)}"
        )
    return ""


def refuse_other(model: nn.Module) -> None:
    """Raise UnsupportedModelError, by name, for a model of transformers that is no supported tower."""
    if is_transformers(type(model)):
        raise UnsupportedModelError(why_not(type(model)))


def layer_paths(model: nn.Module) -> list[str]:
    """Return the names of the layers in order.

    Raises UnsupportedModelError: they are not where the table says.
    """
    tower = tower_of(model)
    for path, found in model.named_modules():
        if isinstance(found, nn.ModuleList) and f".{path}".endswith(f".{tower.layers}"):
            return [f"{path}.{index}" for index in range(len(found))]
    raise _of_another_version(type(model), f"layers `{tower.layers}`")


def _of_another_version(kind: type, part: str) -> UnsupportedModelError:
    version = sys.modules[LIBRARY].__version__
    return UnsupportedModelError(
        f"{kind.__name__} has no {part} in transformers {version}, as it has in 5.24: install that or a newer one"
    )


def embedding_of(model: nn.Module) -> nn.Conv2d:
    """Return the convolution that makes patches of images, the first module that sees them."""
    patch = pair(tower_config(model).patch_size)
    return next(each for each in model.modules() if isinstance(each, nn.Conv2d) and each.kernel_size == patch)


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

    Raises UnsupportedModelError: a mask of true and false, which hides tokens, or one that the operator does not take.
    """
    if attention_mask is not None and not attention_mask.is_floating_point():
        raise UnsupportedModelError(
            f"{type(getattr(module, 'original', module)).__name__} hides tokens by a mask, which a tower whose "
            "layers are hosted or converted does not support: give images without padding"
        )
    traits = getattr(getattr(module, "operator", None), "traits", None)
    if attention_mask is not None and traits is not None and not traits.bias:
        raise UnsupportedModelError(
            f"{type(getattr(module, 'original', module)).__name__} is given a mask, which its operator "
            f"{getattr(module, 'choice', '')} does not support: give images without a mask"
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

    shows_tokens = False

    _looks = False
    """Whether a call only looks for the projections."""

    def __init__(self, original: Any, operator: Operator | None = None) -> None:
        nn.Module.__init__(self)
        kept = vars(original).keys() - vars(nn.Module()).keys() - {"forward"}  # which accelerate replaces
        vars(self).update({name: vars(original)[name] for name in kept})
        self._parameters, self._buffers = original._parameters, original._buffers
        self._non_persistent_buffers_set = original._non_persistent_buffers_set
        self._modules = {name: child for name, child in original._modules.items() if name != "operator"}
        self.training = original.training
        self._original = (original,)
        self.operator = operator or Softmax()
        self.num_heads = int(original.q_proj.out_features) // int(original.head_dim)
        self.config = copy.copy(original.config)  # its own: the model's says how other layers attend
        self.config._attn_implementation = INTERFACE
        parts = (*(f"{part}_proj" for part in QKV), *NORMS)
        self.after_heads = tuple(name for name in original._modules if name not in (*parts, "operator"))
        register()

    @property
    def drop_rate(self) -> float:
        layer: Any = self
        return float(getattr(layer, "attention_dropout", getattr(layer, "dropout", 0.0)))

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

    def merge(self, out_BHND: Tensor, x: Tensor | None = None) -> Any:
        """Join the heads and project them back; return it as transformers' layer does."""
        out = out_BHND.transpose(1, 2).flatten(2)
        for name in self.after_heads:
            out = self._child(name, out)
        return out, None


# The family of towers.


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_tower(kind: type) -> bool:
    """Return whether a class is of a supported tower; torch.compile cannot look into transformers' classes itself."""
    return is_transformers(kind) and not why_not(kind)


class _Kind(type):
    """Of classes that are recognized by `matches`, because transformers' own are not imported."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, nn.Module) and bool(cast(Any, cls).matches(instance))


class _ModelKind(_Kind):
    """Of a class whose subclasses are recognized, too: torch.compile asks for these."""

    def __instancecheck__(cls, instance: object) -> bool:
        return issubclass(type(instance), cls)

    def __subclasscheck__(cls, kind: type) -> bool:
        return bool(_is_tower(kind))


class TowerModel(nn.Module, metaclass=_ModelKind):
    """A model of transformers that is a supported tower."""


class TowerAttention(nn.Module, metaclass=_Kind):
    """An attention layer of a tower, which calls transformers' `AttentionInterface`."""

    @staticmethod
    def matches(layer: nn.Module) -> bool:
        return _is_theirs(layer) and all(f"{part}_proj" in layer._modules for part in QKV)


class TowerLayer(nn.Module, metaclass=_Kind):
    """A layer of a tower."""

    @staticmethod
    def matches(layer: nn.Module) -> bool:
        return _is_theirs(layer) and attention_place(layer) in layer._modules


def _is_theirs(module: nn.Module) -> bool:
    return type(module).__module__.startswith(f"{LIBRARY}.models.")


@dataclass(frozen=True)
class Results:
    """What a tower gives for images."""

    tokens: Tensor
    pooled: Tensor
    logits: Tensor
    """The pooled features of a tower without a classifier, as timm's models without one give them."""


def base_of(model: nn.Module) -> nn.Module:
    """Return the part of a model that gives tokens, without a head; the model itself if it has none."""
    library: Any = sys.modules[LIBRARY]
    embedding, layers = embedding_of(model), submodule(model, layer_paths(model)[0])
    for child in model.children():
        if isinstance(child, library.PreTrainedModel) and {embedding, layers} <= set(child.modules()):
            return cast(nn.Module, child)
    return model


class Towers(Family):
    """Vision towers of transformers, as `TOWERS` lists them."""

    name = "transformers"
    models = (TowerModel,)
    blocks = (TowerLayer,)
    hosts: ClassVar[Hosts] = {TowerAttention: TowerHost}
    kept = KEEP
    keeps_all = True
    cannot: ClassVar = {
        "none": "has no other layers in which tokens meet: name an operator, such as uniform",
        "without": "has no part to give up: leave it out",
        **dict.fromkeys(
            ("copying", "mirroring", "measuring", "masking"),
            "is a model of transformers",
        ),
    }

    def paths(self, model: nn.Module) -> list[list[str]]:
        return [layer_paths(model)]

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        return pair(tower_config(model).image_size)

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        return [geometry_for(model, size)]

    def resize(self, model: nn.Module, size: tuple[int, int]) -> None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is a model of transformers, which has the image size of its configuration"
        )

    def sizes(self, block: nn.Module) -> tuple[int, int, int]:
        layer = attention_of(block)
        if "q_proj" not in layer._modules:
            raise _of_another_version(type(layer), "`q_proj`")
        head_dim = int(layer.head_dim)
        return int(layer.q_proj.in_features), int(layer.q_proj.out_features) // head_dim, head_dim

    def attention_input(self, block: nn.Module) -> None:
        return None

    def prefix(self, model: nn.Module, site: Site) -> tuple[str, ...]:
        return tower_of(model).prefix_kinds(tower_config(model))

    def has_bias(self, model: nn.Module, site: Site) -> bool:
        config, kinds = tower_config(model), ("relative", "shared_relative")
        return any(getattr(config, f"use_{kind}_position_bias", False) for kind in kinds)

    def classifiers(self, model: nn.Module) -> dict[str, nn.Module]:
        found = [(name, model._modules.get(theirs)) for name, theirs in CLASSIFIERS]
        return {name: head for name, head in found if head is not None}

    def num_classes(self, model: nn.Module) -> int:
        return int(cast(Any, model).config.num_labels) if self.classifiers(model) else 0

    def is_strict(self, model: nn.Module) -> bool:
        return not tower_of(model).takes_any_size

    def fixed_size(self, model: nn.Module) -> tuple[int, int] | None:
        return self.image_size(model) if self.is_strict(model) else None

    def image_step(self, model: nn.Module) -> tuple[int, int]:
        return pair(tower_config(model).patch_size)

    def takes_any_grid(self, model: nn.Module) -> bool:
        return True

    def grid_of(self, model: nn.Module, images: Any, patches: Any) -> tuple[int, int]:
        return patches.shape[2], patches.shape[3]

    def why_no_grid(self, model: nn.Module) -> str:
        return "" if tower_of(model).keeps_order else "shows its layers some patches in a random order"

    def embedding(self, model: nn.Module) -> nn.Module:
        return embedding_of(model)

    def last_tokens(self, model: nn.Module) -> nn.Module:
        return base_of(model)

    def features(self, model: nn.Module, images: Tensor) -> Results:
        base: list[Any] = []
        inputs: list[Tensor] = []
        hooks = [base_of(model).register_forward_hook(lambda _, x, out: base.append(out))]
        hooks += [
            head.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
            for head in self.classifiers(model).values()
        ]
        try:
            out: Any = cast(Any, model)(pixel_values=images, return_dict=True)
        finally:
            for hook in hooks:
                hook.remove()
        pooled = torch.stack(inputs).mean(0) if inputs else self._pooled(model, base[0])
        logits = out.get("logits")
        return Results(self.tokens(base[0]), pooled, pooled if logits is None else logits)

    def _pooled(self, model: nn.Module, out: Any) -> Tensor:
        """Return the pooled features of a tower without a classifier: its own, else the class token or the mean."""
        pooled, tokens = out.get("pooler_output"), self.tokens(out)
        if pooled is not None:
            return torch.as_tensor(pooled)
        return tokens[:, 0] if "cls" in tower_of(model).prefix else tokens.mean(1)

    def tokens(self, features: Any) -> Tensor:
        return features.tokens if isinstance(features, Results) else features.last_hidden_state

    def head(self, model: nn.Module, features: Any, *, pre_logits: bool = False) -> Tensor:
        return features.pooled if pre_logits else features.logits

    def predict(self, model: nn.Module, images: Tensor) -> Tensor:
        out: Any = cast(Any, model)(pixel_values=images, return_dict=True)
        logits: Tensor | None = out.get("logits")
        return self._pooled(model, out) if logits is None else logits

    def feature_widths(self, model: nn.Module) -> tuple[int, int]:
        width = int(tower_config(model).hidden_size)
        head: Any = self.classifiers(model).get("head")
        return int(getattr(head, "in_features", width)), width

    def initialize(self, model: nn.Module) -> None:
        model.load_state_dict(type(model)(cast(Any, model).config).state_dict())

    def describe_plan(self, model: Any, plan: str | None) -> None:
        if plan is None:  # it is loaded as a tower all the same
            setattr(model.config, PLAN, f"*: {KEEP}")
            return
        register()
        model.set_attn_implementation(INTERFACE)
        setattr(model.config, PLAN, plan)


FAMILIES = (Towers(),)
