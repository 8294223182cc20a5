"""A saved student is a timm folder; from any source to a folder and back, bit for bit."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
from graftvit.checkpoints.pretrained import load, load_pretrained, load_weights
from graftvit.checkpoints.state import TrainingState, write_state
from graftvit.checkpoints.student import write_tensors
from graftvit.models.conversion import convert, plan_of, with_plan
from graftvit.models.errors import CheckpointError
from graftvit.models.mae import MaskedAutoencoder
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from support.models.tiny_students import same_weights, save_folder
from timm.models import save_for_hf
from torch import Tensor, nn

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


save = partial(save_folder, shown={"mean": MEAN, "std": STD})
NAME = "vit_tiny_patch16_224"
SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
SQUARE = {**SMALL, "img_size": 16}
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "custom size": (
        NAME,
        {**SMALL, "img_size": (16, 24), "num_classes": 5, "global_pool": "avg"},
    ),
    "no head": (NAME, {**SQUARE, "num_classes": 0}),
    "one channel": (NAME, {**SMALL, "img_size": 8, "num_classes": 3, "in_chans": 1}),
    "native parts": (
        NAME,
        {**SQUARE, "num_classes": 3, "reg_tokens": 2, "init_values": 0.1, "qk_norm": True},
    ),
    "eva": ("eva02_tiny_patch14_224", {**SQUARE, "num_classes": 3}),
    "beit": ("beit_base_patch16_224", {**SQUARE, "num_classes": 3}),
    "distilled": ("deit_tiny_distilled_patch16_224", {**SQUARE, "num_classes": 3}),
}


def test_plain_timm_gives_the_same_bits(tmp_path: Path) -> None:
    models = {}
    for kind, (architecture, arguments) in STUDENTS.items():
        models[kind] = randomized(timm.create_model(architecture, **arguments))
        channels = arguments.get("in_chans", 3)
        save_folder(
            models[kind],
            tmp_path / kind,
            architecture,
            arguments,
            {"mean": MEAN[:channels], "std": STD[:channels]},
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
    assert same_weights(teacher.model, model)
    channels = arguments.get("in_chans", 3)
    assert (teacher.mean, teacher.std, teacher.license) == (MEAN[:channels], STD[:channels], "mit")
    assert teacher.has_head == (arguments["num_classes"] > 0)
    assert (teacher.report.missing, teacher.report.unexpected, teacher.report.resampled) == ({}, {}, {})


def test_a_tag_and_the_origin_of_other_weights_are_left_out(tmp_path: Path) -> None:
    arguments = {**SQUARE, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224.augreg_in21k", **arguments)
    save(model, tmp_path / "s", "vit_tiny_patch16_224.augreg_in21k", arguments)
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert config["architecture"] == NAME
    assert not {"hf_hub_id", "url", "file", "tag", "license", "source"} & config["pretrained_cfg"].keys()
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(("wrong", "said"), [
    ({"depth": 3}, r"has other weights than the student: blocks\.2"),
    ({"global_pool": "avg"}, "has other weights than the student: fc_norm"),
    ({"act_layer": nn.GELU}, r"model_args\.act_layer=<class .*cannot be written to config\.json"),
    ({"no_such": 1}, "timm cannot build"),
])  # fmt: skip
def test_what_timm_could_not_load_is_not_written(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    arguments = {**SQUARE, "num_classes": 3}
    model = timm.create_model(NAME, **arguments)
    with pytest.raises(CheckpointError, match=said):
        save(model, tmp_path / "s", NAME, {**arguments, **wrong})
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("plan", ["*: softmax", "*: keep"])
def test_a_plan_that_keeps_every_layer_is_saved_as_timms_own_model(plan: str, tmp_path: Path) -> None:
    small = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}
    name, arguments = with_plan(NAME, small, plan)
    model = timm.create_model(name, **arguments)
    save(model, tmp_path, name, arguments)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architecture"] == NAME
    assert not {"plan", "architecture", "plan_size"} & set(saved["model_args"])
    images = torch.randn(1, 3, 32, 32)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(loaded(images), model.eval()(images))


# `graftvit.save` and `load`: from any source to a folder and back, bit for bit.


ARGUMENTS: dict[str, Any] = {
    "embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": [16, 24], "patch_size": 4, "num_classes": 3,
}  # fmt: skip
META = {
    "version": "0.0.9",
    "student": {"architecture": NAME, "model_args": ARGUMENTS, "mean": MEAN, "std": STD},
    "config": {"mode": "transfer", "output_dir": "/home/me/runs", "engine": {"fsdp": False},
               "data": {"dataset": "digits"}},
    "position": {"metrics": {"test_top1": 80.5, "test_top5": 99.0, "test_loss": 0.5, "test_ema_top1": 82.0}},
    "origins": {"teacher": {"source": "vit_x.mae", "revision": "a" * 40, "license": "cc-by-nc-4.0"}, "init": None},
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, tiny: Callable[..., nn.Module]) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    """A run folder that was stopped, and the weights and averages in it."""
    weights = tiny(**ARGUMENTS).state_dict()
    averages = tiny(**ARGUMENTS).state_dict()
    tensors = {
        **{f"student.{key}": tensor for key, tensor in weights.items()},
        **{f"ema.{key}": tensor for key, tensor in averages.items()},
        "optimizer.0.exp_avg": torch.ones(3),
    }
    write_state(tmp_path / "run" / "checkpoints" / "last.safetensors", TrainingState(tensors, META))
    return tmp_path / "run", weights, averages


@pytest.mark.parametrize("part", ["student", "ema"])
def test_a_run_gives_its_student_alone(run: Any, tmp_path: Path, part: str) -> None:
    folder, weights, averages = run
    source = folder if part == "student" else f"{folder}#ema"
    written = graftvit.save(source, tmp_path / "out")
    wanted = weights if part == "student" else averages
    assert sorted(path.name for path in written.iterdir()) == ["config.json", "model.safetensors"]
    assert load_file(written / "model.safetensors").keys() == weights.keys()
    assert same_weights(timm.create_model(f"local-dir:{written}", pretrained=True), wanted)
    assert same_weights(load(str(written)), wanted)
    again = load_pretrained(str(written))
    assert (again.mean, again.std, again.license) == (MEAN, STD, "cc-by-nc-4.0")


def test_what_was_learned_from_what_is_in_the_config(run: Any, tmp_path: Path) -> None:
    written = graftvit.save(f"{run[0]}#ema", tmp_path / "out")
    made = json.loads((written / "config.json").read_text())["graftvit"]
    assert made["version"] == "0.0.9", "of what trained it"
    assert made["part"] == "ema"
    assert made["teacher"] == META["origins"]["teacher"]  # type: ignore[index]
    assert made["results"] == {"dataset": "digits", "top1": 82.0}
    assert made["recipe"] == {"mode": "transfer", "data": {"dataset": "digits"}}
    second = graftvit.save(str(written), tmp_path / "again")
    assert json.loads((second / "config.json").read_text())["graftvit"] == made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(run: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    written = graftvit.save(run[0], tmp_path / "out", dtype=dtype)
    wanted = {key: tensor.to(dtype) for key, tensor in run[1].items()}
    stored = load_file(written / "model.safetensors")
    assert all(torch.equal(stored[key], wanted[key]) for key in wanted)
    assert same_weights(load(str(written), dtype=dtype), wanted)
    if dtype != torch.float64:
        assert same_weights(load(str(written)), {key: tensor.float() for key, tensor in wanted.items()})


def test_large_weights_are_spread_over_files(run: Any, tmp_path: Path) -> None:
    written = graftvit.save(run[0], tmp_path / "out", max_shard_size=8_000)
    names = sorted(path.name for path in written.iterdir())
    assert len(names) > 4
    assert names[-1] == "model.safetensors.index.json"
    assert same_weights(load(str(written)), run[1])
    (written / names[1]).unlink()
    with pytest.raises(CheckpointError, match=r"lists model-00001-of-\d+\.safetensors, which is not there"):
        load(str(written))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("part", ["student", "ema"])
def test_part_dtype_and_shards_keep_bits(
    run: Any, tmp_path: Path, part: str, dtype: torch.dtype | None
) -> None:
    source = run[0] if part == "student" else f"{run[0]}#ema"
    wanted = {key: tensor.to(dtype) for key, tensor in run[1 if part == "student" else 2].items()}
    whole = graftvit.save(source, tmp_path / "whole", dtype=dtype)
    shards = graftvit.save(str(whole), tmp_path / "shards", dtype=dtype, max_shard_size=4_000)
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    assert same_weights(load(str(shards), dtype=dtype), wanted)
    back = graftvit.save(str(shards), tmp_path / "back", dtype=dtype)
    name = "model.safetensors"
    assert (back / name).read_bytes() == (whole / name).read_bytes()
    assert json.loads((back / "config.json").read_text())["graftvit"]["part"] == part


@pytest.mark.parametrize("size", ["5GB", 40])
def test_tensors_written_one_by_one_are_the_files_of_the_hub(tmp_path: Path, size: int | str) -> None:
    kinds = [
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.uint8,
        torch.int64,
        torch.bool,
    ]
    tensors = {f"{kind}".removeprefix("torch."): torch.arange(6).view(2, 3).to(kind) for kind in kinds}
    tensors |= {"scalar é": torch.tensor(1.5), "empty": torch.zeros(0, 3)}
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir(), ours.mkdir()
    save_torch_state_dict(dict(tensors), theirs, max_shard_size=size, metadata={"format": "pt"})
    outlines = {name: each.to("meta") for name, each in tensors.items()}
    write_tensors(ours, outlines, reversed(list(tensors.items())), size)
    names = sorted(path.name for path in theirs.iterdir())
    assert names == sorted(path.name for path in ours.iterdir())
    assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in names)
    with pytest.raises(CheckpointError, match=r"no values of .*bool"):
        write_tensors(ours, outlines, list(tensors.items())[:-3], size)


def test_a_value_that_is_not_finite_leaves_the_folder_as_it_was(
    tmp_path: Path, tiny: Callable[..., nn.Module]
) -> None:
    save(tiny(**ARGUMENTS), tmp_path / "out", NAME, ARGUMENTS)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    values = tiny(**ARGUMENTS).state_dict()
    values["norm.bias"][0] = float("nan")
    with pytest.raises(CheckpointError, match=r"not finite in norm\.bias"):
        save(tiny(**ARGUMENTS).to("meta"), tmp_path / "out", NAME, ARGUMENTS, values=values.items())
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("shards", [False, True])
def test_a_converted_student_comes_back(tmp_path: Path, tiny: Callable[..., nn.Module], shards: bool) -> None:
    student = convert(tiny(**ARGUMENTS), "*: linear(feature=relu); 1: softmax").eval()
    size = 8_000 if shards else "5GB"
    save(student, tmp_path / "out", NAME, ARGUMENTS, max_shard_size=size)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "graftvit_converted"
    assert config["model_args"]["plan"] == "0: linear(feature=relu); 1: softmax"
    loaded = graftvit.load(str(tmp_path / "out"))
    assert plan_of(loaded) == plan_of(student)
    images = torch.randn(1, 3, 16, 24)
    assert torch.equal(loaded(images), student(images))
    resized = graftvit.load(str(tmp_path / "out"), img_size=(24, 24))
    assert resized(torch.randn(1, 3, 24, 24)).shape == (1, 3)
    # and once more through everything
    graftvit.save(str(tmp_path / "out"), tmp_path / "again")
    assert torch.equal(graftvit.load(str(tmp_path / "again"))(images), student(images))
    if not shards:
        by_timm = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        assert torch.equal(by_timm(images), loaded(images))


def test_a_path_is_a_source_like_its_text(tmp_path: Path, tiny: Callable[..., nn.Module]) -> None:
    source = save(tiny(**ARGUMENTS), tmp_path, NAME, ARGUMENTS)
    assert same_weights(graftvit.load(tmp_path), graftvit.load(source))


def test_loaded_models_are_ready_to_use_and_to_train(run: Any) -> None:
    model = load(str(run[0]))
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_is_no_source(tiny: Callable[..., nn.Module]) -> None:
    source: Any = tiny()
    with pytest.raises(CheckpointError, match=r"VisionTransformer.*graftvit\.save") as caught:
        load(source)
    assert len(str(caught.value)) < 300


def test_nothing_of_the_user_is_replaced(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="is there and holds no model: give a new folder"):
            graftvit.save(run[0], out, overwrite=overwrite)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    graftvit.save(run[0], out)
    with pytest.raises(CheckpointError, match="already holds a model: give another folder, or --force"):
        graftvit.save(run[0], out)
    graftvit.save(f"{run[0]}#ema", out, overwrite=True)
    assert same_weights(load(str(out)), run[2])


def test_other_peoples_files_become_timm_folders(
    tmp_path: Path, tiny: Callable[..., nn.Module], mae_file: Callable[..., str]
) -> None:
    model = tiny()
    source = mae_file(model.state_dict(), optimizer={"state": {}}, epoch=3)
    graftvit.save(source, tmp_path / "out", model=NAME, model_args=SQUARE)
    assert same_weights(
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True), model.state_dict()
    )


# timm folders, run folders and training states as teachers.


Make = Callable[..., nn.Module]


def save_square(model: nn.Module, folder: Path) -> str:
    return save(model, folder, NAME, {**SQUARE, "num_classes": model.num_classes})


def named(prefix: str, model: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in model.state_dict().items()}


def write_run(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
    path = folder / "checkpoints" / "last.safetensors"
    write_state(path, TrainingState({**tensors, "optimizer.x|step": torch.tensor(3.0)}, meta))
    return path


def test_a_run_folder_gives_its_exported_student_or_average(tiny: Make, tmp_path: Path) -> None:
    student, average = tiny(num_classes=3), tiny(num_classes=3)
    save_square(student, tmp_path / "student")
    save_square(average, tmp_path / "student_ema")
    assert same_weights(load_pretrained(f"local-dir:{tmp_path}").model, student)
    assert same_weights(load_pretrained(str(tmp_path)).model, student)
    assert same_weights(load_pretrained(f"local-dir:{tmp_path}#ema").model, average)
    assert same_weights(load_pretrained(f"local-dir:{tmp_path / 'student_ema'}").model, average)


def test_a_training_state_gives_student_and_average(tiny: Make, tmp_path: Path) -> None:
    student, average = tiny(num_classes=3), tiny(num_classes=3)
    entry = {"architecture": NAME, "model_args": SQUARE, "mean": MEAN, "std": STD}
    path = write_run(tmp_path, {**named("student.", student), **named("ema.", average)}, {"student": entry})
    teacher = load_pretrained(str(path))
    assert same_weights(teacher.model, student)
    assert (teacher.mean, teacher.std) == (MEAN, STD)
    assert same_weights(load_pretrained(f"{path}#ema").model, average)
    assert same_weights(load_pretrained(f"local-dir:{tmp_path}").model, student)
    other = tiny(num_classes=3)
    load_weights(other, f"{path}#ema")
    assert same_weights(other, average)


def test_a_masked_autoencoder_in_training_gives_its_encoder(tiny: Make, tmp_path: Path) -> None:
    autoencoder = MaskedAutoencoder(tiny(), decoder_dim=8, decoder_depth=1, decoder_heads=2)
    entry = {"architecture": NAME, "model_args": {**SQUARE, "global_pool": "token"}}
    tensors = {**named("student.", autoencoder), **named("ema.", autoencoder)}
    path = write_run(tmp_path, tensors, {"student": entry})
    for source in (str(path), f"{path}#ema", f"local-dir:{tmp_path}"):
        teacher = load_pretrained(source)
        assert same_weights(teacher.model, autoencoder.encoder)
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
        load_pretrained(str(path), model=NAME, model_args=SQUARE)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"architectures": ["ViTModel"]}', "\x00"])
def test_a_config_that_is_not_timms_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        load_pretrained(f"local-dir:{tmp_path}")


def test_folders_that_lack_something_are_named(tiny: Make, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json .* and no student/"):
        load_pretrained(f"local-dir:{tmp_path}")
    save_square(tiny(), tmp_path / "s")
    (tmp_path / "s" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights: none of model\.safetensors"):
        load_pretrained(f"local-dir:{tmp_path / 's'}")
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    (tmp_path / "s" / "config.json").write_text(json.dumps({**config, "architecture": "vit_nowhere"}))
    save_file(tiny().state_dict(), tmp_path / "s" / "model.safetensors")
    with pytest.raises(CheckpointError, match="vit_nowhere"):
        load_pretrained(f"local-dir:{tmp_path / 's'}")


def test_pickled_weights_and_a_license_from_the_card(tiny: Make, tmp_path: Path) -> None:
    model = tiny(num_classes=3)
    save_square(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# a card\n")
    teacher = load_pretrained(f"local-dir:{tmp_path}")
    assert same_weights(teacher.model, model)
    assert teacher.license == "cc-by-nc-4.0"
    assert "pytorch_model.bin" in teacher.report.format


def test_timm_writes_the_license_of_its_own_weights_beside_any_others(tmp_path: Path) -> None:
    model = timm.create_model(NAME, **SQUARE)
    save_for_hf(model, tmp_path, model_args=SQUARE)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pretrained_cfg"]["license"] == "apache-2.0"
    assert load_pretrained(str(tmp_path)).license is None
    model = timm.create_model(NAME, **SQUARE)
    assert load_weights(model, str(tmp_path)).license is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# a card\n")
    assert load_pretrained(str(tmp_path)).license == "mit"
    for own in ({"license": "cc-by-nc-4.0"}, {"tag": "mine"}, {"tag": None}):
        stated = {**config, "pretrained_cfg": {**config["pretrained_cfg"], **own}}
        (tmp_path / "config.json").write_text(json.dumps(stated))
        assert load_pretrained(str(tmp_path)).license == stated["pretrained_cfg"]["license"]


def test_fields_that_this_timm_does_not_know_are_left_out(tiny: Make, tmp_path: Path) -> None:
    model = tiny()
    save_square(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["of_a_later_timm"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert same_weights(load_pretrained(f"local-dir:{tmp_path}").model, model)
