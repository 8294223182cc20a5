"""A student with the part of its teacher that it runs with: the same numbers as beside the whole teacher."""

from __future__ import annotations

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from graftvit.checkpoints.export import export_model
from graftvit.models import resize
from graftvit.models.copied import ARCHITECTURE, Copying, copying_of
from graftvit.models.errors import TransferError, UnsupportedModelError
from graftvit.transfer.methods.dual import DualViT
from support.models.copied_models import CASES, HALF, MAPS, OTHER, arguments, pair, whole
from support.models.dense import images, tiny
from support.models.method_cases import COPIES
from torch import Tensor


@pytest.mark.parametrize(
    ("case", "method"), [(c, m) for c in CASES for m in COPIES] + [(c, "copy") for c in MAPS]
)
@torch.no_grad()
def test_it_computes_what_the_student_computes_beside_its_teacher(case: str, method: str) -> None:
    dual, teacher = pair(case, method)
    expected = dual.predict(images())
    alone = whole(dual, teacher)
    assert torch.equal(alone(images()), expected)
    described = json.loads(json.dumps(alone.copied.to_json()))
    assert json.loads(json.dumps(Copying.from_json(described).to_json())) == described
    name, given = arguments(**(CASES | MAPS)[case][1])
    again = timm.create_model(ARCHITECTURE, student=name, copied=described, **given).double().eval()
    assert again.state_dict().keys() == alone.state_dict().keys()
    again.load_state_dict(alone.state_dict())
    for twin in (again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert torch.equal(twin(images()), expected)
    features = again.forward_features(images())
    assert torch.equal(again.forward_head(features), expected)


@pytest.mark.parametrize("method", COPIES)
def test_of_the_teacher_it_holds_what_it_needs_and_nothing_after(method: str) -> None:
    dual, teacher = pair("unequal depth", method)
    theirs = {n: t for n, t in dual.teacher.state_dict().items() if not n.startswith(("norm.", "head."))}
    last = ("blocks.3.attn.proj", "blocks.3.norm2", "blocks.3.mlp")
    wanted = {f"teacher.model.{name}" for name in theirs if not name.startswith(last)}
    student = dual.release(bare=True).state_dict().keys()
    assert whole(dual, teacher).state_dict().keys() == wanted | student


def test_the_teacher_learns_nothing_and_stays_in_eval_mode() -> None:
    dual, teacher = pair("alike", "copy", torch.float32)
    alone = whole(dual, teacher).train()
    assert not any(module.training for module in alone.teacher.modules())
    alone(images(dtype=torch.float32)).sum().backward()
    assert all(p.grad is None for p in alone.teacher.parameters())
    assert alone.blocks[0].mlp.fc1.weight.grad is not None


def test_gradients_survive_checkpointing() -> None:
    dual, teacher = pair("alike", "copy_q")
    plain, saving = (whole(dual, teacher).train() for _ in range(2))
    saving.set_grad_checkpointing(True)
    for model in (plain, saving):
        model(images()).square().sum().backward()
    assert torch.equal(plain.blocks[0].attn.qkv.weight.grad, saving.blocks[0].attn.qkv.weight.grad)


@torch.no_grad()
def test_nothing_of_a_step_is_kept() -> None:
    dual, teacher = pair("alike", "copy")
    alone = whole(dual, teacher)
    alone(images())
    assert alone.blocks[0].attn.operator.tape.step is None


def test_a_layer_does_not_run_without_the_teacher() -> None:
    dual, teacher = pair("alike", "copy")
    with pytest.raises(UnsupportedModelError, match="within its model alone"):
        whole(dual, teacher).blocks[0](torch.zeros(1, 25, 32, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_low_precision(dtype: torch.dtype) -> None:
    dual, teacher = pair("larger images", "copy", torch.float32)
    alone = whole(dual, teacher)
    exact, low = alone(images(dtype=torch.float32)), copy.deepcopy(alone).to(dtype)(images(dtype=dtype))
    assert low.dtype == dtype
    assert (low.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.slow
@pytest.mark.parametrize(("case", "method"), [("larger images", "copy_k"), ("means", "copy")])
def test_it_is_exported_to_onnx(case: str, method: str, tmp_path: Any) -> None:
    alone, x = whole(*pair(case, method, torch.float32)), images(3, dtype=torch.float32)
    export_model(alone, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    logits = session.run(None, {"images": x.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), alone(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_it_is_exported_as_one_graph(tmp_path: Any) -> None:
    alone, x = whole(*pair("prefix tokens", "copy_k", torch.float32)), images(3, dtype=torch.float32)
    export_model(alone, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    plain = torch.export.export(alone, (x,)).module()  # by whoever does not use ours
    with torch.no_grad():
        for graph in (loaded, plain):
            torch.testing.assert_close(graph(x), alone(x), rtol=1e-5, atol=1e-5)


def test_a_free_resolution_is_refused(tmp_path: Any) -> None:
    alone = whole(*pair("alike", "copy", torch.float32))
    with pytest.raises(UnsupportedModelError, match=r"dynamic resolution: .* part of its teacher"):
        export_model(alone, tmp_path / "model.pt2", dynamic=("batch", "resolution"))


@torch.no_grad()
def test_another_image_size() -> None:
    dual, teacher = pair("larger images", "copy")
    alone = whole(dual, teacher)
    resize(alone, (48, 48))
    assert copying_of(alone).teacher.model_args["img_size"] == (96, 96)  # type: ignore[union-attr]
    x = images(size=(48, 48))
    sized = {"img_size": (48, 48)}, {"img_size": (96, 96), "patch_size": 16}
    student, theirs = tiny(seed=2, **sized[0]), tiny(seed=1, **sized[1])
    student.load_state_dict({k: v for k, v in alone.state_dict().items() if not k.startswith("teacher.")})
    missing = theirs.load_state_dict(
        {
            k.removeprefix("teacher.model."): v
            for k, v in alone.state_dict().items()
            if k.startswith("teacher.")
        },
        strict=False,
    )
    assert not missing.unexpected_keys
    norms = {"teacher_normalization": OTHER, "student_normalization": HALF}
    assert torch.equal(alone(x), DualViT(theirs, student, "copy", **norms).eval().predict(x))  # type: ignore[arg-type]


def test_its_attention_is_no_teacher_but_its_outputs_are() -> None:
    dual, teacher = pair("alike", "copy")
    alone = whole(dual, teacher)
    for method in ("copy", "distill", "attention_output"):
        with pytest.raises(TransferError, match="a teacher of its own"):
            DualViT(alone, tiny(seed=3), method)
    expected: Tensor = alone(images())
    for method in ("block_output", "feature", "logits"):
        dual = DualViT(copy.deepcopy(alone), tiny(seed=3), method)
        dual(images()).transfer_loss.backward()
        assert torch.equal(dual.teacher(images()), expected)
    zero = DualViT(alone, copy.deepcopy(pair("alike", "copy")[0].student), "logits")
    assert zero(images()).transfer_loss > 0
    with pytest.raises(UnsupportedModelError, match="--bare"):
        DualViT(tiny(seed=1), copy.deepcopy(alone), "distill")


@pytest.mark.parametrize(
    "change",
    [{"method": "distill"}, {"layers": [{"teacher": 9, "student": 0}]}, {"heads": 3}, {"teacher": {}}],
)
def test_a_description_that_is_none_is_refused(change: dict[str, Any]) -> None:
    dual, teacher = pair("alike", "copy")
    name, given = arguments()
    copied = {**whole(dual, teacher).copied.to_json(), **change}  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match=r"copied=|does not go"):
        timm.create_model(ARCHITECTURE, student=name, copied=copied, **given)


@pytest.mark.parametrize("heads", [
    [[-1], [1], [2], [3]], [[4], [1], [2], [3]], [[0], [1], [2]], [[0], [1], [2], [3], [0]],
    [None, None, None, None], [[0], [], [2], [3]], [["a"], [1], [2], [3]], [[0.5], [1], [2], [3]],
])  # fmt: skip
def test_heads_that_are_not_there_are_refused(heads: list[Any]) -> None:
    dual, teacher = pair("alike", "copy")
    described = json.loads(json.dumps(dual.copying(teacher).to_json()))
    copying = Copying.from_json(described | {"heads": [heads] * len(described["heads"])})
    with pytest.raises(ValueError, match="do not go with"):
        copying.links(dual.teacher, dual.student)


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained"])
def test_a_description_names_no_weights(name: str) -> None:
    dual, teacher = pair("alike", "copy")
    described = json.loads(json.dumps(dual.copying(teacher).to_json()))
    described["teacher"]["model_args"] |= {name: "/somewhere"}
    with pytest.raises(ValueError, match=name):
        Copying.from_json(described)


@torch.no_grad()
def test_threads_do_not_meet() -> None:
    dual, teacher = pair("alike", "copy")
    alone, batches = whole(dual, teacher), [images(seed=seed) for seed in range(8)]
    expected = [alone(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(alone, batches), expected))
