"""What a user writes as a source, and what is said to a source that is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from graftvit.checkpoints.sources import FileSource, FolderSource, HubSource, TimmSource, parse_source
from graftvit.models.errors import CheckpointError


def test_names_and_hub_names() -> None:
    assert parse_source("vit_large_patch16_224.mae") == TimmSource("vit_large_patch16_224.mae")
    assert parse_source("vit_tiny_patch16_224") == TimmSource("vit_tiny_patch16_224")
    assert parse_source("hf-hub:org/name") == HubSource("org/name", None)
    assert parse_source("hf_hub:org/name.x-1@v2/a") == HubSource("org/name.x-1", "v2/a")


@pytest.mark.parametrize(
    "name",
    [
        "w.pth",
        "w.safetensors",
        "W.PTH",
        "w.bin",
        "a.b@c.pt",
        "with space.ckpt",
        "x#1.pth",
        "w.npz",
        "checkpoint-best",
    ],
)
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
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
    ],
)
def test_mistakes_are_answered_in_one_sentence(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(CheckpointError, match=said) as caught:
        parse_source(text)
    assert "\n" not in str(caught.value)


def test_a_folder_and_a_model_of_nearly_this_name_are_both_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_file_is_no_folder_and_a_folder_no_file(tmp_path: Path) -> None:
    (tmp_path / "d.pth").mkdir()
    (tmp_path / "f").write_bytes(b"")
    with pytest.raises(CheckpointError, match="a folder; write local-dir: before it"):
        parse_source(str(tmp_path / "d.pth"))
    with pytest.raises(CheckpointError, match="is a file"):
        parse_source(f"local-dir:{tmp_path / 'f'}")
