"""ONNX files as sources: their weights get the names of the exported model, or one sentence says what lacks."""

from __future__ import annotations

import importlib.util
from importlib import import_module
from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
from graftvit.checkpoints.describe import describe_file
from graftvit.checkpoints.export import export_model
from graftvit.checkpoints.export_graph import quiet, relative_error
from graftvit.checkpoints.formats.containers import KEY
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.sources import parse_source
from graftvit.checkpoints.weight_files import read_file
from graftvit.launch.cli import main
from graftvit.models.conversion import convert, plan_of
from graftvit.models.errors import CheckpointError
from safetensors.torch import load_file
from support.models.copied_models import pair, whole
from support.models.tiny_students import save_folder
from timm.models import save_for_hf
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")),
    reason="the extra export is not installed",
)
SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 28}
HF = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def onnx() -> Any:
    return import_module("onnx")


def drawn(model: nn.Module) -> nn.Module:
    """`model` with fresh numbers everywhere: no two parameters are alike, so none can stand for another."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def transformers_model(name: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**HF, **settings)
    return drawn(getattr(transformers, f"{name}Model")(config))


def export(model: nn.Module, path: Path, size: int, *, dynamo: bool) -> Path:
    with quiet():
        torch.onnx.export(model, (torch.zeros(1, 3, size, size),), str(path), dynamo=dynamo)
    return path


def run(path: Path, images: Tensor) -> Tensor:
    session = import_module("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def tiny(**changes: Any) -> nn.Module:
    arguments = {**SIZES, "img_size": 32, "num_classes": 5, **changes}
    return drawn(timm.create_model("vit_tiny_patch16_224", **arguments))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file that this package exported, of a student."""
    folder = tmp_path_factory.mktemp("ours")
    shown = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
    arguments = {**SIZES, "img_size": 32, "num_classes": 5}
    save_folder(tiny(), folder / "student", "vit_tiny_patch16_224", arguments, shown)
    graftvit.export(folder / "student", folder / "student.onnx")
    return folder / "student.onnx"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm model, exported by torch's older exporter, whose nodes are named after the modules."""
    return export(tiny(), tmp_path_factory.mktemp("foreign") / "vit.onnx", 32, dynamo=False)


def edited(path: Path, out: Path, edit: Any) -> Path:
    model = onnx().load(str(path))
    edit(model)
    out.write_bytes(model.SerializeToString())
    return out


def test_our_own_export_is_read_back_with_its_architecture(ours: Path) -> None:
    teacher = load_pretrained(str(ours))
    assert teacher.architecture == "vit_tiny_patch16_224"
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative_error(teacher.model(images), run(ours, images)) < 1e-5
    student = load_file(ours.parent / "student" / "model.safetensors")
    assert all(torch.equal(tensor, student[name]) for name, tensor in teacher.model.state_dict().items())


CONVERTED = [
    "0: linear; 1: nystrom",
    "0: hilo(window=2); 1: agent",
    "0: sla(block=1,share=0.3); 1: topk(block=1)",
]


@pytest.mark.parametrize("plan", CONVERTED)
def test_a_converted_model_is_read_back_with_its_operators(plan: str, tmp_path: Path) -> None:
    model, path, out = drawn(convert(tiny(), plan)), tmp_path / "m.onnx", tmp_path / "m.safetensors"
    export_model(model, path, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    assert main(["checkpoint", "convert", str(path), str(out)]) == 0
    written, own = load_file(out), model.state_dict()
    assert written.keys() == own.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in written.items())
    with pytest.raises(RuntimeError, match=r"operator\.choice"):  # plain timm does not take it for softmax
        tiny().load_state_dict(written)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for source in (path, out):
        teacher = load_pretrained(str(source))
        assert plan_of(teacher.model) == plan_of(model)
        assert teacher.mean == (0.4, 0.5, 0.6)
        with torch.no_grad():
            torch.testing.assert_close(teacher.model(images), model(images))


def test_an_exported_folder_of_a_converted_model_is_a_source(tmp_path: Path) -> None:
    model = drawn(convert(tiny(), "0: linear"))
    save_for_hf(model, tmp_path / "m")
    graftvit.export(tmp_path / "m", tmp_path / "m.onnx", normalize=True)
    assert plan_of(load_pretrained(str(tmp_path / "m.onnx")).model) == plan_of(model)


