"""A site is one block of a model with its place; a family knows where the blocks of its timm models are."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar, cast

from torch import Tensor, nn

from ..attention.base import Geometry, LayerShape
from ..errors import JsonDict, UnsupportedModelError
from ..host import AttentionHost, has_bias
from ..plan_syntax import AS_IT_IS
from ..token_merging import OffsetConv2d, TokenMerging

# The attributes of timm's models that we read, as types, because `nn.Module` does not declare them.


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


PLACES = ("attn", "attention", "self_attn")
"""The names of an attention layer in its block: that of timm, and those of other libraries."""


OWN_PLACES: dict[type[nn.Module], str] = {}
"""The names for kinds of blocks that an adapter reads."""


def attention_place(block: nn.Module) -> str:
    """Return the name of the attention layer in a block."""
    own = OWN_PLACES.get(type(block))
    return own or next((name for name in PLACES if name in block._modules), PLACES[0])


def attention_of(block: nn.Module) -> Any:
    """Return the attention layer of a block, or what is in its place; None for a block that has none."""
    return block._modules.get(attention_place(block))


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


# What stands in a block that has no attention.


class NoAttention(nn.Module):
    """Add nothing to the tokens: the block is its MLP alone, as in the early stages of LIT (arXiv:2105.14217)."""

    plan_size: tuple[int, int] | None = None
    """The image size for which the model was converted."""

    def forward(self, x: Tensor, *more: Any, **options: Any) -> Tensor:
        return x.new_zeros(x.shape[0], *(1,) * (x.ndim - 1))  # a row for each image, for timm's DropPath

    def set_input_size(self, *sizes: Any) -> None:
        """Do nothing: there is nothing that depends on the size."""


M = TypeVar("M", bound=nn.Module)
Blocks = Mapping[type[nn.Module], type[nn.Module]]
Hosts = Mapping[type[nn.Module], type[AttentionHost]]


@dataclass(frozen=True)
class Site:
    """A block of a model: its place, and the tokens and heads of its attention."""

    index: int
    """The number among all blocks of the model, as in plans and records."""
    name: str
    """The same with its stage, as plans name it: "stage2.0"; the number alone where there is one stage."""
    stage: int
    """From 0; a plain vision transformer has one stage."""
    place: int
    """The number in the stage."""
    path: str
    """The name of the block in the model, such as "layers.0.blocks.1"."""
    width: int
    num_heads: int
    """0 for a block without attention."""
    head_dim: int
    geometry: Geometry | None
    """The tokens of the stage for images of the model's size; None if the model has no size."""

    @property
    def shape(self) -> LayerShape:
        """Return the sizes of the block's attention.

        Raises UnsupportedModelError: the model was built without an image size.
        """
        if self.geometry is None:
            raise UnsupportedModelError(
                f"this model was built without an image size, so the number of tokens of {self.path} is unknown: "
                "build it with img_size, or resize it (graftvit.models.conversion.resize)"
            )
        return LayerShape(self.num_heads, self.head_dim, self.geometry, self.width)

    def block(self, model: nn.Module) -> Block:
        """Return the block of this site in `model`."""
        return cast(Block, submodule(model, self.path))

    def layer(self, model: nn.Module) -> Any:
        """Return the attention layer of this site in `model`, or what is in its place."""
        return attention_of(self.block(model))

    def layer_path(self, model: nn.Module) -> str:
        """Return the name of the attention layer of this site in `model`."""
        return f"{self.path}.{attention_place(self.block(model))}"

    def replace_block(self, model: nn.Module, block: nn.Module) -> None:
        """Put another block in this place."""
        replace_block(model, self.path, block)


def valueless(model: M) -> M:
    """Return a copy of a model without values, on the meta device, which computes only shapes."""
    tensors = (*model.parameters(), *model.buffers())
    memo: dict[int, Any] = {id(each): each.detach().to("meta") for each in tensors}
    memo |= {id(each): nn.Parameter(memo[id(each)], False) for each in model.parameters()}
    return copy.deepcopy(model, memo)


