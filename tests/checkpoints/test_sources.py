"""What a user writes as a source, and which architecture its weights are of."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from graftvit.checkpoints.architecture import infer_architecture
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.provenance import collect_identity, identify
from graftvit.checkpoints.sources import FileSource, FolderSource, HubSource, TimmSource, parse_source
from graftvit.checkpoints.weight_files import Weights
from graftvit.models.conversion import convert
from graftvit.models.errors import CheckpointError
from graftvit.models.layer_plan import OPERATORS, register_operator
from graftvit.models.small import without_memory
from support.runs.engine_runs import make_teacher
from torch import Tensor


def test_names_and_hub_names() -> None:
    assert parse_source("vit_large_patch16_224.mae") == TimmSource("vit_large_patch16_224.mae")
    assert parse_source("vit_tiny_patch16_224") == TimmSource("vit_tiny_patch16_224")
    assert parse_source("hf-hub:org/name") == HubSource("org/name", None)
    assert parse_source("hf_hub:org/name.x-1@v2/a") == HubSource("org/name.x-1", "v2/a")


@pytest.mark.parametrize("name", [
    "w.pth", "w.safetensors", "W.PTH", "w.bin", "a.b@c.pt", "with space.ckpt", "x#1.pth", "w.npz",
    "checkpoint-best",
])  # fmt: skip
def test_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    assert parse_source(str(path)) == FileSource(path)
    assert parse_source(f"{path}#ema") == FileSource(path, "ema")
    assert parse_source(f"{path}#student") == FileSource(path, "student")
    assert parse_source(f"{path}#teacher") == FileSource(path, "teacher")


def test_folders(tmp_path: Path) -> None:
    odd = tmp_path / "a.pth#1"
    odd.mkdir()
    for folder in (tmp_path, odd):
        assert parse_source(f"local-dir:{folder}") == FolderSource(folder)
        assert parse_source(f"local-dir:{folder}#ema") == FolderSource(folder, "ema")
        assert parse_source(str(folder)) == FolderSource(folder)


@pytest.mark.parametrize(("text", "said"), [
    ("vit_larg_patch16_224.mae", "did you mean 'vit_large_patch16_224.mae'"),
    ("vit_base_patch16_244", "did you mean 'vit_base_patch16_224'"),
    ("~nouser/x", "no such file or folder"),
    ("", "is no source of weights"),
    ("org/name", "write a timm name .*, hf-hub:org/name"),
    ("./runs/nowhere", "no such file or folder"),
    ("https://host/w", "is a URL"),
    ("nowhere.pth", "weights file 'nowhere.pth' is not there"),
    ("local-dir:nowhere", "there is no folder 'nowhere'"),
    ("local-dir:", "there is no folder"),
    ("local-dir:checkpionts/formats", "there is no folder .*; did you mean 'checkpoints/formats'"),
    ("./checkpoints/formts", "no such file or folder; did you mean 'checkpoints/formats'. Else write"),
    ("checkpoints/test_sources.pth", "is not there; did you mean 'checkpoints/test_sources.py'"),
    ("hf-hub:name", "is not a hub name: write hf-hub:org/name"),
    ("hf-hub:a/b/c", "is not a hub name"),
    ("hf-hub:org/name@", "is not a hub name"),
    ("hf-hub:org/name@a@b", "is not a hub name"),
])  # fmt: skip
def test_mistakes_are_answered_in_one_sentence(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(CheckpointError, match=said):
        parse_source(text)


def test_a_folder_and_a_model_nearly_of_this_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vit_tiny_patch16_run").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"_run'\? Or the model 'vit_tiny_patch16_224'"):
        parse_source("vit_tiny_patch16_22")


def test_a_run_has_a_student_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(CheckpointError, match="has not written it yet"):
        parse_source(f"local-dir:{tmp_path / 'student'}")
    (tmp_path / "student").mkdir()
    with pytest.raises(CheckpointError, match=r"did you mean '.*/student'"):
        parse_source(f"local-dir:{tmp_path / 'studnet'}")


def test_a_link_that_leads_in_a_circle_is_named(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    with pytest.raises(CheckpointError, match="it is a link that leads nowhere"):
        parse_source(str(tmp_path / "one"))


def test_a_hash_in_the_name_of_a_folder_is_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "run#1").mkdir()
    assert parse_source(f"{tmp_path}/run#1") == FolderSource(tmp_path / "run#1")
    assert parse_source(f"{tmp_path}/run#1#best") == FolderSource(tmp_path / "run#1", "best")


def test_a_file_is_no_folder_and_a_folder_no_file(tmp_path: Path) -> None:
    (tmp_path / "d.pth").mkdir()
    (tmp_path / "f").write_bytes(b"")
    with pytest.raises(CheckpointError, match="a folder; write local-dir: before it"):
        parse_source(str(tmp_path / "d.pth"))
    with pytest.raises(CheckpointError, match="is a file"):
        parse_source(f"local-dir:{tmp_path / 'f'}")


# Published architectures are known by what their blocks hold and by their widths; others are asked for.


def shapes(name: str, **arguments: Any) -> dict[str, Tensor]:
    with without_memory():
        return dict(timm.create_model(name, num_classes=0, **arguments).state_dict())


def infer(tensors: dict[str, Tensor], **known: Any) -> tuple[str, dict[str, Any]]:
    return infer_architecture(Weights(tensors, "x.pth", "", model_args=known))


@pytest.mark.parametrize("name", [
    "vit_tiny_patch16_224", "vit_small_patch8_224", "vit_base_patch32_224", "vit_large_patch14_224",
    "vit_base_patch16_224", "vit_large_patch16_224",
    "vit_huge_patch14_224", "vit_giant_patch14_224", "vit_gigantic_patch14_224",
    "deit_tiny_distilled_patch16_224", "deit_base_distilled_patch16_224",
    "deit3_small_patch16_224", "deit3_medium_patch16_224", "deit3_large_patch16_224", "deit3_huge_patch14_224",
    "vit_small_patch14_dinov2", "vit_large_patch14_dinov2", "vit_giant_patch14_dinov2",
    "vit_base_patch14_reg4_dinov2", "vit_giant_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3_qkvb", "vit_base_patch16_dinov3_qkvb",
    "vit_huge_plus_patch16_dinov3", "vit_7b_patch16_dinov3",
    "beit_base_patch16_224", "beit_large_patch16_224",
    "vit_base_patch16_siglip_224", "vit_large_patch16_siglip_256", "vit_so400m_patch14_siglip_224",
])  # fmt: skip
def test_a_published_architecture_is_named_as_timm_does(name: str) -> None:
    tensors = shapes(name)
    assert infer(tensors) == (name, {})


@pytest.mark.parametrize(("name", "arguments"), [
    ("vit_small_patch16_224", {"patch_size": 12}), ("vit_huge_patch14_224", {"patch_size": 16}),
    ("vit_base_patch16_224", {"in_chans": 1}), ("vit_base_patch14_dinov2", {"patch_size": 16}),
    ("vit_small_patch14_reg4_dinov2", {"reg_tokens": 8}), ("deit3_base_patch16_224", {"patch_size": 8}),
    ("vit_small_patch16_dinov3_qkvb", {"num_reg_tokens": 2}), ("beit_base_patch16_224", {"patch_size": 8}),
    ("deit_small_distilled_patch16_224", {"patch_size": 8, "in_chans": 4}),
])  # fmt: skip
def test_what_differs_from_it_is_an_argument(name: str, arguments: dict[str, Any]) -> None:
    tensors = shapes(name, **arguments)
    found, inferred = infer(tensors)
    assert (found, inferred) == (name, arguments)
    again = shapes(found, **inferred)
    assert {key: tensor.shape for key, tensor in again.items()} == {
        key: tensor.shape for key, tensor in tensors.items()
    }


def test_a_model_without_a_class_token_is_named_only_where_the_format_says_so() -> None:
    arguments = {"class_token": False, "global_pool": "avg"}
    tensors = shapes("vit_base_patch16_224", **arguments)
    with pytest.raises(CheckpointError, match=r"as model"):
        infer(tensors)
    assert infer(tensors, class_token=False) == ("vit_base_patch16_224", {})


def without(*names: str) -> Callable[[dict[str, Tensor]], None]:
    def remove(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(names)]:
            del tensors[key]

    return remove


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("blocks.3.", "blocks.7."), r"not whole: of 12 blocks it lacks blocks\.3, blocks\.7$"),
        (without("blocks.11."), "width 192 and depth 11 are of no published ViT.*as model"),
        (without("blocks.0.mlp.fc1.bias"), "not those of a plain ViT.*as model"),
        (without("patch_embed"), "not those of a plain ViT.*as model"),
        (without("pos_embed"), "not those of a plain ViT.*as model"),
        (without("cls_token"), "as model"),
        (without("blocks"), r"cls_token, pos_embed.*MAE, DeiT.*as model"),
        (lambda t: t.update({"patch_embed.proj.weight": torch.zeros(192, 3)}), "not those of a plain ViT"),
        (lambda t: t.update({"patch_embed.proj.weight": torch.zeros(192, 3, 8, 16)}), "of no published ViT"),
        (lambda t: t.update({"patch_embed.proj.weight": torch.zeros(200, 3, 16, 16)}), "width 200"),
        (lambda t: t.update({"norm_pre.weight": torch.zeros(192)}), "not those of a plain ViT"),
        (lambda t: t.update({"reg_token": torch.zeros(1, 4, 192)}), "not those of a plain ViT"),
        (lambda t: t.update({"blocks.0.ls1.gamma": torch.zeros(192)}), "as model"),
        (lambda t: t.update({"blocks.0.attn.q_norm.weight": torch.zeros(64)}), "not those of a plain ViT"),
    ],
)  # fmt: skip
def test_what_could_be_anything(change: Callable[[dict[str, Tensor]], object], said: str) -> None:
    tensors = shapes("vit_tiny_patch16_224")
    change(tensors)
    with pytest.raises(CheckpointError, match=said) as caught:
        infer(tensors)
    assert str(caught.value).startswith("x.pth ")


@pytest.mark.parametrize("name", [
    "swin_tiny_patch4_window7_224", "resnet18", "mixer_s16_224", "cait_xxs24_224", "xcit_nano_12_p16_224",
    "convnext_atto",
])  # fmt: skip
def test_other_families_are_not_taken_for_one(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"MAE, DeiT.*as model|not those of a plain ViT"):
        infer(shapes(name))


# What a teacher is: its numbers, and the code that computes it.


OPERATOR = """
from graftvit.models.attention.softmax import UniformAttention

class Mine(UniformAttention):
    share = 1.0
"""


def test_the_code_of_operators_belongs_to_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftvit.checkpoints.provenance.version", lambda name: "2.0")
    plain = load_pretrained(f"local-dir:{make_teacher(tmp_path / 'teacher')}", identified=True)
    assert collect_identity(plain)["library"] == "timm 2.0"
    linear = replace(plain, model=convert(plain.model, "*: linear"))
    assert collect_identity(linear)["library"] == "timm 2.0, graftvit 2.0"
    file = tmp_path / "operators_of_mine.py"
    file.write_text(OPERATOR)
    monkeypatch.syspath_prepend(str(tmp_path))
    register_operator("mine", importlib.import_module("operators_of_mine").Mine)
    try:
        own = replace(plain, model=convert(plain.model, "1: mine"))
    finally:
        OPERATORS.pop("mine")
    before, name = collect_identity(own)["library"], identify(own)
    assert before.startswith("timm 2.0, graftvit 2.0, operators_of_mine.py ")
    file.write_text(OPERATOR.replace("1.0", "0.9"))
    assert collect_identity(own)["library"] != before, "a cache is filled again"
    assert identify(own) == name, "a run resumes"
    file.unlink()
    assert identify(own) == name, "code that is gone"
