"""What a model folder says of its model is held against bounds and its tensors before anything is built of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.state import TrainingState, write_state
from graftvit.models.errors import GraftError
from support.files.hostile_configs import HUGE_INTS, KINDS, change, small_model, write_model
from support.runs.limits import limited_memory, limited_work

ROOM = 1 << 30
CPU_SECONDS = 20.0
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
    with limited_memory(ROOM), limited_work(CPU_SECONDS):
        yield


@pytest.mark.parametrize(("kind", "place", "value"), CASES, ids=lambda value: repr(value)[:60])
def test_a_description_that_cannot_be_meant_is_refused_in_one_sentence(
    kind: str, place: Place, value: Any, models: Path, tmp_path: Path, limited: None
) -> None:
    folder = shutil.copytree(models / kind, tmp_path / "m")
    change(folder, place, value)
    with pytest.raises(GraftError) as caught:
        load_pretrained(f"local-dir:{folder}")
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 700


@pytest.mark.parametrize("kind", KINDS)
def test_a_true_description_loads(kind: str, models: Path, limited: None) -> None:
    model, _, _ = small_model(kind)
    loaded = load_pretrained(f"local-dir:{models / kind}").model
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("value", [10**5, 10**9, "abc", [], -3])
@pytest.mark.parametrize("kind", KINDS)
def test_arguments_of_a_training_state_are_held_against_it_too(
    kind: str, value: Any, tmp_path: Path, limited: None
) -> None:
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
def test_a_sparse_file_of_five_gigabytes_is_not_read(
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
