"""A converted model is told from one with softmax attention wherever its weights go, parameters or none."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
from graftvit.checkpoints.pretrained import load_pretrained, load_weights
from graftvit.models.conversion import convert, plan_of, resize
from graftvit.models.converted import read_mark
from graftvit.models.errors import CheckpointError, GraftError
from graftvit.transfer.engine.fit_operators import leave_to_us
from graftvit.transfer.engine.run_state import restore_weights
from safetensors.torch import load_file, save_file
from support.files.plain_timm import PlainTimm
from support.models import pyramids
from support.models.copied_models import pair, whole
from support.models.dense import images, tiny
from support.models.tiny_students import save_folder
from timm.models import save_for_hf
from timm.utils import ModelEmaV2
from torch import Tensor, nn

FREE = ["linear", "uniform", "window(window=3)", "monarch"]
"""Operators without parameters: no key of theirs was in a state dict."""
TINY: dict[str, Any] = {"img_size": 64, "num_classes": 5}


def published(seed: int = 0) -> nn.Module:
    """A model of a size that weights are recognized by."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return timm.create_model("vit_tiny_patch16_224", **TINY).eval()


def seen(model: nn.Module, size: tuple[int, int] = (64, 64)) -> Tensor:
    return model.eval()(images(dtype=torch.float32, size=size)).detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize("operator", FREE)
def test_its_state_is_not_one_of_softmax(operator: str) -> None:
    model = tiny()
    converted = convert(model, f"1: {operator}")
    assert not any(".operator." in name for name, _ in converted.named_parameters())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*blocks\.1\.attn\.operator\.choice"):
        model.load_state_dict(converted.state_dict())
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=r"softmax attention.*blocks\.1\.attn"):
            converted.load_state_dict(model.state_dict(), strict=strict)
    converted.load_state_dict({"head.weight": model.head.weight.detach()}, strict=False)


@pytest.mark.parametrize("operator", FREE)
@pytest.mark.parametrize("kind", ["swin", "pvt", "svt"])
def test_the_state_of_a_pyramid_is_not_one_of_softmax(kind: str, operator: str) -> None:
    model = pyramids.tiny(kind)
    converted = convert(model, f"*: {operator}", without=("bias",))
    with pytest.raises(RuntimeError, match=r"\.attn\.operator\.choice"):
        model.load_state_dict(converted.state_dict())
    with pytest.raises(GraftError, match="softmax attention"):
        converted.load_state_dict(model.state_dict(), strict=False)


@pytest.mark.parametrize(
    ("own", "other"),
    [("linear", "uniform"), ("window(window=3)", "window(window=5)"), ("uniform", "linear(feature=relu)")],
)
def test_the_state_of_another_operator_is_refused_by_name(own: str, other: str) -> None:
    model = convert(tiny(), f"0: {own}")
    with pytest.raises(CheckpointError) as refused:
        model.load_state_dict(convert(tiny(), f"0: {other}").state_dict())
    assert own in str(refused.value)
    assert other in str(refused.value)


def test_options_that_change_nothing_are_no_difference() -> None:
    model = convert(tiny(), "*: window(window=3, dilation=2)")
    model.load_state_dict(convert(tiny(seed=1), "*: window(dilation=2, window=3)").state_dict())
    convert(tiny(), "*: linear").load_state_dict(convert(tiny(), "*: linear(feature=elu)").state_dict())


def test_a_kept_layer_has_no_mark_and_a_copy_keeps_its_own() -> None:
    model = tiny()
    kept = convert(model, "*: softmax")
    assert kept.state_dict().keys() == model.state_dict().keys()
    converted = convert(model, "*: uniform")
    copy.deepcopy(converted).to(torch.bfloat16).load_state_dict(converted.state_dict())
    again = convert(converted, "0: linear")
    assert plan_of(again) == "0: linear; 1-2: softmax"
    again.load_state_dict(convert(model, "0: linear").state_dict())


