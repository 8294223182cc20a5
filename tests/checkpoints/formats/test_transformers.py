"""Models of transformers, built at random: timm's model must give what theirs gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.provenance import Pretrained
from graftvit.models.families import check_supported
from support.models.hf_models import CASES, Case, save, save_modules
from torch import Tensor, nn, no_grad

TOLERANCE = 1e-5


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).norm() / wanted.norm())


def check_same(case: Case, model: nn.Module, teacher: Pretrained) -> None:
    check_supported(teacher.model)
    for count in (1, 2):
        images = case.images(count)
        tokens, pooled = case.outputs(model, images)
        with no_grad():
            if tokens is not None:
                assert error(teacher.model.forward_features(images), tokens) <= TOLERANCE
            if pooled is not None:
                assert error(teacher.model(images), pooled) <= TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_features_are_those_of_transformers(case: Case, tmp_path: Path) -> None:
    model = case.build()
    check_same(case, model, load_pretrained(save(model, tmp_path / "saved")))
    check_same(case, model, load_pretrained(save_modules(model, tmp_path / "modules")))


def test_the_classes_of_a_classifier_are_known_by_name(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "vit-classifier")
    model = case.build()
    assert load_pretrained(save(model, tmp_path / "unnamed")).label_names is None
    names = ("dog", "cat", "ant", "bee", "cow")
    model.config.id2label = dict(enumerate(names))
    assert load_pretrained(save(model, tmp_path / "named")).label_names == names
