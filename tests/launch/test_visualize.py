"""`graftvit visualize`, as typed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.launch.cli import main
from graftvit.models.conversion import convert
from graftvit.models.merges import merge_layers
from graftvit.transfer.analysis.visualize import map_page
from graftvit.transfer.analysis.visualize.map_page import read_images, to_tensor
from graftvit.transfer.analysis.visualize.visualize import look
from graftvit.transfer.data import loading
from PIL import Image
from support.models.pyramids import tiny as pyramid
from support.models.saved import save_pyramid
from support.models.visualize_models import MEAN, STD, picture, save, tiny
from support.runs.typed import Typed


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tiny("0: linear"), tmp_path_factory.mktemp("models") / "student")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tiny(), tmp_path_factory.mktemp("models") / "teacher")


def test_a_folder_of_images(
    student: str,
    teacher: str,
    tmp_path: Path,
    typed: Typed,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(loading, "TOLD_EVERY", 0.0)
    folder = tmp_path / "images"
    folder.mkdir()
    for seed, name in enumerate(("one", "two")):
        picture(folder / f"{name}.png", seed)
    (folder / "notes.txt").write_text("no image")
    words = ["visualize", student, str(folder), "--teacher", teacher, "--query", "cls, 7", "--layers", "-1"]
    assert typed(*words, "--output_dir", tmp_path / "out").out == f"{tmp_path / 'out' / 'index.html'}\n"
    assert "maps of the images: 50 %, about" in caplog.text
    assert "pictures: 88 %, about" in caplog.text
    pngs = {path.name for path in (tmp_path / "out").glob("*.png")}
    asked = {
        f"{name}_{query}{end}.png"
        for name in ("one", "two")
        for query in ("cls", "7")
        for end in ("", "_teacher")
    }
    assert pngs == asked | {"layers.png"}
    for png in pngs:
        with Image.open(tmp_path / "out" / png) as opened:
            assert min(opened.size) > 200
    found = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert {*found.pop("pictures")} == asked
    loaded = load_pretrained(student)
    spec = loaded.preprocessing
    looks = [look(loaded.model, to_tensor(each.original, spec)) for each in read_images([str(folder)], spec)]
    for number, layer in enumerate(found["student"]["entropy"]):
        entropy = [each.layers[number].entropy() for each in looks]
        np.testing.assert_allclose(
            layer, np.mean([each for each in entropy if each is not None], axis=0), rtol=1e-5
        )
    assert np.shape(found["teacher"]["distance"]) == (2, 2)
    assert len(found["js"]) == len(found["cka"]) == len(found["cka_random"]) == 2
    assert found["cka_random"] != found["cka"]
    html = (tmp_path / "out" / "index.html").read_text()
    assert "http" not in html.replace("http-equiv", "")
    assert not re.search("{[{%]", html.partition("<script id")[0])


def test_images_are_seen_as_the_model_sees_them(student: str, tmp_path: Path) -> None:
    spec = load_pretrained(student).preprocessing
    (shown,) = read_images([picture(tmp_path / "x.png")], spec)
    with Image.open(tmp_path / "x.png") as opened:
        expected = np.asarray(opened)
    np.testing.assert_array_equal(shown.pixels, expected)  # it has the model's own size
    seen = (expected / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(to_tensor(shown.original, spec)[0].permute(1, 2, 0), seen, atol=1e-5)


def test_an_average_over_a_data_set(student: str, tmp_path: Path, typed: Typed) -> None:
    words = ["visualize", student, "--average", "4", "--dataset", "digits", "--workers", "0"]
    told = typed(*words, "--query", "cls", "--output_dir", tmp_path)
    assert told.out == f"{tmp_path / 'index.html'}\n"
    lines = told.err.splitlines()
    assert lines[0] == f"student: mean of 4 images, 0.0 MB in {tmp_path / 'average.npz'}"
    assert (tmp_path / "average_cls.png").is_file()
    with np.load(tmp_path / "average.npz") as arrays:
        assert arrays["0.maps"].shape == (2, 27, 27)


def test_another_image_size(student: str, tmp_path: Path) -> None:
    words = ["visualize", student, "digits:3", "--img_size", "32,16", "--query", "31", "--layers", "0"]
    assert main([*words, "--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "digit_3_31.png").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none.png"], "'none.png' is no image file and no folder"),
        (["digits:500"], "the test images are 0 to 499"),
        (["{broken}"], "cannot be read as an image"),
        (["{empty}"], "has no image in it"),
        (["digits:0"] * 17, "17 images are given and at most 16"),
        (["digits:0", "--layers", "2"], "--layers: there is no layer 2; the model has layers 0 to 1"),
        (["digits:0", "--layers", "a"], "--layers: 'a' is not a layer"),
        (["digits:0", "--query", "99"], "--query '99': valid are patches 0 to 23, cls, reg0, reg1"),
        (["digits:0", "--output_dir", "{broken}"], "leads nowhere: give a folder"),
        ([], "no IMAGE is given"),
        (["digits:0", "--average", "3"], "--average shows a data set, and the image 'digits:0' is given"),
        (["--average", "0"], "--average '0': valid are a number of images from 1, and 'all'"),
        (["--average", "3", "--layers", "2"], "--layers: there is no layer 2"),
        (["--average", "3"], "data.data_path is not set"),
        (["digits:0", "--val_split", "train"], "--val_split has an effect with --average only"),
    ],
)
def test_mistakes(student: str, tmp_path: Path, words: list[str], said: str, typed: Typed) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    places = {"broken": tmp_path / "broken.png", "empty": tmp_path / "empty"}
    given = [word.format(**places) for word in words]
    out = [] if "--output_dir" in words else ["--output_dir", str(tmp_path / "out")]
    told = typed("visualize", student, *given, *out, code=2).err
    assert said in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_page_that_is_too_large_is_refused(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: Typed
) -> None:
    monkeypatch.setattr(map_page, "MAX_MEGABYTES", 0)
    assert (
        "fewer layers by --layers"
        in typed(f"visualize {student} digits:0 --output_dir {tmp_path}/out", code=2).err
    )


def test_a_new_page_replaces_the_pictures_of_the_one_before(
    student: str, tmp_path: Path, typed: Typed
) -> None:
    mine, out = tmp_path / "mine.png", tmp_path / "out"
    out.mkdir()
    for kept in (mine, out / "mine.png"):
        picture(kept)
    for name in ("one", "two"):
        shown = picture(tmp_path / f"{name}.png")
        typed("visualize", student, shown, "--query", "cls", "--output_dir", out)
        assert {path.name for path in out.glob("*.png")} == {f"{name}_cls.png", "layers.png", "mine.png"}
        numbers = json.loads((out / "numbers.json").read_text())
        numbers["pictures"] += ["../mine.png"]
        (out / "numbers.json").write_text(json.dumps(numbers))
    assert mine.exists()


@pytest.fixture(scope="module")
def pyramids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A teacher of windows, and a student of other attention in two of its four layers and none in one."""
    folder = tmp_path_factory.mktemp("pyramids")
    teacher = pyramid("swin", (40, 24))
    models = {"teacher": teacher, "student": convert(teacher, "0: none; stage2: linear", without=["bias"])}
    return {name: save_pyramid(folder / name, "swin", model, (40, 24)) for name, model in models.items()}


