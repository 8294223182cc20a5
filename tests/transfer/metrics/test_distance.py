"""Distances in sums over batches are those of all rows at once, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graftvit.models.errors import DataError
from graftvit.transfer.metrics.distance import DistanceSums, Reader, compared_layers, measure_distances
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs.engine_runs import tiny_vit
from torch import Tensor


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
def test_sums_over_batches_are_the_dense_values(
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


def test_fewer_than_four_rows_have_no_estimate() -> None:
    found = compared(rows(3, 4, 0), rows(3, 4, 1), 2).result()
    assert found.cka is None
    assert found.relative_error is not None


def test_features_of_two_widths_have_an_alignment_alone() -> None:
    student, teacher = rows(30, 3, 0), rows(30, 8, 1)
    found = compared(student, teacher, 8).result()
    assert (found.relative_error, found.cosine) == (None, None)
    assert found.cka == pytest.approx(dense_cka(student, teacher), rel=1e-9)


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
