"""An exported file, run by onnxruntime or torch, computes what the model computes; or there is no file."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from graftvit.checkpoints import export_graph as check
from graftvit.checkpoints import export_graph as files
from graftvit.checkpoints.export import export, export_model
from graftvit.checkpoints.export_graph import ExportFailedError, compare, data_file
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.models.calibration import fit_at_random
from graftvit.models.conversion import convert, converted_layers
from graftvit.models.errors import CheckpointError, GraftError, RunFailedError, UnsupportedModelError
from graftvit.models.hosting import host_attention
from support.models.dense import FAMILIES, images, relative_error, tiny
from support.models.tiny_students import save_folder
from torch import Tensor, nn

MISSING = [name for name in files.PACKAGES if importlib.util.find_spec(name) is None]
NEEDS_ONNX = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed")
TWO_WAYS = pytest.mark.parametrize("suffix", [pytest.param(".onnx", marks=NEEDS_ONNX), ".pt2"])
BIASED = ("beit", "beit_shared")
ROTATED = ("dinov3", "eva02")
OWN_PARTS = ("clip", "siglip", "eva02", "dinov2_registers", "beit")
"""Families with operators that no other family has, which ONNX must translate."""


def each(families: Iterable[str]) -> pytest.MarkDecorator:
    """Each family with a suffix: `vit` with both, `OWN_PARTS` with ONNX, the others with torch's."""
    cases = [(name, suffix) for name in families for suffix in (".onnx", ".pt2")]
    return pytest.mark.parametrize(
        ("family", "suffix"),
        [
            pytest.param(
                name,
                suffix,
                marks=[NEEDS_ONNX] * (suffix == ".onnx") + [pytest.mark.slow] * (name != "vit"),
            )
            for name, suffix in cases
            if name == "vit" or (name in OWN_PARTS) == (suffix == ".onnx")
        ],
    )


def onnx() -> Any:
    return import_module("onnx")


def small(family: str = "vit", **changes: Any) -> nn.Module:
    return tiny(family, dtype=torch.float32, **{"depth": 1, **changes})


def runner(path: Path) -> Callable[[Tensor], Tensor]:
    """What runs the file, without any code of the library under test."""
    if path.suffix == ".pt2":
        module: Callable[[Tensor], Tensor] = torch.export.load(path).module()
        return module
    session = import_module("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def agrees(path: Path, model: nn.Module, *sizes: tuple[int, int], batches: tuple[int, ...] = (1, 4)) -> None:
    run = runner(path)
    for batch in batches:
        for size in sizes or ((32, 48),):
            x = images(batch, seed=batch, dtype=torch.float32, size=size)
            with torch.no_grad():
                assert relative_error(run(x), model(x)) <= 1e-5, (batch, size)


@each(("vit", *ROTATED, *BIASED))
def test_any_number_of_images_of_one_size(family: str, suffix: str, tmp_path: Path) -> None:
    model, path = small(family, depth=2), tmp_path / f"model{suffix}"  # two, which may share what they read
    report = export_model(model, path)
    agrees(path, model)
    assert report.error <= 1e-5
    assert report.metadata["classes"] == "5"
    assert report.checked == ((1, 3, 32, 48), (2, 3, 32, 48), (3, 3, 32, 48))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("operator", ["window", "dilated", "neighbourhood", "hybrid", "stripes"])
def test_operators_within_tiles_take_any_number_of_images(operator: str, tmp_path: Path) -> None:
    model = convert(small(img_size=(64, 64)), f"*: {operator}")
    export_model(model, tmp_path / "model.pt2")
    agrees(tmp_path / "model.pt2", model, (64, 64), batches=(1, 70))


@pytest.mark.slow
@each(name for name in FAMILIES if name not in BIASED)
def test_every_family_with_any_number_of_images_of_any_size(family: str, suffix: str, tmp_path: Path) -> None:
    model, path = small(family, dynamic_img_size=True), tmp_path / f"model{suffix}"
    report = export_model(model, path, dynamic=("batch", "resolution"))
    agrees(path, model, (32, 48), (64, 24), (16, 80), (48, 48))
    assert len({shape[2:] for shape in report.checked}) == 3
    if suffix == ".onnx":
        shape = onnx().load(path).graph.input[0].type.tensor_type.shape.dim
        assert [size.dim_param or size.dim_value for size in shape] == [
            "batch", 3, "8*grid_height", "8*grid_width",
        ]  # fmt: skip


@pytest.mark.slow
@NEEDS_ONNX
@pytest.mark.parametrize("family", ["qk_norm", "beit"])
def test_hosted_attention_is_exported(family: str, tmp_path: Path) -> None:
    model = small(family)
    host_attention(model)
    export_model(model, tmp_path / "model.onnx")
    agrees(tmp_path / "model.onnx", model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "suffix"), [pytest.param("vit", ".onnx", marks=NEEDS_ONNX), ("eva02", ".pt2")]
)
def test_a_converted_model_is_exported_with_its_plan(family: str, suffix: str, tmp_path: Path) -> None:
    model, path = convert(small(family, dynamic_img_size=True), "*: linear"), tmp_path / f"model{suffix}"
    report = export_model(model, path, dynamic=("batch", "resolution"))
    agrees(path, model, (32, 48), (40, 24))
    assert "linear" in report.metadata["plan"]


