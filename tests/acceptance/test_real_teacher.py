"""A real pretrained transformer on real images: read, converted, hosted, aligned, measured and looked at.

Both come from packages (`python -m benchmarks.real_data`). A test that needs one that cannot be had is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import graftvit
import numpy as np
import onnx
import pytest
import timm
import torch
from graftvit.launch.cli import main
from graftvit.models.layer_plan import OPERATORS
from onnx import numpy_helper
from onnxruntime import InferenceSession, SessionOptions
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.datasets import FashionMNIST
from transformers import Dinov2Config, Dinov2Model

from benchmarks import real_data

pytestmark = pytest.mark.xdist_group("real teacher")
ARCHITECTURE = "vit_small_patch14_dinov2"
OWN = 224
"""Side of the images that the graph takes."""
SMALL = 112
"""A grid of 8 x 8 patches, for what is done with every operator."""
MISSING = "its package cannot be had: `python -m benchmarks.real_data` says why, and where to put a file"
KNN, PROBE = 69.0, 80.0
"""Percent of 300 test images at 56 pixels: a standard error is 2.5."""
IMAGES = {"train": 60, "validation": 30}
"""Images of each class of Fashion-MNIST."""
FEW = ["--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Bits are compared, and other tests have the other cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def graph() -> Path:
    """The ONNX file of the package."""
    try:
        return Path(real_data.graph())
    except real_data.MissingError:
        pytest.skip(MISSING)


@pytest.fixture(scope="session")
def weights(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `graftvit checkpoint convert` makes of it."""
    path = tmp_path_factory.mktemp("real") / "vit_s.safetensors"
    assert main(["checkpoint", "convert", str(graph), str(path)]) == 0
    return path


@pytest.fixture(scope="session")
def teacher(weights: Path) -> str:
    """A model folder for small images."""
    folder = weights.parent / "teacher"
    graftvit.save(str(weights), folder, img_size=SMALL)
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first images of each class of Fashion-MNIST, in a folder for each."""
    try:
        root = real_data.fashion_mnist()
    except real_data.MissingError:
        pytest.skip(MISSING)
    folder = tmp_path_factory.mktemp("fashion")
    for split, count in IMAGES.items():
        images = FashionMNIST(root, train=split == "train")
        for label, name in enumerate(images.classes):
            own = folder / split / f"{label} {name.replace('/', ' or ')}"
            own.mkdir(parents=True)
            for index in (images.targets == label).nonzero()[:count, 0].tolist():
                images[index][0].save(own / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def model(teacher: str) -> nn.Module:
    """The model of that folder."""
    return graftvit.load(teacher)


@pytest.fixture(scope="session")
def converted(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """It with linear attention, as it is before any step."""
    folder = tmp_path_factory.mktemp("linear") / "student"
    assert main(["convert", teacher, "--plan", "*: linear", "--output_dir", str(folder)]) == 0
    return str(folder)


def photographs(photos: Path, size: int, count: int) -> Tensor:
    """Return photographs, normalized as the teacher's: (count, 3, size, size)."""
    paths = sorted((photos / "validation").rglob("*.jpg"))[::7][:count]
    resized = [np.asarray(Image.open(path).convert("RGB").resize((size, size))) for path in paths]
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (torch.tensor(np.stack(resized)).permute(0, 3, 1, 2) / 255 - mean) / std


@torch.no_grad()
def tokens(model: nn.Module, images: Tensor) -> Tensor:
    found: Tensor = model.eval().forward_features(images)
    return found


