from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graftvit.models.errors import DataError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.coco import CocoImages, decode_mask
from graftvit.transfer.data.dense_sets import CITYSCAPES, check_dense, open_dense
from PIL import Image
from support.files.dense_scenes import (
    KINDS,
    Scene,
    composed,
    nuclei,
    polygons,
    with_crowd,
    without_objects,
    write_ade20k,
    write_cityscapes,
    write_coco,
)  # fmt: skip

SHAPES = ((128, 128), (96, 128), (128, 80))


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    found = composed("train", 4, SHAPES)
    return [*found, without_objects(found[0]), with_crowd(found[2])]


def coco(root: Path, training: bool = False, masks: bool = True, split: str = "validation") -> CocoImages:
    return CocoImages(root, split, training=training, masks=masks)


# The scenes themselves.


def test_scenes_are_the_same_each_time_and_splits_differ() -> None:
    one, other = composed("train", 3), composed("train", 4)[:3]
    for first, second in zip(one, other, strict=True):
        assert np.array_equal(first.pixels, second.pixels)
        assert np.array_equal(first.masks, second.masks)
    assert not np.array_equal(one[0].pixels, composed("validation", 1)[0].pixels)
    assert sum(len(scene.labels) for scene in nuclei("train", 8)) > 8


# COCO.


@pytest.mark.parametrize("form", ["rle", "counts"])
def test_items_are_what_was_written(tmp_path: Path, scenes: list[Scene], form: str) -> None:
    source = coco(write_coco(tmp_path, {"val2017": scenes}, form=form))
    assert (len(source), source.class_names) == (len(scenes), KINDS)
    for number, scene in enumerate(scenes):
        image, target = source.read(number)
        assert np.array_equal(np.asarray(image), scene.pixels)
        assert np.array_equal(target["boxes"].numpy(), scene.boxes())
        assert target["labels"].tolist() == list(scene.labels)
        assert np.array_equal(target["masks"].numpy(), scene.masks)
        assert target["area"].tolist() == [mask.sum() for mask in scene.masks]
        assert (target["image_id"], target["original_size"]) == (10 + number, scene.pixels.shape[:2])
    assert source.read(5)[1]["iscrowd"].tolist()[0] is True
    assert "masks" not in coco(tmp_path, masks=False).read(0)[1]


def test_polygons_are_nearly_the_mask(tmp_path: Path, scenes: list[Scene]) -> None:
    source = coco(write_coco(tmp_path, {"val": scenes[:4]}, form="polygons"))
    for number, scene in enumerate(scenes[:4]):
        found = source.read(number)[1]["masks"].numpy()
        assert (found & scene.masks).sum() > 0.95 * (found | scene.masks).sum()


def test_training_leaves_out_crowds_and_images_without_objects(tmp_path: Path, scenes: list[Scene]) -> None:
    alone = Scene(scenes[0].pixels, scenes[0].masks[:1], scenes[0].labels[:1])
    small = Scene(scenes[3].pixels[:, :31], scenes[3].masks[:, :, :31], scenes[3].labels)
    root = write_coco(tmp_path, {"train2017": [*scenes, with_crowd(alone), small]})
    source = coco(root, training=True, split="train")
    shown = [source.read(number)[1] for number in range(len(source))]
    assert [target["image_id"] for target in shown] == [10, 11, 12, 13, 15]
    assert shown[-1]["labels"].tolist() == list(scenes[5].labels[1:])
    assert len(coco(root, split="train")) == len(scenes) + 2
    assert source.wide.tolist() == [True, True, False, True, False]


def test_classes_are_numbered_by_the_order_of_their_ids(tmp_path: Path, scenes: list[Scene]) -> None:
    source = coco(write_coco(tmp_path, {"val": scenes}, ids=(90, 7, 13)))
    assert source.class_names == ("dahlia", "saucer", "coin")
    assert source.read(0)[1]["labels"].tolist() == [{0: 2, 1: 0, 2: 1}[label] for label in scenes[0].labels]


@pytest.mark.parametrize("name", ["train", "train2017", "training", "train2014"])
def test_a_split_is_found_by_its_usual_names(tmp_path: Path, scenes: list[Scene], name: str) -> None:
    write_coco(tmp_path, {name: scenes[:1]})
    assert len(coco(tmp_path, split="train")) == 1