@pytest.mark.parametrize("operator", FREE)
@pytest.mark.parametrize("safe", [True, False])
def test_timms_own_folder_is_no_plain_vit(tmp_path: Path, operator: str, safe: bool) -> None:
    converted = convert(published(), f"*: {operator}; 9-11: softmax")
    save_for_hf(converted, str(tmp_path / "saved"), safe_serialization=safe)
    assert '"graftvit_converted"' in (tmp_path / "saved" / "config.json").read_text()
    loaded = graftvit.load(tmp_path / "saved")
    assert plan_of(loaded) == plan_of(converted)
    torch.testing.assert_close(seen(loaded), seen(converted))
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    torch.testing.assert_close(seen(by_timm), seen(converted))


def test_timm_alone_refuses_the_folder(tmp_path: Path) -> None:
    save_for_hf(convert(published(), "*: uniform"), str(tmp_path / "saved"))
    code = f'model = timm.create_model("local-dir:{tmp_path / "saved"}", pretrained=True)'
    with PlainTimm() as plain, pytest.raises(AssertionError, match="graftvit_converted"):
        plain.measure(code, tmp_path)


def test_a_resized_model_is_described_at_its_size(tmp_path: Path) -> None:
    converted = convert(published(), "*: linformer(num_keys=4)")
    resize(converted, 96)
    save_for_hf(converted, str(tmp_path / "saved"))
    torch.testing.assert_close(seen(graftvit.load(tmp_path / "saved"), (96, 96)), seen(converted, (96, 96)))


@pytest.mark.parametrize("kind", ["swin", "pvt", "svt", "pvt1", "copied"])
def test_timms_own_folder_of_another_model_is_restored(tmp_path: Path, kind: str) -> None:
    if kind == "copied":
        model, x = whole(*pair("alike", "copy", torch.float32)), images(dtype=torch.float32)
    else:
        model = convert(pyramids.tiny(kind), "stage1: none; stage2: uniform", without=("bias",))
        x = pyramids.images((32, 32))
    save_for_hf(model, str(tmp_path / "saved"))
    loaded = graftvit.load(tmp_path / "saved")
    assert plan_of(loaded) == plan_of(model)
    torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize("operator", [*FREE, "hedgehog"])
def test_a_file_of_weights_alone_is_restored_by_its_marks(tmp_path: Path, operator: str) -> None:
    converted = convert(published(), f"0-8: {operator}; 9: uniform")
    save_file(converted.state_dict(), tmp_path / "alone.safetensors")
    torch.save({"model": converted.state_dict()}, tmp_path / "alone.pth")
    for name in ("alone.safetensors", "alone.pth"):
        loaded = load_pretrained(str(tmp_path / name))
        assert plan_of(loaded.model) == plan_of(converted)
        torch.testing.assert_close(seen(loaded.model), seen(converted))
    named = load_pretrained(str(tmp_path / "alone.pth"), model="vit_tiny_patch16_224")
    torch.testing.assert_close(seen(named.model), seen(converted))


def test_a_file_of_a_pyramids_weights_alone_is_restored_by_its_marks(tmp_path: Path) -> None:
    converted = convert(pyramids.tiny("swin"), "stage2: uniform", without=("bias",))
    torch.save(converted.state_dict(), tmp_path / "alone.pth")
    name, arguments = pyramids.TINY["swin"][0], pyramids.arguments("swin")
    loaded = load_pretrained(str(tmp_path / "alone.pth"), model=name, model_args=arguments)
    x = pyramids.images((32, 32))
    torch.testing.assert_close(loaded.model(x), converted(x))


def saved(model: nn.Module, folder: Path) -> Path:
    return Path(save_folder(model, folder, "vit_tiny_patch16_224", TINY, {"input_size": (3, 64, 64)}))


