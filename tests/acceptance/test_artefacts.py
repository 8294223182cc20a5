"""The law of artefacts: the number that a run reports is what anyone gets from all that we hand out for the model.

A row is a method, a column a way to hand out; each cell measures accuracy and loss on the test photographs anew.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import graftvit
import onnxruntime
import pytest
import timm
import torch
from graftvit.launch.cli import main
from graftvit.transfer.analysis.layer_maps import attention_maps
from graftvit.transfer.analysis.visualize.map_figures import entropy
from PIL import Image
from support.files.photos import CLASSES, SPLITS
from support.files.plain_timm import PlainTimm
from support.hub.hub_server import Hub
from support.runs.measure import measure
from support.runs.typed import Typed

MODEL = "vit_tiny_patch16_224"
ARGUMENTS = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
SIZE = 32
IMAGES = SPLITS["validation"] * len(CLASSES)
DESCRIBED = {
    "mean": (0.35, 0.45, 0.55), "std": (0.3, 0.25, 0.2), "crop_pct": 0.7, "interpolation": "bilinear",
    "license": "cc-by-nc-4.0",
}  # fmt: skip
"""Of the weights that all but the fresh student start from or learn from; no default of anything."""


@dataclass(frozen=True)
class Method:
    """How a model is made: flags of `graftvit train`, and whether timm alone loads what comes of it."""

    flags: str
    alone: bool = True
    part: str = "student"


TAUGHT = "--mode transfer --teacher {teacher}"
METHODS = {
    "finetune": Method("--mode finetune --init {weights}"),
    "scratch": Method("--mode scratch"),
    "copy": Method(f"{TAUGHT} --method copy", alone=False),
    "copy_q": Method(f"{TAUGHT} --method copy_q", alone=False),
    "distill": Method(f"{TAUGHT} --weight 1.0 --method distill"),
    "attention_output": Method(f"{TAUGHT} --weight 1.0 --method attention_output"),
    "converted": Method("--mode finetune --teacher {teacher} --init teacher --plan *:linear", alone=False),
    "hashed": Method(
        "--mode finetune --teacher {teacher} --init teacher --plan *:hash --calibrate 8", alone=False
    ),
    "lora": Method("--mode finetune --init {teacher} --lora 4"),
    "ema": Method(f"{TAUGHT} --weight 1.0 --method distill --ema 0.9", part="student_ema"),
}
COPYING = ("copy", "copy_q")


@dataclass(frozen=True)
class Made:
    """A finished run: its folder, its student, what it reports, and what it learned from."""

    run: Path
    student: Path
    source: str
    """The run as a source."""
    alone: bool
    reported: Mapping[str, float]
    needed: Sequence[Path]
    """Folders that must not be needed any more."""

    def agrees(self, found: Mapping[str, Any]) -> None:
        """AssertionError where `found` is not what the run reports, to the image."""
        assert found["images"] == IMAGES
        assert 100 * found["right"] / IMAGES == pytest.approx(self.reported["top1"], rel=1e-12)
        assert found["loss"] == pytest.approx(self.reported["loss"], rel=2e-4)


@pytest.fixture(scope="session")
def make(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """A run of a method; once a session."""
    root, done = tmp_path_factory.mktemp("made"), {}

    def one(name: str) -> Made:
        if name not in done:
            teacher = one("finetune").student if "{teacher}" in METHODS[name].flags else None
            done[name] = train(METHODS[name], root / name, photos, teacher)
        return done[name]

    return one


def train(method: Method, run: Path, photos: Path, teacher: Path | None) -> Made:
    """Thirty steps on the photographs."""
    weights = write_weights(run.parent / "weights")
    flags = method.flags.format(teacher=f"local-dir:{teacher}", weights=f"local-dir:{weights}").split()
    shape = ["--model", MODEL, "--student.model_args", json.dumps(ARGUMENTS), "--student.img_size", str(SIZE)]
    data = f"--data_path {photos} --aa none --crop_scale 0.5,1.0 --batch_size 24 --workers 0".split()
    length = (
        f"--epochs 12 --warmup_epochs 1 --lr 2e-3 --trackers none --device cpu --output_dir {run}".split()
    )
    assert main(["train", *flags, *shape, *data, *length, "--eval_every", "12"]) == 0
    student = run / method.part
    reported = json.loads((student / "config.json").read_text())["graftvit"]["results"]
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    prefix = "test_ema_" if method.part == "student_ema" else "test_"
    assert {key: last[prefix + key] for key in ("top1", "top5", "loss")} == {
        key: reported[key] for key in ("top1", "top5", "loss")
    }
    source = f"{run}#ema" if method.part == "student_ema" else str(run)
    needed = [weights, run] if teacher is None else [weights, teacher, run]
    return Made(run, student, source, method.alone, reported, needed)


def write_weights(folder: Path) -> Path:
    """A timm folder of random weights with a description of its own."""
    if not folder.exists():
        torch.manual_seed(5)
        model = timm.create_model(MODEL, img_size=SIZE, num_classes=0, **ARGUMENTS)
        described = {**model.pretrained_cfg, **DESCRIBED, "input_size": (3, SIZE, SIZE), "num_classes": 0}
        for key in ("url", "hf_hub_id"):
            described.pop(key, None)
        arguments = {**ARGUMENTS, "img_size": SIZE}
        timm.models.save_for_hf(
            model,
            str(folder),
            model_config={"pretrained_cfg": described},
            model_args=arguments,
            safe_serialization=True,
        )
    return folder


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in METHODS])
def made(request: pytest.FixtureRequest, make: Callable[[str], Made]) -> Made:
    return make(request.param)


@pytest.fixture
def tests(photos: Path) -> Path:
    return photos / "validation"


def transform_of(model: Any) -> Any:
    """timm's own, from what is written of the model."""
    return timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)


