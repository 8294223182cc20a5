"""Load weights into a model: resample positions, check every key and shape, then load."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from torch import Tensor, nn

from ..models import attnzero, cswin_models, lit, pvt_models
from ..models.conversion import ARCHITECTURE as CONVERTED
from ..models.conversion import converted_layers
from ..models.converted import is_mark, marks_of, refuse_other_operators
from ..models.copied import ARCHITECTURE as COPIED
from ..models.copied import copying_of, resize
from ..models.errors import CheckpointError, ConfigError, Json, kind_of
from ..models.families import Site, family_named, patch_size, position_grid, sites, vit
from ..models.families.pvt import PVT
from ..models.map_structure import offsets, resample_plainly, resample_table
from .architecture import INNER
from .report import BIAS_TABLE, KeyRules, LoadReport, Role, some, sort_keys
from .weight_files import Weights, as_pair, find_place

# Resample position embeddings and tables of relative positions to another resolution.
#
# `timm`: bicubic with antialiasing, `timm.layers.resample_abs_pos_embed`, and timm's way for tables.
# `mae`: plain bicubic with `align_corners=False`, as MAE's fine-tuning code does for square grids; tables are refused.
# `published`: as the code of the model does: plain bilinear in the stages of PVT (`models/families/pvt.py`), plain
# bicubic in all others and for tables.
# They differ slightly, most where a grid shrinks.

Grid = tuple[int, int]
Method = Literal["timm", "mae", "published"]


def resample_position(position_1ND: Tensor, old: Grid, new: Grid, num_prefix: int, method: Method) -> Tensor:
    """Return embeddings (1, num_prefix + H W, D) of the grid `old` on the grid `new`; prefix tokens stay.

    Computed in float32 or better, and returned in the dtype given.
    """
    if old == new:
        return position_1ND
    if method == "timm":
        return resample_abs_pos_embed(position_1ND, list(new), list(old), num_prefix)
    return resample_plainly(position_1ND, new, old, num_prefix, "bicubic")


def find_grid(num_patches: int, declared: Grid | None) -> Grid | None:
    """Return the grid of `num_patches`: the declared one if it has that many, else a square, else None."""
    if declared is not None and declared[0] * declared[1] == num_patches:
        return declared
    side = math.isqrt(max(num_patches, 0))
    return (side, side) if side and side * side == num_patches else None


# Prefix tokens (class, distillation, registers) and their rows of the position embedding.
#
# One model keeps a row for each prefix token before those of the patches, another none (timm's `no_embed_class`).
# Both compute token + row, so weights of one fit the other: a row is added to its token, or is zero.

TOKENS = ("cls_token", "dist_token", "reg_token")
"""In the order of the sequence."""


def num_prefix_rows(model: nn.Module) -> int:
    """Return rows of a model's `pos_embed` before those of the patches."""
    height, width = position_grid(model)
    return int(model.get_parameter("pos_embed").shape[1] - height * width)


def match_prefix(model: nn.Module, weights: Weights) -> Weights:
    """`weights` with as many prefix rows as the model has; unchanged where that is so, or where no grid is known.

    Features stay as they are. A row for a token that the weights lack is zero.

    Raises CheckpointError: a token and its row differ in shape.
    """
    position = weights.tensors.get("pos_embed")
    if position is None or position.ndim != 3 or getattr(model, "pos_embed", None) is None:
        return weights
    wanted = num_prefix_rows(model)
    rows = _num_rows(model, weights, position, wanted)
    if rows in (None, wanted):
        return weights
    tensors, width = dict(weights.tensors), position.shape[2]
    own = _rows_by_token(_counts(tensors), position[:, :rows])
    if wanted == 0:
        for name, row in own.items():
            if (shape := tuple(weights.tensors[name].shape)) != tuple(row.shape):
                raise CheckpointError(
                    f"{weights.origin}: {name} is {shape} and its position {tuple(row.shape)}"
                )
        for name, row in own.items():
            tensors[name] = tensors[name] + row
        first = position[:, :0]
        note = f"positions of {some(own)}: added to the tokens, the model has no rows for them"
    else:
        counts = _counts({name: getattr(model, name, None) for name in TOKENS})
        if sum(counts.values()) != wanted:
            return weights
        first = torch.cat(
            [own.get(name, position.new_zeros(1, count, width)) for name, count in counts.items()], dim=1
        )
        fresh = [name for name in counts if name not in own]
        note = f"positions of {some(fresh)}: zero, the weights have none" if fresh else ""
    tensors["pos_embed"] = torch.cat([first, position[:, rows:]], dim=1)
    return replace(weights, tensors=tensors, notes=(*weights.notes, note) if note else weights.notes)


