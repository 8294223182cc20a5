"""Files of PVT, LIT, LITv2, CSwin and AttnZero under their own names, and the way back of the first three.

CSwin has the parts of a layer in its block. The others have two schemes: PVT's, which LIT-Ti has too (`block1.0`,
`pos_embed1`), and Swin's, of LIT-S, M and B and LITv2 (`layers.0.blocks.0`), in which a merge ends a stage and does not
begin the next. AttnZero has both, timm's own scheme for DeiT, and another for AutoFormer. Each layer with its formula
has a depthwise convolution of the values (`attn.dwc`), and in the bias variants a table of positions (`attn.na_bias`,
...). `to_reference` and `from_reference` convert a state dict either way; `relative_position_index` is left out,
because it is computed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...models.conversion import with_plan
from ...models.converted import MARK, as_mark
from ...models.errors import CheckpointError, Json
from ...models.plan_syntax import AS_IT_IS, parse_choice
from ..weight_files import Weights
from .containers import unwrap
from .keymap import IMAGENET, KeyMap, apply, normalized, recognize

# EcoFormer's PVTv2 and Twins-SVT: hashed attention in stages 1 to 3, softmax over all tokens in stage 4.

HASH = r"attn\.fast_attention\.ksh\."
UNREAD = "a projection of Performer that EcoFormer does not read"
Models = Mapping[tuple[int, tuple[int, ...]], str]
"""timm's names by the width of the first stage and the depths of all."""
PVT_MODELS: Models = {
    (32, (2, 2, 2, 2)): "pvt_v2_b0",
    (64, (2, 2, 2, 2)): "pvt_v2_b1",
    (64, (3, 4, 6, 3)): "pvt_v2_b2",
    (64, (3, 4, 18, 3)): "pvt_v2_b3",
    (64, (3, 8, 27, 3)): "pvt_v2_b4",
}
TWINS_MODELS: Models = {
    (64, (2, 2, 10, 4)): "twins_svt_small",
    (96, (2, 2, 18, 2)): "twins_svt_base",
    (128, (2, 2, 18, 2)): "twins_svt_large",
}
PVT_BLOCK = re.compile(r"stages\.([0-3])\.blocks\.(\d+)\.")
TWINS_BLOCK = re.compile(r"blocks\.([0-3])\.(\d+)\.")

OPERATOR = (
    (rf"(.+)\.{HASH}A", r"\1.attn.operator.weight"),
    (rf"(.+)\.{HASH}anchor", r"\1.attn.operator.anchors"),
    (rf"(.+)\.{HASH}mvec", r"\1.attn.operator.mean"),
)


def _without_batch(name: str, tensor: Tensor) -> Tensor:
    """Return anchors (H, M, D) and means (H, M) without the dimensions that they are broadcast along."""
    if name.endswith("operator.anchors") and tensor.ndim == 4:
        return tensor[0]
    if name.endswith("operator.mean") and tensor.ndim == 4:
        return tensor[0, :, 0]
    return tensor


PVT_PARTS = {"patch_embed": "downsample", "norm": "norm", "block": "blocks"}


def _stage_name(key: str) -> str:
    """Return a key with the name of timm's stage, from 0, for the published one, from 1."""
    found = re.match(r"(patch_embed|norm|block)([1-4])\.(.+)", key)
    if found is None:
        return key
    rest = found[3].replace(".dwconv.dwconv.", ".dwconv.")
    stage = f"stages.{int(found[2]) - 1}.{PVT_PARTS[found[1]]}"
    return f"patch_embed.{rest}" if key.startswith("patch_embed1.") else f"{stage}.{rest}"


def _prepare_pvt(weights: Weights) -> Weights:
    """Name the projections as timm does: q and kv, of which hashed layers have only v."""
    tensors = _renamed(weights.tensors, lambda key: True)
    return replace(weights, tensors={_stage_name(key): tensor for key, tensor in tensors})


def _prepare_twins(weights: Weights) -> Weights:
    """Name the projections as timm does: qkv in the local layers, the even ones, and q and kv in the others."""
    return replace(weights, tensors=dict(_renamed(weights.tensors, _is_reduced)))


def _is_reduced(key: str) -> bool:
    found = TWINS_BLOCK.match(key)
    return found is not None and int(found[2]) % 2 == 1


