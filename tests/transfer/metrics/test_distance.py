"""Distances, nearest neighbors and the linear probe, in sums over batches, against plain references in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from graftvit.models.conversion import convert
from graftvit.models.errors import DataError
from graftvit.transfer.metrics.distance import (
    STRENGTHS,
    DistanceSums,
    NearestNeighbors,
    Reader,
    compared_layers,
    fit_probe,
    measure_distances,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from support.models.pyramids import TINY, images, tiny
from support.runs.engine_runs import ARGUMENTS, tiny_vit
from torch import Tensor, nn


def rows(count: int, width: int, seed: int, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) + mean


def dense_cka(student: Tensor, teacher: Tensor) -> float:
    """From the N x N kernels: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), HSIC as Song et al. 2012, equation 5."""
    count = len(student)
    centered = [x.double() - x.double().mean(0) for x in (student, teacher)]  # changes rounding alone
    kernels = [x @ x.T for x in centered]
    for kernel in kernels:
        kernel.fill_diagonal_(0)

    def hsic(k: Tensor, other: Tensor) -> Tensor:
        first = torch.trace(k @ other) + k.sum() * other.sum() / ((count - 1) * (count - 2))
        return (first - 2 / (count - 2) * (k @ other).sum()) / (count * (count - 3))

    itself = hsic(kernels[0], kernels[0]) * hsic(kernels[1], kernels[1])
    return float(hsic(*kernels) / itself.sqrt()) if itself > 0 else 0.0


def compared(student: Tensor, teacher: Tensor, size: int, valid: Tensor | None = None) -> DistanceSums:
    valid = torch.ones(len(student), dtype=torch.bool) if valid is None else valid
    comparison = DistanceSums()
    for batch in zip(student.split(size), teacher.split(size), valid.split(size), strict=True):
        comparison.update(*batch)
    return comparison


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(4, 40), width=st.integers(1, 6), size=st.integers(1, 41), seed=st.integers(0, 99),
    mean=st.sampled_from([0.0, 100.0]),
)  # fmt: skip
def test_sums_over_batches_are_dense_values(
    count: int, width: int, size: int, seed: int, mean: float
) -> None:
    student, teacher = rows(count, width, seed, mean), rows(count, width, seed + 100, mean)
    found = compared(student, teacher, size).result()
    assert found.rows == count
    assert found.relative_error == pytest.approx(float((student - teacher).norm() / teacher.norm()), rel=1e-9)
    assert found.cosine == pytest.approx(float(F.cosine_similarity(student, teacher).mean()), rel=1e-9)
    assert found.cka == pytest.approx(dense_cka(student, teacher), rel=1e-5, abs=1e-6)


def test_equal_features_and_rotated_ones() -> None:
    teacher = rows(30, 5, 0)
    same = compared(teacher, teacher, 7).result()
    assert (same.relative_error, same.cosine, same.cka) == pytest.approx((0.0, 1.0, 1.0))
    turned = compared(3 * teacher @ torch.linalg.qr(rows(5, 5, 1))[0], teacher, 7).result()
    assert turned.cka == pytest.approx(1.0)
    assert turned.relative_error is not None
    assert turned.relative_error > 1


def test_features_that_have_nothing_in_common_are_not_alike() -> None:
    """The biased estimate of independent features with more columns than rows is near one."""
    found = [compared(rows(60, 300, seed), rows(60, 300, seed + 50), 16).result().cka for seed in range(8)]
    assert max(abs(each) for each in found if each is not None) < 0.1


def test_features_of_two_widths_have_an_alignment_alone_and_three_rows_none() -> None:
    student, teacher = rows(30, 3, 0), rows(30, 8, 1)
    found = compared(student, teacher, 8).result()
    assert (found.relative_error, found.cosine) == (None, None)
    assert found.cka == pytest.approx(dense_cka(student, teacher), rel=1e-9)
    found = compared(rows(3, 4, 0), rows(3, 4, 1), 2).result()
    assert found.cka is None
    assert found.relative_error is not None


def test_a_mean_far_above_the_deviation_loses_nothing_in_float32() -> None:
    student, teacher = rows(400, 4, 0, mean=1000.0), rows(400, 4, 1, mean=1000.0)
    found = compared(student.float(), teacher.float(), 32).result()
    assert found.cka == pytest.approx(dense_cka(student.float(), teacher.float()), abs=1e-6)


def test_padding_does_not_count_even_where_it_is_not_finite() -> None:
    student, teacher = rows(20, 4, 0), rows(20, 4, 1)
    expected = compared(student[:13], teacher[:13], 20).result()
    student[13:], valid = float("nan"), torch.arange(20) < 13
    found = compared(student, teacher, 6, valid).result()
    assert (found.relative_error, found.cosine, found.cka, found.rows) == pytest.approx(
        (expected.relative_error, expected.cosine, expected.cka, 13)
    )
    with pytest.raises(DataError, match="no image could be compared"):
        compared(student, teacher, 6, torch.zeros(20, dtype=torch.bool)).result()


def test_layers_are_compared_token_by_token() -> None:
    torch.manual_seed(0)
    teacher, student = tiny_vit().double().eval(), tiny_vit(num_classes=0).double().eval()
    images = torch.randn(10, 1, 8, 8, dtype=torch.float64)
    layers = compared_layers(teacher, student)
    readers = Reader(student, layers=layers.student), Reader(teacher, layers=layers.teacher)
    batches = [
        (part, torch.zeros(len(part)), torch.ones(len(part), dtype=torch.bool)) for part in images.split(4)
    ]
    found = measure_distances({"s": readers[0]}, readers[1], {"s": layers}, batches, torch.device("cpu"))["s"]
    assert sorted(found.layers) == [0, 1]
    with torch.no_grad():
        ours, theirs = (
            (model.forward_intermediates(images, indices=[0], intermediates_only=True, output_fmt="NLC",
                                         return_prefix_tokens=True)[0])
            for model in (student, teacher)
        )  # fmt: skip
        tokens = [torch.cat([prefix, patches], dim=1) for patches, prefix in (ours, theirs)]
        features = [
            model.forward_head(model.forward_features(images), pre_logits=True)
            for model in (student, teacher)
        ]
    for distance, (s, t) in ((found.layers[0], tokens), (found.feature, features)):
        assert distance.relative_error == pytest.approx(float((s - t).norm() / t.norm()))
        assert distance.cka == pytest.approx(dense_cka(s.flatten(0, -2), t.flatten(0, -2)))
    assert (found.feature.rows, found.layers[0].rows) == (10, 10 * 5)


def test_only_tokens_that_both_have_are_compared() -> None:
    with_registers = tiny_vit(reg_tokens=2)
    layers = compared_layers(with_registers, tiny_vit(depth=1))
    assert layers.teacher == (1,)
    assert layers.tokens is not None
    assert layers.tokens.teacher.index(7) == [0, 3, 4, 5, 6]
    assert compared_layers(tiny_vit(img_size=16), tiny_vit()).pairs == ()


def blobs(count: int, classes: int, width: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images around one center a class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    noise = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return centers[labels] + spread * noise, labels


def votes(
    train: Tensor, labels: Tensor, query: Tensor, classes: int, k: int, temperature: float
) -> list[float]:
    """One image at a time, in plain numbers."""
    similar = [float(F.cosine_similarity(query, row, dim=0)) for row in train]
    nearest = sorted(range(len(train)), key=lambda index: -similar[index])[:k]
    counted = [0.0] * classes
    for index in nearest:
        counted[int(labels[index])] += math.exp(similar[index] / temperature)
    return counted


@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(1, 40), classes=st.integers(1, 5), k=st.integers(1, 50), seed=st.integers(0, 99),
    temperature=st.sampled_from([0.07, 1.0]),
)  # fmt: skip
def test_votes_are_of_a_plain_loop(count: int, classes: int, k: int, seed: int, temperature: float) -> None:
    train, labels = blobs(count, classes, 4, spread=1.0, seed=seed)
    queries, _ = blobs(7, classes, 4, spread=1.0, seed=seed + 1000)
    knn = NearestNeighbors(train, labels, classes, neighbors=k, temperature=temperature)
    expected = torch.tensor([votes(train, labels, query, classes, k, temperature) for query in queries])
    torch.testing.assert_close(knn(queries), expected.double(), rtol=1e-6, atol=1e-12)
    of_dino = NearestNeighbors(train, labels, classes, neighbors=20, temperature=0.07)
    torch.testing.assert_close(NearestNeighbors(train, labels, classes)(queries), of_dino(queries))


def test_the_probe_is_the_logistic_regression_of_scikit_learn() -> None:
    features, labels = blobs(90, 3, 6, spread=1.5)
    probe = fit_probe(features, labels, 3)
    assert probe.strength in STRENGTHS
    other = LogisticRegression(C=probe.strength, tol=1e-8, max_iter=5000).fit(
        features.numpy(), labels.numpy()
    )
    expected = torch.from_numpy(other.predict_proba(features.numpy()))
    torch.testing.assert_close(probe(features).softmax(1), expected, atol=2e-4, rtol=0)


def test_the_probe_chooses_its_strength_and_separates_what_can_be_separated() -> None:
    features, labels = blobs(200, 4, 8, spread=0.1)
    test, wanted = blobs(80, 4, 8, spread=0.1, seed=5)
    assert (fit_probe(features, labels, 4)(test).argmax(1) == wanted).all()
    noise = torch.randn(200, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weak = fit_probe(torch.cat([blobs(200, 4, 8, spread=3.0)[0], noise], dim=1), labels, 4)
    assert weak.strength < max(STRENGTHS), "features that say little want a strong penalty"


def test_few_images_and_absent_classes_are_fitted_too() -> None:
    features, labels = blobs(4, 2, 3, spread=0.1)
    probe = fit_probe(features, labels, 5)
    assert probe(features).shape == (4, 5)
    assert (probe(features).argmax(1) == labels).all()


def pyramid(kind: str, plan: str | None) -> nn.Module:
    return tiny(kind) if plan is None else convert(tiny(kind), plan, without=["bias"])


MODELS: dict[str, nn.Module] = {
    "head": tiny_vit(),
    "headless": tiny_vit(num_classes=0),
    "average": tiny_vit(global_pool="avg"),
    "two heads": timm.create_model("deit_tiny_distilled_patch16_224", **ARGUMENTS, num_classes=3),
    "tokens that no pooling joins": tiny_vit(num_classes=0, class_token=False, global_pool=""),
    **{
        f"{kind}, {plan}": pyramid(kind, plan)
        for kind in TINY
        for plan in (None, "stage1: none; stage2: linear")
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_the_feature_is_what_the_head_reads(name: str) -> None:
    """The same images are run once."""
    model: Any = MODELS[name].eval()
    shown = images((32, 32)) if "," in name else torch.randn(3, 1, 8, 8)
    runs: list[int] = []
    reader = Reader(model, lambda images: runs.append(1) or model(images))
    with torch.no_grad():
        tokens = model.forward_features(shown)
        expected = tokens.mean(1) if "tokens" in name else model.forward_head(tokens, pre_logits=True)
        if isinstance(expected, tuple):
            expected = torch.stack(expected).mean(0)
        torch.testing.assert_close(reader.feature(shown), expected)
        torch.testing.assert_close(reader.logits(shown), model(shown))
    assert len(runs) == 1
    assert not any(module._forward_pre_hooks for module in model.modules())