def drop_class_token(model: nn.Module, weights: Weights) -> Weights:
    """`weights` of a PVT without the class token of a stage, and its position, if the model has none (avg pooling)."""
    if not isinstance(model, PVT):
        return weights
    tensors, left_out = dict(weights.tensors), dict(weights.left_out)
    for name, stage in model.stages.named_children():
        token, position = f"stages.{name}.cls_token", tensors.get(f"stages.{name}.pos_embed")
        if stage.num_prefix or token not in tensors or position is None or position.ndim != 3:
            continue
        del tensors[token]
        tensors[f"stages.{name}.pos_embed"] = position[:, 1:]
        left_out[token] = "with its position: the model takes the mean of the patches and has no class token"
    return replace(weights, tensors=tensors, left_out=left_out)


def _num_rows(model: nn.Module, weights: Weights, position: Tensor, wanted: int) -> int | None:
    """Return how many rows of the weights are of prefix tokens: all, none, or the class token's, as the grid allows."""
    counts = _counts(weights.tensors)
    possible = [sum(counts.values()), 0, counts.get("cls_token", 0)]
    if wanted in possible:
        possible.insert(0, wanted)
    grid = declared_grid(model, weights)
    return next((rows for rows in possible if find_grid(position.shape[1] - rows, grid) is not None), None)


def declared_grid(model: nn.Module, weights: Weights) -> Grid | None:
    """Return the patch grid of the images that the weights say they were trained on."""
    if weights.img_size is None:
        return None
    height, width = patch_size(model)
    return weights.img_size[0] // height, weights.img_size[1] // width


def _counts(tensors: Mapping[str, Tensor | None]) -> dict[str, int]:
    """Return how many tokens of each kind there are."""
    present = {name: tensors.get(name) for name in TOKENS}
    return {name: token.shape[1] for name, token in present.items() if token is not None and token.ndim == 3}


def _rows_by_token(counts: Mapping[str, int], rows_1PD: Tensor) -> dict[str, Tensor]:
    """Return the rows of each kind of token, of those that have any."""
    if rows_1PD.shape[1] < sum(counts.values()):
        counts = {name: count for name, count in counts.items() if name == "cls_token" and rows_1PD.shape[1]}
    return dict(zip(counts, rows_1PD.split(list(counts.values()), dim=1), strict=True)) if counts else {}


@dataclass(frozen=True)
class Match:
    """Weights held against a model, key by key, before anything is loaded."""

    present: Mapping[str, Tensor]
    """The tensors of both, with position embeddings on the model's grid."""
    missing: Mapping[str, str]
    unexpected: Mapping[str, str]
    """The tensors that only one of them has, with the reason."""
    absent: list[str]
    foreign: list[str]
    """The tensors that only one of them has without a reason: not in the weights, not in the model."""
    wrong: list[str]
    """Keys with another shape or kind of number, in words."""
    resampled: Mapping[str, str]

    @property
    def problems(self) -> dict[str, list[str]]:
        """The reasons not to load, by kind."""
        kinds = {"wrong tensors": self.wrong, "missing keys": self.absent, "unexpected keys": self.foreign}
        return {kind: keys for kind, keys in kinds.items() if keys}


