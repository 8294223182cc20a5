"""Any pair of models is put side by side, with the pairs that learned from each other, and a notebook shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import graftvit
import pytest
import torch
import torch.nn.functional as F
from graftvit.checkpoints.pretrained import describe_model, load_pretrained
from graftvit.models.errors import DataError, TransferError
from graftvit.transfer import attention_maps
from graftvit.transfer.analysis.layer_maps import layer_maps, map_divergence
from graftvit.transfer.analysis.visualize.map_page import to_tensor
from graftvit.transfer.analysis.visualize.partners import pair_layers
from graftvit.transfer.analysis.visualize.visualize import look
from PIL import Image
from support.models.visualize_models import picture, save, tiny
from support.runs.typed import Typed

DEEP = {"depth": 4, "seed": 1}
PAIRED = {"method": "distill", "layers": "3>0,1>1", "heads": "1>0,0>1"}


def dual(teacher: Any = None, student: Any = None, **options: Any) -> graftvit.DualViT:
    given = teacher or tiny(**DEEP), student or tiny()
    return graftvit.DualViT(*given, **(PAIRED | options))


def test_the_pairs_of_a_run_of_another_depth(tmp_path: Path, typed: Typed) -> None:
    teacher = save(tiny(**DEEP), tmp_path / "teacher", depth=4)
    student = dual().save(tmp_path / "student")
    words = [student, picture(tmp_path / "x.png"), "--teacher", teacher, "--query", "3"]
    typed("visualize", *words, "--output_dir", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert found["pairs"] == [3, 1]
    assert len(found["teacher"]["entropy"]) == 4
    assert [len(found[key]) for key in ("js", "cka", "cka_random")] == [2, 2, 2]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "layer 0, teacher\u0027s 3" in page or "layer 0, teacher's 3" in page
    assert "learned from (transfer.method=distill)" in page
    assert '"groups":[[1],[0]]' in page


def test_without_a_run_layers_are_at_the_same_relative_depth() -> None:
    found = pair_layers(tiny(**DEEP), describe_model(tiny()))
    assert found.numbers(2) == [1, 3]
    assert "relative depth" in found.words
    shallow = pair_layers(tiny(depth=1), describe_model(tiny()))
    assert shallow.numbers(2) == [0, 0]


def test_pairs_of_a_run_that_do_not_fit_this_teacher_are_said() -> None:
    student = dual().to_pretrained()
    assert pair_layers(tiny(**DEEP), student).numbers(2) == [3, 1]
    found = pair_layers(tiny(depth=3), student)
    assert found.numbers(2) == [1, 2]
    assert "do not fit this teacher: transfer.layers=" in found.words


def test_heads_are_compared_with_those_that_they_learned_from() -> None:
    teacher, student, image = tiny(**DEEP), tiny(), torch.randn(1, 3, 16, 24)
    seen = graftvit.visualize(dual(teacher, student), image)
    theirs, ours = attention_maps(teacher, image), attention_maps(student, image)
    for layer, other in enumerate([3, 1]):
        expected = map_divergence(theirs[other][:, [1, 0]], ours[layer])
        assert seen.numbers["js"][layer] == pytest.approx(expected, rel=1e-4)


def test_a_layer_without_a_partner_is_shown_alone() -> None:
    seen = graftvit.visualize(dual(layers="3>1"), torch.randn(1, 3, 16, 24), queries="cls")
    assert seen.numbers["pairs"] == [None, 3]
    assert seen.numbers["js"][0] is None
    assert seen.numbers["cka"][0] is None
    assert any("alone: 0" in each for each in seen.notes)
    figure = seen.figures["image_0_cls_teacher.png"]
    shown = [bool(axes.images) for axes in figure.axes[:10]]
    assert shown == [True, False, True, False, True, *[True] * 5]


def test_on_another_grid_logits_are_interpolated_as_the_transfer_does_it() -> None:
    teacher, image, grid = tiny(**DEEP), torch.randn(1, 3, 16, 24), (3, 5)
    own = attention_maps(teacher, image)[2][0].double()
    spread = F.interpolate(torch.eye(24).view(24, 1, 4, 6), grid, mode="bilinear").view(24, 15).T.double()
    spread = torch.block_diag(torch.eye(3, dtype=torch.float64), spread)
    expected = (spread @ own.log() @ spread.T).softmax(-1)
    found = layer_maps(teacher, image, [2], grid=grid)[2]
    torch.testing.assert_close(found.weights[0].double(), expected, atol=1e-5, rtol=1e-4)
    assert layer_maps(tiny("1: linear"), image, [0, 1], grid=grid).keys() == {0}


def test_a_teacher_of_another_size_sees_the_photograph_by_its_own_preprocessing(tmp_path: Path) -> None:
    teacher = save(tiny(img_size=(32, 40), **DEEP), tmp_path / "teacher", img_size=(32, 40), depth=4)
    with Image.open(picture(tmp_path / "x.png", size=(40, 40))) as photo:
        seen = graftvit.visualize(tiny(), photo.convert("RGB"), teacher=teacher, layers=-1)
        loaded = load_pretrained(teacher)
        own = look(loaded.model, to_tensor(photo, loaded.preprocessing)).numbers()
    assert loaded.preprocessing.input_size == (3, 32, 40)
    assert seen.numbers["teacher"]["entropy"] == [pytest.approx(heads) for heads in own.entropy]
    assert all(js > 0 for js in seen.numbers["js"])
    assert seen.numbers["cka"] == [None, None]
    assert any("8x10 patches" in each and "4x6" in each for each in seen.notes)


def test_a_dual_vit_brings_its_teachers(tmp_path: Path) -> None:
    image = torch.randn(2, 3, 16, 24)
    losses = [
        {"method": "logits", "teacher": "one"},
        {"method": "distill", "layers": "3>1", "heads": "all", "teacher": "two"},
    ]
    student, teachers = tiny(), {"one": tiny(seed=5), "two": tiny(**DEEP)}
    both = graftvit.DualViT(teachers, student, losses=losses)
    assert graftvit.visualize(both, image).numbers["pairs"] == [None, 3]
    assert graftvit.visualize(both, image, teacher="one").numbers["pairs"] == [0, 1]
    assert both.training
    seen = graftvit.visualize(both, image, tmp_path, queries=[4, "cls"])
    assert seen.page == tmp_path / "index.html"
    assert {path.name for path in tmp_path.glob("*.png")} == set(seen.figures)
    assert json.loads((tmp_path / "numbers.json").read_text())["js"] == seen.numbers["js"]


def test_a_notebook_shows_the_pictures_and_the_numbers() -> None:
    seen = graftvit.visualize(tiny(), torch.randn(2, 3, 16, 24), teacher=tiny(**DEEP))
    html = seen._repr_html_()
    assert html.count('src="data:image/png;base64,') == len(seen.figures) == 5
    assert "http" not in html
    assert html.count("<tr>") == 3
    assert f"{seen.numbers['js'][0]:.3g}" in html
    assert "vit_tiny_patch16_224" in html


def test_a_batch_a_picture_and_a_file_are_the_same_image(tmp_path: Path) -> None:
    model, file = load_pretrained(save(tiny(), tmp_path / "model")), picture(tmp_path / "x.png")
    with Image.open(file) as opened:
        given = [file, opened.copy(), to_tensor(opened, model.preprocessing)]
    numbers = [graftvit.visualize(model, each).numbers["student"]["distance"] for each in given]
    assert numbers[0] == numbers[1] == numbers[2]
    with pytest.raises(DataError, match="images is of shape"):
        graftvit.visualize(model, given[2][0])
    with pytest.raises(TransferError, match="the teacher takes 1 channels and the student 3"):
        graftvit.visualize(model, file, teacher=tiny(in_chans=1))