def _renamed(tensors: Mapping[str, Tensor], separate: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors with projections that are joined as in timm; `separate` keeps queries apart from the others."""
    for key, tensor in tensors.items():
        shared, value = re.search(r"\.attn\.to_qk\.", key), re.search(r"\.attn\.to_v\.", key)
        if shared and separate(key):
            yield key.replace(".to_qk.", ".q."), tensor
        elif value and separate(key):
            yield key.replace(".to_v.", ".kv."), tensor
        elif shared:
            other = key.replace(".to_qk.", ".to_v.")
            if other not in tensors:
                raise CheckpointError(f"the weights hold {key} without {other}")
            yield key.replace(".to_qk.", ".qkv."), torch.cat([tensor, tensors[other]])
        elif not value and ".attn.qkv." in key and separate(key):
            rows = len(tensor) // 3
            yield key.replace(".qkv.", ".q."), tensor[:rows]
            yield key.replace(".qkv.", ".kv."), tensor[rows:]
        elif not value:
            yield key, tensor


def _describe(
    models: Models, block: re.Pattern[str], width: str, last: str
) -> Callable[[Weights, Json], Weights]:
    """Return what finds the architecture by width and depths, and the plan by the sizes of the hash functions."""

    def describe(weights: Weights, config: Json) -> Weights:
        depths = _depths(weights.tensors, block)
        architecture = models.get((len(weights.tensors[width]), depths))
        if architecture is None:
            known = ", ".join(models.values())
            raise CheckpointError(
                f"{weights.origin} has {len(weights.tensors[width])} channels and {depths} blocks, which no published "
                f"EcoFormer has: {known}"
            )
        sizes = next(tensor for name, tensor in weights.tensors.items() if name.endswith("operator.weight"))
        options = "".join(
            f"{name}={size}, "
            for name, size, usual in zip(("bits", "anchors"), sizes.shape[1:], (16, 25), strict=True)
            if size != usual
        )
        hashed, operator = sum(depths[:3]), f"hash({options}mode=reference)"
        plan = f"0-{hashed - 1}: {operator}; {hashed}-{sum(depths) - 1}: {last}"
        marks = {
            f"{found[0]}attn.{MARK}": as_mark(parse_choice(last if found[1] == "3" else operator))
            for found in map(block.match, weights.tensors)
            if found is not None and (found[1] != "3" or last != AS_IT_IS)
        }
        name, arguments = with_plan(architecture, weights.model_args, plan)
        note = f"architecture: {architecture} with {plan}, as EcoFormer publishes"
        tensors = {**weights.tensors, **marks}
        return replace(
            weights, tensors=tensors, architecture=name, model_args=arguments, notes=(*weights.notes, note)
        )

    return describe


def _depths(tensors: Mapping[str, Tensor], block: re.Pattern[str]) -> tuple[int, ...]:
    found = {(int(each[1]), int(each[2])) for each in map(block.match, tensors) if each is not None}
    return tuple(
        1 + max(place for at, place in found if at == stage) for stage in sorted({at for at, _ in found})
    )


ECOFORMER_MAPS: tuple[KeyMap, ...] = (
    KeyMap(
        "EcoFormer's PVTv2",
        marks=(rf"block1\.0\.{HASH}A", r"block4\.0\.attn\.qkv\.weight", r"patch_embed1\.proj\.weight"),
        prepare=_prepare_pvt,
        names=OPERATOR,
        left_out=((r".+\.projection_matrix", UNREAD),),
        reshape=_without_batch,
        describe=_describe(PVT_MODELS, PVT_BLOCK, "patch_embed.proj.weight", "keep"),
    ),
    KeyMap(
        "EcoFormer's Twins-SVT",
        marks=(rf"blocks\.0\.0\.{HASH}A", r"blocks\.3\.0\.attn\.qkv\.weight"),
        prepare=_prepare_twins,
        names=OPERATOR,
        left_out=((r".+\.projection_matrix", UNREAD),),
        reshape=_without_batch,
        describe=_describe(TWINS_MODELS, TWINS_BLOCK, "patch_embeds.0.proj.weight", "softmax"),
    ),
)


INDEX = (r".*\.relative_position_index", "an index that the model computes")
PVT_DEPTHS: dict[tuple[int, ...], str] = {
    (2, 2, 2, 2): "pvt_tiny",
    (3, 4, 6, 3): "pvt_small",
    (3, 4, 18, 3): "pvt_medium",
    (3, 8, 27, 3): "pvt_large",
}
SWIN_SIZES = {(96, 6): "s", (96, 18): "m", (128, 18): "b"}
"""By the width of stage 1 and the depth of stage 3."""
CSWIN_SIZES = {
    (64, 21): "cswin_tiny",
    (64, 32): "cswin_small",
    (96, 32): "cswin_base",
    (144, 32): "cswin_large",
}
ATTNZERO_SWIN_SIZES = {(96, 6): "t", (96, 18): "s", (128, 18): "b"}
ATTNZERO_DEIT_SIZES = {192: "t", 384: "s", 768: "b"}
AUTOFORMER_WIDTH = 192


def from_reference(published: Json) -> dict[str, Tensor]:
    """Return a state dict of a published PVT, LIT or LITv2 under the names of our models.

    Like a file, it may be inside {'model': ...}, and its names may begin with `module.`.

    Raises CheckpointError: the keys are of no such model.
    """
    weights = unwrap(Weights({}, "the state dict", "a state dict", tree=dict(published)), None)
    found = recognize(weights.tensors, LIT_MAPS)
    if found is None:
        raise CheckpointError("the state dict has the keys of no PVT, LIT or LITv2: see docs/checkpoints.md")
    return apply(found, weights, {}).tensors


def to_reference(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of our PVT, LIT or LITv2 under the names that its authors gave it.

    Raises CheckpointError: another model.
    """
    state = model.state_dict()
    if "stages.0.pos_embed" in state:
        return _pvt_names(state)
    if any(key.startswith("layers.1.downsample.dconv") for key in state):
        return _swin_names(state)
    raise CheckpointError(f"{type(model).__name__} is no PVT, LIT or LITv2")


def _pvt_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    fused = any(key.startswith("stages.1.downsample.dconv") for key in state)
    names: dict[str, Tensor] = {}
    for key, tensor in state.items():
        head, _, rest = key.partition(".")
        if head != "stages":
            names[key.replace("patch_embed", "patch_embed1")] = tensor
            continue
        number, _, rest = rest.partition(".")
        stage = int(number) + 1
        part, _, rest = rest.partition(".")
        if fused and ".attn.q." in key:
            rest = rest.replace(".attn.q.", ".attn.qkv.")
            tensor = torch.cat([tensor, state[key.replace(".attn.q.", ".attn.kv.")]])
        elif fused and ".attn.kv." in key:
            continue
        names[
            {
                "downsample": f"patch_embed{stage}.{rest}",
                "blocks": f"block{stage}.{rest}",
                "pos_embed": f"pos_embed{stage}",
                "cls_token": "cls_token",
            }[part]
        ] = tensor
    return names


def _swin_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    second = "layers.0.blocks.0.mlp.dwconv.weight" in state
    names: dict[str, Tensor] = {}
    for key, tensor in (hilo_parts(state) if second else dict(state)).items():
        parts = key.replace("head.fc.", "head.").replace("mlp.dwconv.", "mlp.dwconv.dwconv.").split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        names[".".join(parts)] = tensor
    return names


def _split(weights: Weights) -> Weights:
    """Cut the fused projections of LIT-Ti into those of PVT: queries, and keys with values."""
    tensors = dict(weights.tensors)
    for name in [name for name in tensors if ".attn.qkv." in name]:
        q, k, v = _parts(weights, name, 3)
        del tensors[name]
        tensors[name.replace("qkv", "q")], tensors[name.replace("qkv", "kv")] = q, torch.cat((k, v))
    return replace(weights, tensors=tensors)


def _parts(weights: Weights, name: str, count: int) -> tuple[Tensor, ...]:
    """Cut a fused projection into `count` parts.

    Raises CheckpointError: it is absent, or its rows are not as many equal parts.
    """
    fused = weights.tensors.get(name)
    if fused is None:
        raise CheckpointError(f"{weights.origin} is not whole: it lacks {name}")
    if not fused.ndim or not len(fused) or len(fused) % count:
        words = {1: "no rows", 2: "not two equal parts", 3: "not three equal parts"}[count]
        raise CheckpointError(f"{weights.origin}: {name} is {tuple(fused.shape)}, which are {words}")
    return fused.chunk(count)


def _joined(weights: Weights) -> Weights:
    """Join the projections of LITv2's high and low heads to the fused one of Swin."""
    tensors = dict(weights.tensors)
    for name in [name for name in tensors if ".attn.l_q." in name]:
        high_name, low_name = name.replace("l_q", "h_qkv"), name.replace("l_q", "l_kv")
        low = (*_parts(weights, name, 1), *_parts(weights, low_name, 2))
        high = _parts(weights, high_name, 3) if high_name in tensors else ()
        parts = [each for pair in zip(high, low, strict=True) for each in pair] if high else low
        if len({each.shape[1:] for each in parts}) > 1:
            raise CheckpointError(f"{weights.origin}: {name} and {low_name} are not of one width")
        for each in (name, low_name, high_name):
            tensors.pop(each, None)
        tensors[name.replace("l_q", "qkv")] = torch.cat(list(parts))
        proj = name.replace("l_q", "l_proj")
        if proj in tensors and not high:
            tensors[proj.replace("l_proj", "proj")] = tensors.pop(proj)
    return replace(weights, tensors=tensors)


def hilo_parts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in which the projections of HiLo are cut by high and low heads, as LITv2 names them."""
    names: dict[str, Tensor] = {}
    for key, tensor in state.items():
        stem, _, rest = key.partition(".attn.")
        if rest.startswith("qkv."):
            part = rest.removeprefix("qkv.")
            first = state.get(f"{stem}.attn.proj.high.bias")
            rows = 0 if first is None else len(first)
            pairs = [(each[:rows], each[rows:]) for each in tensor.chunk(3)]
            if first is not None:
                names[f"{stem}.attn.h_qkv.{part}"] = torch.cat([high for high, _ in pairs])
            names[f"{stem}.attn.l_q.{part}"] = pairs[0][1]
            names[f"{stem}.attn.l_kv.{part}"] = torch.cat([low for _, low in pairs[1:]])
        elif rest.startswith("proj."):
            kind, _, part = rest.removeprefix("proj.").rpartition(".")
            names[f"{stem}.attn.{'h' if kind == 'high' else 'l'}_proj.{part}"] = tensor
        else:
            names[key] = tensor
    return names


def _describe_pvt(weights: Weights, config: Json) -> Weights:
    depths = tuple(_count(weights.tensors, rf"stages.{i}.blocks.") for i in range(4))
    name = PVT_DEPTHS.get(depths)
    if name == "pvt_small" and "stages.1.downsample.dconv.weight" in weights.tensors:
        name = "lit_ti"
    elif name is not None and "stages.0.blocks.0.attn.operator.conv.weight" in weights.tensors:
        name = f"attnzero_pvt_{name.removeprefix('pvt_')[0]}{_variant(weights.tensors)}"
    elif name == "pvt_small" and "stages.0.blocks.0.attn.sr.weight" not in weights.tensors:
        name = "pvt_small_full"
    position = weights.tensors["stages.0.pos_embed"]
    side = 4 * math.isqrt(position.shape[1]) if position.ndim == 3 else 0
    return _described(weights, name, side)


def _describe_swin(weights: Weights, config: Json) -> Weights:
    first = weights.tensors["patch_embed.proj.weight"]
    size = SWIN_SIZES.get((len(first) if first.ndim else 0, _count(weights.tensors, "layers.2.blocks.")))
    second = "layers.0.blocks.0.mlp.dwconv.weight" in weights.tensors
    table = weights.tensors.get("layers.2.blocks.0.attn.relative_position_bias_table")
    side = (
        0 if table is None or not table.ndim else 8 * (math.isqrt(len(table)) + 1)
    )  # (2 h - 1)² rows for h² tokens of 16 x 16 pixels
    return _described(weights, None if size is None else f"lit{'v2' if second else ''}_{size}", side)


def _describe_attnzero_swin(weights: Weights, config: Json) -> Weights:
    first = weights.tensors["patch_embed.proj.weight"]
    size = ATTNZERO_SWIN_SIZES.get(
        (len(first) if first.ndim else 0, _count(weights.tensors, "layers.2.blocks."))
    )
    rows = {len(t) for key, t in weights.tensors.items() if key.endswith("bias_table") and t.ndim}
    window = (math.isqrt(max(rows, default=0)) + 1) // 2  # of stage 4, whose grid it covers
    name = None if size is None else f"attnzero_swin_{size}{_variant(weights.tensors)}"
    described = _described(weights, name, 32 * window)
    arguments = {"window_size": window} if window else {}
    return replace(described, model_args={**arguments, **described.model_args})


def _describe_cswin(weights: Weights, config: Json) -> Weights:
    """Find the architecture by width and depth; nothing in a file says the size of the images."""
    first = weights.tensors["stage1_conv_embed.0.weight"]
    size = (len(first) if first.ndim else 0, _count(weights.tensors, "stage3."))
    return _described(weights, CSWIN_SIZES.get(size), 0)


def _describe_plain(weights: Weights, config: Json) -> Weights:
    """Describe AttnZero's DeiT or AutoFormer by its width."""
    position = weights.tensors["pos_embed"]
    tokens, width = position.shape[1:] if position.ndim == 3 else (1, 0)
    size = ATTNZERO_DEIT_SIZES.get(width)
    name = None if size is None else f"attnzero_deit_{size}{_variant(weights.tensors)}"
    if "blocks.0.attn.qkv.bias" not in weights.tensors:
        name = "attnzero_autoformer_t" if width == AUTOFORMER_WIDTH else None
    return _described(weights, name, 16 * math.isqrt(max(tokens - 1, 0)))


def _variant(tensors: Mapping[str, Tensor]) -> str:
    """Return the end of the name of a model with a table of positions in its layers."""
    return "_bias" if any(key.endswith(".attn.operator.positions.na_bias") for key in tensors) else ""


def _described(weights: Weights, name: str | None, side: int) -> Weights:
    weights = normalized(weights, IMAGENET, "ImageNet's, as PVT, LIT, CSwin and AttnZero train")
    size = {"img_size": (side, side)} if side else {}
    return replace(
        weights,
        architecture=weights.architecture or name,
        model_args={**size, **weights.model_args},
        pretrained_cfg={**weights.pretrained_cfg, **({"input_size": (3, side, side)} if side else {})},
    )


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Return how many numbers follow a prefix."""
    return len({key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)})


_PVT_NAMES = (
    *(
        (rf"block{i}\.(\d+)\.attn\.{part}", rf"stages.{i - 1}.blocks.\1.attn.operator.{place}.\2")
        for i in (1, 2, 3, 4)
        for part, place in ((r"dwc\.(.+)", "conv"), ("([nhw]a_bias)", "positions"))
    ),
    (r"patch_embed1\.(.+)", r"patch_embed.\1"),
    (r"cls_token", "stages.3.cls_token"),
    *((rf"patch_embed{i}\.(.+)", rf"stages.{i - 1}.downsample.\1") for i in (2, 3, 4)),
    *((rf"pos_embed{i}", f"stages.{i - 1}.pos_embed") for i in (1, 2, 3, 4)),
    *((rf"block{i}\.(.+)", rf"stages.{i - 1}.blocks.\1") for i in (1, 2, 3, 4)),
)
_SWIN_NAMES = (
    *((rf"layers\.{i}\.downsample\.(.+)", rf"layers.{i + 1}.downsample.\1") for i in (0, 1, 2)),
    (r"head\.(.+)", r"head.fc.\1"),
    (r"(.+)\.attn\.h_proj\.(.+)", r"\1.attn.proj.high.\2"),
    (r"(.+)\.attn\.l_proj\.(.+)", r"\1.attn.proj.low.\2"),
    (r"(.+)\.mlp\.dwconv\.dwconv\.(.+)", r"\1.mlp.dwconv.\2"),
    (r"(.+)\.attn\.dwc\.(.+)", r"\1.attn.operator.conv.\2"),
    (r"(.+)\.attn\.([nhw]a_bias)", r"\1.attn.operator.positions.\2"),
)
_PLAIN_NAMES = (
    (r"(.+)\.attn\.dwc\.(.+)", r"\1.attn.operator.conv.\2"),
    (r"(.+)\.attn\.([nhwa][ac]_bias)", r"\1.attn.operator.positions.\2"),
    (r"(.+)\.attn_layer_norm\.(.+)", r"\1.norm1.\2"),
    (r"(.+)\.ffn_layer_norm\.(.+)", r"\1.norm2.\2"),
    (r"(blocks\.\d+)\.(fc[12]\..+)", r"\1.mlp.\2"),
)
LIT_MAPS = (
    KeyMap(
        "PVT, LIT-Ti and AttnZero's PVT",
        marks=("pos_embed1", "pos_embed4", r"patch_embed1\.proj\.weight"),
        prepare=_split,
        names=_PVT_NAMES,
        left_out=(INDEX,),
        describe=_describe_pvt,
    ),
    KeyMap(
        "LIT of Swin's scheme",
        marks=(r"layers\.0\.downsample\.dconv\.weight", r"patch_embed\.proj\.weight"),
        prepare=_joined,
        names=_SWIN_NAMES,
        left_out=(INDEX,),
        describe=_describe_swin,
    ),
    KeyMap(
        "AttnZero's Swin",
        marks=(r"layers\.0\.blocks\.0\.attn\.dwc\.weight", r"patch_embed\.proj\.weight"),
        names=_SWIN_NAMES,
        left_out=(INDEX,),
        describe=_describe_attnzero_swin,
    ),
    KeyMap(
        "CSwin",
        marks=(r"stage1_conv_embed\.0\.weight", r"stage1\.0\.qkv\.weight"),
        names=((r"(stage[1-4]\.\d+)\.(qkv|proj|attns)\.(.+)", r"\1.attn.\2.\3"),),
        describe=_describe_cswin,
    ),
    KeyMap(
        "AttnZero's DeiT and AutoFormer",
        marks=(r"blocks\.0\.attn\.dwc\.weight", "pos_embed", r"patch_embed\.proj\.weight"),
        names=_PLAIN_NAMES,
        describe=_describe_plain,
    ),
)