def shallow(module: M) -> M:
    """Return a module with the same parameters and buffers whose children can be replaced."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def listed(like: nn.Module, modules: Sequence[nn.Module]) -> nn.Module:
    """Return modules in a list of the kind that a model has them in."""
    return nn.Sequential(*modules) if isinstance(like, nn.Sequential) else nn.ModuleList(modules)


def submodule(model: nn.Module, path: str) -> nn.Module:
    """Return a submodule by its registered name, even while another attribute hides that name (`replay.py`)."""
    for name in filter(None, path.split(".")):
        model = cast(nn.Module, model._modules[name])
    return model


def replace_block(model: nn.Module, path: str, block: nn.Module) -> None:
    """Put another block in the place that a path names."""
    parent, _, name = path.rpartition(".")
    submodule(model, parent)._modules[name] = block


def _open(opened: dict[str, nn.Module], path: str) -> nn.Module:
    """Return the twin of a part of a model, whose children can be replaced, with those of the parts that it is in."""
    if path not in opened:
        parent, _, name = path.rpartition(".")
        outer = _open(opened, parent)
        opened[path] = outer._modules[name] = shallow(cast(nn.Module, outer._modules[name]))
    return opened[path]


def _end_with(opened: dict[str, nn.Module], path: str) -> None:
    """Leave out what comes after a block in every list that it is in."""
    while path:
        path, _, name = path.rpartition(".")
        parent = opened[path]
        if isinstance(parent, nn.Sequential | nn.ModuleList):
            names = list(parent._modules)
            for later in names[names.index(name) + 1 :]:
                del parent._modules[later]


def size_of(embedding: Any) -> tuple[int, int] | None:
    """Return the height and width of the images that a patch embedding was built for; None if it takes any."""
    size = getattr(embedding, "img_size", None)
    if isinstance(size, int):
        return size, size
    return None if size is None else (int(size[0]), int(size[1]))


def convolved(convolution: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of the output of a convolution."""
    sides: Any = zip(
        size, convolution.kernel_size, convolution.stride, convolution.padding, strict=True
    )  # fmt: skip
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side, kernel, stride, padding in sides)
    return height, width