def test_a_pyramid_by_stage(pyramids: dict[str, str], tmp_path: Path) -> None:
    words = ["visualize", pyramids["student"], picture(tmp_path / "x.png", size=(24, 40))]
    words += [
        "--teacher",
        pyramids["teacher"],
        "--query",
        "3x20,39x23",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(words) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {f"x_{place}{end}.png" for place in ("3x20", "39x23") for end in ("", "_teacher")}
    assert names == pictures | {"layers.png", "numbers.json", "index.html"}
    found = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert [layer and len(layer) for layer in found["student"]["entropy"]] == [None, 1, 2, 2]
    assert [layer and len(layer) for layer in found["teacher"]["distance"]] == [1, 1, 2, 2]
    assert [js is None for js in found["js"]] == [True, False, False, False]
    assert (
        max(layer for heads in found["teacher"]["entropy"] for layer in heads) <= np.log(9) + 1e-6
    )  # of a window
    assert max(layer for heads in found["student"]["entropy"][2:] for layer in heads) <= np.log(5 * 3) + 1e-6
    assert len(found["cka"]) == len(found["cka_random"]) == 4


def test_deformable_merges_have_a_picture_and_numbers(tmp_path: Path) -> None:
    model = convert(pyramid("swin", (40, 24)), "merge: deformable")
    for merge in merge_layers(model):
        merge.dconv.conv_offset.bias.data += 0.5
    save_pyramid(tmp_path / "lit", "swin", model, (40, 24))
    words = [f"local-dir:{tmp_path / 'lit'}", picture(tmp_path / "x.png", size=(24, 40)), "--query", "3x20"]
    assert main(["visualize", *words, "--output_dir", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").glob("x_*")}
    assert names == {"x_3x20.png", "x_3x20_merges.png"}
    [merge] = json.loads((tmp_path / "out" / "numbers.json").read_text())["student"]["merges"]
    assert merge["shift"] == pytest.approx(4 * 0.5 * 2**0.5)  # a token has four pixels
    assert merge["outside"] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--query 5", "--query '5': valid are places in pixels, 0x0 to 39x23"),
        ("--layers stage3", "--layers: there is no stage 3"),
        ("--layers 0", "--layers 0: no layer of these has attention"),
    ],
)
def test_mistakes_with_a_pyramid(
    pyramids: dict[str, str], tmp_path: Path, words: str, said: str, typed: Typed
) -> None:
    line = f"visualize {pyramids['student']} digits:0 {words} --output_dir {tmp_path}/out"
    assert said in typed(line, code=2).err
    assert not (tmp_path / "out").exists()


def test_images_may_follow_flags(typed: Typed, tmp_path: Path) -> None:
    first, second = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", seed=1)
    out = tmp_path / "out"
    typed("visualize", save(tiny(), tmp_path / "model"), first, "--query", "cls", second, "--output_dir", out)
    assert json.loads((out / "numbers.json").read_text())["pictures"] == ["a_cls.png", "b_cls.png"]