def tokens_of_the_graph(path: Path, images: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Return what onnxruntime computes behind the last norm of the transformer."""
    graph = onnx.load(path)
    last = [node.output[0] for node in graph.graph.node if node.name.startswith("/backbone/layernorm/")][-1]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    options = SessionOptions()
    options.intra_op_num_threads = 1
    session = InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([last], {"input_image": images.numpy()})[0])


def transformers_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights under transformers' names: as the exporter left them, and by the node of each matrix."""
    graph = onnx.load(path).graph
    held = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    found = {
        name.removeprefix("backbone."): each for name, each in held.items() if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in held:
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            found[f"{layer}.weight"] = held[node.input[1]].T.contiguous()
    nodes = {node.name: node for node in graph.node}
    pieces = [nodes[f"/backbone/embeddings/{name}"].input for name in ("Concat_6", "Reshape_1")]
    first, grid = (next(held[name] for name in each if name in held) for each in pieces)
    found["embeddings.position_embeddings"] = torch.cat([first, grid.reshape(1, -1, first.shape[-1])], 1)
    return found


def test_timm_loads_every_weight(weights: Path) -> None:
    found = load_file(weights)
    model = timm.create_model(ARCHITECTURE, num_classes=0)
    model.load_state_dict(found, strict=True)
    assert len(found) == 174
    assert sum(each.numel() for each in found.values()) == 22_056_192
    assert found["pos_embed"].shape == (1, 1 + 37 * 37, 384)


def test_tokens_are_those_of_onnxruntime(graph: Path, weights: Path, photos: Path) -> None:
    images = photographs(photos, OWN, 1)
    expected = tokens_of_the_graph(graph, images)
    for source in (graph, weights):
        model = graftvit.load(str(source), img_size=OWN, position_embedding="published")
        np.testing.assert_allclose(tokens(model, images).numpy(), expected, atol=1e-4)


def test_the_same_weights_of_transformers_are_the_same_bits(
    graph: Path, weights: Path, photos: Path, tmp_path: Path
) -> None:
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    config.save_pretrained(tmp_path)
    save_file(transformers_weights(graph), tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, told = Dinov2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert (set(told["missing_keys"]), told["unexpected_keys"]) == ({"embeddings.mask_token"}, set())
    theirs.save_pretrained(tmp_path / "saved")
    found = load_file(weights)
    for folder in (tmp_path, tmp_path / "saved"):
        ours = graftvit.load(str(folder)).state_dict()
        assert ours.keys() == found.keys()
        assert all(torch.equal(ours[name], found[name]) for name in found)
    images = photographs(photos, OWN, 1)
    model = graftvit.load(str(weights), img_size=OWN, position_embedding="published")
    with torch.no_grad():
        expected = theirs.eval()(images).last_hidden_state
    torch.testing.assert_close(tokens(model, images), expected, atol=1e-4, rtol=0)


def test_its_features_tell_products_apart(teacher: str, fashion: Path, tmp_path: Path) -> None:
    """With 600 training images of 56 pixels; of fresh weights about half are right."""
    words = ["--metrics", "knn,probe", "--data_path", str(fashion), "--json", str(tmp_path / "scores.json")]
    assert main(["evaluate", teacher, "--img_size", "56", *words, *FEW]) == 0
    (found,) = json.loads((tmp_path / "scores.json").read_text()).values()
    assert found["samples"] == 300
    assert found["knn_top1"] == pytest.approx(KNN, abs=3)
    assert found["probe_top1"] == pytest.approx(PROBE, abs=3)


def test_softmax_in_its_layers_gives_the_same_bits(model: nn.Module, photos: Path) -> None:
    images = photographs(photos, SMALL, 2)
    assert torch.equal(tokens(graftvit.convert(model, "*: softmax"), images), tokens(model, images))


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_runs_in_its_layers(operator: str, model: nn.Module, photos: Path) -> None:
    images = photographs(photos, SMALL, 2)
    fitted_to = images if operator == "hash" else None
    found = tokens(graftvit.convert(model, f"*: {operator}", calibration=fitted_to), images)
    assert found.shape == (2, 65, 384)
    assert found.isfinite().all()


def test_alignment_without_labels_brings_a_conversion_nearer(
    teacher: str, converted: str, photos: Path, tmp_path: Path
) -> None:
    images = ["--data_path", str(photos), "--batch_size", "8", *FEW]
    words = ["--teacher.source", teacher, "--plan", "*: linear", "--max_steps", "10", "--lr", "1e-3"]
    run, scores = tmp_path / "run", tmp_path / "scores.json"
    assert (
        main(["train", "--mode", "align", *words, "--val_split", "none", "--output_dir", str(run), *images])
        == 0
    )
    compare = [
        "--metrics",
        "distance",
        "--against",
        teacher,
        "--val_split",
        "validation",
        "--json",
        str(scores),
    ]
    assert main(["evaluate", converted, str(run), *compare, *images]) == 0
    before, after = list(json.loads(scores.read_text()).values())[:2]
    errors = [name for name in before if name.startswith("relative_error")]
    assert len(errors) == 13, "of the features, and of each layer"
    assert all(after[name] < 0.97 * before[name] for name in errors)
    assert after["relative_error"] < 0.85 * before["relative_error"]
    assert after["cka"] > before["cka"]


def test_its_attention_is_shown_on_photographs(
    teacher: str, converted: str, photos: Path, tmp_path: Path
) -> None:
    pictures = [str(path) for path in sorted((photos / "validation").rglob("*.jpg"))[:2]]
    words = ["--teacher", teacher, "--layers", "0,11", "--output_dir", str(tmp_path)]
    assert main(["visualize", converted, *pictures, *words]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    own, linear = (np.array(numbers[name]["entropy"]) for name in ("teacher", "student"))
    assert own.shape == linear.shape == (12, 6)
    assert np.all(own < linear), "every head looks at less than linear attention does"
    assert len(list(tmp_path.glob("*_cls_teacher.png"))) == 2
    assert (tmp_path / "index.html").stat().st_size > 100_000
