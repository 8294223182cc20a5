"""Every hostile file and description is refused in one sentence; nothing runs, nothing large is allocated."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from graftvit.checkpoints.architecture import build
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.state import TrainingState, write_state
from graftvit.checkpoints.weight_files import outline, read_file
from graftvit.models.errors import CheckpointError, GraftError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.files.hostile import ARCHITECTURE, ARGUMENTS, CORPUS, weights
from support.files.hostile_archives import legacy_view_of_another_storage, record_of_a_lying_size
from support.files.hostile_configs import HUGE_INTS, KINDS, change, small_model, write_model
from support.files.hostile_tensors import valid
from support.runs.limits import limited_memory, limited_work

ROOM = 512 << 20
"""Bytes that the process may take beyond what it has; the smallest lie in the corpus asks for more."""
CPU_SECONDS = 30.0
CONTAINERS = ("safetensors", "zip", "legacy", "npz")


@pytest.fixture(scope="module", autouse=True)
def everything_is_imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the first file makes a process load is not counted as what a hostile one takes."""
    path = valid("safetensors", tmp_path_factory.mktemp("good"))
    load_pretrained(str(path), model=ARCHITECTURE, model_args=ARGUMENTS)


@pytest.mark.parametrize("name", sorted(CORPUS))
def test_a_hostile_file_is_refused(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "files").mkdir()
    path = CORPUS[name](tmp_path / "files", canary)
    source = f"local-dir:{path}" if path.is_dir() else str(path)
    with limited_memory(ROOM), limited_work(CPU_SECONDS), pytest.raises(CheckpointError) as caught:
        load_pretrained(source, model=ARCHITECTURE, model_args=ARGUMENTS)
    sentence = str(caught.value)
    assert len(sentence) < 700
    assert path.name in sentence
    assert not canary.exists()
    causes = [type(error) for error in _causes(caught.value)]
    assert MemoryError not in causes


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def test_the_corpus_is_large() -> None:
    assert len(CORPUS) >= 100


@pytest.mark.parametrize("name", [name for name in sorted(CORPUS) if name.startswith("code_")])
def test_code_is_named_with_what_to_do(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is refused: it.*(code|program)"):
        read_file(CORPUS[name](tmp_path, tmp_path / "canary"))


@pytest.mark.parametrize("make", [record_of_a_lying_size, legacy_view_of_another_storage])
def test_numbers_of_another_record_are_not_taken(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"is (damaged|refused)"):
        read_file(tmp_path / "m.pth")


@pytest.mark.parametrize("container", CONTAINERS)
def test_good_files_pass(container: str, tmp_path: Path) -> None:
    path = valid(container, tmp_path)
    tree = read_file(path).tree
    found = tree.get("model", tree)
    assert found.keys() == weights().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights().items())


def never_another_error(path: Path) -> None:
    try:
        read_file(path)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    head=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x10\0\0\0\0\0\0\0{"]),
    rest=st.binary(max_size=300),
)
def test_random_bytes(tmp_path: Path, head: bytes, rest: bytes) -> None:
    path = tmp_path / "random.pth"
    path.write_bytes(head + rest)
    never_another_error(path)