def test_a_student_starts_from_weights_of_its_own_plan_or_of_softmax(tmp_path: Path) -> None:
    folder = saved(convert(published(), "*: uniform"), tmp_path / "student")
    with pytest.raises(CheckpointError, match=r"uniform in blocks\.0\.attn, where the model has softmax"):
        load_weights(published(1), str(folder))
    with pytest.raises(CheckpointError, match=r"uniform in blocks\.0\.attn, where the model has linear"):
        load_weights(convert(published(1), "*: linear"), str(folder))
    student = convert(published(1), "*: uniform")
    report = load_weights(student, str(folder))
    assert not report.missing
    torch.testing.assert_close(seen(student), seen(graftvit.load(folder)))
    other = convert(published(1), "*: linear")
    replaced = load_weights(other, str(folder), replanned=True)
    assert set(replaced.unexpected.values()) == {"linear takes the place of uniform"}
    from_softmax = convert(published(1), "*: linear")
    load_weights(from_softmax, str(saved(published(), tmp_path / "softmax")))
    torch.testing.assert_close(seen(from_softmax), seen(convert(published(), "*: linear")))


def edited(folder: Path, change: Any) -> str:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("lost", ["plan", "mark"])
def test_a_folder_whose_plan_and_marks_differ_is_refused(lost: str, tmp_path: Path) -> None:
    folder = saved(convert(published(), "0: uniform"), tmp_path / "student")
    if lost == "mark":
        edited(folder, lambda tensors: tensors.pop("blocks.0.attn.operator.choice"))
    else:
        config = json.loads((folder / "config.json").read_text())
        config["model_args"]["plan"] = "0: linear"
        (folder / "config.json").write_text(json.dumps(config))
    words = {"plan": "uniform in .* has linear", "mark": "softmax attention in .* has uniform"}[lost]
    with pytest.raises(CheckpointError, match=words.replace("in ", r"in blocks\.0\.attn")):
        graftvit.load(folder)


