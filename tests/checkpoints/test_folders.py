"""timm folders, run folders and training states as teachers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.pretrained import load_pretrained, load_weights
from graftvit.checkpoints.state import TrainingState, write_state
from graftvit.checkpoints.student import write_student
from graftvit.models.errors import CheckpointError
from graftvit.models.mae import MaskedAutoencoder
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

Make = Callable[..., nn.Module]
NAME = "vit_tiny_patch16_224"
ARGUMENTS: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 4}
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def save(model: nn.Module, folder: Path) -> None:
    arguments = {**ARGUMENTS, "num_classes": model.num_classes}
    write_student(
        model,
        folder,
        architecture=NAME,
        model_args=arguments,
        preprocessing=Preprocessing.of(model, mean=MEAN, std=STD),
    )


def same(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def named(prefix: str, model: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in model.state_dict().items()}


def write_run(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
    path = folder / "checkpoints" / "last.safetensors"
    write_state(path, TrainingState({**tensors, "optimizer.x|step": torch.tensor(3.0)}, meta))
    return path


def test_a_run_folder_gives_its_exported_student_or_average(tiny: Make, tmp_path: Path) -> None:
    student, average = tiny(num_classes=3), tiny(num_classes=3)
    save(student, tmp_path / "student")
    save(average, tmp_path / "student_ema")
    assert same(load_pretrained(f"local-dir:{tmp_path}").model, student)
    assert same(load_pretrained(str(tmp_path)).model, student)
    assert same(load_pretrained(f"local-dir:{tmp_path}#ema").model, average)
    assert same(load_pretrained(f"local-dir:{tmp_path / 'student_ema'}").model, average)


def test_a_training_state_gives_student_and_average(tiny: Make, tmp_path: Path) -> None:
    student, average = tiny(num_classes=3), tiny(num_classes=3)
    entry = {"architecture": NAME, "model_args": ARGUMENTS, "mean": MEAN, "std": STD}
    path = write_run(tmp_path, {**named("student.", student), **named("ema.", average)}, {"student": entry})
    teacher = load_pretrained(str(path))
    assert same(teacher.model, student)
    assert (teacher.mean, teacher.std) == (MEAN, STD)
    assert same(load_pretrained(f"{path}#ema").model, average)
    assert same(load_pretrained(f"local-dir:{tmp_path}").model, student)
    other = tiny(num_classes=3)
    load_weights(other, f"{path}#ema")
    assert same(other, average)


def test_a_masked_autoencoder_in_training_gives_its_encoder(tiny: Make, tmp_path: Path) -> None:
    autoencoder = MaskedAutoencoder(tiny(), decoder_dim=8, decoder_depth=1, decoder_heads=2)
    entry = {"architecture": NAME, "model_args": {**ARGUMENTS, "global_pool": "token"}}
    tensors = {**named("student.", autoencoder), **named("ema.", autoencoder)}
    path = write_run(tmp_path, tensors, {"student": entry})
    for source in (str(path), f"{path}#ema", f"local-dir:{tmp_path}"):
        teacher = load_pretrained(source)
        assert same(teacher.model, autoencoder.encoder)
        assert not teacher.has_head


def test_a_state_without_average_or_whole_bytes_is_refused(tiny: Make, tmp_path: Path) -> None:
    path = write_run(tmp_path, named("student.", tiny()), {})
    with pytest.raises(CheckpointError, match="no moving average; leave #ema out"):
        load_pretrained(f"{path}#ema")
    with pytest.raises(CheckpointError, match="give its timm name"):
        load_pretrained(str(path))
    content = bytearray(path.read_bytes())
    content[-9] ^= 1  # in a tensor: a plain safetensors reader would not see it
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.safetensors is damaged"):
        load_pretrained(str(path), model=NAME, model_args=ARGUMENTS)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"architectures": ["ViTModel"]}', "\x00"])
def test_a_config_that_is_not_timms_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json is damaged") as caught:
        load_pretrained(f"local-dir:{tmp_path}")
    assert "\n" not in str(caught.value)


def test_folders_that_lack_something_are_named(tiny: Make, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json .* and no student/"):
        load_pretrained(f"local-dir:{tmp_path}")
    save(tiny(), tmp_path / "s")
    (tmp_path / "s" / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"has a config\.json but no weights: none of model\.safetensors"
    ):
        load_pretrained(f"local-dir:{tmp_path / 's'}")
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    (tmp_path / "s" / "config.json").write_text(json.dumps({**config, "architecture": "vit_nowhere"}))
    save_file(tiny().state_dict(), tmp_path / "s" / "model.safetensors")
    with pytest.raises(CheckpointError, match="vit_nowhere"):
        load_pretrained(f"local-dir:{tmp_path / 's'}")


def test_pickled_weights_and_a_license_from_the_card(tiny: Make, tmp_path: Path) -> None:
    model = tiny(num_classes=3)
    save(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# a card\n")
    teacher = load_pretrained(f"local-dir:{tmp_path}")
    assert same(teacher.model, model)
    assert teacher.license == "cc-by-nc-4.0"
    assert "pytorch_model.bin" in teacher.report.format


def test_timm_writes_the_license_of_its_own_weights_beside_any_others(tmp_path: Path) -> None:
    model = timm.create_model(NAME, **ARGUMENTS)
    save_for_hf(model, tmp_path, model_args=ARGUMENTS)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pretrained_cfg"]["license"] == "apache-2.0"
    assert load_pretrained(str(tmp_path)).license is None
    model = timm.create_model(NAME, **ARGUMENTS)
    assert load_weights(model, str(tmp_path)).license is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# a card\n")
    assert load_pretrained(str(tmp_path)).license == "mit"
    for own in ({"license": "cc-by-nc-4.0"}, {"tag": "mine"}, {"tag": None}):
        stated = {**config, "pretrained_cfg": {**config["pretrained_cfg"], **own}}
        (tmp_path / "config.json").write_text(json.dumps(stated))
        assert load_pretrained(str(tmp_path)).license == stated["pretrained_cfg"]["license"]


def test_fields_that_this_timm_does_not_know_are_left_out(tiny: Make, tmp_path: Path) -> None:
    model = tiny()
    save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["of_a_later_timm"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert same(load_pretrained(f"local-dir:{tmp_path}").model, model)
