"""What goes up of a student's folder, and what never does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm
from graftvit.checkpoints.card import MARKER
from graftvit.checkpoints.upload import Upload, plan_upload
from graftvit.models.errors import CheckpointError
from huggingface_hub import ModelCard
from support.models.tiny_students import ARGUMENTS, NAME, write_tiny_student

TEACHER = {"source": "/secret/mae.pth", "architecture": NAME, "revision": None, "license": "cc-by-nc-4.0"}


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A student of CC-BY-NC weights."""
    made = {
        "version": "0",
        "part": "student",
        "teacher": TEACHER,
        "recipe": {"data": {"data_path": "/secret/in1k"}},
    }
    return write_tiny_student(tmp_path / "student", provenance=made, license="cc-by-nc-4.0")


def names(upload: Upload) -> list[str]:
    return sorted(file.name for file in upload.files)


def content(upload: Upload, name: str) -> str:
    (found,) = (file.content for file in upload.files if file.name == name)
    return found.decode() if isinstance(found, bytes) else found.read_text()


def refusal(folder: Path, repository: str = "org/vit", **how: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        plan_upload(folder, repository, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_student_goes_up_and_nothing_else(student: Path) -> None:
    for name in (
        "secret.txt",
        "pytorch_model.bin",
        "model-00001-of-00002.safetensors",
        ".env",
        "config.yaml",
    ):
        (student / name).write_text("x")
    (student / "checkpoints").mkdir()
    (student / "LICENSE").write_text("its text")
    upload = plan_upload(student, "org/vit")
    assert names(upload) == ["LICENSE", "README.md", "config.json", "model.safetensors"]
    assert upload.left_behind == (
        ".env", "checkpoints/", "config.yaml", "model-00001-of-00002.safetensors", "pytorch_model.bin", "secret.txt",
    )  # fmt: skip
    assert not (student / "README.md").exists()


def test_the_license_is_carried_into_card_and_config(student: Path) -> None:
    upload = plan_upload(student, "org/vit")
    assert upload.facts.license == "cc-by-nc-4.0"
    assert ModelCard(upload.card).data.license == "cc-by-nc-4.0"
    assert "is not cc-by-nc-4.0" in refusal(student, license="apache-2.0")
    upload = plan_upload(student, "org/vit", license="apache-2.0", confirm_license=True)
    assert ModelCard(upload.card).data.license == "apache-2.0"
    assert json.loads(content(upload, "config.json"))["pretrained_cfg"]["license"] == "apache-2.0"
    assert json.loads((student / "config.json").read_text())["pretrained_cfg"]["license"] == "cc-by-nc-4.0"


def test_no_path_of_this_machine_goes_up(student: Path) -> None:
    upload = plan_upload(student, "org/vit")
    assert "secret" in (student / "config.json").read_text()
    assert "secret" not in content(upload, "config.json") + content(upload, "README.md")
    shown, own = json.loads(content(upload, "config.json")), json.loads((student / "config.json").read_text())
    assert {key: value for key, value in shown.items() if key != "graftvit"} == {
        key: value for key, value in own.items() if key != "graftvit"
    }


def test_an_unknown_license_is_not_made_up(tmp_path: Path) -> None:
    upload = plan_upload(write_tiny_student(tmp_path / "student"), "org/vit")
    assert upload.facts.license is None
    assert ModelCard(upload.card).data.license is None
    assert "license" not in json.loads(content(upload, "config.json"))["pretrained_cfg"]


def test_parameters_are_counted_from_the_header(student: Path) -> None:
    model = timm.create_model(NAME, **ARGUMENTS)
    assert plan_upload(student, "org/vit").facts.parameters == sum(
        part.numel() for part in model.parameters()
    )


def test_shards_go_up_with_their_index(tmp_path: Path) -> None:
    folder = write_tiny_student(tmp_path / "student", max_shard_size=8000)
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"an older one")
    upload = plan_upload(folder, "org/vit")
    assert names(upload) == ["README.md", "config.json", *shards, "model.safetensors.index.json"]
    assert upload.left_behind == ("model-00009-of-00009.safetensors",)
    assert upload.facts.sharded
    assert "graftvit.load" in upload.card
    (folder / shards[0]).unlink()
    assert shards[0] in refusal(folder)


def test_an_index_must_be_that_of_its_files(tmp_path: Path) -> None:
    folder = write_tiny_student(tmp_path / "student", max_shard_size=8000)
    index = folder / "model.safetensors.index.json"
    held = json.loads(index.read_text())
    first = next(iter(held["weight_map"].values()))
    index.write_text(json.dumps({"weight_map": held["weight_map"] | {"no.such.tensor": first}}))
    assert "no.such.tensor" in refusal(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    assert "outside of its folder" in refusal(folder)
    index.write_text("{")
    assert "damaged" in refusal(folder)


def test_a_card_that_a_person_wrote_is_kept(student: Path) -> None:
    own = "---\nlicense: CC-BY-NC-4.0\ntags: [mine]\n---\n# Mine, with /secret/paths\n"
    (student / "README.md").write_text(own)
    upload = plan_upload(student, "org/vit")
    assert upload.own_card
    assert content(upload, "README.md") == own
    assert upload.facts.license == "cc-by-nc-4.0"
    assert json.loads(content(upload, "config.json"))["pretrained_cfg"]["license"] == "cc-by-nc-4.0"


def test_a_card_of_ours_is_written_anew_until_a_person_takes_it_over(student: Path) -> None:
    card = plan_upload(student, "org/vit").card
    (student / "README.md").write_text(card + "\nstale\n")
    assert "stale" not in plan_upload(student, "org/vit").card
    (student / "README.md").write_text(card.replace(MARKER, "") + "\nmine\n")
    assert "mine" in plan_upload(student, "org/vit").card


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ("---\nlicense: mit\n---\n", "is not cc-by-nc-4.0"),
        ("# No head\n", "names no license"),
        ("---\nlicense: [\n---\n", "damaged"),
    ],
)
def test_a_written_card_must_name_a_license_that_holds(student: Path, card: str, words: str) -> None:
    (student / "README.md").write_text(card)
    assert words in refusal(student)