def resized(kind: str, plan: str, made_at: int) -> tuple[nn.Module, Tensor]:
    """A model that was converted at one image size and is used at another, and images of that size."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(kind, num_classes=5, **({"img_size": made_at} if "vit" in kind else {}))
    if "vit" not in kind:
        resize(model, made_at)
    converted = convert(model.eval(), plan).eval()
    resize(converted, 64)
    return converted, images(dtype=torch.float32, size=(64, 64))


@pytest.mark.parametrize(("kind", "plan"), [
    ("vit_tiny_patch16_224", "*: nystrom"), ("vit_tiny_patch16_224", "3: agent"),
    ("pvt_v2_b0", "stage3: nystrom; stage4: agent"),
])  # fmt: skip
def test_default_counts_of_another_size_are_another_operator(tmp_path: Path, kind: str, plan: str) -> None:
    (large, x), (small, _) = resized(kind, plan, 224), resized(kind, plan, 64)
    with pytest.raises(CheckpointError, match=r"num_(landmarks|agents)=\d+.* where the model has"):
        small.load_state_dict(large.state_dict())
    again, _ = resized(kind, plan, 224)
    again.load_state_dict(large.state_dict())
    save_for_hf(large, str(tmp_path / "saved"))
    torch.testing.assert_close(graftvit.load(tmp_path / "saved")(x), large(x))
    torch.save(large.state_dict(), tmp_path / "alone.pth")
    with pytest.raises(GraftError, match=r"num_\w+=\d+.*16, all patches, or convert at a larger image size"):
        graftvit.load(tmp_path / "alone.pth", model=kind, img_size=64)
    if "vit" not in kind:  # built at timm's own size, where the counts fit
        torch.testing.assert_close(graftvit.load(tmp_path / "alone.pth", model=kind)(x), large(x))


def test_default_counts_are_restored_from_a_file_alone_and_may_be_written_in_a_plan(tmp_path: Path) -> None:
    large, x = resized("vit_tiny_patch16_224", "*: agent", 112)
    torch.save(large.state_dict(), tmp_path / "alone.pth")
    loaded = graftvit.load(tmp_path / "alone.pth")
    assert plan_of(loaded) == "*: agent(num_agents=12)"
    torch.testing.assert_close(loaded(x), large(x))
    large.load_state_dict(loaded.state_dict())


@pytest.mark.parametrize("mark", ["uniform", [1, 2], None, torch.ones(7, dtype=torch.uint8).to_sparse()])
def test_a_mark_that_is_no_tensor_of_bytes_is_refused_by_its_name(mark: Any) -> None:
    model = convert(tiny(), "0: uniform")
    state = {**model.state_dict(), "blocks.0.attn.operator.choice": mark}
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn"):
        model.load_state_dict(state)


def test_a_huge_number_in_a_mark_is_refused_in_one_sentence() -> None:
    with pytest.raises(CheckpointError, match=r"names no operator: .*num_keys=9{40}.*up to 16,384"):
        read_mark("x", torch.tensor(list(f"linformer(num_keys={'9' * 390})".encode()), dtype=torch.uint8))


def test_an_average_of_buffers_is_explained() -> None:
    student = convert(tiny(dtype=torch.float32), "0: window(window=3)")
    average = ModelEmaV2(student, decay=0.9)
    for _ in range(3):
        average.update(student)
    with pytest.raises(CheckpointError, match=r"average.*buffers.*ModelEmaV3"):
        student.load_state_dict(average.module.state_dict())


@pytest.mark.parametrize("mark", [
    torch.zeros(0, dtype=torch.uint8), torch.full((9,), 255, dtype=torch.uint8), torch.zeros(3, 3),
    torch.zeros(200_000, dtype=torch.uint8), torch.tensor(list(b"linear(((")).to(torch.uint8),
    torch.tensor(list(b"nothing_known")).to(torch.uint8),
])  # fmt: skip
def test_a_damaged_mark_is_refused_in_one_sentence(tmp_path: Path, mark: Tensor) -> None:
    folder = saved(convert(published(), "0: uniform"), tmp_path / "student")
    with pytest.raises(CheckpointError, match=r"operator\.choice"):
        graftvit.load(edited(folder, lambda tensors: tensors.update({"blocks.0.attn.operator.choice": mark})))
    torch.save({**published().state_dict(), "blocks.0.attn.operator.choice": mark}, tmp_path / "alone.pth")
    with pytest.raises(CheckpointError, match=r"operator\.choice|nothing_known"):
        graftvit.load(tmp_path / "alone.pth")


def test_the_mark_is_neither_trained_nor_converted_nor_exported_as_a_weight() -> None:
    converted = convert(tiny(dtype=torch.float32), "*: uniform")
    before = {key: value.clone() for key, value in converted.state_dict().items() if key.endswith("choice")}
    assert bytes(before["blocks.0.attn.operator.choice"].tolist()) == b"uniform"
    converted.half()
    converted.load_state_dict(converted.state_dict())
    assert all(torch.equal(converted.state_dict()[key], value) for key, value in before.items())
    stream = io.BytesIO()
    torch.save(converted, stream)  # a whole pickled model is what it was
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    again.load_state_dict(converted.state_dict())


def test_a_run_is_not_restored_into_another_operator() -> None:
    """The two marks have one length, so that their shapes do not differ."""
    model, other = (convert(tiny(), f"0: window(window={side})") for side in (3, 5))
    restore_weights(model.state_dict(), model, None)
    with pytest.raises(CheckpointError, match=r"operator\.choice.*another operator"):
        restore_weights(other.state_dict(), model, None)


def test_processes_do_not_send_marks_in_each_step() -> None:
    task = nn.ModuleDict({"student": convert(tiny(), "0: uniform")})
    leave_to_us(task)
    assert task._ddp_params_and_buffers_to_ignore == ["student.blocks.0.attn.operator.choice"]


def test_weights_that_do_not_fit_a_plan_name_the_architecture(tmp_path: Path) -> None:
    save_file(convert(published(), "*: linear").state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="does not fit vit_small_patch16_224: "):
        load_pretrained(str(tmp_path / "weights.safetensors"), model="vit_small_patch16_224")
