"""What `release` and `save` of a `DualViT` hand out gives the numbers that it gave, for every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.upload import plan_upload
from graftvit.models.conversion import convert
from graftvit.models.copied import copying_of
from graftvit.models.copying.teacher_view import Normalization
from graftvit.models.errors import CheckpointError, TransferError
from graftvit.transfer.methods.dual import DualViT
from support.models import pyramids
from support.models.dense import images, tiny
from support.models.method_cases import COPIES, METHODS
from support.runs.engine_runs import make_teacher
from torch import nn

X = images(dtype=torch.float32)
NORMS = {
    "teacher_normalization": Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)),
    "student_normalization": Normalization((0.5,) * 3, (0.3,) * 3),
}


def trained(method: str, student: nn.Module | None = None, **options: Any) -> DualViT:
    """A student after a step, so that it is neither fresh nor its teacher."""
    student = tiny(seed=2, dtype=torch.float32) if student is None else student
    dual = DualViT(tiny(seed=1, dtype=torch.float32), student, method, **{**NORMS, **options}).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    out = dual(X)
    (out.logits.square().mean() + out.transfer_loss).backward()
    optimizer.step()
    return dual.eval()


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_saved_and_a_released_student_give_the_numbers_of_the_dual(tmp_path: Path, method: str) -> None:
    with torch.enable_grad():
        dual = trained(method)
    expected, student = dual.predict(X), dual.student
    folder = dual.save(tmp_path / "student")
    torch.testing.assert_close(graftvit.load(folder)(X), expected)
    torch.testing.assert_close(dual.predict(X), expected)  # it goes on
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == ("graftvit_copied" if method in COPIES else "vit_tiny_patch16_224")
    assert config["pretrained_cfg"]["mean"] == [0.5] * 3
    assert config["graftvit"]["recipe"]["transfer"]["method"] == method
    released = dual.release()
    assert released is student is dual.release()
    torch.testing.assert_close(released(X), expected)
    assert (copying_of(released) is not None) == (method in COPIES)
    with pytest.raises(CheckpointError, match=r"already holds a model.*overwrite=True"):
        dual.save(folder)
    torch.testing.assert_close(graftvit.load(dual.save(folder, overwrite=True))(X), expected)
    assert json.loads((folder / "config.json").read_text()) == config, "it is saved after its release, too"


@pytest.mark.parametrize("method", COPIES)
def test_the_bare_student_is_released_by_its_name_alone(method: str) -> None:
    dual, plain = trained(method), tiny(dtype=torch.float32)
    bare = dual.release(bare=True)
    assert copying_of(bare) is None
    assert bare.state_dict().keys() == plain.state_dict().keys()
    assert all(parameter.requires_grad for parameter in bare.parameters())
    with pytest.raises(TransferError, match="bare"):
        trained("distill").release(bare=True)
    whole = trained(method)
    whole.release()
    with pytest.raises(TransferError, match="released with its teacher's part"):
        whole.release(bare=True)


@torch.no_grad()
def test_a_converted_student_and_several_losses_are_saved(tmp_path: Path) -> None:
    student = convert(tiny(seed=2, dtype=torch.float32), "0: hedgehog; 1: uniform")
    losses = [{"method": "block_output"}, {"method": "copy", "layers": [(2, 2)]}]
    dual = DualViT(tiny(seed=1, dtype=torch.float32), student, losses=losses, **NORMS).eval()
    torch.testing.assert_close(graftvit.load(dual.save(tmp_path / "student"))(X), dual.predict(X))
    torch.testing.assert_close(dual.release()(X), graftvit.load(tmp_path / "student")(X))


@torch.no_grad()
def test_other_norms_types_and_heads_are_kept(tmp_path: Path) -> None:
    student = tiny(seed=2, dtype=torch.float64, global_pool="avg")
    student.reset_classifier(7)
    student.double()
    for module in student.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-3
    dual = DualViT(tiny("clip", seed=1), student, "copy", layers="first:2", **NORMS).eval()
    loaded = graftvit.load(dual.save(tmp_path / "student"), dtype=torch.float64)
    torch.testing.assert_close(loaded(images()), dual.predict(images()))


def test_what_is_known_of_a_loaded_teacher_is_recorded(tmp_path: Path) -> None:
    teacher = load_pretrained(f"local-dir:{make_teacher(tmp_path)}")
    student = timm.create_model(teacher.architecture, **teacher.model_args)
    dual = DualViT(teacher, student, "copy")
    folder = dual.save(tmp_path / "student")
    made = json.loads((folder / "config.json").read_text())["graftvit"]
    assert made["teacher"]["source"] == teacher.source
    assert made["init"] == {"source": "not recorded"}
    files = plan_upload(str(folder), "me/student")
    assert teacher.source.rpartition("/")[2] in str(files)


def test_teacher_and_student_by_name_are_loaded(tmp_path: Path) -> None:
    teacher = tiny(seed=1, dtype=torch.float32)
    folder = DualViT(tiny(dtype=torch.float32), teacher, "distill", **NORMS).save(tmp_path / "model")
    dual = DualViT(folder, str(folder), "distill")
    assert torch.equal(dual.teacher.state_dict()["norm.weight"], teacher.state_dict()["norm.weight"])
    assert all(each.requires_grad for each in dual.student.parameters())
    assert not any(each.requires_grad for each in dual.teacher.parameters())
    with pytest.raises(CheckpointError, match="runs/t2/student"):
        DualViT("runs/t2/student", tiny(), "distill")


def test_of_another_dual_the_teacher_is_a_copy() -> None:
    dual = DualViT(tiny(seed=1, dtype=torch.float32), tiny(dtype=torch.float32), "distill", **NORMS)
    other = DualViT(dual, tiny(seed=2, dtype=torch.float32), "distill", **NORMS)
    with torch.no_grad():
        dual.student.norm.weight.zero_()
    assert other.teacher.norm.weight.all()
    with pytest.raises(TransferError, match="release"):
        DualViT(tiny(dtype=torch.float32), dual, "distill")


def test_what_cannot_be_described_is_refused(tmp_path: Path) -> None:
    student = tiny(dtype=torch.float32)
    del student.pretrained_cfg  # as of a model that timm's factory did not make
    with pytest.raises(CheckpointError, match="timm name"):
        DualViT(tiny(seed=1, dtype=torch.float32), student, "distill", **NORMS).save(tmp_path / "student")
    pyramid = DualViT(pyramids.tiny("pvt"), pyramids.tiny("pvt", seed=1), "copy")
    with pytest.raises(TransferError, match="pyramid"):
        pyramid.release()
    assert pyramid.predict(pyramids.images((32, 32))).shape == (2, 3)
    assert copying_of(pyramid.release(bare=True)) is None