def fit(
    model: nn.Module,
    weights: Weights,
    *,
    role: Role,
    method: Method,
    classifiers: tuple[str, ...],
    mapped: bool = False,
    take: Callable[[dict[str, Tensor]], object] | None = None,
) -> LoadReport:
    """Load `weights` into `model` in place; if `mapped`, its parameters are those of the weights, and not copied.

    With `take`, that gets the tensors instead, by the model's names.

    Position embeddings are resampled to the model's grid by `method`; nothing else changes its shape.
    Keys that are missing or unexpected must have a reason (`KeyRules`). A teacher's norms get the epsilon that
    the source says; initial weights leave the model's own.

    Raises CheckpointError naming the first keys without a reason, with another shape, or with values
    that are not finite.
    """
    weights = drop_class_token(model, match_prefix(model, weights))
    found = match(model, weights, role=role, method=method, classifiers=classifiers)
    if found.problems:
        words = "; ".join(
            f"{kind}: {some(keys, 3 if keys is found.wrong else 4)}" for kind, keys in found.problems.items()
        )
        raise CheckpointError(f"{weights.origin} does not fit {_architecture(model)}: {words}")
    refuse_not_finite(
        weights.origin, found.present, {key: tensor.dtype for key, tensor in model.state_dict().items()}
    )
    if mapped or not without_values(model.state_dict()):
        take = take or partial(model.load_state_dict, strict=False, assign=mapped)
        take({**marks_of(model), **found.present})
    if role == "teacher" and weights.norm_eps is not None:
        set_norm_eps(model, weights.norm_eps)
    return LoadReport(
        weights.origin,
        weights.format,
        len(found.present),
        found.missing,
        {**weights.left_out, **found.unexpected},
        found.resampled,
        weights.notes,
        weights.pretrained_cfg.get("license"),
        weights.revision,
        {key: place for key, tensor in found.present.items() if mapped and (place := find_place(tensor))},
    )


def _architecture(model: nn.Module) -> str:
    """Return timm's name of a model: of one that we changed, that of the model before."""
    name = (getattr(model, "default_cfg", None) or {}).get("architecture")
    inner = getattr(model, "_model_args", {}).get(INNER.get(str(name), ""))
    return str(inner or name or type(model).__name__)


def match(
    model: nn.Module, weights: Weights, *, role: Role, method: Method, classifiers: tuple[str, ...]
) -> Match:
    """Match `weights` to the tensors of `model`, and list misfits.

    Raises CheckpointError: unknown grid, or a layer has another operator than in the weights.
    """
    weights = drop_class_token(model, match_prefix(model, weights))
    refuse_other_operators(model, weights.tensors, weights.origin, starts=role == "init")
    target = {key: tensor for key, tensor in model.state_dict().items() if not is_mark(key)}
    tensors, resampled = _resample(model, weights, target, method)
    head_fits = _head_fits(tensors, target, classifiers)
    if not head_fits and role == "init":
        dropped = {key for key in tensors if key.rpartition(".")[0] in classifiers}
    else:
        dropped = set()
    present = {key: tensor for key, tensor in tensors.items() if key in target and key not in dropped}
    rules = KeyRules(
        role, frozenset(target), frozenset(tensors), classifiers, getattr(model, "num_classes", 0), head_fits
    )
    missing, absent = sort_keys(
        (key for key in target if key not in present),
        lambda key: "a backbone has none" if key.rpartition(".")[0] in weights.fresh else rules.missing(key),
    )
    unexpected, foreign = sort_keys((key for key in tensors if key not in present), rules.unexpected)
    return Match(present, missing, unexpected, absent, foreign, _wrong(present, target), resampled)


def own_norm_eps(model: nn.Module, fresh: nn.Module, architecture: str) -> float | None:
    """Return the norms' epsilon if it is not the one that timm builds in `fresh`.

    Raises CheckpointError: there are several.
    """
    wanted = {name: module.eps for name, module in fresh.named_modules() if isinstance(module, nn.LayerNorm)}
    norms = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.LayerNorm))
    own = {norm.eps for name, norm in norms if norm.eps != wanted.get(name)}
    if len(own) > 1:
        listed = ", ".join(f"{epsilon:g}" for epsilon in sorted(own))
        raise CheckpointError(
            f"the norms of {architecture} have several epsilons ({listed}): give all the same"
        )
    return own.pop() if own else None