def no_bias(model: nn.Module) -> nn.Module:
    """As a head begins."""
    nn.init.zeros_(drawn(model).head.bias)  # type: ignore[arg-type, union-attr]
    return model


@pytest.mark.parametrize(("make", "words"), [
    (lambda: drawn(convert(tiny(), "0: linformer(num_keys=2)")), "blocks.0.attn.operator.key_pooling"),
    (lambda: drawn(convert(tiny(), "0: ttt")), "of which the exporter changed 1 of the matrices"),
    (lambda: drawn(convert(tiny(), "0: uniform")), "without blocks.0.attn.qkv.weight"),
    (lambda: no_bias(tiny()), "without head.bias"),
    (lambda: no_bias(convert(tiny(), "0: linear")), "without head.bias"),
    (lambda: drawn(whole(*pair("alike", "copy_q", torch.float32))), "runs with its teacher's attention"),
])  # fmt: skip
def test_a_graph_of_lost_weights(
    make: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "m.onnx", tmp_path / "m.safetensors"
    graftvit.export(make(), path, dynamic=())
    assert main(["checkpoint", "convert", str(path), str(out)]) == 2
    assert not out.exists()
    assert "cannot be read back; give the run, folder or file" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=words):
        load_pretrained(str(path))


def test_a_converted_graph_without_a_description_is_refused(tmp_path: Path) -> None:
    def forget(model: Any) -> None:
        [entry] = [each for each in model.metadata_props if each.key == KEY]
        model.metadata_props.remove(entry)

    export_model(drawn(convert(tiny(), "0: linear")), tmp_path / "m.onnx", dynamic=())
    with pytest.raises(CheckpointError, match="of a converted model, which it does not describe"):
        load_pretrained(str(edited(tmp_path / "m.onnx", tmp_path / "e.onnx", forget)))


@pytest.mark.slow
def test_a_resolution_left_free_and_a_normalization_inside(ours: Path, tmp_path: Path) -> None:
    path = tmp_path / "free.onnx"
    graftvit.export(ours.parent / "student", path, dynamic=("batch", "resolution"), normalize=True)
    student = load_file(ours.parent / "student" / "model.safetensors")
    found = load_pretrained(str(path)).model.state_dict()
    assert all(torch.equal(tensor, student[name]) for name, tensor in found.items())


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize(("name", "settings", "size", "model"), [
    ("Dinov2", {"image_size": 28, "patch_size": 14}, 28, "vit_small_patch14_dinov2"),
    ("ViT", {"image_size": 32, "intermediate_size": 96}, 32, "vit_tiny_patch16_224"),
])  # fmt: skip
def test_both_exporters(
    name: str, settings: dict[str, Any], size: int, model: str, dynamo: bool, tmp_path: Path
) -> None:
    path = export(transformers_model(name, **settings), tmp_path / "m.onnx", size, dynamo=dynamo)
    teacher = load_pretrained(str(path), model=model, model_args={**SIZES, "img_size": size})
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = teacher.model.forward_features(images)  # type: ignore[operator]
    assert relative_error(tokens, run(path, images)) < 1e-4


