"""A saved student is a timm folder: plain timm, in a process that cannot import this package, gives the same bits."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.student import write_student
from graftvit.models.conversion import with_plan
from graftvit.models.errors import CheckpointError
from torch import nn

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)

READER = """
import hashlib, json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "graftvit":
            raise ImportError("graftvit is not here")
sys.meta_path.insert(0, Refuse())
import timm, torch
results = {}
for folder in sys.argv[1:]:
    model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    config = timm.data.resolve_data_config({}, model=model)
    size = config["input_size"]
    images = torch.linspace(-1, 1, 2 * size[0] * size[1] * size[2]).reshape(2, *size)
    with torch.no_grad():
        logits = model(images)
    results[folder] = {"digest": digest.hexdigest(), "logits": logits.tolist(), "size": size,
                       "mean": config["mean"], "std": config["std"]}
assert not any(name.startswith("graftvit.") for name in sys.modules)
print(json.dumps(results))
"""


def randomized(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5)
    return model.eval()


def save(model: nn.Module, folder: Path, architecture: str, arguments: dict[str, Any], **more: Any) -> None:
    write_student(
        model,
        folder,
        architecture=architecture,
        model_args=arguments,
        preprocessing=Preprocessing.of(model, mean=MEAN, std=STD),
        **more,
    )


SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "custom size": (
        "vit_tiny_patch16_224",
        {**SMALL, "img_size": (16, 24), "num_classes": 5, "global_pool": "avg"},
    ),
    "no head": ("vit_tiny_patch16_224", {**SMALL, "img_size": 16, "num_classes": 0}),
    "one channel": ("vit_tiny_patch16_224", {**SMALL, "img_size": 8, "num_classes": 3, "in_chans": 1}),
    "native parts": (
        "vit_tiny_patch16_224",
        {**SMALL, "img_size": 16, "num_classes": 3, "reg_tokens": 2, "init_values": 0.1, "qk_norm": True},
    ),
    "eva": ("eva02_tiny_patch14_224", {**SMALL, "img_size": 16, "num_classes": 3}),
    "beit": ("beit_base_patch16_224", {**SMALL, "img_size": 16, "num_classes": 3}),
    "distilled": ("deit_tiny_distilled_patch16_224", {**SMALL, "img_size": 16, "num_classes": 3}),
}


def test_plain_timm_gives_the_same_bits(tmp_path: Path) -> None:
    models = {}
    for kind, (architecture, arguments) in STUDENTS.items():
        models[kind] = randomized(timm.create_model(architecture, **arguments))
        channels = arguments.get("in_chans", 3)
        folder, mean, std = tmp_path / kind, MEAN[:channels], STD[:channels]
        write_student(
            models[kind],
            folder,
            architecture=architecture,
            model_args=arguments,
            preprocessing=Preprocessing.of(models[kind], mean=mean, std=std),
        )
    command = [sys.executable, "-c", READER, *(str(tmp_path / kind) for kind in STUDENTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for folder, found in json.loads(done.stdout).items():
        kind = Path(folder).name
        check_found(found, models[kind], STUDENTS[kind][1])


def check_found(found: dict[str, Any], model: nn.Module, arguments: dict[str, Any]) -> None:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    size, channels = arguments["img_size"], arguments.get("in_chans", 3)
    shape = [channels, *(size if isinstance(size, tuple) else (size, size))]
    images = torch.linspace(-1, 1, 2 * channels * shape[1] * shape[2]).reshape(2, *shape)
    assert found["digest"] == digest.hexdigest()
    with torch.no_grad():
        assert found["logits"] == model(images).tolist()
    assert found["size"] == shape
    assert (tuple(found["mean"]), tuple(found["std"])) == (MEAN[:channels], STD[:channels])


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_saved_student_is_a_teacher(tmp_path: Path, kind: str) -> None:
    architecture, arguments = STUDENTS[kind]
    model = randomized(timm.create_model(architecture, **arguments))
    save(model, tmp_path / "s", architecture, arguments, license="mit")
    teacher = load_pretrained(f"local-dir:{tmp_path / 's'}")
    ours, theirs = teacher.model.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    channels = arguments.get("in_chans", 3)
    assert (teacher.mean, teacher.std, teacher.license) == (MEAN[:channels], STD[:channels], "mit")
    assert teacher.has_head == (arguments["num_classes"] > 0)
    assert (teacher.report.missing, teacher.report.unexpected, teacher.report.resampled) == ({}, {}, {})


def test_a_tag_and_the_origin_of_other_weights_are_left_out(tmp_path: Path) -> None:
    arguments = {**SMALL, "img_size": 16, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224.augreg_in21k", **arguments)
    save(model, tmp_path / "s", "vit_tiny_patch16_224.augreg_in21k", arguments)
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert not {"hf_hub_id", "url", "file", "tag", "license", "source"} & config["pretrained_cfg"].keys()
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"depth": 3}, r"has other weights than the student: blocks\.2"),
        ({"global_pool": "avg"}, "has other weights than the student: fc_norm"),
        ({"act_layer": nn.GELU}, r"model_args\.act_layer=<class .*cannot be written to config\.json"),
        ({"no_such": 1}, "timm cannot build"),
    ],
)
def test_what_timm_could_not_load_is_not_written(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    arguments = {**SMALL, "img_size": 16, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **arguments)
    with pytest.raises(CheckpointError, match=said):
        save(model, tmp_path / "s", "vit_tiny_patch16_224", {**arguments, **wrong})
    assert not (tmp_path / "s").exists()


def test_an_older_student_is_replaced(tmp_path: Path) -> None:
    arguments = {**SMALL, "img_size": 16, "num_classes": 3}
    create: Callable[..., nn.Module] = timm.create_model
    for _ in range(2):
        model = randomized(create("vit_tiny_patch16_224", **arguments))
        save(model, tmp_path / "s", "vit_tiny_patch16_224", arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    loaded = create(f"local-dir:{tmp_path / 's'}", pretrained=True)
    assert torch.equal(loaded.state_dict()["pos_embed"], model.state_dict()["pos_embed"])


@pytest.mark.parametrize("plan", ["*: softmax", "*: keep"])
def test_a_plan_that_keeps_every_layer_is_saved_as_timms_own_model(plan: str, tmp_path: Path) -> None:
    small = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}
    name, arguments = with_plan("vit_tiny_patch16_224", small, plan)
    model = timm.create_model(name, **arguments)
    shown = Preprocessing.of(model, input_size=(3, 32, 32))
    write_student(model, tmp_path, architecture=name, model_args=arguments, preprocessing=shown)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architecture"] == "vit_tiny_patch16_224"
    assert not {"plan", "architecture", "plan_size"} & set(saved["model_args"])
    images = torch.randn(1, 3, 32, 32)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(loaded(images), model.eval()(images))