def edited(root: Path, edit: Callable[[dict[str, Any]], object], split: str = "val") -> Path:
    file = root / "annotations" / f"instances_{split}.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
    return root


def _drop(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.pop(key)


def _swap_format(content: dict[str, Any]) -> None:
    for row in content["annotations"]:
        x, y, width, height = row["bbox"]
        row["bbox"] = [x, y, x + width, y + height]


def _set(part: str, **values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: [row.update(values) for row in content[part]]


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no images": (_drop("images"), "images"),
    "no objects": (lambda content: content["annotations"].clear(), "no annotations"),
    "unknown category": (_set("annotations", category_id=77), "category_id 77"),
    "unknown image": (_set("annotations", image_id=5), "image_id 5"),
    "corners for sides": (_swap_format, "x, y, width, height"),
    "empty boxes": (_set("annotations", bbox=[1, 1, 0, 5]), "empty"),
    "boxes outside": (_set("annotations", bbox=[500, 1, 9, 5]), "outside"),
    "infinite": (_set("annotations", bbox=[1e999, 1, 9, 5]), "damaged"),
    "three numbers": (_set("annotations", bbox=[1, 9, 5]), "bbox"),
    "no size": (_set("images", height=0), "height"),
    "a path out": (_set("images", file_name="../a.png"), "leads out"),
    "missing files": (_set("images", file_name="a.png"), "a.png"),
    "ids twice": (_set("images", id=10), "several images"),
    "a large id": (_set("categories", id=1 << 63), "id"),
    "a large category": (_set("annotations", category_id=1 << 63), "category_id"),
    "categories twice": (_set("categories", id=1), "several categories"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, scenes: list[Scene], damage: str) -> None:
    edit, words = DAMAGE[damage]
    root = edited(write_coco(tmp_path, {"val": scenes}), edit)
    with pytest.raises(DataError) as found:
        coco(root)
    assert words in str(found.value)
    assert "\n" not in str(found.value)


def test_a_file_that_is_no_json_or_not_there_is_one_sentence(tmp_path: Path, scenes: list[Scene]) -> None:
    root = write_coco(tmp_path, {"val": scenes})
    with pytest.raises(DataError, match="instances_NAME"):
        coco(root, split="train")
    file = root / "annotations" / "instances_val.json"
    file.write_text(file.read_text()[:-9])
    with pytest.raises(DataError, match="damaged"):
        coco(root)


def test_one_wrong_box_among_many_is_left_out_of_training(
    tmp_path: Path, scenes: list[Scene], caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(content: dict[str, Any]) -> None:
        content["annotations"][0]["bbox"][2] = 0

    root = edited(write_coco(tmp_path, {"val": scenes}), spoil)
    assert len(coco(root, training=True).read(0)[1]["labels"]) == len(scenes[0].labels) - 1
    assert len(coco(root).read(0)[1]["labels"]) == len(scenes[0].labels)
    assert caplog.text.count("1 of") == 2


def test_an_image_of_another_size_than_the_file_says_is_bad(tmp_path: Path, scenes: list[Scene]) -> None:
    source = coco(write_coco(tmp_path, {"val": scenes}))
    Image.fromarray(scenes[1].pixels).save(source.path(0))
    with pytest.raises(DataError, match="128 x 96"):
        source.read(0)


@pytest.mark.parametrize(
    "mask",
    [{"size": [8, 6], "counts": [0, 10**9]}, {"size": [8, 6], "counts": "zzzzz"}, {"size": [8, 7], "counts": [56]},
     {"size": [8, 6], "counts": [-4, 52]}, {"counts": [48]}, "polygon", 3, [["a"] * 6], [[1, 2, 3, 4, 5, 6, 7]], None],
)  # fmt: skip
def test_a_damaged_mask_is_one_sentence(mask: object) -> None:
    with pytest.raises(DataError, match="damaged"):
        decode_mask(mask, 8, 6)


def test_a_mask_outside_the_image_ends_at_its_border() -> None:
    assert decode_mask([[-1e30, -50, 1e30, -50, 1e30, 1e30, -1e30, 1e30]], 8, 6).all()
    assert not decode_mask([], 8, 6).any()
    square = np.zeros((8, 6), bool)
    square[2:6, 1:4] = True
    assert (decode_mask(polygons(square), 8, 6) ^ square).sum() <= 2


# Labeled pixels.


def config(root: Path, name: str, **settings: Any) -> DataConfig:
    return DataConfig(dataset=name, data_path=str(root), **settings)


def test_ade20k_has_a_class_less_than_its_number_and_ignores_zero(
    tmp_path: Path, scenes: list[Scene]
) -> None:
    write_ade20k(tmp_path, {"training": scenes, "validation": scenes[:2]})
    source = open_dense(config(tmp_path, "ade20k", num_classes=3), "train", training=True)
    assert (len(source), len(source.class_names), source.task) == (len(scenes), 3, "segmentation")
    for number, scene in enumerate(scenes):
        image, target = source.read(number)
        assert image.size == scene.pixels.shape[1::-1]
        assert np.array_equal(target["labels"].numpy(), scene.classes())
    assert len(open_dense(config(tmp_path, "ade20k"), "validation", training=False).class_names) == 150
    (tmp_path / "objectInfo150.txt").write_text("Idx\tName\n1\twall, w\n2\tfloor\n3\tsky\n")
    named = open_dense(config(tmp_path, "ade20k"), "val", training=False)
    assert tuple(named.class_names) == ("wall, w", "floor", "sky")


def test_cityscapes_has_its_19_classes(tmp_path: Path, scenes: list[Scene]) -> None:
    assert len(CITYSCAPES) == 19
    write_cityscapes(tmp_path, {"train": scenes, "val": scenes[:1]}, ids=(26, 24, 9))
    source = open_dense(config(tmp_path, "cityscapes"), "train", training=True)
    names = ["car", "person"]
    labels = source.read(0)[1]["labels"]
    for place, name in enumerate(names):
        expected = torch.from_numpy(scenes[0].classes() == place)
        assert torch.equal(labels == source.class_names.index(name), expected)
    assert set(labels.unique().tolist()) <= {13, 11, 255}  # number 9 is no class that is evaluated


def test_wrong_labels_are_one_sentence(tmp_path: Path, scenes: list[Scene]) -> None:
    write_ade20k(tmp_path, {"training": scenes})
    few = open_dense(config(tmp_path, "ade20k", num_classes=1), "train", training=True)
    with pytest.raises(DataError, match="1 class"):
        [few.read(number) for number in range(len(few))]
    label = tmp_path / "annotations" / "training" / "00000000.png"
    Image.fromarray(scenes[0].pixels).save(label)
    source = open_dense(config(tmp_path, "ade20k"), "train", training=True)
    with pytest.raises(DataError, match="RGB"):
        source.read(0)
    Image.fromarray(scenes[0].pixels[:9, :, 0]).save(label)
    with pytest.raises(DataError, match="128 x 9"):
        source.read(0)
    label.write_bytes(label.read_bytes()[:60])
    with pytest.raises(DataError, match=f"{label.name} is damaged"):
        source.read(0)
    label.unlink()
    with pytest.raises(DataError, match="have no labels"):
        open_dense(config(tmp_path, "ade20k"), "train", training=True)


def test_another_number_of_classes_than_the_data_set_has_is_refused(
    tmp_path: Path, scenes: list[Scene]
) -> None:
    write_coco(tmp_path, {"train": scenes})
    assert len(open_dense(config(tmp_path, "coco", num_classes=3), "train", training=True).class_names) == 3
    with pytest.raises(DataError, match="num_classes=4"):
        open_dense(config(tmp_path, "coco", num_classes=4), "train", training=True)


def test_what_is_no_such_data_set_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="coco"):
        check_dense(config(tmp_path, "folder"), ["train"])
    with pytest.raises(DataError, match="does not exist"):
        check_dense(config(tmp_path / "no", "coco"), ["train"])
    for name in ("coco", "ade20k", "cityscapes"):
        with pytest.raises(DataError, match="train"):
            check_dense(config(tmp_path, name), ["train", None])
