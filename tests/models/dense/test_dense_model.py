"""A dense model takes images of several sizes, gives losses or predictions, and refuses what does not fit."""

from __future__ import annotations

import copy
import pickle
from typing import Any, get_args

import pytest
import torch
from graftvit.models.dense import DESIGNS, Kind
from graftvit.models.dense.dense_model import DenseModel, create_dense
from graftvit.models.errors import ConfigError, DataError
from support.models.dense_bodies import SIZES, body, images, targets
from torch import Tensor

KINDS = get_args(Kind)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def made(kind: Any, name: str = "pvt", **how: Any) -> DenseModel:
    return create_dense(kind, body(name), 3, width=16, **how)


def without_objects() -> list[dict[str, Any]]:
    second = targets("detection")[1]
    first = {**second, "masks": torch.zeros(0, *SIZES[0], dtype=torch.bool)}
    return [first, second]


def test_images_are_normalized_then_padded_with_zeros_and_labels_with_255() -> None:
    model = made("semantic_fpn", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    given, known = images(), targets("segmentation")
    prepared = model.prepare(given, known)
    assert prepared.tensors.shape == (2, 3, 96, 160)
    assert prepared.sizes == list(SIZES)
    mean, std = torch.tensor([0.1, 0.2, 0.3])[:, None, None], torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    assert prepared.targets is not None
    for one, image, target, before in zip(prepared.tensors, given, prepared.targets, known, strict=True):
        height, width = image.shape[1:]
        torch.testing.assert_close(one[:, :height, :width], (image - mean) / std)
        assert one[:, height:].eq(0).all()
        assert one[:, :, width:].eq(0).all()
        assert target["labels"].shape == (96, 160)
        assert torch.equal(target["labels"][:height, :width], before["labels"])
        assert target["labels"][height:].eq(255).all()
    in_bytes = [torch.full((3, 20, 20), 51, dtype=torch.uint8)]
    torch.testing.assert_close(
        model.prepare(in_bytes).tensors[0, :, 0, 0], (0.2 - mean[:, 0, 0]) / std[:, 0, 0]
    )


def test_mean_and_deviation_are_those_of_the_weights() -> None:
    described = body("pvt")
    described.pretrained_cfg = {"mean": (0.5, 0.5, 0.4), "std": (0.2, 0.2, 0.3)}  # type: ignore[assignment]
    model = create_dense("retinanet", described, 3, width=16)
    assert (model.mean, model.std) == ((0.5, 0.5, 0.4), (0.2, 0.2, 0.3))


@pytest.mark.parametrize("name", ["pvt", "vit"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_gradient_also_without_objects(kind: str, name: str) -> None:
    model = made(kind, name)
    known = without_objects() if model.task == "detection" else targets("segmentation")
    losses = model(images(), known)
    assert all(each.shape == () for each in losses.values())
    sum(losses.values()).backward()
    assert [key for key, each in model.named_parameters() if each.grad is None] == []


@pytest.mark.parametrize("kind", ["semantic_fpn", "upernet"])
def test_a_batch_without_labels_has_a_loss_of_zero(kind: str) -> None:
    losses = made(kind)(images(), [{"labels": torch.full(size, 255)} for size in SIZES])
    assert all(float(each.detach()) == 0 for each in losses.values())


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_have_the_size_of_the_images(kind: Kind) -> None:
    model = made(kind, **({"score_threshold": 0.0} if DESIGNS[kind].best == "box_ap" else {})).eval()
    with torch.no_grad():
        found = model(images())
    for one, size in zip(found, SIZES, strict=True):
        if model.task == "segmentation":
            assert one["labels"].shape == size
            continue
        count = len(one["boxes"])
        assert one["scores"].shape == one["labels"].shape == (count,)
        assert 0 < count <= 100
        assert one["boxes"][:, 2].max() <= size[1]
        if kind == "mask_rcnn":
            assert one["masks"].shape == (count, *size)
            assert one["masks"].dtype == torch.bool


@pytest.mark.parametrize("kind", ["retinanet", "mask_rcnn", "fcos"])
def test_an_image_where_nothing_is_found_has_empty_predictions(kind: str) -> None:
    with torch.no_grad():
        found = made(kind, score_threshold=1.0).eval()(images())[0]
    assert found["boxes"].shape == (0, 4)
    assert found["labels"].shape == found["scores"].shape == (0,)
    assert "masks" not in found or found["masks"].shape == (0, *SIZES[0])


def of_class(model: Any, label: int) -> None:
    """Make the box head of Mask R-CNN say one class for everything."""
    predictor = model.head.roi_heads.box_predictor.cls_score
    torch.nn.init.zeros_(predictor.weight)
    torch.nn.init.zeros_(predictor.bias)
    predictor.bias.data[label + 1] = 9


def test_labels_of_mask_rcnn_begin_at_0_in_predictions_and_targets() -> None:
    model = made("mask_rcnn")
    of_class(model, 2)
    losses = {}
    for label in (0, 2):
        torch.manual_seed(0)
        known = targets("detection")
        known[0]["labels"] = torch.full((2,), label)
        losses[label] = float(model(images(), known)["loss_classifier"])
    assert losses[2] < losses[0]
    with torch.no_grad():
        found = model.eval()(images())
    assert set(found[0]["labels"].tolist()) == {2}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_in_float32_under_autocast(kind: str) -> None:
    model = made(kind)
    known = targets(model.task)
    states = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            states.append(model(images(), known))
    plain, mixed = states
    for name, each in mixed.items():
        assert each.dtype == torch.float32
        torch.testing.assert_close(each, plain[name], rtol=0.2, atol=0.05)
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(images())[0]
    assert {each.dtype for each in found.values()} <= {torch.float32, torch.int64, torch.bool}


def test_large_boxes_keep_their_exact_anchors_under_autocast() -> None:
    model: Any = made("retinanet").eval()
    for each in model.head.head.parameters():
        torch.nn.init.zeros_(each)
    torch.nn.init.ones_(model.head.head.classification_head.cls_logits.bias)
    image = [torch.rand(3, 64, 1000)]
    with torch.no_grad():
        wanted = model(image)[0]["boxes"]
        with torch.autocast("cpu", torch.bfloat16):
            found = model(image)[0]["boxes"]
    assert isinstance(wanted, Tensor)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_can_be_copied_and_pickled(kind: str) -> None:
    model = made(kind).eval()
    shown = images()[:1]
    with torch.no_grad():
        wanted = model(shown)[0]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            found = other(shown)[0]
            assert found.keys() == wanted.keys()
            assert all(torch.equal(each, wanted[name]) for name, each in found.items())


def test_what_does_not_fit_is_refused() -> None:
    model = made("retinanet")
    with pytest.raises(DataError):
        model.prepare([])
    with pytest.raises(DataError):
        model.prepare(images(), targets("detection")[:1])
    with pytest.raises(DataError):
        model(images())
    for wrong in (
        {"dropout": 0.1},
        {"class_names": ["a"]},
        {"norms": (7,)},
        {"width": "wide"},
        {"size_divisor": 48},
        {"detections": 0},
        {"samples": 64},
        {"score_threshold": float("nan")},
        {"std": (0.1, 0.1)},
    ):
        with pytest.raises(ConfigError):
            create_dense("retinanet", body("pvt"), 3, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        create_dense("yolo", body("pvt"), 3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        create_dense("retinanet", body("pvt"), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_images_and_targets_are_one_sentence(kind: Kind) -> None:
    model, task = made(kind), DESIGNS[kind].task
    for shape in ((3, 64, 64), (2, 1, 64, 64), (1, 4, 64, 64), (1, 3, 0, 64)):
        with pytest.raises(DataError, match=r"give a tensor \(3, H, W\)"):
            model.prepare(torch.zeros(shape))  # type: ignore[arg-type]
    model.prepare(torch.rand(2, 3, 64, 64))  # type: ignore[arg-type]
    first, *others = targets(task)
    labels = first["labels"]
    wrong = {
        "from -1": {"labels": labels * 0 - 1},
        "to 3": {"labels": labels * 0 + 3},
        "whole numbers": {"labels": labels.float()},
        "shape": {"labels": labels[:-1]},
        "no 'labels'": None,
    }
    if task == "detection":
        wrong["empty box"] = {"boxes": first["boxes"][:, [2, 3, 0, 1]]}
        wrong["boxes of a target"] = {"boxes": first["boxes"][0]}
    if kind == "mask_rcnn":
        wrong["masks of a target"] = {"masks": first["masks"][..., 1:]}
    for words, changed in wrong.items():
        given = {name: each for name, each in first.items() if name != "labels"} if changed is None else first
        with pytest.raises(DataError, match=words):
            model(images(), [{**given, **(changed or {})}, *others])
    with pytest.raises(DataError, match="a target has no"):
        model(images(), [None, *others])
    model(images(), [{**first, "labels": labels.int()}, *others])


def test_upernet_learns_from_two_images_or_more() -> None:
    model = made("upernet")
    with pytest.raises(DataError):
        model.train()(images()[:1], targets("segmentation")[:1])
    assert model.eval()(images()[:1])[0]["labels"].shape == images()[0].shape[1:]