FREE = frozenset(
    {"training", "inplace", "momentum", "drop_rate", "grad_checkpointing", "fused_attn", "num_classes"}
    | {"distilled_training", "img_size"}
)
"""Attributes of modules that decide nothing in evaluation, and two that the description says by themselves."""
PLAIN = (bool, float, str)
"""Types of attributes that say how a module computes; whole numbers are sizes, which follow those of the images."""


def refuse_changed(model: nn.Module, fresh: nn.Module, architecture: str) -> None:
    """CheckpointError where a model was changed since it was built into one that `fresh`, which its description builds,
    is not: a module of another type or with other settings. Hosts in place of attention layers are no such change.
    """
    own, wanted = (dict(each.named_modules(remove_duplicate=False)) for each in (model, fresh))
    hosts = {name for name, module in own.items() if name in wanted and _is_host(module, wanted[name])}
    within = tuple(f"{name}." for name in hosts)
    for name in (*wanted, *own):
        if name in hosts or (name.startswith(within) and not (name in own and name in wanted)):
            continue
        why = _difference(own.get(name), wanted.get(name))
        if why:
            if type(own.get(name)) is nn.Identity:
                why += " (as in a backbone: save its detector or segmenter instead)"
            raise CheckpointError(
                f"{name or 'the model'} {why} in {architecture} as it is described: it was changed after it was built, "
                "which no description says"
            )


def _is_host(module: nn.Module, plain: nn.Module) -> bool:
    return _library(module) == OURS and type(module) is not type(plain)


OURS = __package__.partition(".")[0]


