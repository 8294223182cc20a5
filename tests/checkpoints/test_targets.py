"""A file of another runtime computes what the model computes, run by its own script and none of our code."""

from __future__ import annotations

import importlib.util
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from graftvit.checkpoints import targets
from graftvit.checkpoints.preprocessing import CROP_MODES, INTERPOLATIONS, Preprocessing
from graftvit.checkpoints.pretrained import describe_model
from graftvit.checkpoints.provenance import Pretrained
from graftvit.checkpoints.targets import FILES, LOADER, Target, check_target, write_target
from graftvit.launch.commands.deploy import TARGETS
from graftvit.models.calibration import fit_at_random
from graftvit.models.conversion import convert, converted_layers
from graftvit.models.errors import CheckpointError, UnsupportedModelError
from PIL import Image
from support.models.copied_models import pair
from support.models.dense import relative_error, tiny
from support.models.operator_cases import CASES
from torch import nn

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)
ERROR = {"onnx": 1e-5, "onnx-int8": 0.05, "aoti": 1e-5, "executorch": 1e-5}
"""Largest relative error of all logits."""
REFUSED = {(name, "executorch") for name in ("stripes", "hilo", "neighbourhood", "ttt")}
KINDS = ("stripes", "hilo", "nystrom", "neighbourhood", "ttt", "hash")
OPERATORS = list({re.sub(r"[_\d]*$", "", case.operator): str(case) for case in CASES}.values())
"""One case of each operator; those whose names differ in a number count as one."""
OPERATORS.remove("linear")  # which is in every other test
IMAGES = torch.randn(8, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def needs(target: Target) -> None:
    try:
        check_target(target)
    except CheckpointError as error:
        pytest.skip(str(error))


def loaded(known: Pretrained, folder: Path, target: Target) -> Any:
    """The file as its script opens it."""
    path = write_target(known, folder, target, lambda: IMAGES)
    assert sorted(each.name for each in folder.iterdir()) == sorted([FILES[target], LOADER])
    return runpy.run_path(str(folder / LOADER))["Model"](path)


def agrees(model: nn.Module, folder: Path, target: Target) -> None:
    needs(target)
    found = torch.from_numpy(loaded(describe_model(model), folder, target)(IMAGES.numpy()))
    with torch.no_grad():
        assert relative_error(found, model(IMAGES)) <= ERROR[target]


def with_operator(plan: str, depth: int = 1) -> nn.Module:
    model = convert(tiny(dtype=torch.float32, depth=depth), plan)
    fit_at_random(converted_layers(model))
    return model.eval()


def copied() -> nn.Module:
    """A student that runs with its teacher's attention."""
    dual, _ = pair("alike", "copy", torch.float32)
    return dual.release().eval()


def test_the_command_knows_the_targets() -> None:
    assert get_args(Target) == TARGETS == tuple(FILES)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: tiny(dtype=torch.float32, depth=1),
    "converted": lambda: with_operator("0: linear"),
    "copied": copied,
    "of four kinds": lambda: with_operator("0: linear; 1: stripes; 2: ttt; 3: keep", 4),
}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *((name, target) for name in ("plain", "converted", "copied") for target in ("onnx", "onnx-int8")),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (
                ("copied", "aoti"),
                ("of four kinds", "aoti"),
                ("copied", "executorch"),
                ("plain", "executorch"),
                ("converted", "executorch"),
            )
        ),
    ],
)
def test_a_file_gives_the_logits_of_its_model(name: str, target: Target, tmp_path: Path) -> None:
    agrees(MODELS[name](), tmp_path, target)


@pytest.mark.parametrize("operator", ["linear", "hedgehog"])
def test_what_attention_computes_of_activations_stays_float32(operator: str, tmp_path: Path) -> None:
    path = write_target(
        describe_model(with_operator(f"0: {operator}")), tmp_path, "onnx-int8", lambda: IMAGES
    )
    graph = import_module("onnx").load(path).graph
    weights = {each.name for each in graph.initializer}
    scaled = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    products = [node.input[1] for node in graph.node if node.op_type == "MatMul"]
    assert sum(name in scaled for name in products) == 4, "qkv, projection and the two of the block's MLP"
    assert all(scaled[name] in weights for name in products if name in scaled)
    assert len(products) >= 7


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_goes_to_onnx(operator: str, tmp_path: Path) -> None:
    agrees(with_operator(f"0: {operator}"), tmp_path, "onnx")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx-int8", "executorch"])
@pytest.mark.parametrize("operator", KINDS)
def test_an_operator_of_each_kind_goes_to_every_target(operator: str, target: Target, tmp_path: Path) -> None:
    if (operator, target) in REFUSED:
        needs(target)
        with pytest.raises(UnsupportedModelError, match=operator):
            loaded(describe_model(with_operator(f"0: {operator}")), tmp_path, target)
    else:
        agrees(with_operator(f"0: {operator}"), tmp_path, target)