def test_a_part_beside_the_model_is_left_out_and_named(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.decoder = tiny(num_classes=0), nn.Linear(24, 7)

        def forward(self, images: Tensor) -> Tensor:
            return self.decoder(self.backbone(images))

    path = export(drawn(Both()), tmp_path / "both.onnx", 32, dynamo=False)
    teacher = load_pretrained(str(path), model="vit_tiny_patch16_224", model_args={**SIZES, "img_size": 32})
    assert "decoder.weight" in teacher.report.unexpected
    assert not teacher.report.missing


def test_convert_writes_for_timm(foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "vit.safetensors"
    assert main(["checkpoint", "convert", str(foreign), str(out)]) == 0
    model = tiny()
    loaded = timm.create_model(
        "vit_tiny_patch16_224", **{**SIZES, "img_size": 32}, num_classes=5, checkpoint_path=str(out)
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    hf = export(transformers_model("ViT", image_size=32), tmp_path / "hf.onnx", 32, dynamo=False)
    assert main(["checkpoint", "convert", str(hf), str(tmp_path / "hf.safetensors")]) == 0
    assert "blocks.1.attn.qkv.weight" in load_file(tmp_path / "hf.safetensors")
    assert capsys.readouterr().out.endswith("left out: pooler.dense.weight, pooler.dense.bias\n")


def test_inspect_and_names_of_paths(foreign: Path) -> None:
    assert describe_file(foreign)[0].startswith(f"{foreign}: onnx, ")
    with pytest.raises(CheckpointError, match=r"the weights file 'no\.onnx' is not there"):
        parse_source("no.onnx")


def test_without_the_package(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(CheckpointError, match=r"is an ONNX file.*pip install 'onnx>="):
        read_file(foreign)


def test_weights_without_names(foreign: Path, tmp_path: Path) -> None:
    def forget(model: Any) -> None:
        for node in model.graph.node:
            node.name = ""

    path = edited(foreign, tmp_path / "anonymous.onnx", forget)
    with pytest.raises(CheckpointError, match=r"8 of its matrices have no names.*'onnx::MatMul_\d+'"):
        load_pretrained(str(path))


def test_quantized_weights(foreign: Path, tmp_path: Path) -> None:
    def quantize(model: Any) -> None:
        model.graph.node.add(op_type="DequantizeLinear", input=["a", "b"], output=["c"])

    with pytest.raises(CheckpointError, match="is quantized"):
        load_pretrained(str(edited(foreign, tmp_path / "int8.onnx", quantize)))


def external(foreign: Path, folder: Path, location: str, length: int | None = None) -> Path:
    """The file with one initializer in another file."""

    def move(model: Any) -> None:
        tensor = next(each for each in model.graph.initializer if each.name == "head.weight")
        raw = tensor.raw_data
        (folder / "data.bin").write_bytes(raw)
        tensor.ClearField("raw_data")
        tensor.data_location = 1
        for key, value in (("location", location), ("offset", 0), ("length", length or len(raw))):
            tensor.external_data.add(key=key, value=str(value))

    return edited(foreign, folder / "m.onnx", move)


def test_numbers_in_a_file_beside(foreign: Path, tmp_path: Path) -> None:
    found = read_file(external(foreign, tmp_path, "data.bin")).tree["head.weight"]
    assert torch.equal(found, read_file(foreign).tree["head.weight"])


@pytest.mark.parametrize(("location", "length", "why"), [
    ("../data.bin", None, "outside of"), ("/etc/passwd", None, "outside of"), ("link.bin", None, "outside of"),
    ("absent.bin", None, "absent.bin cannot be read"), (".", None, "is a folder"),
    ("data.bin", 1 << 40, "is damaged"),
])  # fmt: skip
def test_references_to_other_files(
    location: str, length: int | None, why: str, foreign: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "data.bin").write_bytes(bytes(5 * 24 * 4))
    (folder / "link.bin").symlink_to(tmp_path / "data.bin")
    with pytest.raises(CheckpointError, match=why):
        read_file(external(foreign, folder, location, length))


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short(share: float, foreign: Path, tmp_path: Path) -> None:
    content = foreign.read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(content[: max(int(len(content) * share), 8)])
    with pytest.raises(CheckpointError, match=r"^[^\n]+$"):
        load_pretrained(str(path))


def test_millions_of_empty_nodes_are_refused(tmp_path: Path) -> None:
    graph = b"\x0a\x00" * 3_000_000  # empty nodes: two bytes each, hundreds of bytes once parsed
    length, size = b"", len(graph)
    while size:
        size, low = size >> 7, size & 127
        length += bytes([low | (128 if size else 0)])
    path = tmp_path / "bomb.onnx"
    path.write_bytes(b"\x08\x09\x12\x01x" + b"\x3a" + length + graph)
    with pytest.raises(CheckpointError, match="more than 200,000 nodes"):
        read_file(path)


def test_a_name_that_is_no_text(foreign: Path, tmp_path: Path) -> None:
    path = tmp_path / "bytes.onnx"
    path.write_bytes(foreign.read_bytes().replace(b"head.weight", b"head.weigh\xf4"))
    with pytest.raises(CheckpointError, match="is no text"):
        load_pretrained(str(path))


def test_a_part_without_a_number(foreign: Path, tmp_path: Path) -> None:
    path = tmp_path / "zeros.onnx"
    path.write_bytes(foreign.read_bytes() + bytes(2))
    with pytest.raises(CheckpointError, match="a part of it has no number"):
        load_pretrained(str(path))
