"""Nearest neighbors and the linear probe against plain references."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from graftvit.transfer.metrics.distance import STRENGTHS, NearestNeighbors, Reader, fit_probe
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from support.runs.engine_runs import ARGUMENTS, tiny_vit
from torch import Tensor, nn


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
def test_votes_are_those_of_a_plain_loop(
    count: int, classes: int, k: int, seed: int, temperature: float
) -> None:
    train, labels = blobs(count, classes, 4, spread=1.0, seed=seed)
    queries, _ = blobs(7, classes, 4, spread=1.0, seed=seed + 1000)
    knn = NearestNeighbors(train, labels, classes, neighbors=k, temperature=temperature)
    expected = torch.tensor([votes(train, labels, query, classes, k, temperature) for query in queries])
    torch.testing.assert_close(knn(queries), expected.double(), rtol=1e-6, atol=1e-12)


def test_the_values_are_those_of_dino() -> None:
    train, labels = blobs(60, 3, 4, spread=2.0)
    queries, _ = blobs(5, 3, 4, spread=2.0, seed=1)
    torch.testing.assert_close(
        NearestNeighbors(train, labels, 3)(queries),
        NearestNeighbors(train, labels, 3, neighbors=20, temperature=0.07)(queries),
    )


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


@pytest.mark.parametrize(
    "model",
    [
        tiny_vit(),
        tiny_vit(num_classes=0),
        tiny_vit(global_pool="avg"),
        timm.create_model("deit_tiny_distilled_patch16_224", **ARGUMENTS, num_classes=3),
    ],
    ids=["head", "headless", "average", "two heads"],
)
def test_the_feature_is_what_the_head_reads(model: nn.Module) -> None:
    images = torch.randn(3, 1, 8, 8)
    runs = 0

    def predict(shown: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        out: Tensor = model(shown)
        return out

    reader = Reader(model.eval(), predict)
    with torch.no_grad():
        tokens = model.forward_features(images)  # type: ignore[operator]
        expected = model.forward_head(tokens, pre_logits=True)  # type: ignore[operator]
        if isinstance(expected, tuple):
            expected = torch.stack(expected).mean(0)
        torch.testing.assert_close(reader.feature(images), expected)
        torch.testing.assert_close(reader.logits(images), model(images))
    assert runs == 1, "the same images are run once"
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_tokens_that_no_pooling_joins_are_averaged() -> None:
    model = tiny_vit(num_classes=0, class_token=False, global_pool="").eval()
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(Reader(model).feature(images), model(images).mean(1))
