"""What a pair of layers means for a method: its heads and tokens, or a refusal."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ...models.copying.grids import GridRule, match_tokens, words
from ...models.copying.tape import HeadMap, LayerPair, Link
from ...models.errors import TransferError
from ...models.families import (
    Site,
    depths,
    family_of,
    find_family,
    layout_of,
    native_host,
    sites,
)
from ..loss_config import LossConfig
from .heads import resolve_heads
from .layer_choice import choose_layers
from .map_loss import LayerMaps
from .method import TransferMethod, TransferPlan
from .mismatch import compare_models, report_mismatch
from .registry import find_method


def resolve_layers(
    layers: str | Sequence[int] | Sequence[tuple[int, int]],
    teacher_depths: Sequence[int],
    student_depths: Sequence[int],
) -> tuple[LayerPair, ...]:
    """Return the pairs of blocks for `layers` as `choose_layers` does."""
    return tuple(LayerPair(*pair) for pair in choose_layers(layers, teacher_depths, student_depths))


# What a pair of layers means for a method: their heads and tokens, or a refusal by name.


def resolve_links(
    config: LossConfig, method: TransferMethod, teacher: nn.Module, student: nn.Module
) -> tuple[tuple[Link, ...], GridRule]:
    """Return the pairs of layers with their heads and tokens, and the grids that a batch must have for them.

    Raises TransferError: the layers of a pair do not fit the method.
    """
    theirs, ours = sites(teacher), sites(student)
    pairs = resolve_layers(config.layers, depths(teacher), depths(student))
    stages = tuple(dict.fromkeys((theirs[pair.teacher].stage, ours[pair.student].stage) for pair in pairs))
    rule = GridRule(
        copy=method.equal_grids,
        interpolate=config.interpolate_grid,
        relative_bias=_has_bias(teacher, [theirs[pair.teacher] for pair in pairs]),
        stages=stages,
        method=None if method.copies else method.name,
    )
    links = []
    for pair in pairs:
        t, s = theirs[pair.teacher], ours[pair.student]
        if method.uses_heads:
            _check_attention(config, method, (teacher, t), (student, s))
        try:
            tokens = match_tokens(layout_of(teacher, t), layout_of(student, s), rule)
        except TransferError as error:
            raise TransferError(f"layers {t.index}>{s.index} (teacher>student): {error}") from error
        links.append(Link(pair, _heads(config, method, t, s), tokens, t, s))
    return tuple(links), rule


def _has_bias(teacher: nn.Module, used: list[Site]) -> bool:
    return any(family_of(teacher).has_bias(teacher, site) for site in used)


def _check_attention(
    config: LossConfig,
    method: TransferMethod,
    teacher: tuple[nn.Module, Site],
    student: tuple[nn.Module, Site],
) -> None:
    """Raise TransferError: what the method takes from attention means different things in the two layers."""
    (model_t, t), (model_s, s) = teacher, student
    where = f"layer {s.index} of the student cannot learn from layer {t.index} of the teacher"
    for owner, site in (("teacher", t), ("student", s)):
        if site.num_heads == 0:
            raise TransferError(
                f"{where}: that of the {owner} has no attention; use block_output, or leave the layer out of "
                f"transfer.layers={config.layers!r}"
            )
    _check_widths(config, method, t, s)
    maps = LayerMaps.of(model_t, t), LayerMaps.of(model_s, s)
    reason = method.refuses(config, *maps)
    if reason is not None:
        raise TransferError(
            f"{where} by transfer.method={method.name}: {reason}; use attention_output, block_output, feature or "
            "logits, or other transfer.layers"
        )
    structures = [each.structure for each in maps]
    if config.heads == "match" and structures[0] != structures[1]:
        raise TransferError(
            f"transfer.heads='match' compares maps of one structure, and layer {t.index} of the teacher has maps "
            f"{structures[0]} and layer {s.index} of the student {structures[1]}; use mean or pairs such as 3>0,1>2"
        )
    grids = t.shape.geometry.grid, s.shape.geometry.grid
    partial = next((each for each in structures if not each.is_whole), None)
    if config.interpolate_grid and grids[0] != grids[1] and partial is not None:
        raise TransferError(
            f"{where}: the grids are {words(grids[0])} and {words(grids[1])}, and transfer.interpolate_grid "
            f"interpolates only maps of all tokens to all tokens, not maps {partial}"
        )


def _check_widths(config: LossConfig, method: TransferMethod, t: Site, s: Site) -> None:
    if t.head_dim == s.head_dim:
        return
    widths = (
        f"needs heads of one width, and the teacher's are {t.head_dim} wide and the student's {s.head_dim}"
    )
    if method.head_widths == "equal":
        raise TransferError(
            f"transfer.method={method.name} {widths}; use method=copy, or a student with head width {t.head_dim}"
        )
    if config.heads != "all" and method.head_widths == "equal if chosen":
        raise TransferError(
            f"transfer.heads={config.heads!r} with transfer.method={method.name} {widths}; use heads=all"
        )


def _heads(config: LossConfig, method: TransferMethod, teacher: Site, student: Site) -> HeadMap:
    if not method.uses_heads:
        return HeadMap(tuple((head,) for head in range(student.num_heads)), student.num_heads)
    if config.heads == "match":
        return _first_heads(teacher, student)
    if config.heads == "all" and method.joins_heads:
        # Tensors are compared with their heads joined, so equal counts do not matter.
        return HeadMap(tuple((head,) for head in range(student.num_heads)), student.num_heads)
    heads = resolve_heads(config.heads, teacher.num_heads, student.num_heads)
    if heads.is_grouped and not method.averages_heads(config):
        raise TransferError(
            f"transfer.heads={config.heads!r} averages maps of several heads, which transfer.method={config.method} "
            f"with transfer.loss={config.loss} cannot do; use copy, or distill with loss=ce (the same gradient)"
        )
    return heads


def _first_heads(teacher: Site, student: Site) -> HeadMap:
    """Any one-to-one map, to stand in until the heads are matched."""
    count = min(teacher.num_heads, student.num_heads)
    return HeadMap(tuple((h,) if h < count else None for h in range(student.num_heads)), teacher.num_heads)


def resolve_plan(config: LossConfig, teacher: nn.Module, student: nn.Module) -> TransferPlan:
    """Resolve layers, heads and tokens; raises `TransferError` where the two models do not fit the method."""
    method = find_method(config.method)
    if not method.uses_layers and find_family(teacher) is None:
        return TransferPlan(method, (), (), tokens=config.tokens)
    notes = (report_mismatch(compare_models(teacher, student)),)
    if not method.uses_layers:
        return TransferPlan(method, (), notes, tokens=config.tokens)
    _check_student(method, student)
    links, rule = resolve_links(config, method, teacher, student)
    report = dict.fromkeys(line for link in links for line in link.tokens.report)
    needs_calibration = config.heads == "match" and method.uses_heads
    return TransferPlan(method, links, (*report, *notes), needs_calibration, rule)


def _check_student(method: TransferMethod, student: nn.Module) -> None:
    if method.whole_maps and any(_drops_probabilities(student, site) for site in sites(student)):
        raise TransferError(
            "student.model_args.attn_drop_rate must be 0: a dropped-out map is not the map that is transferred"
        )
    drop = getattr(student, "patch_drop", None)
    if drop is not None and not isinstance(drop, nn.Identity):
        raise TransferError(
            f"student.model_args.patch_drop_rate must be 0 for transfer.method={method.name}: a dropped patch has no "
            "counterpart in the teacher"
        )


def _drops_probabilities(student: nn.Module, site: Site) -> bool:
    return site.num_heads > 0 and native_host(student, site.block(student)).drop_rate > 0
