"""Random pairs of small models, a method, and the layers, heads and images that go together, for hypothesis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graftvit.models.copying.teacher_view import Normalization
from graftvit.transfer.loss_config import LossConfig
from graftvit.transfer.methods.method import TransferMethod
from graftvit.transfer.methods.method_facts import reads_setting
from graftvit.transfer.methods.registry import find_method
from hypothesis import strategies as st
from support.models.dense import FAMILIES, tiny
from support.models.method_cases import METHODS, only_read
from support.models.pair_reference import Pair
from torch import nn

GRIDS = [(2, 3), (3, 2), (2, 2), (1, 3)]
NORMS = [(1.0, 0.0), (2.0, 0.5), (0.5, -0.25)]  # exact in float32
DRAWN = {
    "temperature": [1.0, 2.0],
    "feature_loss": ["cosine", "smooth_l1"],
    "loss": ["ce", "kl"],
}
"""Values of settings that a loss may read."""
Draw = Any


@dataclass(frozen=True)
class Case:
    """Two models as their builders take them, and what is asked of them."""

    teacher: dict[str, Any]
    student: dict[str, Any]
    pair: Pair
    sizes: tuple[tuple[int, int], ...]
    """Of the images: that of the student, and others where both models take any."""

    def models(self) -> tuple[nn.Module, nn.Module]:
        return tiny(seed=1, **self.teacher), tiny(seed=2, **self.student)

    def norms(self) -> dict[str, Normalization]:
        """Normalizations between which x becomes x · scale + shift."""
        scale, shift = self.pair.scale, self.pair.shift
        theirs = Normalization((0.5,) * 3, (0.25,) * 3)
        ours = Normalization((0.5 + 0.25 * shift,) * 3, (0.25 * scale,) * 3)
        return {"teacher_normalization": theirs, "student_normalization": ours}


@st.composite
def cases(draw: Draw) -> Case:
    method, dynamic = draw(st.sampled_from(METHODS)), draw(st.booleans())
    student = _model(draw, draw(st.sampled_from(GRIDS)), 8)
    grid = tuple(side // 8 for side in student["img_size"])
    other = reads_setting(method, "interpolate_grid") and draw(st.booleans())
    patch = draw(st.sampled_from([4, 8]))
    teacher = _model(draw, draw(st.sampled_from(GRIDS)) if other else grid, patch)
    differs = tuple(side // patch for side in teacher["img_size"]) != grid
    for model in (teacher, student):
        if "beit" in model["family"] and (dynamic or (differs and model is teacher)):
            model["family"] = "vit"  # a relative position bias has one size, and is not interpolated
    sizes = [student["img_size"]]
    if dynamic:
        teacher["dynamic_img_size"] = student["dynamic_img_size"] = True
        sizes += [(8 * height, 8 * width) for height, width in draw(st.permutations(GRIDS))[:2]]
    weight, reduction = draw(st.sampled_from([1.0, 3.0])), draw(st.sampled_from(["sum", "mean"]))
    options = only_read(method, weight=weight, reduction=reduction)
    if differs:
        options["interpolate_grid"] = True
    options |= {name: draw(st.sampled_from(DRAWN[name])) for name in DRAWN if reads_setting(method, name)}
    of_method = find_method(method)
    means = of_method.averages_heads(LossConfig(method=method, loss=options.get("loss", "ce")))
    one_width = of_method.head_widths == "equal" and not _alike(teacher, student)
    if one_width or not (of_method.joins_heads or means or of_method.copies):
        teacher |= {name: student[name] for name in ("embed_dim", "num_heads")}
    if means:
        teacher["num_heads"] = draw(st.sampled_from([1, 2, 4]))
    layers = _layers(draw, method, teacher["depth"], student["depth"], options)
    heads = _heads(draw, of_method, means, teacher, student, options)
    scale, shift = draw(st.sampled_from(NORMS))
    return Case(teacher, student, Pair(method, layers, heads, options, scale, shift), tuple(sizes))


def _model(draw: Draw, grid: tuple[int, ...], patch: int) -> dict[str, Any]:
    family = draw(st.sampled_from(sorted(FAMILIES)))
    return {
        "family": family, "embed_dim": draw(st.sampled_from([16, 32])),
        "num_heads": draw(st.sampled_from([1, 2, 4])), "depth": draw(st.integers(1, 3)), "patch_size": patch,
        "img_size": tuple(side * patch for side in grid),
    }  # fmt: skip


def _alike(teacher: dict[str, Any], student: dict[str, Any]) -> bool:
    widths = [model["embed_dim"] // model["num_heads"] for model in (teacher, student)]
    return widths[0] == widths[1]


def _layers(
    draw: Draw, method: str, theirs: int, ours: int, options: dict[str, Any]
) -> tuple[tuple[int, int], ...]:
    if not reads_setting(method, "layers"):
        return ()
    form = draw(st.sampled_from(["all", "first", "last", "pairs"]))
    count = draw(st.integers(1, ours))
    if form == "pairs":
        chosen = draw(st.permutations(range(ours)))[:count]
        pairs = [(draw(st.integers(0, theirs - 1)), layer) for layer in chosen]
        options["layers"] = pairs
        return tuple(sorted(pairs, key=lambda pair: pair[1]))
    options["layers"] = form if form == "all" else f"{form}:{count}"
    chosen = {"all": range(ours), "first": range(count), "last": range(ours - count, ours)}[form]
    return tuple((-(-(layer + 1) * theirs // ours) - 1, layer) for layer in chosen)  # spread evenly


def _heads(
    draw: Draw,
    method: TransferMethod,
    means: bool,
    teacher: dict[str, Any],
    student: dict[str, Any],
    options: dict[str, Any],
) -> dict[int, list[int]]:
    if not method.uses_heads:
        return {}
    theirs, ours = teacher["num_heads"], student["num_heads"]
    least = min(theirs, ours)
    forms = ["list", "pairs"] if method.head_widths == "any" or _alike(teacher, student) else []
    forms += ["all"] if theirs == ours or method.joins_heads else []
    forms += ["mean"] if means else []
    form = draw(st.sampled_from(forms))
    if form == "all":
        options["heads"] = "all"
        return {} if method.joins_heads else {head: [head] for head in range(ours)}
    if form == "mean":
        options["heads"] = "mean"
        if theirs >= ours:
            return {h: list(range(h * theirs // ours, (h + 1) * theirs // ours)) for h in range(ours)}
        return {h: [h * theirs // ours] for h in range(ours)}
    if form == "list":
        chosen = sorted(draw(st.permutations(range(least)))[: draw(st.integers(1, least))])
        options["heads"] = chosen
        return {head: [head] for head in chosen}
    chosen = sorted(draw(st.permutations(range(ours)))[: draw(st.integers(1, ours))])
    most = 2 if means else 1
    groups = {h: draw(st.permutations(range(theirs)))[: draw(st.integers(1, most))] for h in chosen}
    options["heads"] = ",".join(f"{one}>{head}" for head, group in groups.items() for one in group)
    return groups