def loaded(source: str | Path) -> Any:
    return graftvit.load(source).eval()


def measured(made: Made, source: str, tests: Path, plain_timm: PlainTimm) -> dict[str, Any]:
    """By `timm.create_model` in a process of its own, or in this one where timm needs graftvit beside it."""
    if made.alone:
        return plain_timm.measure(f'model = timm.create_model("{source}", pretrained=True)', tests)
    model = timm.create_model(source, pretrained=True).eval()
    return measure(model, transform_of(model), str(tests))


def test_the_accuracy_would_tell(made: Made, tests: Path) -> None:
    """Between chance and perfect, and other with other preparation of the images."""
    assert 1.5 * 100 / len(CLASSES) < made.reported["top1"] < 95
    model = loaded(made.student)
    described = timm.data.resolve_model_data_config(model)
    for wrong in ({"crop_pct": 1.0}, {"mean": (0.6, 0.6, 0.6)}, {"std": (0.3, 0.3, 0.3)}):
        transform = timm.data.create_transform(**{**described, **wrong}, is_training=False)
        found = measure(model, transform, str(tests))
        assert abs(found["loss"] - made.reported["loss"]) > 1e-3 * made.reported["loss"], wrong


def test_the_description_of_the_weights_travels(made: Made) -> None:
    held = json.loads((made.student / "config.json").read_text())["pretrained_cfg"]
    held = {key: tuple(each) if isinstance(each, list) else each for key, each in held.items()}
    assert (DESCRIBED.items() <= held.items()) == (made.run.name != "scratch")


