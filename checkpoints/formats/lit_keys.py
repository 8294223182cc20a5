"""Files of PVT, LIT, LITv2 and AttnZero's PVT and Swin under their own names, and the way back of the first three.

There are two schemes: PVT's, which LIT-Ti has too (`block1.0`, `pos_embed1`), and Swin's, of LIT-S, M and B and LITv2
(`layers.0.blocks.0`), in which a merge ends a stage and does not begin the next. AttnZero has both, and in each layer
with its formula a depthwise convolution of the values (`attn.dwc`). `to_reference` and `from_reference` convert a state
dict either way; `relative_position_index` is left out, because it is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...models.errors import CheckpointError, Json
from ..weight_files import Content
from ..weights import Weights
from .containers import unwrap
from .keymap import KeyMap, apply, recognize
from .normalization import IMAGENET, normalized

INDEX = (r".*\.relative_position_index", "an index that the model computes")
PVT_DEPTHS: dict[tuple[int, ...], str] = {
    (2, 2, 2, 2): "pvt_tiny",
    (3, 4, 6, 3): "pvt_small",
    (3, 4, 18, 3): "pvt_medium",
    (3, 8, 27, 3): "pvt_large",
}
SWIN_SIZES = {(96, 6): "s", (96, 18): "m", (128, 18): "b"}
"""By the width of stage 1 and the depth of stage 3."""
ATTNZERO_SWIN_SIZES = {(96, 6): "t", (96, 18): "s", (128, 18): "b"}


def from_reference(published: Json) -> dict[str, Tensor]:
    """Return a state dict of a published PVT, LIT or LITv2 under the names of our models.

    Like a file, it may be inside {'model': ...}, and its names may begin with `module.`.

    Raises CheckpointError: the keys are of no such model.
    """
    weights = unwrap(Content(Path("the state dict"), dict(published), {}), None)
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
        name = f"attnzero_pvt_{name.removeprefix('pvt_')[0]}"
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
    described = _described(weights, None if size is None else f"attnzero_swin_{size}", 32 * window)
    arguments = {"window_size": window} if window else {}
    return replace(described, model_args={**arguments, **described.model_args})


def _described(weights: Weights, name: str | None, side: int) -> Weights:
    weights = normalized(weights, IMAGENET, "ImageNet's, as PVT, LIT and AttnZero train")
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
        (rf"block{i}\.(\d+)\.attn\.dwc\.(.+)", rf"stages.{i - 1}.blocks.\1.attn.operator.conv.\2")
        for i in (1, 2, 3, 4)
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
)
