"""Accuracy is exact, against a plain computation: for ensembles, subsets, several labels; all metrics, over ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.pretrained import describe_model
from graftvit.models.errors import ConfigError, DataError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.labels import real_labels, subset_classes
from graftvit.transfer.data.loaders import EvalLoader, create_eval_loader, create_reference_loader
from graftvit.transfer.methods.dual import DualViT
from graftvit.transfer.metrics.distance import Reader, compared_layers
from graftvit.transfer.metrics.measure import (
    FAMILIES,
    Against,
    Metrics,
    check_folders,
    check_same_classes,
    evaluate,
    measure,
    score_models,
    to_json,
    to_table,
)
from PIL import Image
from support.files.photos import CLASSES, make_photo_folder
from support.runs.engine_runs import tiny_vit
from torch import Tensor, nn

SPEC = Preprocessing((1, 8, 8), (0.5,), (0.5,))


class Fixed(EvalLoader):
    """Batches from memory; the images are the logits."""

    def __init__(
        self, logits: Tensor, targets: Tensor, valid: Tensor | None = None, classes: int = 10
    ) -> None:
        self.num_samples, self.num_classes = len(logits), classes
        valid = torch.ones(len(logits), dtype=torch.bool) if valid is None else valid
        self._rows = list(zip(logits.split(3), targets.split(3), valid.split(3), strict=True))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return iter(self._rows)


def identity(logits: Tensor) -> Tensor:
    return logits


def logits_of(count: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (count,), generator=generator)
    return torch.randn(count, classes, generator=generator), targets


def reference(probabilities: Tensor, targets: Tensor, top: int = 5) -> tuple[float, float, float]:
    order = probabilities.argsort(dim=1, descending=True)
    top1 = (order[:, 0] == targets).double().mean().item() * 100
    top5 = (order[:, :top] == targets[:, None]).any(dim=1).double().mean().item() * 100
    return top1, top5, F.nll_loss(probabilities.log(), targets).item()


class Odd(nn.Linear):
    """A model of somebody else, whose names mean other things than ours."""

    student = "Ada"

    def predict(self, images: Tensor) -> Tensor:
        return images.argmax(1)


def test_a_model_with_names_of_its_own_is_evaluated_by_its_logits() -> None:
    odd, images = Odd(4, 4), torch.randn(6, 3, 4, 4)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    odd.forward = model.forward  # type: ignore[method-assign]
    labels = torch.arange(6) % 4
    assert evaluate(odd, [(images, labels)]) == evaluate(model, [(images, labels)])


def test_no_model_is_refused_whatever_the_data(tmp_path: Path) -> None:
    for data in (tmp_path, [(torch.zeros(1, 3, 4, 4), torch.zeros(1).long())]):
        with pytest.raises(ConfigError, match="names no model"):
            evaluate({}, data)


def test_metrics_agree_with_a_plain_computation() -> None:
    logits, targets = logits_of(50, 10)
    other = logits_of(50, 10, seed=1)[0]
    joined = torch.cat([logits, other], dim=1)
    models = {"a": lambda x: x[:, :10], "b": lambda x: x[:, 10:]}
    results = score_models(models, Fixed(joined, targets))
    first, second = logits.softmax(1), other.softmax(1)
    wanted = {"a": first, "b": second, "ensemble": (first + second) / 2}
    assert list(results) == list(wanted)
    for name, probabilities in wanted.items():
        metrics = results[name]
        assert (metrics.top1, metrics.top5, metrics.loss) == pytest.approx(reference(probabilities, targets))
        assert metrics.samples == 50
    assert list(score_models(models, Fixed(joined, targets), ensemble=False)) == ["a", "b"]
    assert list(score_models({"a": models["a"]}, Fixed(joined, targets))) == ["a"]


def test_padding_does_not_count_even_where_it_is_not_finite() -> None:
    logits, targets = logits_of(10, 10)
    valid = torch.arange(10) < 7
    expected = score_models({"m": identity}, Fixed(logits[:7], targets[:7]))
    logits[7:] = float("nan")
    assert score_models({"m": identity}, Fixed(logits, targets, valid)) == expected


def test_modules_are_in_eval_mode_meanwhile() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.Identity())
    model[1].eval()
    logits, targets = logits_of(30, 10)
    plain = score_models({"m": identity}, Fixed(logits, targets))["m"]
    assert score_models({"m": model}, Fixed(logits, targets))["m"] == plain
    assert [module.training for module in model.modules()] == [True, True, False]


def test_a_subset_looks_at_its_own_classes_alone() -> None:
    classes = torch.tensor(subset_classes("imagenet-r"))
    logits, targets = logits_of(40, 200)
    wide = torch.full((40, 1000), 100.0)  # the other classes would win
    wide[:, classes] = logits
    own = score_models({"m": identity}, Fixed(wide, targets, classes=200), subset="imagenet-r")["m"]
    assert own == score_models({"m": identity}, Fixed(logits, targets, classes=200))["m"]
    whole = torch.cat([classes[targets], torch.tensor([0])])  # class 0 is not in the subset
    filtered = Fixed(torch.cat([wide, wide[:1]]), whole, classes=1000)
    assert score_models({"m": identity}, filtered, subset="imagenet-r")["m"] == own
    folders = Fixed(wide, targets, classes=1000)  # as a run says that was trained on all of ImageNet
    folders.class_names = synsets("imagenet-r")
    assert score_models({"m": identity}, folders, subset="imagenet-r")["m"] == own


@pytest.mark.parametrize(
    ("folders", "classes", "advice"),
    [
        ("imagenet-a", 200, "its folders are those of imagenet-a, so add --subset imagenet-a"),
        ("imagenet-r", 200, "so add --subset imagenet-r"),
        (None, 200, "--subset imagenet-a or --subset imagenet-r"),
        (("cat", "dog"), 2, "its features with --metrics knn"),
    ],
)
def test_more_logits_than_classes_are_refused(folders: object, classes: int, advice: str) -> None:
    """200 folders against 1,000 logits gave a plausible wrong number: label 7 of one is not class 7 of the other."""
    loader = Fixed(torch.randn(6, 1000), torch.arange(6) % 2, classes=classes)
    loader.class_names = synsets(folders) if isinstance(folders, str) else folders  # type: ignore[assignment]
    with pytest.raises(DataError, match=f"model 'm' has 1000 logits: .*{advice}"):
        score_models({"m": identity}, loader)
    if isinstance(folders, str):
        assert score_models({"m": identity}, loader, subset=folders)["m"].samples == 6
        loader.num_classes = 1000  # as somebody may say with --num_classes
        with pytest.raises(DataError, match=advice):
            check_folders("m", 1000, loader)
        assert score_models({"m": identity}, loader)["m"].samples == 6, (
            "a run that learned from these folders"
        )


def synsets(subset: str) -> tuple[str, ...]:
    """The class folders of a subset, in order."""
    every = (resources.files("timm.data") / "_info" / "imagenet_synsets.txt").read_text().split()
    return tuple(every[index] for index in subset_classes(subset))


def test_several_labels_count_if_any_is_right() -> None:
    logits = torch.eye(10)[:3] * 9
    accepted = torch.zeros(3, 10)
    accepted[0, [0, 4]] = 1
    accepted[1, [2, 3]] = 1
    metrics = score_models({"m": identity}, Fixed(logits, accepted, torch.tensor([True, True, False])))["m"]
    assert (metrics.top1, metrics.samples) == (50, 2)
    shares = accepted[:2] / 2
    assert metrics.loss == pytest.approx(F.cross_entropy(logits[:2], shares).item())


def test_what_does_not_fit_is_named() -> None:
    logits, targets = logits_of(6, 10)
    with pytest.raises(DataError, match="has 12 classes; model 'm' has 10 logits"):
        score_models({"m": identity}, Fixed(logits, targets, classes=12))
    with pytest.raises(DataError, match="needs 1000 logits; model 'm' has 10"):
        score_models({"m": identity}, Fixed(logits, targets, classes=200), subset="imagenet-a")
    with pytest.raises(DataError, match=r"has 10 classes; model 'n' has 11 logits: set --num_classes 11"):
        score_models({"m": identity, "n": lambda x: F.pad(x, (0, 1))}, Fixed(logits, targets))
    few = logits_of(9, 3)
    assert score_models({"m": identity}, Fixed(*few, classes=3))["m"].top5 == 100, "of three classes"
    with pytest.raises(DataError, match="no image could be evaluated"):
        score_models({"m": identity}, Fixed(logits, targets, torch.zeros(6, dtype=torch.bool)))


def test_results_become_a_table_and_json() -> None:
    metrics = {"student": Metrics(81.25, 99.5, 0.6543, 500), "ensemble": Metrics(100, 100, 0.1, 500)}
    results = {name: asdict(each) for name, each in metrics.items()}
    lines = to_table(results).splitlines()
    assert lines[2] == "| student  |      81.25 [77.5, 84.4] |   99.50 | 0.6543 |    500 |"
    assert len({len(line) for line in lines}) == 1
    assert json.loads(to_json(results))["ensemble"]["top1"] == 100


def test_real_labels_are_scored_through_the_loader(tmp_path: Path) -> None:
    (tmp_path / "val" / "a").mkdir(parents=True)
    for number in range(1, 7):
        Image.new("L", (9, 9), number * 20).save(tmp_path / "val" / "a" / f"ILSVRC2012_val_{number:08d}.png")
    config = DataConfig(data_path=str(tmp_path), workers=0, batch_size=4)
    loader = create_eval_loader(config, SPEC, real=True)
    batches = list(loader)
    assert batches[0][1].shape == (4, 1000)
    labelled = real_labels([f"ILSVRC2012_val_{number:08d}.png" for number in range(1, 7)]).any(dim=1).sum()
    assert sum(int(valid.sum()) for *_, valid in batches) == int(labelled) == 5  # timm's file leaves one out
    assert score_models({"m": lambda x: torch.zeros(len(x), 1000)}, loader)["m"].samples == int(labelled)


HERE = Path(__file__).resolve().parent
RANK = """
import gc; gc.disable()
import sys, json, torch, torch.distributed as dist
sys.path[:0] = sys.argv[4:]
from test_measure import measured
rank, world, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if world > 1:
    dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=world)
