"""Necks and heads against a restatement of their equations in float64, on grids that are not square."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graftvit.models.dense.backbone import Pyramid, SimplePyramid
from graftvit.models.dense.dense_model import DenseModel, create_dense
from support.models.dense_bodies import body, images, targets
from torch import Tensor
from torchvision.models.detection import FCOS
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou, nms, roi_align

CLASSES, WIDTH = 3, 8
Weights = dict[str, Tensor]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def model_of(kind: Any, name: str = "pvt", **how: Any) -> DenseModel:
    """Return a model in float64 with weights that matter everywhere."""
    model = create_dense(kind, body(name), CLASSES, width=WIDTH, **how).double()
    with torch.no_grad():
        for key, each in model.named_parameters():
            if not key.startswith("backbone.body"):
                each.normal_(std=0.3)
    return model


def close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def part(model: torch.nn.Module, prefix: str) -> Weights:
    state = model.state_dict()
    return {key.removeprefix(prefix): each for key, each in state.items() if key.startswith(prefix)}


def conv(x: Tensor, weights: Weights, name: str, stride: int = 1) -> Tensor:
    weight = weights[f"{name}.weight"]
    return F.conv2d(x, weight, weights.get(f"{name}.bias"), stride, weight.shape[2] // 2)


def normed(x: Tensor, weights: Weights, name: str) -> Tensor:
    """Return LayerNorm over the channels, eps 1e-6."""
    moved = x.permute(0, 2, 3, 1)
    found = F.layer_norm(moved, moved.shape[3:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)
    return found.permute(0, 3, 1, 2)


def batch_normed(x: Tensor, weights: Weights, name: str) -> Tensor:
    """Return relu of the convolution `name`.0 after BatchNorm `name`.1 with the statistics of the batch."""
    x = conv(x, weights, f"{name}.0")
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    scale, shift = (weights[f"{name}.1.{kind}"][:, None, None] for kind in ("weight", "bias"))
    return ((x - mean) / (variance + 1e-5).sqrt() * scale + shift).relu()


def bilinear(x: Tensor, size: Any) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def feature_pyramid(maps: list[Tensor], weights: Weights) -> list[Tensor]:
    merged = [conv(each, weights, f"fpn.inner_blocks.{i}.0") for i, each in enumerate(maps)]
    for i in reversed(range(len(maps) - 1)):
        rows, columns = merged[i].shape[2:]
        coarse = merged[i + 1]
        down = (torch.arange(rows) * coarse.shape[2]) // rows
        across = (torch.arange(columns) * coarse.shape[3]) // columns
        merged[i] = merged[i] + coarse[:, :, down][:, :, :, across]
    return [conv(each, weights, f"fpn.layer_blocks.{i}.0") for i, each in enumerate(merged)]


def prepared_maps(model: DenseModel) -> Any:
    prepared = model.prepare(images(), targets(model.task, CLASSES))
    return prepared, [each.detach() for each in model.backbone(prepared.tensors)]


# Necks.


def test_the_pyramid_of_mask_rcnn() -> None:
    model = model_of("mask_rcnn")
    _, maps = prepared_maps(model)
    wanted = feature_pyramid(maps, part(model, "neck."))
    wanted.append(wanted[-1][:, :, ::2, ::2])
    close(model.neck(maps), wanted)


def test_the_levels_of_retinanet_begin_at_stride_8_and_have_no_relu_before_p7() -> None:
    model = model_of("retinanet")
    _, maps = prepared_maps(model)
    weights = part(model, "neck.")
    wanted = feature_pyramid(maps[1:], weights)
    p6 = conv(maps[-1], weights, "fpn.extra_blocks.p6", 2)
    assert (p6 < 0).any()
    close(model.neck(maps), [*wanted, p6, conv(p6, weights, "fpn.extra_blocks.p7", 2)])


def test_a_pyramid_resizes_to_the_size_of_an_odd_finer_map() -> None:
    model = model_of("semantic_fpn")
    shapes = [(13, 21), (7, 11), (4, 6), (2, 3)]
    maps = [
        torch.randn(1, width, *shape).double()
        for width, shape in zip(model.backbone.channels, shapes, strict=True)
    ]
    assert isinstance(model.neck, Pyramid)
    close(model.neck(maps), feature_pyramid(maps, part(model, "neck.")))


@pytest.mark.parametrize(
    ("kind", "strides"), [("mask_rcnn", [4, 8, 16, 32, 64]), ("retinanet", [8, 16, 32, 64, 128])]
)
def test_the_simple_pyramid_of_a_plain_vision_transformer(kind: Any, strides: list[int]) -> None:
    model = model_of(kind, "vit")
    neck: Any = model.neck
    assert isinstance(neck, SimplePyramid)
    assert neck.levels.strides == strides
    _, maps = prepared_maps(model)
    weights = part(model, "neck.")
    x = maps[-1]

    def up(x: Tensor, name: str) -> Tensor:
        return F.conv_transpose2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2)

    first = int(kind == "retinanet")
    scaled = [up(x, f"scales.{1 - first}"), x, F.max_pool2d(x, 2)]
    if not first:
        half = F.gelu(normed(up(x, "scales.0.0"), weights, "scales.0.1"))
        scaled.insert(0, up(half, "scales.0.3"))
    wanted = []
    for i, each in enumerate(scaled):
        thin = normed(conv(each, weights, f"outputs.{i}.0"), weights, f"outputs.{i}.1")
        wanted.append(normed(conv(thin, weights, f"outputs.{i}.2"), weights, f"outputs.{i}.3"))
    if first:
        p6 = conv(scaled[-1], weights, "extra.p6", 2)
        wanted += [p6, conv(p6, weights, "extra.p7", 2)]
    else:
        wanted.append(wanted[-1][:, :, ::2, ::2])
    close(neck(maps), wanted)


# Anchors and RetinaNet.


def all_anchors(levels: list[Tensor], strides: list[int], scale: float, octaves: int) -> list[Tensor]:
    """Return the anchors of each level: of a token, ratios outermost, sizes within; centers at the tokens' corners."""
    found = []
    for level, stride in zip(levels, strides, strict=True):
        rows = []
        for y in range(level.shape[2]):
            for x in range(level.shape[3]):
                for ratio in (0.5, 1.0, 2.0):
                    for octave in range(octaves):
                        side = scale * stride * 2 ** (octave / octaves)
                        w, h = side / math.sqrt(ratio), side * math.sqrt(ratio)
                        rows.append(
                            [x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2]
                        )
        found.append(torch.tensor(rows, dtype=torch.float64))
    return found