@pytest.mark.parametrize("container", CONTAINERS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_changes_of_a_good_file(tmp_path: Path, container: str, data: st.DataObject) -> None:
    """Bytes changed, put in or left out anywhere; the descriptions at both ends are hit more often than numbers."""
    path = tmp_path / "changed.bin"
    content = bytearray(valid(container, tmp_path).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        near_an_end = data.draw(st.sampled_from([0, len(content)]))
        place = abs(near_an_end - data.draw(st.integers(1, min(1500, len(content))))) % len(content)
        length = data.draw(st.integers(0, 4))
        content[place : place + length] = data.draw(st.binary(max_size=8))
    path.write_bytes(
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    never_another_error(path)


def test_a_directory_of_an_archive_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "m.npz", **{f"a{number}": np.zeros(1, np.float32) for number in range(50)})
    opened: list[object] = []
    plain = zipfile.ZipFile.__init__

    def count(archive: zipfile.ZipFile, *arguments: Any, **options: Any) -> None:
        opened.append(archive)
        plain(archive, *arguments, **options)

    monkeypatch.setattr(zipfile.ZipFile, "__init__", count)
    assert len(outline(tmp_path / "m.npz").tree) == 50
    assert len(opened) <= 2


# What a model folder says of its model is held against bounds and its tensors before anything is built of it.


CONFIGS_ROOM = 1 << 30
CONFIGS_CPU_SECONDS = 20.0
NAN, INF = float("nan"), float("inf")
SIZES = ("depth", "embed_dim", "num_heads", "img_size", "patch_size", "num_classes", "in_chans", "reg_tokens")
OF_TEACHER = ("copied", "teacher", "model_args")
Place = tuple[Any, ...]
CASES: list[tuple[str, Place, Any]] = [
    *(("plain", ("model_args", name), size) for name in SIZES for size in (10**5, 10**9, 10**30)),
    *(("plain", ("model_args", name), value) for name in SIZES for value in (-3, "abc", [[1]], 2e9)),
    *(("plain", ("model_args", name), 0) for name in ("num_heads", "patch_size", "embed_dim", "img_size")),
    *(("plain", ("model_args", name), "abc") for name in ("norm_layer", "act_layer", "weight_init", "init_values")),
    *(("plain", ("model_args", "mlp_ratio"), value) for value in (INF, NAN, 1e300, "abc", [])),
    *(("plain", ("model_args", "drop_path_rate"), value) for value in (1e5, -1.0)),
    *(("plain", ("model_args", "layers"), value) for value in ([10**9, 3],)),
    *(("plain", ("architecture",), value) for value in (5, None, [], {}, "hf-hub:a/b", "local-dir:/dev")),
    *(("plain", ("graftvit",), value) for value in ("abc", 5, [1], True)),
    *(("plain", ("graftvit", "norm_eps"), value) for value in ("abc", -1.0, NAN, 0.0, [])),
    *(("plain", ("pretrained_cfg", "classifier"), value) for value in (5, [5], [], {})),
    *(("plain", ("pretrained_cfg", "mean"), value) for value in ([NAN] * 3, [INF] * 3, [1e300] * 3, "abc", [], 0)),
    *(("plain", ("pretrained_cfg", "std"), value) for value in ([0.0] * 3, [NAN] * 3, [-1.0] * 3, [1e-300] * 3, [])),
    *(("plain", ("pretrained_cfg", "crop_pct"), value) for value in (0, -1, NAN, "abc")),
    *(("plain", ("pretrained_cfg", "input_size"), value) for value in ([], [3, -1, 16], [10**9, 16, 16], 5)),
    *(("plain", ("pretrained_cfg",), value) for value in (5, "abc", [])),
    *(("plain", ("model_args",), value) for value in (5, "abc", [1])),
    *(("converted", ("model_args", "architecture"), value) for value in (5, None, "hf-hub:a/b", "graftvit_converted")),
    *(("converted", ("model_args", "plan"), value) for value in (5, None, [], {"a": 1}, "abc", "")),
    *(
        ("converted", ("model_args", "plan"), f"0: {plan}")
        for plan in ("performer(num_features=2000000000)", "monarch(steps=1000000000)", "linformer(num_keys=.nan)")
    ),
    *(("converted", ("model_args", "plan_size"), value) for value in (10**9, [10**6, 10**6], "abc")),
    ("converted", ("model_args", "reg_tokens"), 10**9),
    *(("copied", ("model_args", "student"), value) for value in (5, None, "hf-hub:a/b", "local-dir:/dev")),
    *(("copied", ("model_args", "copied"), value) for value in (5, None, [], "abc", {})),
    *(("copied", ("model_args", "copied", "method"), value) for value in (5, [], "distill")),
    *(("copied", ("model_args", "copied", "layers"), value) for value in ([], 5, [{"teacher": -1, "student": 0}])),
    ("copied", ("model_args", "copied", "layers"), [{"teacher": 0, "student": 0}] * 2),
    *(("copied", ("model_args", "copied", "heads"), value) for value in ([], 5, [[5, 6]], [[[10**9], [0]]])),
    *(("copied", ("model_args", *OF_TEACHER[:2], "architecture"), value) for value in (5, "hf-hub:a/b", None)),
    *(("copied", ("model_args", *OF_TEACHER[:2], "norm_eps"), value) for value in ("abc", -1.0, NAN, [])),
    *(("copied", ("model_args", *OF_TEACHER), value) for value in (5, "abc", [])),
    *(("copied", ("model_args", *OF_TEACHER, "depth"), value) for value in HUGE_INTS),
    *(
        ("copied", ("model_args", "copied", *owner, "normalization", name), value)
        for owner in ((), ("teacher",))
        for name, value in (("std", [0.0] * 3), ("mean", [NAN] * 3), ("mean", [1e300] * 3), ("std", "a"), ("mean", []))
    ),
    *(("copied", ("model_args", "reg_tokens"), value) for value in (10**5, 10**6)),
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        write_model(kind, folder / kind)
    return folder


@pytest.fixture
def limited() -> Iterator[None]:
    """A process that may take a gigabyte more than it has, and twenty seconds of work."""
    with limited_memory(CONFIGS_ROOM), limited_work(CONFIGS_CPU_SECONDS):
        yield


@pytest.mark.parametrize(("kind", "place", "value"), CASES, ids=lambda value: repr(value)[:60])
def test_an_impossible_description_is_refused(
    kind: str, place: Place, value: Any, models: Path, tmp_path: Path, limited: None
) -> None:
    folder = shutil.copytree(models / kind, tmp_path / "m")
    change(folder, place, value)
    with pytest.raises(GraftError) as caught:
        load_pretrained(f"local-dir:{folder}")
    sentence = str(caught.value)
    assert len(sentence) < 700


@pytest.mark.parametrize("kind", KINDS)
def test_a_true_description_loads(kind: str, models: Path, limited: None) -> None:
    model, _, _ = small_model(kind)
    loaded = load_pretrained(f"local-dir:{models / kind}").model
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("value", [10**5, 10**9, "abc", [], -3])
@pytest.mark.parametrize("kind", KINDS)
def test_arguments_of_a_training_state(kind: str, value: Any, tmp_path: Path, limited: None) -> None:
    model, name, arguments = small_model(kind)
    path = tmp_path / "last.safetensors"
    entry = {"architecture": name, "model_args": {**arguments, "depth": value}}
    tensors = {f"student.{key}": tensor for key, tensor in model.state_dict().items()}
    write_state(path, TrainingState(tensors, {"student": entry}))
    with pytest.raises(GraftError) as caught:
        load_pretrained(str(path))
    assert "depth" in str(caught.value)


@pytest.mark.parametrize("value", [10**6, 10**9, -3, NAN])
def test_arguments_that_a_user_gives_are_bounded(value: Any, models: Path, limited: None) -> None:
    with pytest.raises(GraftError, match=r"model_args\.depth"):
        load_pretrained(f"local-dir:{models / 'plain'}", model_args={"depth": value})


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "README.md"])
def test_a_sparse_file_of_gigabytes_is_not_read(
    name: str, models: Path, tmp_path: Path, limited: None
) -> None:
    folder = shutil.copytree(models / "plain", tmp_path / "m")
    if name.startswith("model"):
        (folder / "model.safetensors").unlink()
    with (folder / name).open("wb") as file:
        file.truncate(5 << 30)
    if name == "README.md":  # what a card says of a license is all that is lost
        assert load_pretrained(f"local-dir:{folder}").license is None
        return
    with pytest.raises(GraftError, match=r"is refused: it has more than 16,777,216 bytes"):
        load_pretrained(f"local-dir:{folder}")


def test_a_card_that_multiplies_itself_is_no_license(models: Path, tmp_path: Path, limited: None) -> None:
    folder = shutil.copytree(models / "plain", tmp_path / "m")
    levels = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))
    (folder / "README.md").write_text(f"---\na0: &a0 [x]\n{levels}\nlicense: *a29\n---\n")
    assert load_pretrained(f"local-dir:{folder}").license is None


# The bound on what a constructor makes leaves larger images room.


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "vit_base_patch16_224"])
def test_large_images_are_no_reason_to_refuse(name: str) -> None:
    weights = build(name, {}, on_meta=True).state_dict()
    model = build(name, {"img_size": 1024}, on_meta=True, within=weights)
    assert model.patch_embed.img_size == (1024, 1024)


@pytest.mark.slow
def test_a_model_far_larger_than_its_weights_is_refused() -> None:
    weights = timm.create_model("vit_tiny_patch16_224", depth=1).state_dict()
    with pytest.raises(CheckpointError, match="far larger than its weights"):
        build("vit_tiny_patch16_224", {"depth": 10**6}, on_meta=True, within=weights)
    with pytest.raises(CheckpointError, match="far larger than its weights"):
        build("beit_base_patch16_224", {"img_size": 4096}, on_meta=True, within=weights)