def merged_grid(merge: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of the output of a merge or patch embedding that is a convolution."""
    return convolved(merge.dconv if isinstance(merge, TokenMerging) else merge.proj, size)


def widths(projection: Any) -> tuple[int, int]:
    """Return the widths of the output and of the input of a linear layer, or of a convolution of one pixel."""
    if isinstance(projection, nn.Conv2d):
        return projection.out_channels, projection.in_channels
    return int(projection.out_features), int(projection.in_features)


@dataclass(frozen=True)
class NativeParts:
    """The components of a model's blocks and embeddings, apart from sizes."""

    layer_scale: float | None  # initial value; None without LayerScale
    registers: int
    pre_norm: bool  # a norm between the embedding and the first block
    activation: str  # timm's name where it has one
    mlp: str  # "MLP", "SwiGLU" or "GLU", with " with norm" where a norm sits inside
    position: tuple[str, ...]  # of "learned absolute", "relative bias", "shared relative bias", "rotary"
    qk_norm: bool
    attention_norm: bool  # a norm on the attention output before its projection
    gate: bool
    qkv_bias: bool
    pooling: str


class Handle(Protocol):
    """What ends a watch."""

    def remove(self) -> None: ...


@dataclass(eq=False)
class _Shown:
    """A forward hook that shows the output of a module, as `read` returns it."""

    see: Callable[[Any], None]
    read: Callable[[Any], Any] | None = None

    def __call__(self, module: nn.Module, inputs: object, out: Any) -> None:
        self.see(out if self.read is None else self.read(out))


OF_PLAIN = ("copying", "mirroring", "measuring", "masking")
"""What is for plain vision transformers alone: words of `Family.cannot`."""


def named_heads(model: nn.Module) -> dict[str, nn.Module]:
    """Return the heads of a model that has one, or one more for a distillation token, by name."""
    found = {name: model._modules.get(name) for name in ("head", "head_dist")}
    return {name: head for name, head in found.items() if head is not None}


class Family(ABC):
    """Models that are built in one way. A new family is a file in this folder with a table `FAMILIES`."""

    name: str
    models: tuple[type[nn.Module], ...]
    blocks: tuple[type[nn.Module], ...]
    hosts: ClassVar[Hosts]
    """The host of each kind of attention layer: how q, k and v are computed, and over which pairs its softmax is."""
    whole: ClassVar[Blocks] = {}
    """For blocks that give their attention less than the whole grid: the same block, which gives it all."""
    post_norm: tuple[type[nn.Module], ...] = ()
    """Blocks whose attention gets the tokens without `norm1`, which comes after it."""
    kept = AS_IT_IS
    """How a plan names a layer that is not converted: `softmax` where that is what timm's layer computes."""
    keeps_all = False
    """A converted layer keeps every part of timm's layer, so it can be converted again."""
    gives_up: tuple[str, ...] = ()
    """Parts of a layer that a conversion may give up, of the words of `without`."""
    cannot: ClassVar[Mapping[str, str]] = dict.fromkeys(OF_PLAIN, "is a pyramid")
    """What is not possible with these models, and why: of none, without, copying, mirroring, measuring, masking."""
    sized_when_built = True
    """timm's constructor takes `img_size`, and builds parts for it."""
    takes_size = True
    """timm's constructor takes `img_size`."""
    resized_when_loaded = False
    """Weights for images of another size are loaded at their own, and the model is then resized."""
    reads_attention = True
    """Whether layers of these models are hosted, converted and looked at; without it only their outputs are read."""
    exported_hosted = False
    """torch cannot export timm's layers to ONNX, and can export their hosts."""
    rerun: tuple[str, ...] = ("blocks",)
    """The list, in each of the modules `recomputed`, whose parts run again in the backward pass."""
    told_by = ""
    """Prefix of the weights that tell whether a file has timm's names; those of a head never do."""
    merging: type[TokenMerging] = TokenMerging
    """Deformable merging with the input and output of this family's merges."""

    def merges(self, model: nn.Module) -> list[str]:
        """Return the names of the parts that merge tokens, one before each stage but the first."""
        return []

    def size_arguments(self, model: nn.Module) -> dict[str, Any]:
        """Return the arguments that build a model again that was resized after it was built."""
        return {}

    def host(self, model: nn.Module, block: nn.Module) -> AttentionHost:
        """Return a native host for the attention layer of a block, without putting it there.

        Raises UnsupportedModelError: the family has no host for such a layer.
        """
        attention = attention_of(block)
        attention = getattr(attention, "original", attention)
        kind = next((host for layer, host in self.hosts.items() if isinstance(attention, layer)), None)
        if kind is None:
            raise UnsupportedModelError(
                f"{type(block).__name__} with {type(attention).__name__} is not supported; "
                f"supported in {self.name} are " + ", ".join(layer.__name__ for layer in self.hosts)
            )
        host = kind(attention)
        host._block = (block,)
        return host

    def takes(self, model: nn.Module) -> bool:
        """Return whether a model is of this family."""
        return isinstance(model, self.models)

    def check(self, model: nn.Module) -> None:
        """Raise UnsupportedModelError if a model, whose blocks are known, cannot be read after all."""
        return

    def native_parts(self, model: nn.Module) -> NativeParts | None:
        """Return the parts of blocks and embeddings that all layers share; None where each stage has its own."""
        return None

    def has_bias(self, model: nn.Module, site: Site) -> bool:
        """Return whether a relative position bias is added to the logits of a site."""
        return has_bias(site.layer(model))

    def attention_input(self, block: nn.Module) -> nn.Module | None:
        """Return the module whose output a block's attention gets: `norm1`, unless that comes after the attention.

        None where the block gives its attention more than that, and so has to run as a whole.
        """
        return nn.Identity() if isinstance(block, self.post_norm) else block.get_submodule("norm1")

    def prefix(self, model: nn.Module, site: Site) -> tuple[str, ...]:
        """Return the kinds of prefix tokens in the stage of a site; in a pyramid a class token is the only one."""
        return ("cls",) * site.shape.geometry.num_prefix

    def classifiers(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the layers after the pooled features, by name."""
        found = vit(model).get_classifier()
        if not isinstance(found, nn.Module):
            return {}
        return {"head": found._modules.get("fc") or found}  # timm's ClassifierHead pools before its `fc`

    def fixed_size(self, model: nn.Module) -> tuple[int, int] | None:
        """Return the only size (height, width) of images that a model takes; None if it takes any."""
        described = getattr(model, "pretrained_cfg", None) or {}
        if described.get("fixed_input_size"):
            return self.image_size(model)
        embedding = getattr(model, "patch_embed", None)
        return size_of(embedding) if getattr(embedding, "strict_img_size", True) else None

    def known_size(self, model: nn.Module) -> tuple[int, int] | None:
        """Return the size (height, width) that a model was built for or resized to; None if it was never told one."""
        return size_of(getattr(model, "patch_embed", None))

    def patch_size(self, model: nn.Module) -> tuple[int, int]:
        """Return the height and width of a patch; one pixel if patches overlap, which fill any image."""
        size = getattr(getattr(model, "patch_embed", None), "patch_size", None) or (1, 1)
        return int(size[0]), int(size[1])

    def position_grid(self, model: nn.Module) -> tuple[int, int]:
        """Return the rows and columns of the patches that a model's `pos_embed` is of."""
        height, width = vit(model).patch_embed.grid_size
        return int(height), int(width)

    def channels(self, model: nn.Module) -> int:
        """Return the channels of the images that a model takes."""
        embedding = getattr(model, "patch_embed", model)  # a tower of transformers has its own name for it
        found = (each for each in embedding.modules() if isinstance(each, nn.Conv2d))
        return next((each.in_channels for each in found), 3)

    def image_step(self, model: nn.Module) -> tuple[int, int]:
        """Return the height and width of which images are multiples; one pixel where any size is padded or cut."""
        return 1, 1

    @abstractmethod
    def paths(self, model: nn.Module) -> list[list[str]]:
        """Return the names of the blocks, stage by stage."""

    @abstractmethod
    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        """Return the height and width of the images that the model is meant for; None if it has no size."""

    @abstractmethod
    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        """Return the tokens of each stage for images of this size (height, width)."""

    def last_geometry(self, model: nn.Module, size: tuple[int, int]) -> Geometry:
        """Return the tokens after the final norm: those of the last stage, and those that join after its blocks."""
        return self.geometries(model, size)[-1]

    @abstractmethod
    def resize(self, model: nn.Module, size: tuple[int, int]) -> None:
        """Prepare the model for images of another size, and resample what is tied to the size."""

    def with_blocks(self, model: nn.Module, blocks: Sequence[nn.Module], *, cut: bool) -> nn.Module:
        """Return a model that shares everything with `model` except its blocks.

        `blocks` are all blocks of the model, or its first ones: then the model ends with the last of them. With `cut`
        only the blocks count, and what comes after the last of them is left out where that is possible.
        """
        paths = [path for stage in self.paths(model) for path in stage]
        opened = {"": shallow(model)}
        for path, block in zip(paths, blocks, strict=False):
            parent, _, name = path.rpartition(".")
            _open(opened, parent)._modules[name] = block
        if cut or len(blocks) < len(paths):
            _end_with(opened, paths[len(blocks) - 1])
        return opened[""]

    def in_sequence(self, out: Tensor) -> Tensor:
        """Return the output of a block as (B, N, C)."""
        return out.flatten(1, 2) if out.dim() == 4 else out

    def sequencer(self, model: nn.Module) -> Callable[[Any], Tensor]:
        """Return `in_sequence` with the tokens row by row, also where the order of a model's tokens is its own."""
        return self.in_sequence

    def features(self, model: nn.Module, images: Tensor) -> Any:
        """Run a model up to its features, of which `tokens` and `head` give parts."""
        return vit(model).forward_features(images)

    def tokens(self, features: Any) -> Tensor:
        """Return the tokens of the last stage after the final norm, from `features` or the output of `last_tokens`."""
        return features

    def head(self, model: Any, features: Any, *, pre_logits: bool = False) -> Tensor:
        """Return the logits (B, classes) of `features`; with `pre_logits`, what goes into the classifier (B, C)."""
        return model.forward_head(features, pre_logits=pre_logits)

    def predict(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the logits of images."""
        return model(images)

    def num_classes(self, model: nn.Module) -> int:
        """Return the number of classes of a classifier; 0 without one."""
        return int(vit(model).num_classes)

    def feature_widths(self, model: Any) -> tuple[int, int]:
        """Return the widths of what goes into the classifier, and of the tokens."""
        width = int(model.num_features)
        return int(getattr(model, "head_hidden_size", width)), width

    def is_strict(self, model: nn.Module) -> bool:
        """Return whether a model takes only images of its own size."""
        return bool(getattr(getattr(model, "patch_embed", None), "strict_img_size", False))

    def shows_grid(self, model: nn.Module, stage: int) -> nn.Module:
        """Return the module whose output shows the grid of a stage, from 0, where `takes_any_grid`."""
        return self.embedding(model)

    def grid_of(self, model: nn.Module, images: Any, patches: Any) -> tuple[int, int] | None:
        """Return the rows and columns of what the module of `shows_grid` gave; None where nothing shows them."""
        return (patches.shape[1], patches.shape[2]) if patches.ndim == 4 else None

    def takes_any_grid(self, model: nn.Module) -> bool:
        """Return whether converted layers read the grid of each batch from the output of `shows_grid`."""
        return bool(getattr(model, "dynamic_img_size", False))

    def why_no_grid(self, model: nn.Module) -> str:
        """Return why the tokens of a model are not a whole grid in its order, after its name; empty where they are."""
        dropped = getattr(model, "patch_drop", None)
        if dropped is None or isinstance(dropped, nn.Identity):
            return ""
        return "drops patches: build it with patch_drop_rate 0"

    def initialize(self, model: nn.Module) -> None:
        """Initialize every weight as the constructor does; PVTv2 and Twins of timm have no method for it."""
        if hasattr(model, "init_weights"):
            vit(model).init_weights()
            return
        for module in model.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        own: Any = getattr(model, "_init_weights", None)
        if own is not None:
            model.apply(own)
        for module in model.modules():
            if isinstance(module, OffsetConv2d):
                module.reset_parameters()

    def forget(self, model: nn.Module) -> None:
        """Drop what a forward pass left in a model."""
        return

    def describe_plan(self, model: nn.Module, plan: str | None) -> None:
        """Write the plan of a converted model into its configuration; timm's models have only `pretrained_cfg`."""
        return

    def embedding(self, model: nn.Module) -> nn.Module:
        """Return the module that sees the images first."""
        return submodule(model, "patch_embed")

    def last_tokens(self, model: nn.Module) -> nn.Module:
        """Return the module whose output are the tokens of the last stage after the final norm."""
        return submodule(model, "norm")

    def patches(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        """Return these tokens as (B, rows, columns, C) of the last grid, without prefix tokens."""
        found: Tensor = tokens
        return found if tokens.dim() == 4 else found[:, geometry.num_prefix :].unflatten(1, geometry.grid)

    def watch_block(self, model: nn.Module, index: int, see: Callable[[Tensor], None]) -> Handle:
        """Call `see` with the output (B, N, C) of a block in each forward pass by `predict`, until it is removed."""
        path = [path for stage in self.paths(model) for path in stage][index]
        return submodule(model, path).register_forward_hook(_Shown(see, self.sequencer(model)))

    def watch_tokens(self, model: nn.Module, see: Callable[[Any], None]) -> Handle:
        """Call `see` with what `tokens` takes in each forward pass by `predict`, until it is removed."""
        return self.last_tokens(model).register_forward_hook(_Shown(see))

    def run_blocks(self, model: nn.Module, images: Tensor) -> None:
        """Run a model as far as its blocks are needed."""
        self.features(model, images)

    def recomputed(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules that run their parts in `rerun` again in the backward pass with `grad_checkpointing`."""
        return [model]

    def by_stage(self, model: nn.Module, blocks: Sequence[nn.Module]) -> list[list[nn.Module]]:
        """Return the first blocks of a model stage by stage, without empty stages."""
        stages, rest = [], list(blocks)
        for paths in self.paths(model):
            stages.append(rest[: len(paths)])
            rest = rest[len(paths) :]
        return [stage for stage in stages if stage]

    def sizes(self, block: nn.Module) -> tuple[int, int, int]:
        """Return the width of a block, the number of its heads (0 without attention), and the width of a head."""
        return _sizes(block)

    def sites(self, model: nn.Module) -> Iterator[Site]:
        """Yield the sites of a model in order."""
        paths, size = self.paths(model), self.image_size(model)
        geometries = [None] * len(paths) if size is None else self.geometries(model, size)
        index = 0
        for stage, (names, geometry) in enumerate(zip(paths, geometries, strict=True)):
            for place, path in enumerate(names):
                name = str(index) if len(paths) == 1 else f"stage{stage + 1}.{place}"
                width, heads, head_dim = self.sizes(submodule(model, path))
                yield Site(index, name, stage, place, path, width, heads, head_dim, geometry)
                index += 1


class AnySize(Family):
    """Stages of models that take images of any size, so their constructor has no size."""

    sized_when_built = False
    takes_size = False

    def paths(self, model: nn.Module) -> list[list[str]]:
        stages: Any = model.stages
        return [
            [f"stages.{i}.blocks.{j}" for j in range(len(stage.blocks))] for i, stage in enumerate(stages)
        ]

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        """Return the size that the model was resized to, else the size of its published weights."""
        own: Any = getattr(model, "img_size", None)
        described: Any = getattr(model, "default_cfg", None) or {}
        height, width = own or tuple(described.get("input_size", ())[1:]) or (224, 224)
        return int(height), int(width)

    def fixed_size(self, model: nn.Module) -> tuple[int, int] | None:
        return None

    def known_size(self, model: nn.Module) -> tuple[int, int] | None:
        return size_of(model)

    def patch_size(self, model: nn.Module) -> tuple[int, int]:
        return 1, 1

    def resize(self, model: Any, size: tuple[int, int]) -> None:
        model.img_size = size

    def last_tokens(self, model: nn.Module) -> nn.Module:
        return list(submodule(model, "stages").children())[-1]

    def patches(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        return tokens.permute(0, 2, 3, 1)

    def recomputed(self, model: nn.Module) -> list[nn.Module]:
        return list(submodule(model, "stages").children())


class OneSize(AnySize):
    """The same for models of one size of images, that of their windows or tables, which are resampled for another."""

    sized_when_built = True
    takes_size = True
    resized_when_loaded = True

    def known_size(self, model: nn.Module) -> tuple[int, int] | None:
        return self.image_size(model)

    def fixed_size(self, model: nn.Module) -> tuple[int, int] | None:
        return self.image_size(model)

    def is_strict(self, model: nn.Module) -> bool:
        return True

    def embedding(self, model: nn.Module) -> nn.Module:
        return submodule(model, "stem")


def _sizes(block: Any) -> tuple[int, int, int]:
    """Return width, number of heads and width of a head."""
    attention = attention_of(block)
    projection = getattr(attention, "proj", None)
    if projection is None:
        first = next(part for part in block.mlp.modules() if isinstance(part, nn.Linear | nn.Conv2d))
        return widths(first)[1], 0, 0
    heads, (width, inner) = int(attention.num_heads), widths(projection)
    return width, heads, inner // heads