def retinanet_outputs(levels: list[Tensor], weights: Weights) -> tuple[list[Tensor], list[Tensor]]:
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for branch, (head, last, width) in enumerate(
        [("classification_head", "cls_logits", CLASSES), ("regression_head", "bbox_reg", 4)]
    ):
        for x in levels:
            for i in range(4):
                x = conv(x, weights, f"{head}.conv.{i}.0").relu()
            x = conv(x, weights, f"{head}.{last}")
            found[branch].append(x.unflatten(1, (9, width)).permute(0, 3, 4, 1, 2).flatten(1, 3))
    return found


def deltas(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Return (dx, dy, dw, dh) from anchors to boxes."""
    (c_a, s_a), (c_b, s_b) = (
        ((each[:, 2:] + each[:, :2]) / 2, each[:, 2:] - each[:, :2]) for each in (anchors, boxes)
    )
    return torch.cat([(c_b - c_a) / s_a, (s_b / s_a).log()], 1)


def decoded(anchors: Tensor, shifts: Tensor) -> Tensor:
    sides = anchors[:, 2:] - anchors[:, :2]
    centers = (anchors[:, 2:] + anchors[:, :2]) / 2 + shifts[:, :2] * sides
    sides = sides * shifts[:, 2:].clamp(max=math.log(1000 / 16)).exp()
    return torch.cat([centers - sides / 2, centers + sides / 2], 1)


def assigned(anchors: Tensor, boxes: Tensor, low: float, high: float) -> Tensor:
    """Return for each anchor the number of its box, -1 for background, -2 between the thresholds."""
    if not len(boxes):
        return torch.full((len(anchors),), -1)
    overlap = box_iou(boxes, anchors)
    best, index = overlap.max(0)
    found = torch.where(best < low, -1, torch.where(best < high, -2, index))
    for each in overlap:  # the best anchors of a box are positive, for their own best box
        is_best = each == each.max()
        found[is_best] = index[is_best]
    return found


def test_the_losses_of_retinanet() -> None:
    model = model_of("retinanet")
    prepared, maps = prepared_maps(model)
    levels = model.neck(maps)
    logits, boxes = (torch.cat(each, 1) for each in retinanet_outputs(levels, part(model, "head.head.")))
    anchors = torch.cat(all_anchors(levels, model.neck.levels.strides, 4, 3))  # type: ignore[union-attr]
    generator: Any = model.head.anchor_generator
    close(generator(ImageList(prepared.tensors, prepared.sizes), levels), [anchors, anchors])
    of_classes, of_boxes = [], []
    for i, target in enumerate(targets("detection")):
        known = target["boxes"].double()
        match = assigned(anchors, known, 0.4, 0.5)
        positive = match >= 0
        count = max(1, int(positive.sum()))
        wanted = torch.zeros_like(logits[i])
        wanted[positive, target["labels"][match[positive]]] = 1
        p = logits[i].sigmoid()
        p_t, alpha = torch.where(wanted > 0, p, 1 - p), torch.where(wanted > 0, 0.25, 0.75)
        focal = -alpha * (1 - p_t) ** 2 * F.logsigmoid(torch.where(wanted > 0, logits[i], -logits[i]))
        of_classes.append(focal[match != -2].sum() / count)
        shifts = deltas(anchors[positive], known[match[positive]])
        of_boxes.append((boxes[i][positive] - shifts).abs().sum() / count)
    assert len(of_boxes) == 2
    found = model.losses(prepared, maps)
    close(found["classification"], sum(of_classes) / 2)
    close(found["bbox_regression"], sum(of_boxes) / 2)


def test_the_boxes_of_retinanet_are_at_the_original_size() -> None:
    model = model_of("retinanet", score_threshold=0.3, detections=7).eval()
    with torch.no_grad():
        for each in model.head.parameters():
            each.mul_(0.4)  # no score is 1, so that their order is known
    prepared, maps = prepared_maps(model)
    levels = model.neck(maps)
    logits, boxes = retinanet_outputs(levels, part(model, "head.head."))
    anchors = all_anchors(levels, model.neck.levels.strides, 4, 3)  # type: ignore[union-attr]
    originals = [(180, 225), (64, 100)]
    found = model.predict(prepared, maps, originals)
    for i, (size, original) in enumerate(zip(prepared.sizes, originals, strict=True)):
        chosen, scores, labels = [], [], []
        for level, own in enumerate(anchors):
            by_class = logits[level][i].sigmoid()
            above = (by_class.flatten() > 0.3).nonzero()[:, 0]
            above = above[by_class.flatten()[above].argsort(descending=True)[:1000]]
            kept = above // CLASSES
            box = decoded(own[kept], boxes[level][i][kept])
            limit = torch.tensor([size[1], size[0]] * 2)
            chosen.append(torch.minimum(box.clamp(min=0), limit))
            scores.append(by_class.flatten()[above])
            labels.append(above % CLASSES)
        box, score, label = map(torch.cat, (chosen, scores, labels))
        keep = nms(box + label[:, None] * 10_000.0, score, 0.5)[:7]
        scale = torch.tensor([original[1] / size[1], original[0] / size[0]] * 2, dtype=torch.float64)
        assert len(keep) == 7
        torch.testing.assert_close(found[i]["boxes"], box[keep] * scale, rtol=1e-6, atol=1e-6)
        close(found[i]["scores"], score[keep])
        assert found[i]["labels"].tolist() == label[keep].tolist()


@pytest.mark.parametrize("training", [True, False])
def test_fcos_is_that_of_torchvision(training: bool) -> None:
    """On images for which torchvision's rounded strides are exact, of the published width."""
    model = create_dense("fcos", body("pvt"), CLASSES).double().train(training)
    for each in model.head.parameters():
        if each.dim() == 4:
            torch.nn.init.normal_(each, std=0.02)
    shown = [torch.rand(3, 128, 256), torch.rand(3, 128, 128)]
    known = [{**each, "boxes": each["boxes"].double() * 2} for each in targets("detection")]
    prepared = model.prepare(shown, known)
    levels = [torch.randn(2, 256, 128 // each, 256 // each).double() for each in model.neck.levels.strides]  # type: ignore[union-attr]
    outside = torch.nn.Identity()
    outside.out_channels = 256  # type: ignore[assignment]
    theirs = FCOS(outside, CLASSES, score_thresh=0.05)
    theirs.double().load_state_dict(model.head.state_dict())
    theirs.train(training)
    theirs.transform.forward = lambda images, targets: (  # type: ignore[method-assign]
        ImageList(prepared.tensors, prepared.sizes), targets,
    )  # fmt: skip
    theirs.backbone.forward = lambda images: {str(i): each for i, each in enumerate(levels)}
    head: Any = model.head
    if training:
        close(head.losses(prepared, levels), theirs(shown, known))
    else:
        found, wanted = head.predict(prepared, levels, prepared.sizes), theirs(shown)
        assert [len(each["boxes"]) for each in found] == [100, 100]
        close(found, wanted)


# Mask R-CNN.


def test_the_anchors_and_objectness_of_mask_rcnn() -> None:
    model = model_of("mask_rcnn")
    head: Any = model.head
    prepared, maps = prepared_maps(model)
    levels = model.neck(maps)
    found = head.rpn.anchor_generator(ImageList(prepared.tensors, prepared.sizes), levels)
    close(found[1], torch.cat(all_anchors(levels, [4, 8, 16, 32, 64], 8, 1)))
    weights = part(model, "head.rpn.head.")
    logits, boxes = head.rpn.head(levels)
    for i, x in enumerate(levels):
        x = conv(x, weights, "conv.0.0").relu()
        close(logits[i], conv(x, weights, "cls_logits"))
        close(boxes[i], conv(x, weights, "bbox_pred"))


def test_a_box_is_pooled_from_the_level_of_its_size_whatever_the_padding() -> None:
    model = model_of("mask_rcnn")
    head: Any = model.head
    small = [torch.rand(3, 33, 40).double()]  # padded to 64 x 64
    prepared = model.prepare(small)
    levels = model.neck(model.backbone(prepared.tensors))
    named = {str(i): each for i, each in enumerate(levels)}
    boxes = torch.tensor([[1.0, 2, 30, 31], [0, 0, 150, 150], [0, 0, 300, 260], [0, 0, 600, 900]]).double()
    found = head.roi_heads.box_roi_pool(named, [boxes], prepared.sizes)
    for i, level in enumerate([0, 1, 2, 3]):
        wanted = roi_align(levels[level], [boxes[i : i + 1]], 7, 1 / (4 * 2**level), 2)
        close(found[i], wanted[0])


def test_the_box_and_mask_heads_of_mask_rcnn() -> None:
    model = model_of("mask_rcnn")
    heads: Any = model.head.roi_heads
    x = torch.randn(5, WIDTH, 7, 7).double()
    weights = part(model, "head.roi_heads.")
    inner = x.flatten(1)
    for name in ("box_head.fc6", "box_head.fc7"):
        inner = F.linear(inner, weights[f"{name}.weight"], weights[f"{name}.bias"]).relu()
    wanted = [
        F.linear(inner, weights[f"box_predictor.{name}.weight"], weights[f"box_predictor.{name}.bias"])
        for name in ("cls_score", "bbox_pred")
    ]
    assert [each.shape[1] for each in wanted] == [CLASSES + 1, 4 * (CLASSES + 1)]
    close(heads.box_predictor(heads.box_head(x)), wanted)
    x = torch.randn(2, WIDTH, 14, 14).double()
    mask = x
    for i in range(4):
        mask = conv(mask, weights, f"mask_head.{i}.0").relu()
    name = "mask_predictor.conv5_mask"
    mask = F.conv_transpose2d(mask, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2).relu()
    close(heads.mask_predictor(heads.mask_head(x)), conv(mask, weights, "mask_predictor.mask_fcn_logits"))


def test_the_settings_of_mask_rcnn_are_the_published_ones() -> None:
    model = model_of("mask_rcnn")
    rpn, heads = model.head.rpn, model.head.roi_heads
    assert rpn._pre_nms_top_n == {"training": 2000, "testing": 1000}  # type: ignore[union-attr]
    assert rpn._post_nms_top_n == {"training": 1000, "testing": 1000}  # type: ignore[union-attr]
    assert heads.detections_per_img == 100  # type: ignore[union-attr]
    assert heads.fg_bg_sampler.batch_size_per_image == 512  # type: ignore[union-attr]
    fewer = model_of("mask_rcnn", samples=64).head.roi_heads
    assert fewer.fg_bg_sampler.batch_size_per_image == 64  # type: ignore[union-attr]
    assert heads.box_coder.weights == (10.0, 10.0, 5.0, 5.0)  # type: ignore[union-attr]


# Semantic FPN and UPerNet.


def labeled_loss(logits: Tensor, labels: Tensor) -> Tensor:
    whole = bilinear(logits, labels.shape[1:]).log_softmax(1)
    counted = labels != 255
    picked = whole.gather(1, labels.where(counted, 0)[:, None])[:, 0]
    return -picked[counted].mean()


def padded_labels(size: Any) -> Tensor:
    found = torch.full((2, *size), 255)
    torch.manual_seed(1)
    for one, target in zip(found, targets("segmentation", CLASSES), strict=True):
        height, width = target["labels"].shape
        one[:height, :width] = target["labels"]
    return found


def segmented(kind: Any, name: str) -> Any:
    model = model_of(kind, name, dropout=0.0)
    shown = images()
    torch.manual_seed(1)
    prepared = model.prepare(shown, targets("segmentation", CLASSES))
    maps = [each.detach() for each in model.backbone(prepared.tensors)]
    labels = padded_labels(prepared.tensors.shape[2:])
    assert prepared.targets is not None
    assert torch.equal(torch.stack([each["labels"] for each in prepared.targets]), labels)
    return model, prepared, maps, labels


def test_semantic_fpn() -> None:
    model, prepared, maps, labels = segmented("semantic_fpn", "pvt")
    weights, total = part(model, "head."), torch.zeros(())
    for i, x in enumerate(feature_pyramid(maps, part(model, "neck."))):
        for j in range(max(1, i)):
            x = batch_normed(x, weights, f"scales.{i}.{2 * j if i else 0}")
            x = bilinear(x, (2 * x.shape[2], 2 * x.shape[3])) if i else x
        total = total + x
    logits = conv(total, weights, "classifier.1")
    close(model.losses(prepared, maps), {"cross_entropy": labeled_loss(logits, labels)})


@pytest.mark.parametrize("name", ["pvt", "vit"])
def test_upernet(name: str) -> None:
    model, prepared, maps, labels = segmented("upernet", name)
    levels, weights = model.neck(maps), part(model, "head.")
    *finer, last = levels
    size = last.shape[2:]
    pooled = [
        bilinear(batch_normed(F.adaptive_avg_pool2d(last, side), weights, f"pools.{i}.1"), size)
        for i, side in enumerate((1, 2, 3, 6))
    ]
    merged = [batch_normed(each, weights, f"laterals.{i}") for i, each in enumerate(finer)]
    merged.append(batch_normed(torch.cat([last, *pooled], 1), weights, "bottleneck"))
    for i in reversed(range(3)):
        merged[i] = merged[i] + bilinear(merged[i + 1], merged[i].shape[2:])
    outputs = [batch_normed(each, weights, f"outputs.{i}") for i, each in enumerate(merged[:3])]
    joined = torch.cat([bilinear(each, levels[0].shape[2:]) for each in [*outputs, merged[3]]], 1)
    logits = conv(batch_normed(joined, weights, "joined"), weights, "classifier.1")
    second = conv(batch_normed(levels[2], weights, "auxiliary.0"), weights, "auxiliary.2")
    wanted = {
        "cross_entropy": labeled_loss(logits, labels),
        "auxiliary": 0.4 * labeled_loss(second, labels),
    }
    close(model.losses(prepared, maps), wanted)


def test_segments_are_cut_to_the_image_and_resized_to_the_original() -> None:
    model, prepared, maps, _ = segmented("semantic_fpn", "pvt")
    model.eval()
    originals = [(45, 200), (64, 100)]
    found = model.predict(prepared, maps, originals, logits=True)
    whole = bilinear(model.head(model.neck(maps)), prepared.tensors.shape[2:])
    for i, (size, original) in enumerate(zip(prepared.sizes, originals, strict=True)):
        scores = bilinear(whole[i : i + 1, :, : size[0], : size[1]], original)[0]
        close(found[i]["logits"], scores)
        assert torch.equal(found[i]["labels"], scores.argmax(0))
    assert all(each.keys() == {"labels"} for each in model.predict(prepared, maps, originals))