@pytest.mark.parametrize("mode", CROP_MODES)
@pytest.mark.parametrize("size", [(1, 24, 24), (3, 24, 24), (3, 20, 32)])
@pytest.mark.parametrize("crop", [1.0, 0.875])
def test_the_script_prepares_an_image_as_timm_does(
    mode: str, size: tuple[int, int, int], crop: float, tmp_path: Path
) -> None:
    prepare = runpy.run_path(str(script(tmp_path)))["prepare"]
    draw = np.random.default_rng(0)
    for number, (height, width) in enumerate([(24, 24), (31, 57), (90, 41), (9, 13), (300, 301)]):
        picture = Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8))
        spec = Preprocessing(
            size, (0.485, 0.456, 0.406)[: size[0]], (0.229, 0.224, 0.225)[: size[0]], crop, mode,
            INTERPOLATIONS[number],
        )  # fmt: skip
        wanted = spec.transform()(picture.convert("L" if size[0] == 1 else "RGB"))
        said = {
            name: ",".join(f"{each:g}" for each in getattr(spec, name))
            for name in ("input_size", "mean", "std")
        }
        said |= {"crop_pct": f"{crop:g}", "crop_mode": mode, "interpolation": spec.interpolation}
        torch.testing.assert_close(torch.from_numpy(prepare(picture, said)), wanted, rtol=1e-5, atol=1e-5)


def script(folder: Path) -> Path:
    path = folder / LOADER
    path.write_text(targets.script_of("onnx"))
    return path


def test_the_script_needs_none_of_our_code(tmp_path: Path) -> None:
    known = replace(describe_model(MODELS["plain"]()), label_names=("a", "b", "é", "d", "e"))
    file = loaded(known, tmp_path, "onnx")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    picture.save(tmp_path / "picture.png")
    with torch.no_grad():
        place = int(known.model(known.preprocessing.transform()(picture)[None]).argmax())
    without = "import sys; sys.modules.update(dict.fromkeys(('torch', 'timm', 'graftvit'))); import runpy; "
    run = f"sys.argv = ['load.py', 'picture.png']; runpy.run_path({str(tmp_path / LOADER)!r}, run_name='__main__')"
    said = subprocess.run(
        [sys.executable, "-c", without + run], cwd=tmp_path, capture_output=True, check=True, encoding="utf-8",
        env={"PYTHONIOENCODING": "utf-8", "PATH": "/usr/bin"},
    )  # fmt: skip
    assert said.stdout.split() == ["picture.png", file.names[place]]


@pytest.mark.parametrize(
    "wrong", [np.zeros((1, 3, 32, 32)), np.zeros((3, 32, 48)), np.full((1, 3, 32, 48), np.nan)]
)
def test_the_script_refuses_what_is_no_prepared_image(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, 32, 48\)"):
        loaded(describe_model(MODELS["plain"]()), tmp_path, "onnx")(wrong)


def test_the_script_refuses_a_file_of_others(tmp_path: Path) -> None:
    loaded(describe_model(MODELS["plain"]()), tmp_path, "onnx")
    onnx: Any = import_module("onnx")
    model = onnx.load(tmp_path / "model.onnx")
    kept = [each for each in model.metadata_props if each.key != "mean"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="mean"):
        runpy.run_path(str(tmp_path / LOADER))["Model"]()
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(Exception, match=r"model\.onnx"):
        runpy.run_path(str(tmp_path / LOADER))["Model"]()


def test_int8_is_smaller_and_says_the_same(tmp_path: Path) -> None:
    known = describe_model(tiny(dtype=torch.float32, depth=2, embed_dim=96))
    sizes, said = [], []
    for target in ("onnx", "onnx-int8"):
        (tmp_path / target).mkdir()
        said.append(loaded(known, tmp_path / target, target).said)  # type: ignore[arg-type]
        sizes.append((tmp_path / target / "model.onnx").stat().st_size)
    assert sizes[1] < 0.5 * sizes[0]
    assert said[0].items() <= said[1].items()


def test_a_file_holds_no_path_of_this_machine(tmp_path: Path) -> None:
    loaded(describe_model(MODELS["plain"]()), tmp_path, "onnx")
    data = (tmp_path / "model.onnx").read_bytes()
    assert str(Path(torch.__file__).parent.parent).encode() not in data


def test_a_missing_package_or_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    absent = ("executorch", "onnxruntime")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in absent else find(name, *more)
    )
    with pytest.raises(CheckpointError, match=r"pip install 'executorch>="):
        check_target("executorch")
    with pytest.raises(CheckpointError, match=r"pip install 'onnx>=\S+ 'onnxruntime>=\S+ 'onnxscript>="):
        check_target("onnx-int8")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(CheckpointError, match=r"C\+\+ compiler"):
        check_target("aoti")
