"""Load weights into a model: resample positions, check every key and shape, then load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from torch import Tensor, nn

from ..models.converted import is_mark, marks_of, refuse_other_operators
from ..models.errors import CheckpointError
from ..models.families import vit
from .keys import KeyRules, Role, sort_keys
from .position import Method, find_grid, resample_position
from .prefix_tokens import declared_grid, match_prefix, num_prefix_rows
from .report import LoadReport, some
from .weights import Weights

BIAS_TABLE = "relative_position_bias_table"


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
    model: nn.Module, weights: Weights, *, role: Role, method: Method, classifiers: tuple[str, ...]
) -> LoadReport:
    """Load `weights` into `model` in place.

    Position embeddings are resampled to the model's grid by `method`; nothing else changes its shape.
    Keys that are missing or unexpected must have a reason (`KeyRules`). A teacher's norms get the epsilon that
    the source says; initial weights leave the model's own.

    Raises CheckpointError naming the first keys without a reason, with another shape, or with values
    that are not finite.
    """
    weights = match_prefix(model, weights)
    found = match(model, weights, role=role, method=method, classifiers=classifiers)
    if found.problems:
        words = "; ".join(
            f"{kind}: {some(keys, 3 if keys is found.wrong else 4)}" for kind, keys in found.problems.items()
        )
        described = getattr(model, "default_cfg", None) or {}
        name = described.get("architecture")
        raise CheckpointError(f"{weights.origin} does not fit {name or type(model).__name__}: {words}")
    refuse_not_finite(
        weights.origin, found.present, {key: tensor.dtype for key, tensor in model.state_dict().items()}
    )
    if not without_values(model.state_dict()):
        model.load_state_dict({**marks_of(model), **found.present}, strict=False)
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
    )


def match(
    model: nn.Module, weights: Weights, *, role: Role, method: Method, classifiers: tuple[str, ...]
) -> Match:
    """Match `weights` to the tensors of `model`, and list misfits.

    Raises CheckpointError: unknown grid, or a layer has another operator than in the weights.
    """
    weights = match_prefix(model, weights)
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
    missing, absent = sort_keys((key for key in target if key not in present), rules.missing)
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


def refuse_not_finite(origin: str, tensors: Mapping[str, Tensor], kinds: Mapping[str, torch.dtype]) -> None:
    """CheckpointError for numbers that are not finite, or not any more in the kind of number that they become."""
    floating = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
    bad = [key for key, tensor in floating.items() if not _is_finite(tensor.to(kinds[key]))]
    if bad:
        kind = str(kinds[bad[0]]).removeprefix("torch.")
        beyond = f" as {kind}" if _is_finite(tensors[bad[0]]) else ""
        raise CheckpointError(f"{origin} holds values that are not finite{beyond} in {some(bad)}")


def _is_finite(tensor: Tensor) -> bool:
    return tensor.is_meta or bool(torch.isfinite(tensor).all())


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
    new = tuple(vit(model).patch_embed.grid_size)
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
    if method != "timm":
        raise CheckpointError(
            f"{weights.origin}: {key} is resampled by timm's way only; position_embedding=timm does it"
        )
    if table.shape[1:] != target.shape[1:]:
        return table, ""  # other heads: refused by its shape
    window: Any = model.get_submodule(key.rpartition(".")[0]).window_size
    resized = resize_rel_pos_bias_table(table, new_window_size=window, new_bias_shape=tuple(target.shape))
    return resized, f"from {table.shape[0]} to {target.shape[0]} offsets (timm's way)"
