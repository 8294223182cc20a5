"""ImageNet's subsets and ReaL labels, as timm ships them."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
from graftvit.models.errors import ConfigError, DataError
from graftvit.transfer.data.labels import real_labels, subset_classes


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
def test_classes_of_a_subset_are_in_the_order_of_its_folders(name: str) -> None:
    info = files("timm.data") / "_info"
    synsets = (info / "imagenet_synsets.txt").read_text().split()
    own = (info / f"{name.replace('-', '_')}_synsets.txt").read_text().split()
    classes = subset_classes(name)
    assert len(classes) == 200
    assert [synsets[index] for index in classes] == sorted(own)


def test_an_unknown_subset_is_named() -> None:
    with pytest.raises(ConfigError, match="'imagenet-b'; did you mean 'imagenet-"):
        subset_classes("imagenet-b")


def test_real_labels_go_by_file_name(tmp_path: Path) -> None:
    file = tmp_path / "real.json"
    file.write_text(json.dumps([[3, 7], [], [999]]))
    names = [f"/data/val/n01/ILSVRC2012_val_{number:08d}.JPEG" for number in (3, 1, 2)]
    labels = real_labels(names, file)
    assert [row.nonzero().flatten().tolist() for row in labels] == [[999], [3, 7], []]


def test_timms_copy_is_the_default() -> None:
    labels = real_labels([f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 50001, 997)])
    shipped = json.loads((files("timm.data") / "_info" / "imagenet_real_labels.json").read_text())
    assert [row.nonzero().flatten().tolist() for row in labels] == [sorted(each) for each in shipped[::997]]


@pytest.mark.parametrize("name", ["cat.jpg", "ILSVRC2012_val_00000000.JPEG", "ILSVRC2012_val_00050001.JPEG"])
def test_other_images_have_no_real_label(name: str) -> None:
    with pytest.raises(DataError, match="has no ReaL label"):
        real_labels([name])


def test_a_missing_file_of_labels_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.json cannot be read"):
        real_labels([], tmp_path / "nothing.json")


@pytest.mark.parametrize("text", ["no JSON", "[" * 100_000, "{}", "[[1000]]", "[[-1]]", '["a"]', "[[1], 5]"])
def test_a_file_that_has_no_labels_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text(text)
    with pytest.raises(DataError, match=r"real.json"):
        real_labels(["ILSVRC2012_val_00000001.JPEG"], tmp_path / "real.json")