def test_the_run_folder(made: Made, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    assert main(["evaluate", made.source, "--device", "cpu", "--json", str(file)]) == 0
    (found,) = json.loads(file.read_text()).values()
    assert {key: found[key] for key in ("top1", "top5")} == {
        key: made.reported[key] for key in ("top1", "top5")
    }
    assert found["samples"] == IMAGES
    assert found["loss"] == pytest.approx(made.reported["loss"], rel=1e-6)


@contextmanager
def hidden(folders: Sequence[Path]) -> Iterator[None]:
    """The folders are elsewhere meanwhile."""
    with ExitStack() as stack:
        for folder in folders:
            away = folder.with_name(f"{folder.name}-away")
            folder.rename(away)
            stack.callback(away.rename, folder)
        yield


def test_the_student_moved_elsewhere_alone(made: Made, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(made.student, tmp_path / "moved")
    file = tmp_path / "found.json"
    with hidden([folder for folder in made.needed if folder.name != "student"]):
        words = ["--data_path", str(photos), "--device", "cpu", "--json", str(file)]
        assert main(["evaluate", str(tmp_path / "moved"), *words]) == 0
    (found,) = json.loads(file.read_text()).values()
    assert found["top1"] == made.reported["top1"]
    assert found["loss"] == pytest.approx(made.reported["loss"], rel=1e-6)


def test_graftvit_load(made: Made, tests: Path) -> None:
    model = loaded(made.student)
    made.agrees(measure(model, transform_of(model), str(tests)))


def test_timm_create_model(made: Made, tests: Path, plain_timm: PlainTimm) -> None:
    made.agrees(measured(made, f"local-dir:{made.student}", tests, plain_timm))


def test_save(made: Made, tests: Path, plain_timm: PlainTimm, tmp_path: Path) -> None:
    assert main(["checkpoint", "save", made.source, str(tmp_path / "saved")]) == 0
    made.agrees(measured(made, f"local-dir:{tmp_path / 'saved'}", tests, plain_timm))


def test_push_and_the_three_lines_of_the_card(
    made: Made, tests: Path, hub: Hub, plain_timm: PlainTimm, tmp_path: Path
) -> None:
    name = f"org/{made.run.name.replace('_', '-')}"
    assert main(["push", str(made.student), name]) == 0
    made.agrees(measured(made, f"hf-hub:{name}", tests, plain_timm))
    card = hub.files[name, hub.refs[name]["main"], "README.md"].decode()
    lines = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    assert len(lines.splitlines()) == 3
    made.agrees(plain_timm.measure(lines, tests))


def test_onnx(made: Made, tests: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    assert main(["export", made.source, str(file)]) == 0
    session = onnxruntime.InferenceSession(str(file))

    def run(images: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(None, {"images": images.numpy()})
        return torch.from_numpy(logits)

    made.agrees(measure(run, transform_of(loaded(made.student)), str(tests)))


def test_torch_export(made: Made, tests: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    assert main(["export", made.source, str(file)]) == 0
    model = torch.export.load(str(file)).module()
    made.agrees(measure(model, transform_of(loaded(made.student)), str(tests)))


def test_converted_by_a_plan_that_changes_nothing(
    made: Made, tests: Path, tmp_path: Path, typed: Typed
) -> None:
    """A window that is wider than the image, or for linear layers linear ones.

    A plan that keeps all of the hashed layers is refused, and so is copied attention, which is not the student's own.
    """
    plan = {"converted": "*: linear", "hashed": "*: keep"}.get(made.run.name, "*: window(window=9)")
    words = ["convert", made.source, "--plan", plan, "--output_dir", str(tmp_path / "out")]
    refusals = {"hashed": "keeps every layer", **dict.fromkeys(COPYING, "its teacher's attention")}
    if made.run.name in refusals:
        assert refusals[made.run.name] in typed(*words, code=2).err
        assert not (tmp_path / "out").exists()
        return
    typed(*words)
    model = loaded(tmp_path / "out")
    made.agrees(measure(model, transform_of(model), str(tests)))


def test_what_visualize_shows_is_what_the_model_attends_to(
    made: Made, make: Callable[[str], Made], tests: Path, tmp_path: Path
) -> None:
    """Where attention is copied that is the teacher's."""
    picture = sorted((tests / CLASSES[1]).iterdir())[0]
    assert (
        main(["visualize", made.source, str(picture), "--layers", "-1", "--output_dir", str(tmp_path)]) == 0
    )
    shown = torch.tensor(json.loads((tmp_path / "numbers.json").read_text())["student"]["entropy"])
    model = loaded(make("finetune").student if made.run.name == "copy" else made.student)
    image = transform_of(model)(Image.open(picture).convert("RGB"))[None]
    wanted = entropy(torch.cat(list(attention_maps(model, image).values())))
    assert torch.allclose(shown, wanted.to(shown), rtol=1e-4, atol=1e-5)
