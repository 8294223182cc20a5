"""Models of transformers: timm's model gives what theirs gives; half and wrong ones are refused in one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
import transformers
from graftvit.checkpoints.describe import describe_source
from graftvit.checkpoints.formats import KEY_MAPS
from graftvit.checkpoints.formats.hf_key_maps import TRANSFORMERS_MAPS
from graftvit.checkpoints.formats.keymap import recognize
from graftvit.checkpoints.model_folders import loads_in_plain_timm
from graftvit.checkpoints.pretrained import load, load_pretrained
from graftvit.checkpoints.provenance import Pretrained
from graftvit.models.errors import CheckpointError
from graftvit.models.families import check_supported
from safetensors.torch import load_file, save_file
from support.models.hf_models import CASES, TEXT, Case, save, save_modules
from torch import Tensor, nn, no_grad

TOLERANCE = 1e-5


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).norm() / wanted.norm())


def check_same(case: Case, model: nn.Module, teacher: Pretrained) -> None:
    check_supported(teacher.model)
    for count in (1, 2):
        images = case.images(count)
        tokens, pooled = case.outputs(model, images)
        with no_grad():
            if tokens is not None:
                assert error(teacher.model.forward_features(images), tokens) <= TOLERANCE
            if pooled is not None:
                assert error(teacher.model(images), pooled) <= TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_features_are_those_of_transformers(case: Case, tmp_path: Path) -> None:
    model = case.build()
    check_same(case, model, load_pretrained(save(model, tmp_path / "saved")))
    check_same(case, model, load_pretrained(save_modules(model, tmp_path / "modules")))


def test_the_classes_of_a_classifier_are_known_by_name(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "vit-classifier")
    model = case.build()
    assert load_pretrained(save(model, tmp_path / "unnamed")).label_names is None
    names = ("dog", "cat", "ant", "bee", "cow")
    model.config.id2label = dict(enumerate(names))
    assert load_pretrained(save(model, tmp_path / "named")).label_names == names


# Half and wrong models of transformers are refused in one sentence; whole ones survive shards and saving.


Folder = tuple[Path, dict[str, Tensor], dict[str, Any]]
ROWS = {
    "transformers' DeiT with one classifier": "deit-classifier",
    "transformers' DeiT": "deit-distilled",
    "transformers' BEiT": "beit-relative",
    "transformers' ViTMAE": "mae",
    "transformers' ViT": "vit-classifier",
    "transformers' DINOv2 with registers": "dinov2-registers",
    "transformers' DINOv2": "dinov2-swiglu",
    "transformers' DINOv3 (SwiGLU)": "dinov3-swiglu",
    "transformers' DINOv3": "dinov3",
    "transformers' CLIP with a classifier": "clip-classifier",
    "transformers' CLIP": "clip-whole",
    "transformers' SigLIP with a classifier": "siglip-classifier",
    "transformers' SigLIP": "siglip-whole",
}
"""A case of hf_models for each row of the table."""
NOT_OF_THE_TOWER = r"(?:text_|visual_projection|logit_|decoder\.).*|.*(?:pooler\.dense|mask_token).*"
UNREAD = {
    "transformers' CLIP with a classifier": r"vision_model\.post_layernorm\..*",
    "transformers' SigLIP with a classifier": r"vision_model\.head\..*",
}
"""What classifiers do not read."""
WRONG = (torch.zeros(()), torch.zeros(0, 3), torch.zeros(5, 7, 2))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Folder]:
    """The folder, tensors and config of a case, built once."""
    built: dict[str, Folder] = {}

    def folder(name: str) -> Folder:
        if name not in built:
            path = tmp_path_factory.mktemp(name)
            save(case_of(name).build(), path)
            built[name] = (
                path, load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text()),
            )  # fmt: skip
        return built[name]

    return folder


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


def refusal(source: str) -> str:
    """The one sentence of loading."""
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(source)
    said = str(caught.value)
    assert len(said) < 500
    return said


def told(source: str) -> str:
    """What `teacher info` prints of a source that does not load: the same sentence behind it, or that alone."""
    try:
        text, error = describe_source(source)
    except CheckpointError as unreadable:
        text, error = "", unreadable
    assert str(error) == refusal(source)
    return text


def test_each_row_of_the_table_has_a_case(folders: Callable[[str], Folder]) -> None:
    assert list(ROWS) == [row.name for row in TRANSFORMERS_MAPS]
    for row, name in ROWS.items():
        tensors = folders(name)[1]
        found = recognize(tensors, KEY_MAPS)
        assert found is not None
        assert found.name == row


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("seed", range(2))
def test_half_of_the_tensors_is_refused(folders: Any, tmp_path: Path, row: str, seed: int) -> None:
    _, tensors, config = folders(ROWS[row])
    keep = torch.rand(len(tensors), generator=torch.Generator().manual_seed(seed)) < 0.5
    half = {key: tensor for (key, tensor), kept in zip(tensors.items(), keep, strict=True) if kept}
    told(write(tmp_path / "half", half, config))


@pytest.mark.parametrize("row", ROWS)
def test_no_tensor_of_the_tower_may_be_absent_or_other(folders: Any, tmp_path: Path, row: str) -> None:
    _, tensors, config = folders(ROWS[row])
    unread = re.compile(
        f"{NOT_OF_THE_TOWER}|{UNREAD.get(row, 'none')}|.*layers?[.]1[.].*"
    )  # block 1 is as block 0
    for number, key in enumerate(key for key in tensors if not unread.fullmatch(key)):
        rest = {name: tensor for name, tensor in tensors.items() if name != key}
        wrong = {**tensors, key: WRONG[number % len(WRONG)]}
        said = refusal(write(tmp_path / "faulty", wrong if number % 2 else rest, config))
        assert str(tmp_path / "faulty") in said


@pytest.mark.parametrize("row", ROWS)
def test_info_says_what_a_model_is_and_what_of_it_would_load(folders: Any, tmp_path: Path, row: str) -> None:
    _, tensors, config = folders(ROWS[row])
    norm = next(
        key
        for key in tensors
        if re.search(r"layers?\.1\..*norm.*1?\.weight|.*layers?\.1\.norm1\.weight", key)
    )
    lines = told(
        write(tmp_path / "half", {k: t for k, t in tensors.items() if k != norm}, config)
    ).splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines)
    assert row in facts["weights"]
    assert facts["architecture"].startswith(("vit_", "deit_", "beit_"))
    assert re.fullmatch(
        r"would load +(\d+) of \1 tensors", next(line for line in lines if "would load" in line)
    )
    assert re.fullmatch(r"would not +missing keys: blocks\.\*\.norm[12]\.weight", lines[-1])


@pytest.mark.parametrize("row", [row for row, name in ROWS.items() if "class" in name or "distilled" in name])
def test_without_a_classifier_or_with_half_of_it(folders: Any, tmp_path: Path, row: str) -> None:
    _, tensors, config = folders(ROWS[row])
    heads = [key for key in tensors if "classifier" in key]
    if row.startswith(("transformers' ViT", "transformers' DeiT")):
        without = {key: tensor for key, tensor in tensors.items() if key not in heads}
        assert not load_pretrained(write(tmp_path / "without", without, config)).has_head
    for key in heads:
        half = {name: tensor for name, tensor in tensors.items() if name != key}
        refusal(write(tmp_path / "half", half, config))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("setting", "value", "said"), [
    ("hidden_size", 64, "hidden_size=64, but its weights have 32"),
    ("num_hidden_layers", 3, "num_hidden_layers=3, but its weights have 2"),
    ("patch_size", 4, "patch_size=4, but its weights have"),
    ("num_channels", 1, "num_channels=1, but its weights have 3"),
    ("num_attention_heads", 5, "num_attention_heads=5, which does not divide the width 32"),
    ("num_attention_heads", "4", "which is no positive whole number"),
    ("layer_norm_eps", -1, "which is no positive number"),
    ("image_size", [0, 32], "which is no size in pixels"),
])  # fmt: skip
def test_a_config_against_the_tensors(
    folders: Any, tmp_path: Path, row: str, setting: str, value: Any, said: str
) -> None:
    refuses(folders, tmp_path, row, setting, value, said)


@pytest.mark.parametrize("row", [row for row in ROWS if row != "transformers' DINOv2"])
def test_an_unknown_activation_is_refused(folders: Any, tmp_path: Path, row: str) -> None:
    """A gated MLP has silu, whatever config.json says."""
    refuses(folders, tmp_path, row, "hidden_act", "mish", "which is not supported; supported are gelu")


def refuses(folders: Any, tmp_path: Path, row: str, setting: str, value: Any, said: str) -> None:
    _, tensors, config = folders(ROWS[row])
    changed = json.loads(json.dumps(config))
    changed.get("vision_config", changed)[setting] = value
    assert said in refusal(write(tmp_path / "other", tensors, changed))


@pytest.mark.parametrize(("case", "setting", "value"), [
    ("vit", "qkv_bias", False),
    ("vit-gray", "qkv_bias", True),
    ("beit-masked", "use_absolute_position_embeddings", False),
    ("beit-relative", "use_relative_position_bias", False),
    ("beit", "use_shared_relative_position_bias", True),
    ("dinov2-registers", "num_register_tokens", 3),
    ("dinov3-wide", "query_bias", True),
    ("dinov3", "key_bias", True),
    ("siglip-without-head", "vision_use_head", True),
])  # fmt: skip
def test_a_setting_against_the_tensors(
    folders: Any, tmp_path: Path, case: str, setting: str, value: Any
) -> None:
    _, tensors, config = folders(case)
    said = refusal(write(tmp_path / "other", tensors, {**config, setting: value}))
    assert f"config.json says {setting}={value!r}" in said or "query_bias" in said


@pytest.mark.parametrize("row", ROWS)
def test_unknown_keys_and_types_are_refused_by_name(folders: Any, tmp_path: Path, row: str) -> None:
    _, tensors, config = folders(ROWS[row])
    said = refusal(write(tmp_path / "more", {**tensors, "adapter.down": torch.ones(2)}, config))
    assert said.endswith("unexpected keys: adapter.down")
    for other in ("swin", 3, ["vit"]):
        said = refusal(write(tmp_path / "type", tensors, {**config, "model_type": other}))
        assert f"of type {other!r}, which is not supported" in said


def test_a_model_of_texts_alone_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(TEXT)
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**settings))
    said = refusal(save(model, tmp_path / "text"))
    assert "of type 'clip_text_model', which is not supported" in said
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    tensors = load_file(tmp_path / "text" / "model.safetensors")
    said = refusal(write(tmp_path / "clip", tensors, {**config, "model_type": "clip"}))
    assert "is not whole or is no vision tower: config.json says model_type='clip'" in said


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_load_as_one_and_an_absent_one_is_named(folders: Any, tmp_path: Path, suffix: str) -> None:
    path, tensors, config = folders("vit-classifier")
    names: dict[str, str] = {}
    half = len(tensors) // 2
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    for number, part in enumerate((list(tensors)[:half], list(tensors)[half:]), 1):
        file, shard = f"{stem}-0000{number}-of-00002.{suffix}", {key: tensors[key] for key in part}
        if suffix == "bin":
            torch.save(shard, tmp_path / file)
        else:
            save_file(shard, tmp_path / file, metadata={"format": "pt"})
        names |= dict.fromkeys(part, file)
    (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": names}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole: Any = load_pretrained(f"local-dir:{path}").model
    found: Any = load_pretrained(f"local-dir:{tmp_path}").model
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(whole(images), found(images))
    (tmp_path / f"{stem}-00002-of-00002.{suffix}").unlink()
    assert f"{stem}-00002-of-00002.{suffix}, which is not there" in refusal(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_what_is_saved_gives_the_same_in_plain_timm(folders: Any, tmp_path: Path, case: Case) -> None:
    teacher: Any = load_pretrained(f"local-dir:{folders(case.name)[0]}")
    written = graftvit.save(teacher.source, tmp_path / "out")
    images = case.images()
    with torch.no_grad():
        wanted = teacher.model.forward_features(images)
        ours: Any = load(str(written))
        assert torch.equal(ours.forward_features(images), wanted)
        theirs: Any = timm.create_model(f"local-dir:{written}", pretrained=True).eval()
        plain = theirs.forward_features(images)
    close = float((plain - wanted).norm() / wanted.norm()) <= 1e-5
    assert close == loads_in_plain_timm(written) == (case.name != "vit-relu")  # whose epsilon is 0.01
    again = graftvit.save(str(written), tmp_path / "again")
    assert (again / "config.json").read_text() == (written / "config.json").read_text()
