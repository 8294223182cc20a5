"""Standardized features: PHI-S and single dimensions against a dense reference, and the same in a resumed run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graftvit.launch.plan_text import describe_plan
from graftvit.models.errors import ConfigError, TransferError
from graftvit.transfer import DualViT, OutsideTeacher
from graftvit.transfer.engine.dry_run import dry_run
from graftvit.transfer.engine.loop import Loop
from graftvit.transfer.engine.train import train
from graftvit.transfer.methods.standardize import Standardizer, hadamard_matrix
from graftvit.transfer.setting import check_effect
from support.models.dense import images, relative_error, tiny
from support.runs.engine_runs import config, differences, make_convnext, make_teacher, state
from torch import Tensor


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 28, 36, 44, 60, 76, 96, 384, 768, 888])
def test_hadamard_matrices(order: int) -> None:
    matrix = hadamard_matrix(order)
    assert matrix is not None
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [3, 6, 10, 90, 92])
def test_orders_without_a_known_matrix(order: int) -> None:
    assert hadamard_matrix(order) is None


def covariance(x: Tensor) -> Tensor:
    return torch.cov(x.T, correction=0)


@pytest.mark.parametrize("tokens", ["pooled", "patches"])
@pytest.mark.parametrize("kind", ["dimension", "phi_s"])
def test_standardized_features(kind: str, tokens: str) -> None:
    teacher, student = tiny(seed=1), tiny(seed=2)
    batches = [images(batch=7, seed=seed) for seed in range(3)]
    dual = DualViT(
        teacher, student, "feature", tokens=tokens, standardize=kind, standardize_images=17
    ).double()
    seen: list[int] = []
    teacher.patch_embed.register_forward_hook(lambda *_: seen.append(1))
    dual.standardize([*batches, images(seed=9)])
    assert len(seen) == 3  # and not the fourth batch
    with torch.no_grad():
        features = teacher.forward_features(torch.cat(batches)[:17])
    x = features[:, 0] if tokens == "pooled" else features[:, 1:].flatten(0, 1)
    (standardizer,) = [each for each in dual.modules() if isinstance(each, Standardizer)]
    found = standardizer(x)
    assert found.mean(0).abs().max() < 1e-10
    if kind == "dimension":
        assert relative_error(found, (x - x.mean(0)) / x.std(0, correction=0)) < 1e-10
        return
    values, vectors = torch.linalg.eigh(covariance(x))
    phi = values.mean().sqrt()
    rotation = standardizer.scale * phi
    assert relative_error(rotation @ rotation.T, torch.eye(32, dtype=torch.float64)) < 1e-10
    assert relative_error(covariance(found).diagonal(), torch.ones(32, dtype=torch.float64)) < 1e-8
    assert relative_error(torch.cdist(found, found), torch.cdist(x, x) / phi) < 1e-8
    # H U^T: in the basis of the principal components every entry has the same size
    wide = values > 1e-6 * values.max()
    assert (
        relative_error((rotation @ vectors)[:, wide].abs(), torch.full((32, int(wide.sum())), 32**-0.5))
        < 1e-6
    )


@pytest.mark.parametrize("kind", ["dimension", "phi_s"])
def test_the_loss_is_that_of_the_projected_student_and_the_standardized_teacher(kind: str) -> None:
    teacher, student, x = tiny(seed=1), tiny(seed=2), images(batch=6)
    dual = DualViT(teacher, student, "feature", standardize=kind, feature_loss="mse", weight=1.0).double()
    dual.standardize([x])
    projector, standardizer = (
        copy.deepcopy(dual.projectors[name]) for name in ("feature", "feature_statistics")
    )
    with torch.no_grad():
        own = student.forward_head(student.forward_features(x), pre_logits=True)
        theirs = teacher.forward_head(teacher.forward_features(x), pre_logits=True)
    centered = theirs - standardizer.mean
    target = centered @ standardizer.scale.T if kind == "phi_s" else centered * standardizer.scale
    out = dual(x)
    assert relative_error(out.transfer_loss, F.mse_loss(projector(own), target)) < 1e-12
    out.transfer_loss.backward()
    assert dual.projectors["feature"].weight.grad is not None
    twin = dual.with_student(copy.deepcopy(student))
    twin.projectors["feature"].load_state_dict(projector.state_dict())
    assert relative_error(twin(x).transfer_loss, out.transfer_loss) < 1e-12


def test_a_step_without_statistics_says_what_is_missing() -> None:
    dual = DualViT(tiny(seed=1), tiny(seed=2), "feature", standardize="phi_s")
    with pytest.raises(TransferError, match=r"call DualViT.standardize\(batches of images\)"):
        dual(images())


@pytest.mark.parametrize(
    ("value", "message"),
    [(0.3, "the same features for all images"), (float("nan"), "a feature of the teacher is not finite")],
)
def test_features_that_have_no_statistics_are_named(value: float, message: str) -> None:
    teacher = OutsideTeacher(lambda x: torch.full((len(x), 8), value, dtype=x.dtype), feature_width=8)
    dual = DualViT(teacher, tiny(seed=2), "feature", standardize="dimension").double()
    with pytest.raises(TransferError, match=message):
        dual.standardize([images(batch=4)])


def test_a_width_without_a_hadamard_matrix_is_refused() -> None:
    teacher = OutsideTeacher(lambda x: x.mean((2, 3)), feature_width=3)
    with pytest.raises(TransferError, match=r"width of the teacher's features.*none is known here for 3"):
        DualViT(teacher, tiny(seed=2), "feature", standardize="phi_s")


def test_a_number_of_images_for_nothing_is_refused(tmp_path: Path) -> None:
    run = config(tmp_path, tmp_path, mode="transfer", transfer={"method": "feature", "standardize_images": 8})
    with pytest.raises(ConfigError, match="standardize_images=8 changes nothing with standardize=none"):
        check_effect(run)


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that learns two kinds of features of a ConvNeXt."""
    folder = tmp_path_factory.mktemp("teachers")
    feature = {"method": "feature", "teacher": "convnext", "standardize_images": 40, "feature_loss": "mse"}
    return {
        "source": make_teacher(folder / "vit"),
        "teachers": {
            "convnext": {"source": f"local-dir:{make_convnext(folder / 'convnext')}", "img_size": 32}
        },
        "transfer": {
            "losses": [
                {"method": "distill"},
                {**feature, "tokens": "both", "standardize": "phi_s"},
                {**feature, "tokens": "pooled", "standardize": "dimension"},
            ]
        },
    }


@pytest.mark.slow
def test_a_resumed_run_has_the_same_statistics_and_weights(
    sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert "standardized (phi_s) on 40 training images" in plan(straight, sections)
    assert train(config(straight, **sections)).finished

    step = Loop._step

    def fails_at_seven(loop: Loop, batches: Any) -> None:
        if loop.position.step == 7:
            raise KeyboardInterrupt
        step(loop, batches)

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_step", fails_at_seven)
        with pytest.raises(KeyboardInterrupt):
            train(config(cut, **sections, engine={"save_every": 5}))
    kept = {name: value for name, value in state(cut).items() if "statistics" in name}
    assert len(kept) == 6
    assert all(value.any() for value in kept.values())
    assert train(config(cut, **sections, engine={"save_every": 5})).finished
    assert all(torch.equal(state(cut)[name], value) for name, value in kept.items())
    assert [name for name in differences(straight, cut) if not name.startswith("best")] == []


def plan(folder: Path, sections: dict[str, Any]) -> str:
    run = config(folder, **sections)
    assert dry_run(run, 1, here=True).footprint.activations > 0
    return describe_plan(run)