@TWO_WAYS
@pytest.mark.parametrize(
    "operator", ["kernel(feature=cosine)", "nystrom", "agent", "window", "linformer", "hybrid"]
)
def test_an_operator_of_one_grid_is_refused(operator: str, suffix: str, tmp_path: Path) -> None:
    model = convert(small(dynamic_img_size=True), f"0: {operator}")
    name = operator.partition("(")[0]
    with pytest.raises(UnsupportedModelError, match=rf"'{name}' in layer 0 .*fixed size"):
        export_model(model, tmp_path / f"model{suffix}", dynamic=("batch", "resolution"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    [
        "0: linear; 1: mala",
        "0: focused; 1: ttt",
        "0: monarch; 1: uniform",
        "0: vit3; 1: veca",
        "0: rala; 1: nala",
        "0: pola; 1: kernel(local=dynamic)",
        "0: attnzero_105; 1: hash",
    ],
)
def test_an_operator_of_any_grid_is_right_on_grids_it_was_not_traced_on(plan: str, tmp_path: Path) -> None:
    model, path = convert(small(dynamic_img_size=True, depth=2), plan), tmp_path / "model.pt2"
    fit_at_random(converted_layers(model))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "attn" in name:  # strong enough for attention that is far from uniform
                nn.init.normal_(parameter, std=0.5)
    export_model(model, path, dynamic=("batch", "resolution"))
    agrees(path, model, (16, 64), (64, 32), (24, 24))


@TWO_WAYS
def test_a_fixed_batch_is_one(
    suffix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: Any
) -> None:
    model, path = small(), tmp_path / f"model{suffix}"
    assert export_model(model, path, dynamic=()).checked == ((1, 3, 32, 48),)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    agrees(path, model, batches=(1,))
    with pytest.raises(Exception, match=r"images|[Ss]hape|dimension|size"):
        runner(path)(images(2, dtype=torch.float32))


@pytest.mark.parametrize("suffix", [pytest.param(".onnx", marks=[NEEDS_ONNX, pytest.mark.slow]), ".pt2"])
def test_normalisation_in_the_file(suffix: str, tmp_path: Path) -> None:
    model, path = small(), tmp_path / f"model{suffix}"
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    report = export_model(model, path, mean=mean, std=std, normalize=True)
    pixels = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        expected = model((pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    assert relative_error(runner(path)(pixels), expected) <= 1e-5
    assert "0..1" in report.metadata["input"]
    with pytest.raises(CheckpointError, match="mean and std"):
        export_model(model, tmp_path / f"other{suffix}", normalize=True)


@TWO_WAYS
def test_the_file_says_how_to_feed_it(suffix: str, tmp_path: Path) -> None:
    folder, path = tmp_path / "student", tmp_path / f"model{suffix}"
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 16, "patch_size": 4, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    shown = {"mean": (0.25,) * 3, "std": (0.5,) * 3, "crop_pct": 0.8}
    save_folder(model, folder, "vit_tiny_patch16_224", sizes, shown, license="cc-by-nc-4.0")
    report = export(folder, path)
    if suffix == ".onnx":
        words = {entry.key: entry.value for entry in onnx().load(path).metadata_props}
        assert onnx().load(path).graph.output[0].name == "features"
    else:
        extra = {"graftvit.json": ""}
        torch.export.load(path, extra_files=extra)
        words = json.loads(extra["graftvit.json"])
    expected = {
        "mean": "0.25,0.25,0.25", "std": "0.5,0.5,0.5", "input_size": "3,16,16", "output": "features",
        "architecture": "vit_tiny_patch16_224", "license": "cc-by-nc-4.0", "source": "student",
        "crop_pct": "0.8", "crop_mode": "center", "interpolation": "bicubic",
    }  # fmt: skip
    assert expected.items() <= words.items()
    assert "classes" not in words
    assert str(tmp_path) not in json.dumps(words)
    assert report.output == "features"


def test_an_onnx_file_names_its_classes_and_refuses_other_images(tmp_path: Path) -> None:
    folder, path, names = tmp_path / "student", tmp_path / "model.onnx", ["quince", "æble", "fig"]
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 16, "patch_size": 4, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    torch.nn.init.normal_(model.head.bias)  # the exporter leaves zeros out
    save_folder(model, folder, "vit_tiny_patch16_224", sizes, label_names=names)
    export(folder, path)
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    assert json.loads(session.get_modelmeta().custom_metadata_map["label_names"]) == names
    assert load_pretrained(path).label_names == tuple(names)
    for shape in ((2, 3, 20, 16), (2, 1, 16, 16)):
        with pytest.raises(Exception, match="invalid dimensions for input: images"):
            session.run(None, {"images": np.zeros(shape, np.float32)})


@pytest.mark.slow
def test_a_source_of_one_size_is_exported_for_any(tmp_path: Path) -> None:
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 16, "patch_size": 4, "num_classes": 5}
    model = timm.create_model("eva02_tiny_patch14_224", **sizes).eval()
    nn.init.normal_(model.pos_embed)
    save_folder(model, tmp_path / "student", "eva02_tiny_patch14_224", sizes)
    path = tmp_path / "model.pt2"
    export(tmp_path / "student", path, dynamic=("batch", "resolution"))
    agrees(path, model, (16, 16))
    larger = timm.create_model("eva02_tiny_patch14_224", **sizes, dynamic_img_size=True).eval()
    larger.load_state_dict(model.state_dict())
    agrees(path, larger, (24, 16))


def test_the_model_and_the_random_state_stay_as_they_were(tmp_path: Path) -> None:
    model = tiny("dinov3", dynamic_img_size=True, depth=1).train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    methods = dict(vars(model.rope))
    state, disabled = torch.get_rng_state(), logging.root.manager.disable
    export_model(model, tmp_path / "model.pt2", dynamic=("batch", "resolution"))
    assert torch.equal(torch.get_rng_state(), state)
    assert logging.root.manager.disable == disabled
    assert [module.training for module in model.modules()] == modes
    assert vars(model.rope).keys() == methods.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert next(model.parameters()).dtype == torch.float64
    assert next(iter(torch.export.load(tmp_path / "model.pt2").state_dict.values())).dtype == torch.float32


@NEEDS_ONNX
@pytest.mark.slow
def test_large_weights_stand_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = small(), tmp_path / "model.onnx"
    monkeypatch.setattr(files, "ONE_FILE_BYTES", 1000)
    report = export_model(model, path)
    assert report.files == (path, data_file(path))
    assert sorted(tmp_path.iterdir()) == sorted(report.files)
    assert data_file(path).stat().st_size > 0.9 * 4 * sum(
        parameter.numel() for parameter in model.parameters()
    )
    agrees(path, model)
    with pytest.raises(CheckpointError, match=r"model\.onnx is there already"):
        export_model(model, path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.onnx\.data is there already"):
        export_model(model, path)
    export_model(small(seed=1), path, overwrite=True)
    agrees(path, small(seed=1))
    monkeypatch.undo()
    assert export_model(model, path, overwrite=True).files == (path,)
    assert list(tmp_path.iterdir()) == [path]
    agrees(path, model)


@TWO_WAYS
def test_a_file_that_differs_is_not_kept(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_text("before")
    with pytest.raises(ExportFailedError, match=r"relative error is .*more than 1e-30") as caught:
        export_model(small("clip"), path, overwrite=True, tolerance=1e-30, dynamic=("batch",), normalize=False) \
            if suffix == ".onnx" else _with_noise(path, monkeypatch)  # fmt: skip
    assert isinstance(caught.value, RunFailedError)
    assert caught.value.exit_code == 1
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def _with_noise(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's file gives the model's own bits, so its outputs are changed here."""
    true: Callable[[Path], Callable[[Tensor], Tensor]] = check.run_torch
    monkeypatch.setattr(check, "run_torch", lambda path: lambda x: true(path)(x) * 1.001)
    export_model(small(), path, overwrite=True, tolerance=1e-30)


@pytest.mark.parametrize("family", BIASED)
def test_a_table_of_positions_has_one_resolution(family: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"Beit has a relative position bias.*fixed size"):
        export_model(small(family), tmp_path / "model.pt2", dynamic=("batch", "resolution"))
    assert not list(tmp_path.iterdir())


def test_what_torch_cannot_trace_is_refused_in_its_words(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(UnsupportedModelError, match=r"^Odd with dynamic batch .* torch says: "):
        export_model(Odd(), tmp_path / "model.pt2", image_size=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("model.pt", {}, r"must end in \.onnx \(ONNX\) or \.pt2"),
        ("model.onnx", {"format": "torch"}, r"contradicts format 'torch', whose files end in \.pt2"),
        ("model.pt2", {"format": "onnx"}, r"contradicts format 'onnx', whose files end in \.onnx"),
        ("model.pt2", {"format": "onxx"}, "did you mean 'onnx'"),
        ("model.onnx", {"dynamic": ("bach",)}, "did you mean 'batch'"),
        pytest.param(
            "model.onnx", {"opset": 17}, "opset 17 cannot be written; valid are 18 to", marks=NEEDS_ONNX
        ),
        pytest.param(
            "model.onnx", {"opset": 1000}, "opset 1000 cannot be written; valid are 18 to", marks=NEEDS_ONNX
        ),
        ("model.pt2", {"opset": 18}, r"of ONNX, and model\.pt2 is of torch"),
        ("model.pt2", {"tolerance": 0.0}, "tolerance=0.0 must be above 0"),
        ("model.pt2", {"tolerance": float("nan")}, "must be above 0"),
        ("folder.pt2", {}, "is a folder"),
        ("there.pt2", {}, "there already: give another name, or --force"),
        (
            "model.pt2",
            {"dynamic": ("resolution",)},
            "built for one size; build it with dynamic_img_size=True",
        ),
        ("model.pt2", {"image_size": 64}, r"image_size 64x64: this model takes 32x48"),
    ],
)
def test_mistakes_are_named(name: str, how: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "there.pt2").touch()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(GraftError, match=message) as caught:
        export_model(small(), tmp_path / name, **how)
    assert caught.value.exit_code == 2
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without_onnxruntime(name: str, *rest: Any) -> Any:
        return name != "onnxruntime" or None if name in files.PACKAGES else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without_onnxruntime)
    with pytest.raises(CheckpointError, match=r"onnxruntime.* pip install 'onnx>="):
        export("no-such-model", tmp_path / "model.onnx")
    export_model(small(), tmp_path / "model.pt2")


@NEEDS_ONNX
@pytest.mark.parametrize("opset", [pytest.param(18, marks=pytest.mark.slow), 21])
def test_the_opset_is_the_one_asked_for(opset: int, tmp_path: Path) -> None:
    model = small()
    assert export_model(model, tmp_path / "model.onnx", opset=opset).opset == opset
    assert onnx().load(tmp_path / "model.onnx").opset_import[0].version == opset
    agrees(tmp_path / "model.onnx", model)


# The comparison that stands between an exported file and its place: what passes, and what cannot.


def test_only_a_close_output_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, x = tmp_path / "model.pt2", (1, 3, 4, 4)

    def error(output: Tensor, reference: Tensor) -> float:
        monkeypatch.setattr(check, "run_torch", lambda path: lambda images: output)
        model = nn.Identity()
        monkeypatch.setattr(model, "forward", lambda images: reference)
        return compare(model, path, "torch", [x], 1e-4)

    good = torch.tensor([[1.0, 2.0], [1e-3, 2e-3]])
    assert error(good, good) == 0
    assert error(good * (1 + 5e-5), good) == pytest.approx(5e-5, rel=1e-2)
    with pytest.raises(ExportFailedError, match=r"relative error is 1.*e-03"):
        error(good + torch.tensor([[0.0, 0.0], [0.0, 3e-6]]), good)  # small beside the first image's output
    with pytest.raises(ExportFailedError, match="inf"):
        error(good[:1], good)
    with pytest.raises(ExportFailedError, match="inf"):
        error(good * np.nan, good)
    with pytest.raises(ExportFailedError, match="the model itself gives numbers that are not finite"):
        error(good, good * np.inf)
    monkeypatch.undo()
    with pytest.raises(ExportFailedError, match="torch cannot run it"):
        compare(nn.Identity(), path, "torch", [x], 1e-4)