def _library(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


def _difference(own: nn.Module | None, plain: nn.Module | None) -> str | None:
    """Return in words what a module has other than one that is built as described."""
    if own is None or plain is None:
        there, absent = ("nothing" if each is None else kind_of(each) for each in (own, plain))
        return f"is {there}, and {absent}"
    if (_drops(own) and _drops(plain)) or isinstance(own, nn.SyncBatchNorm):
        return None
    libraries = {_library(own), _library(plain)} <= {"torch", "timm"}  # timm's LayerNorm computes as torch's
    if type(own) is not type(plain) and not (libraries and type(own).__name__ == type(plain).__name__):
        return f"is {kind_of(own)}, and {kind_of(plain)}"
    for key, value in vars(plain).items() if _library(plain) != OURS else ():
        free = key in FREE or key.startswith("_") or (key == "eps" and isinstance(own, nn.LayerNorm))
        now = vars(own).get(key)
        kinds = (int,) if key == "num_heads" else PLAIN
        if not free and isinstance(value, kinds) and isinstance(now, kinds) and now != value:
            return f"has {key}={now!r}, and {value!r}"
    return None


def _drops(module: nn.Module) -> bool:
    """Return whether a module does nothing in evaluation: drops values, paths or patches, or is an identity."""
    kind = type(module)
    return kind is nn.Identity or (_library(module) in ("timm", "torch") and "Drop" in kind.__name__)


def set_norm_eps(model: nn.Module, epsilon: float) -> None:
    """Set the epsilon of all norms, except those of a teacher inside the model (`models/copied.py` sets these)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and not name.startswith("teacher."):
            module.eps = epsilon


def _head_fits(
    tensors: Mapping[str, Tensor], target: Mapping[str, Tensor], classifiers: tuple[str, ...]
) -> bool:
    heads = [key for key in target if key.rpartition(".")[0] in classifiers]
    return all(key in tensors and tensors[key].shape == target[key].shape for key in heads)


def _wrong(present: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """Return tensors with another shape, or with other types than float: whole numbers, truth values."""
    words = []
    for key, tensor in present.items():
        wanted = target[key]
        if tensor.is_floating_point() != wanted.is_floating_point() or tensor.is_complex():
            words.append(f"{key} is {str(tensor.dtype).removeprefix('torch.')}, no floating-point tensor")
        elif tensor.shape != wanted.shape:
            words.append(f"{key} is {tuple(tensor.shape)} and not {tuple(wanted.shape)}")
    return words


def without_values(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether tensors have shapes only, as in a dry run."""
    return any(tensor.is_meta for tensor in tensors.values())


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise ConfigError for a type that weights are not written or loaded in."""
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ConfigError(f"dtype={dtype}; give torch.float16, bfloat16, float32 or float64")


def refuse_not_finite(origin: str, tensors: Mapping[str, Tensor], kinds: Mapping[str, torch.dtype]) -> None:
    """CheckpointError for numbers that are not finite, or not any more in the kind of number that they become."""
    floating = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
    bad = [key for key, tensor in floating.items() if not _is_finite(tensor.to(kinds[key]))]
    if bad:
        kind = str(kinds[bad[0]]).removeprefix("torch.")
        beyond = f" as {kind}" if _is_finite(tensors[bad[0]].double()) else ""
        raise CheckpointError(f"{origin} holds values that are not finite{beyond} in {some(bad)}")


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite, without another tensor of this size: an extreme of NaN is NaN."""
    return tensor.is_meta or not tensor.numel() or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def _resample(
    model: nn.Module, weights: Weights, target: Mapping[str, Tensor], method: Method
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors with position embeddings on the model's grid, and a note for each change."""
    tensors, done = {key: tensor for key, tensor in weights.tensors.items() if not is_mark(key)}, {}
    for key in [key for key in tensors if key in target]:
        if key == "pos_embed" and tensors[key].ndim == 3 and target[key].ndim == 3:
            tensors[key], how = _absolute(model, weights, target[key], method)
        elif key.endswith(BIAS_TABLE) and tensors[key].shape != target[key].shape:
            tensors[key], how = _relative(model, weights, key, target[key], method)
        else:
            continue
        if how:
            done[key] = how
    return tensors, done


def source_grid(model: nn.Module, weights: Weights) -> tuple[int, int] | None:
    """Return the patch grid of the weights' `pos_embed`, for a model of their kind; None if unknown."""
    position = match_prefix(model, weights).tensors.get("pos_embed")
    if position is None or position.ndim != 3 or getattr(model, "pos_embed", None) is None:
        return None
    return find_grid(position.shape[1] - num_prefix_rows(model), declared_grid(model, weights))


def _absolute(model: nn.Module, weights: Weights, target: Tensor, method: Method) -> tuple[Tensor, str]:
    position = weights.tensors["pos_embed"]
    new = position_grid(model)
    old = source_grid(model, weights)
    if old == new or position.shape[2] != target.shape[2]:
        return position, ""
    if old is None:
        raise CheckpointError(
            f"{weights.origin}: pos_embed has {position.shape[1]} tokens, which with {num_prefix_rows(model)} "
            "prefix tokens is no square grid; give the images' size as model_args img_size=[height, width]"
        )
    resized = resample_position(position, old, new, num_prefix_rows(model), method)
    return resized, f"from grid {old[0]}x{old[1]} to {new[0]}x{new[1]} ({method}'s bicubic)"


def _relative(
    model: nn.Module, weights: Weights, key: str, target: Tensor, method: Method
) -> tuple[Tensor, str]:
    table = weights.tensors[key]
    if table.shape[1:] != target.shape[1:]:
        return table, ""  # other heads: refused by its shape
    words = f"from {table.shape[0]} to {target.shape[0]} offsets"
    window: Any = model.get_submodule(key.rpartition(".")[0]).window_size
    old, new = find_grid(len(table), None), offsets(window)
    if method == "timm":
        resized = resize_rel_pos_bias_table(table, new_window_size=window, new_bias_shape=tuple(target.shape))
        return resized, f"{words} (timm's way)"
    if method == "mae" or old is None or math.prod(new) != len(target):
        raise CheckpointError(
            f"{weights.origin}: {key} is not resampled by {method}'s way; position_embedding=timm does it"
        )
    return resample_table(table, old, new), f"{words} (published bicubic)"


# Another image size for a converted model, whose operators have shapes of their own making, and for one that copies
# its teacher's attention: load, then resize.


def late_size(
    weights: Weights, asked: Json, img_size: int | tuple[int, int] | None, model: str | None = None
) -> tuple[int, int] | None:
    """Return the image size to apply after loading: for a converted or copying model of known size, if requested.

    `model` is the architecture of weights that do not say theirs.
    """
    wanted = img_size if img_size is not None else asked.get("img_size")
    ours = (
        CONVERTED,
        COPIED,
        *attnzero.default_cfgs,
        *cswin_models.default_cfgs,
        *lit.default_cfgs,
        *pvt_models.default_cfgs,
    )  # with parts for one size in each stage
    name = weights.architecture or model
    family = None if name is None else family_named(name)
    known = (
        name in ours or (family is not None and family.resized_when_loaded)
    ) and weights.img_size is not None
    return as_pair(wanted) if known and wanted is not None else None


def resize_loaded(model: nn.Module, size: tuple[int, int], method: Method, report: LoadReport) -> LoadReport:
    """Resize a loaded model in place, position embeddings by `method`; return the report with what was resampled.

    Raises UnsupportedModelError: the model has no such size.
    """
    parts = {"": model} if copying_of(model) is None else {"": model, "teacher.": vit(model).teacher.model}
    positions = {prefix: getattr(part, "pos_embed", None) for prefix, part in parts.items()}
    before = sites(model)
    tables = _whole_tables(model, before)
    resize(model, size)
    after, layers = sites(model), converted_layers(model)
    changes = {site.index: _change(site, now) for site, now in zip(before, after, strict=True)}
    if not any(changes.values()):
        return report
    done = {
        f"{site.layer_path(model)}.operator": changes[site.index]
        for site in after
        if site.index in layers and layers[site.index].operator.traits.resolution == "resampled"
    }
    old, new, change = before[0].shape.geometry.grid, after[0].shape.geometry.grid, changes[0]
    for prefix, position in positions.items():
        if position is None:
            continue
        part = vit(parts[prefix])
        if position.ndim != 3:  # `resize` did it, as timm's forward pass does
            done[f"{prefix}pos_embed"] = f"{change} (timm's bicubic)"
            continue
        with torch.no_grad():
            part.get_parameter("pos_embed").copy_(
                resample_position(position, old, new, num_prefix_rows(part), method)
            )
        done[f"{prefix}pos_embed"] = f"{change} ({method}'s bicubic)"
    if method == "published":
        done |= _publish_tables(model, tables, after)
    return replace(report, resampled={**report.resampled, **done})


def _whole_tables(model: nn.Module, found: Sequence[Site]) -> dict[int, tuple[Grid, Tensor]]:
    """Return by layer the grid, and the table of relative positions that a converted layer has of all of it."""
    tables = {}
    for index, layer in converted_layers(model).items():
        table, grid = layer._parameters.get(BIAS_TABLE), found[index].shape.geometry.grid
        if table is not None and len(table) == math.prod(offsets(grid)):
            tables[index] = (grid, table.detach())
    return tables


def _publish_tables(
    model: nn.Module, tables: Mapping[int, tuple[Grid, Tensor]], found: Sequence[Site]
) -> dict[str, str]:
    """Resample tables of the whole grid, which timm has resized, as published; return what was resampled."""
    done = {}
    for index, (old, table) in tables.items():
        key, new = f"{found[index].layer_path(model)}.{BIAS_TABLE}", found[index].shape.geometry.grid
        if old == new:
            continue
        with torch.no_grad():
            model.get_parameter(key).copy_(resample_table(table, offsets(old), offsets(new)))
        done[key] = f"from grid {old[0]}x{old[1]} to {new[0]}x{new[1]} (published bicubic)"
    return done


def _change(old: Site, new: Site) -> str:
    """Return how the grid of a block changed, in words; nothing if it did not."""
    (rows, columns), (height, width) = old.shape.geometry.grid, new.shape.geometry.grid
    return "" if (rows, columns) == (height, width) else f"from grid {rows}x{columns} to {height}x{width}"
