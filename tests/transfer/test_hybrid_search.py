"""The choice of each layer's operator, against every mix that there is."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import timm
import torch
from graftvit.models.conversion import convert, converted_layers, resize
from graftvit.models.cost import count_operations
from graftvit.models.errors import ConfigError, TransferError
from graftvit.transfer.hybrid_search import (
    KEEP,
    Budget,
    HybridSearch,
    Journal,
    Measure,
    Mix,
    Palette,
    Scale,
    Sum,
    choose,
    end_error,
    end_of,
)
from hypothesis import given
from hypothesis import strategies as st
from support.models.pyramids import images, tiny
from torch import nn

SMALL: dict[str, Any] = {
    "embed_dim": 16, "depth": 3, "num_heads": 2, "img_size": 16, "patch_size": 4, "num_classes": 3,
}  # fmt: skip
NAMES = ("linear", "uniform")


def vit(**changed: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **{**SMALL, **changed}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv.weight" in name:
                parameter.mul_(30 if "blocks.1" in name else 8)
            elif name == "head.weight":
                parameter.mul_(30)
    return model


def students(teacher: nn.Module, names: tuple[str, ...] = NAMES) -> dict[str, nn.Module]:
    found = {
        name: convert(teacher, f"*: {name}", without=("bias",) * (teacher.num_features == 96))
        for name in names
    }
    for student in found.values():
        for layer in converted_layers(student).values():
            for parameter in layer.parameters():
                parameter.data.mul_(1.05)  # as an alignment changes them
    return found


def search(folder: Path, teacher: nn.Module | None = None, digest: str = "0", **more: Any) -> HybridSearch:
    teacher = vit() if teacher is None else teacher
    batches = torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    palette = Palette(teacher, students(teacher), dict.fromkeys(NAMES, digest))
    return HybridSearch(
        palette, list(batches), Scale((16, 16)), Journal(folder / "hybrid.jsonl", "own"), **more
    )


def every_mix(depth: int) -> list[Mix]:
    return list(itertools.product((KEEP, *NAMES), repeat=depth))


@given(st.integers(0, 10**6), st.floats(0.1, 1.1), st.integers(0, 4))
def test_a_choice_is_the_best_of_all_mixes_but_those_excluded(seed: int, limit: float, excluded: int) -> None:
    draw = np.random.default_rng(seed)
    pairs = [(layer, name) for layer in range(3) for name in NAMES if draw.random() < 0.8]
    error = Sum(0.0, {pair: 10.0 ** draw.uniform(-4, 1) for pair in pairs})
    cost = Sum(1.0, {pair: draw.uniform(-0.3, 0.1) for pair in pairs})
    possible = [
        mix for mix in every_mix(3)
        if all(name == KEEP or (layer, name) in error.parts for layer, name in enumerate(mix)) and cost.of(mix) <= limit
    ]  # fmt: skip
    possible.sort(key=error.of)
    found = choose(error, cost, limit, 3, possible[:excluded])
    wanted = possible[excluded:]
    assert (found is None) == (not wanted)
    if found is not None:
        assert cost.of(found) <= limit + 1e-6
        assert error.of(found) == pytest.approx(error.of(wanted[0]), abs=1e-5)


def test_a_corrected_sum_agrees_with_what_was_measured_and_else_stays() -> None:
    pairs = list(itertools.product(range(3), NAMES))
    plain = Sum(0.0, {pair: 1.0 + number for number, pair in enumerate(pairs)})
    measured = {("linear", KEEP, KEEP): 1.0, ("linear", "linear", KEEP): 8.0}
    found = plain.corrected(measured)
    assert found.of(("linear", "linear", KEEP)) == pytest.approx(8.0, rel=0.01)
    assert found.of(("linear", KEEP, KEEP)) == pytest.approx(1.0, rel=0.01)
    untouched = {pair: part for pair, part in plain.parts.items() if pair[1] == "uniform"}
    assert {pair: found.parts[pair] for pair in untouched} == pytest.approx(untouched)
    assert plain.corrected({}) == plain


def test_a_mix_has_the_layers_of_its_students_and_all_else_of_the_teacher() -> None:
    teacher = vit()
    own = students(teacher)
    palette = Palette(teacher, own)
    mix = ("linear", KEEP, "uniform")
    made, x = palette.model(mix), torch.randn(2, 3, 16, 16)
    by_hand = convert(teacher, "*: keep")
    for layer, name in enumerate(mix):
        if name != KEEP:
            by_hand.blocks[layer].attn = own[name].blocks[layer].attn
    assert torch.equal(made(x), by_hand(x))
    assert palette.model(palette.kept) is teacher


@pytest.mark.parametrize("kind", ["pvt", "svt", "swin"])
def test_a_mix_of_a_pyramid_errs_as_the_layers_in_their_places(kind: str) -> None:
    teacher = tiny(kind)
    without = ("bias",) if kind == "swin" else ()
    own = {name: convert(teacher, f"0: {name}; 2: {name}", without=without) for name in NAMES}
    palette = Palette(teacher, own)
    batch = images((32, 32))
    made = palette.model(palette.single([2], "linear"))
    assert sorted(converted_layers(made)) == [2]
    wanted = convert(teacher, "2: linear", without=without)
    assert torch.allclose(made(batch), wanted(batch), atol=1e-6)
    assert set(palette.pairs) == set(itertools.product((0, 2), NAMES))


@pytest.mark.parametrize(
    "measure",
    ["keep", *(pytest.param(each, marks=pytest.mark.slow) for each in ("macs", "energy", "memory"))],
)
def test_the_hybrid_is_the_best_of_all_within_its_budget(tmp_path: Path, measure: Measure) -> None:
    found = search(tmp_path)
    costs = {mix: found.cost(measure, mix) for mix in every_mix(3)}
    errors = {mix: found.error(mix) for mix in every_mix(3)}
    for limit in sorted(set(costs.values()))[:-1:3]:
        fresh = search(tmp_path / str(limit))
        hybrid = fresh.best(Budget(measure, limit))
        assert hybrid.cost == pytest.approx(costs[hybrid.mix])
        assert hybrid.cost <= limit
        best = min(error for mix, error in errors.items() if costs[mix] <= limit)
        assert hybrid.error == pytest.approx(best, rel=1e-4)
        assert hybrid.error == pytest.approx(errors[hybrid.mix], rel=1e-4)


def test_latency_is_measured_beside_the_teacher_at_the_size_asked_for(
    tmp_path: Path, monkeypatch: Any
) -> None:
    sizes = []

    def costs(self: Scale, measure: str, models: dict[str, nn.Module]) -> dict[str, float]:
        sizes.append({name: tuple(each.patch_embed.img_size) for name, each in models.items()})
        return {name: 1.0 + len(converted_layers(each)) / 10 for name, each in models.items()}

    monkeypatch.setattr(Scale, "costs", costs)
    found = search(tmp_path)
    found.scale = Scale((24, 32))
    assert found.cost("latency", ("linear", "linear", KEEP)) == pytest.approx(1.2)
    assert sizes == [{"teacher": (24, 32), "student": (24, 32)}]
    assert tuple(found.palette.teacher.patch_embed.img_size) == (16, 16)


def test_a_latency_that_was_lucky_is_not_promised(tmp_path: Path, monkeypatch: Any) -> None:
    found, times = search(tmp_path), dict[Mix, int]()
    best = found.best(Budget("macs", 0.95)).mix
    macs = {mix: found.cost("macs", mix) for mix in every_mix(3)}

    def measure(self: HybridSearch, measure: str, mix: Mix) -> float:
        times[mix] = times.get(mix, 0) + 1
        return 1.1 if mix == best and times[mix] == 2 else macs[mix]

    monkeypatch.setattr(HybridSearch, "measure", measure)
    hybrid = found.best(Budget("latency", 0.95))
    assert times[best] == times[hybrid.mix] == 2
    errors = {mix: found.error(mix) for mix in every_mix(3) if macs[mix] <= 0.95 and mix != best}
    assert hybrid.mix == min(errors, key=lambda mix: errors[mix])


@torch.no_grad()
def test_errors_are_those_of_a_dense_float64_restatement() -> None:
    teacher, x = vit().double(), torch.randn(5, 3, 16, 16).double()
    student = convert(teacher, "*: linear").eval()
    p, q = teacher(x).softmax(-1), student(x).softmax(-1)
    kl = (p * (p / q).log()).sum(-1).mean()
    ends = [[end_of(model, part) for part in x.split(2)] for model in (student, teacher)]
    assert end_error(*ends) == pytest.approx(float(kl), rel=1e-4)
    teacher, student = vit(num_classes=0), convert(vit(num_classes=0), "*: linear").eval()
    own, theirs = (model.forward_features(x.float()) for model in (student, teacher))
    wanted = (own - theirs).square().sum() / (theirs - theirs.mean((0, 1))).square().sum()
    ends = [[end_of(model, x.float())] for model in (student, teacher)]
    assert end_error(*ends) == pytest.approx(float(wanted), rel=1e-4)


def test_what_is_written_is_not_measured_again(tmp_path: Path) -> None:
    first = search(tmp_path).best(Budget("macs", 0.9))
    file = tmp_path / "hybrid.jsonl"
    whole = file.read_text()
    told: list[str] = []
    assert search(tmp_path, tell=told.append).best(Budget("macs", 0.9)) == first
    assert not told
    assert file.read_text() == whole
    for cut in (0, len(whole) // 3, len(whole) - 5):
        file.write_text(whole[:cut])
        assert search(tmp_path).best(Budget("macs", 0.9)) == first
    assert search(tmp_path, digest="another alignment", tell=told.append).best(Budget("macs", 0.9))
    assert told
    file.write_text(json.dumps({"settings": "others", "key": "x", "value": 1.0}) + "\n")
    with pytest.raises(ConfigError, match="--output_dir"):
        search(tmp_path).best(Budget("macs", 0.9))


def test_a_budget_that_no_mix_meets_names_the_cheapest(tmp_path: Path) -> None:
    found = search(tmp_path)
    least = min(found.cost("macs", mix) for mix in every_mix(3))
    with pytest.raises(ConfigError) as refused:
        found.best(Budget("macs", least / 2))
    named = float(next(iter(re.findall(r"has (0\.\d+)", str(refused.value)))))
    assert least <= named < least + 0.001
    assert found.best(Budget("macs", named)).cost == least


def test_operators_that_are_not_cheaper_at_this_size_are_told(tmp_path: Path) -> None:
    teacher = vit()
    palette = Palette(teacher, {"hedgehog": convert(teacher, "*: hedgehog")})
    found = HybridSearch(palette, [], Scale((16, 16)), Journal(tmp_path / "hybrid.jsonl", "own"))
    with pytest.raises(ConfigError, match="16x16"):
        found.check(Budget("macs", 0.9))


def test_an_error_that_is_not_finite_is_refused_and_never_read(tmp_path: Path) -> None:
    teacher = vit()
    palette = Palette(teacher, students(teacher))
    images = torch.full((1, 3, 16, 16), float("inf"))
    found = HybridSearch(palette, [images], Scale((16, 16)), Journal(tmp_path / "hybrid.jsonl", "own"))
    with pytest.raises(TransferError, match="not finite"):
        found.error_sum()
    assert not (tmp_path / "hybrid.jsonl").exists()
    journal = Journal(tmp_path / "other.jsonl", "own")
    for damaged in (float("nan"), "x", None):
        record = {"settings": "own", "key": "a", "value": damaged}
        journal.path.write_text(json.dumps(record) + "\n")
        assert journal.known("a", lambda: 2.0) == 2.0
    assert journal.known("a", lambda: 3.0) == 2.0


@pytest.mark.parametrize("size", [12, 32])
def test_a_student_that_was_aligned_at_another_size_is_the_same_in_a_mix(size: int) -> None:
    teacher = vit()
    student = students(teacher, ("nystrom",))["nystrom"]
    resize(student, size)
    resize(teacher, size)
    palette = Palette(teacher, {"nystrom": student})
    whole, sample = palette.model(("nystrom",) * 3), torch.randn(2, 3, size, size)
    torch.testing.assert_close(whole(sample), student(sample))
    assert palette.plan(("nystrom", KEEP, KEEP)) == {0: "nystrom(num_landmarks=3)"}


def test_students_of_another_teacher_are_refused() -> None:
    teacher = vit()
    with pytest.raises(TransferError, match="converts no layer"):
        Palette(teacher, {"own": vit()})
    with pytest.raises(TransferError, match="the model that the student was converted from"):
        Palette(vit(depth=2), students(teacher))


def test_multiplications_are_those_of_the_whole_model(tmp_path: Path) -> None:
    found = search(tmp_path)
    mix = ("linear", KEEP, KEEP)
    wanted = [
        count_operations(each).total.multiplications
        for each in (found.palette.model(mix), found.palette.teacher)
    ]
    assert found.cost("macs", mix) == wanted[0] / wanted[1]
    assert "macs" in get_args(Measure)