print(json.dumps(measured(rank, world)))
"""


def measured(rank: int = 0, world: int = 1) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    student, other, teacher = (tiny_vit().eval() for _ in range(3))
    config = DataConfig(dataset="digits", eval_batch_size=93, workers=0, train_samples=60)
    spec, ranks = Preprocessing((1, 8, 8), (0.5,), (0.5,)), {"rank": rank, "world_size": world}
    layers = compared_layers(teacher, student)
    readers = {
        "student": Reader(student, layers=layers.student),
        "other": Reader(other, layers=layers.student),
    }
    with torch.no_grad():
        return measure(
            readers,
            {"student": list(FAMILIES), "other": ["top1"]},
            create_eval_loader(config, spec, **ranks),
            reference=create_reference_loader(config, spec, **ranks),
            against=Against(Reader(teacher, layers=layers.teacher), dict.fromkeys(readers, layers)),
        )


def test_each_model_has_what_was_asked_for() -> None:
    found = measured()
    assert set(found) == {"student", "other", "ensemble"}
    assert set(found["other"]) == set(found["ensemble"]) == {"top1", "top5", "loss", "samples"}
    assert {"top1", "knn_top1", "knn_top5", "probe_top1", "cka", "cosine_layer01"} <= set(found["student"])
    assert {numbers["samples"] for numbers in found.values()} == {500}
    assert found["student"]["probe_top1"] > 30, "even random features of digits tell some apart"


def test_labels_of_two_splits_must_mean_the_same() -> None:
    config = DataConfig(dataset="digits", workers=0)
    spec = Preprocessing((1, 8, 8), (0.5,), (0.5,))
    reference, loader = create_reference_loader(config, spec), create_eval_loader(config, spec)
    check_same_classes(reference, loader)
    reference.class_names, loader.class_names = ("a", "c"), ("a", "b")
    with pytest.raises(DataError, match="the training images have no class 'b'"):
        check_same_classes(reference, loader)
    reference.class_names, reference.num_classes = None, 9
    with pytest.raises(DataError, match="these have 10 and 9 of them; set --num_classes"):
        check_same_classes(reference, loader)


@pytest.mark.slow
def test_two_ranks_measure_what_one_measures(tmp_path: Path) -> None:
    def start(rank: int) -> subprocess.Popen[bytes]:
        words = [str(rank), "2", str(tmp_path / "group"), str(HERE), str(HERE.parents[1])]
        return subprocess.Popen([sys.executable, "-c", RANK, *words], stdout=subprocess.PIPE)

    first, second = (json.loads(process.communicate(timeout=300)[0]) for process in [start(0), start(1)])
    alone = measured()
    assert first == second
    for name, numbers in alone.items():
        assert first[name] == pytest.approx(numbers, rel=1e-4)
        assert first[name].get("loss") == pytest.approx(numbers.get("loss"), rel=1e-6)
        for key in ("knn_top1", "probe_top1", "top1", "top5", "samples"):
            assert first[name].get(key) == numbers.get(key)


def test_a_model_is_measured_as_it_predicts_whatever_holds_it() -> None:
    """Not in its mode, by its name, or by the number of classes that it was built with."""
    model: Any
    model, images = tiny_vit(img_size=32, in_chans=3, drop_path_rate=0.9), torch.randn(4, 3, 32, 32)
    labels = torch.arange(4)
    wanted = evaluate(model.eval(), [(images, labels)])
    assert evaluate(DualViT(tiny_vit(img_size=32, in_chans=3), model).train(), [(images, labels)]) == wanted
    assert (
        evaluate({"ensemble": model, "b": tiny_vit(img_size=32, in_chans=3)}, [(images, labels)])["ensemble"]
        == wanted
    )
    model.head = nn.Linear(model.head.in_features, 9)
    assert evaluate(model, [(images, labels + 5)]).samples == 4


def test_labels_go_by_the_names_of_the_model_and_the_settings_make_the_images(tmp_path: Path) -> None:
    folder = make_photo_folder(tmp_path)
    model = tiny_vit(img_size=32, in_chans=3, num_classes=len(CLASSES))
    with torch.no_grad():
        model.head.weight.normal_()
    known = replace(describe_model(model), label_names=tuple(sorted(CLASSES)))
    wanted = evaluate(model, folder)
    turned = deepcopy(model)
    turned.head.load_state_dict({name: value.flip(0) for name, value in model.head.state_dict().items()})
    found = evaluate(replace(known, model=turned, label_names=known.label_names[::-1]), folder)
    assert asdict(found) == pytest.approx(asdict(wanted))
    with pytest.raises(DataError):
        evaluate(replace(known, label_names=tuple(f"no {name}" for name in CLASSES)), folder)
    half = replace(known, preprocessing=replace(known.preprocessing, crop_pct=0.5))
    settings = DataConfig(data_path=str(folder), workers=0, crop_pct=0.5)
    assert evaluate(known, settings) == evaluate(half, folder) != wanted


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_type_is_measured_on_files(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = make_photo_folder(tmp_path)
    model = tiny_vit(img_size=32, in_chans=3, num_classes=len(CLASSES))
    assert evaluate(model.to(dtype), folder).loss == pytest.approx(
        evaluate(model.float(), folder).loss, rel=0.02
    )