def test_a_card_that_is_no_text_is_refused(student: Path) -> None:
    (student / "README.md").write_bytes(b"\xff\xfe\x00")
    assert "README.md" in refusal(student)


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "config.json", "LICENSE"])
def test_a_link_out_of_the_folder_is_refused(student: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes((student / name).read_bytes() if (student / name).exists() else b"the secret")
    (student / name).unlink(missing_ok=True)
    (student / name).symlink_to(outside)
    assert f"{name} is a link that leads out" in refusal(student)


def test_a_link_within_the_folder_is_followed(student: Path) -> None:
    (student / "model.safetensors").rename(student / "weights")
    (student / "model.safetensors").symlink_to("weights")
    upload = plan_upload(student, "org/vit")
    assert names(upload) == ["README.md", "config.json", "model.safetensors"]
    assert upload.left_behind == ("weights",)


def test_a_folder_that_is_reached_by_a_link_is_one(student: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(student)
    assert plan_upload(tmp_path / "link", "org/vit").facts.license == "cc-by-nc-4.0"


def test_a_pipe_or_a_dead_link_in_the_place_of_a_file_is_refused(student: Path) -> None:
    (student / "model.safetensors").unlink()
    os.mkfifo(student / "model.safetensors")
    assert "not a file" in refusal(student)
    (student / "model.safetensors").unlink()
    (student / "model.safetensors").symlink_to("nowhere")
    assert "no model.safetensors" in refusal(student)


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_half_a_file_is_refused(student: Path, keep: int) -> None:
    weights = (student / "model.safetensors").read_bytes()
    (student / "model.safetensors").write_bytes(weights[:keep])
    assert "model.safetensors is damaged" in refusal(student)


@pytest.mark.parametrize("config", [b"", b"{", b"[]", b"{}", b'{"architecture": 3}', b"\xff"])
def test_a_config_that_is_none_is_refused(student: Path, config: bytes) -> None:
    (student / "config.json").write_bytes(config)
    assert "config.json" in refusal(student)


def test_what_is_no_student_folder_is_refused(student: Path, tmp_path: Path) -> None:
    assert "there is no folder" in refusal(tmp_path / "absent")
    run = tmp_path / "run"
    run.mkdir()
    assert "is not a student folder" in refusal(run)
    student.rename(run / "student")
    assert f"push {run / 'student'}" in refusal(run)
    weights = run / "student" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    assert "`graftvit checkpoint convert` makes one of pytorch_model.bin" in refusal(run / "student")


@pytest.mark.parametrize(
    "name", ["vit", "org/", "/vit", "a/b/c", "org/../x", "org/a b", "org/a--b", "-org/x", "", "org/x.git"]
)
def test_what_is_no_repository_name_is_refused(student: Path, name: str) -> None:
    assert "write org/name" in refusal(student, name)
