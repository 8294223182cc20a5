"""Teachers from weights files: MAE's formats, heads, pooling, positions, and keys that do not fit."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from graftvit.checkpoints.describe import describe_teacher, teacher_facts
from graftvit.checkpoints.fit import resample_position
from graftvit.checkpoints.pretrained import load_pretrained, load_weights
from graftvit.checkpoints.provenance import Pretrained
from graftvit.models.errors import CheckpointError
from graftvit.models.small import without_memory
from safetensors.torch import save_file
from torch import Tensor, nn

Make = Callable[..., nn.Module]
Write = Callable[..., str]
TINY: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
NAME = "vit_tiny_patch16_224"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def load(source: str, **keywords: Any) -> Pretrained:
    arguments = {**TINY, **keywords.pop("model_args", {})}
    return load_pretrained(source, **{"model": NAME, "model_args": arguments, **keywords})


def decoder() -> dict[str, Tensor]:
    keys = ("mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.0.attn.qkv.weight")
    return {key: torch.zeros(1) for key in (*keys, "decoder_norm.bias", "decoder_pred.weight")}


def same_weights(loaded: nn.Module, original: nn.Module) -> bool:
    ours, theirs = loaded.state_dict(), original.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("with_decoder", [False, True])
def test_mae_pretrained(tiny: Make, mae_file: Write, with_decoder: bool) -> None:
    model = tiny()
    teacher = load(mae_file({**model.state_dict(), **(decoder() if with_decoder else {})}))
    assert same_weights(teacher.model, model)
    assert not teacher.has_head
    assert (teacher.mean, teacher.std) == IMAGENET  # not the half and half of timm's default weights
    assert (teacher.architecture, teacher.license, teacher.revision) == (NAME, None, None)
    assert set(teacher.report.unexpected) == (set(decoder()) if with_decoder else set())
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(teacher.model(images), model.eval()(images))


def test_mae_fine_tuned_pools_as_its_keys_say(tiny: Make, mae_file: Write) -> None:
    model = tiny(global_pool="avg", num_classes=7)
    assert "fc_norm.weight" in model.state_dict()
    teacher = load(mae_file(model.state_dict()))
    assert same_weights(teacher.model, model)
    assert teacher.has_head
    assert teacher.model.global_pool == "avg"
    assert teacher.model.num_classes == 7
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(teacher.model(images), model.eval()(images))


def test_mae_training_file_holds_a_namespace(tiny: Make, mae_file: Write) -> None:
    model = tiny(num_classes=3)
    optimizer = torch.optim.AdamW(model.parameters())
    more = {
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "scaler": {"scale": 1.0},
        "args": argparse.Namespace(lr=1),
    }
    teacher = load(mae_file(model.state_dict(), **more))
    assert same_weights(teacher.model, model)
    assert "training file" in teacher.report.format


def test_a_plain_state_dict_and_safetensors_take_timms_normalization(tiny: Make, tmp_path: Path) -> None:
    model = tiny(num_classes=3)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        teacher = load(str(tmp_path / name))
        assert same_weights(teacher.model, model)
        assert teacher.mean == (0.5, 0.5, 0.5)


def test_timm_training_file_and_its_average(tiny: Make, tmp_path: Path) -> None:
    model, average = tiny(num_classes=3), tiny(num_classes=3)
    tree = {"arch": NAME, "state_dict": model.state_dict(), "state_dict_ema": average.state_dict()}
    torch.save({**tree, "args": argparse.Namespace(), "epoch": 1}, tmp_path / "last.pth.tar")
    path = str(tmp_path / "last.pth.tar")
    assert same_weights(load(path, model=None).model, model)
    assert same_weights(load(f"{path}#ema", model=None).model, average)
    with pytest.raises(CheckpointError, match="says it is 'vit_tiny_patch16_224'; leave model out"):
        load(path, model="vit_small_patch16_224")


def test_there_is_no_average_where_none_was_saved(tiny: Make, mae_file: Write, tmp_path: Path) -> None:
    path = mae_file(tiny().state_dict())
    torch.save(tiny().state_dict(), tmp_path / "plain.pth")
    for source in (path, str(tmp_path / "plain.pth")):
        with pytest.raises(CheckpointError, match=r"holds no moving average.*leave #ema out"):
            load(f"{source}#ema")


@pytest.mark.parametrize("classes", [0, 7, None])
def test_a_head_can_be_dropped_but_not_invented(tiny: Make, mae_file: Write, classes: int | None) -> None:
    path = mae_file(tiny(num_classes=7).state_dict())
    teacher = load(path, num_classes=classes)
    assert teacher.has_head == (classes != 0)
    assert set(teacher.report.unexpected) == ({"head.weight", "head.bias"} if classes == 0 else set())
    with pytest.raises(CheckpointError, match=r"wrong tensors: head\.weight is \(7, 16\) and not \(9, 16\)"):
        load(path, num_classes=9)
    with pytest.raises(CheckpointError, match=r"missing keys: head\.weight, head\.bias"):
        load(mae_file(tiny().state_dict(), "headless.pth"), num_classes=9)


@pytest.mark.parametrize("method", ["timm", "mae"])
@pytest.mark.parametrize("size", [(24, 24), (16, 32), 8])
def test_positions_and_only_positions_are_resampled(
    tiny: Make, mae_file: Write, method: Any, size: Any
) -> None:
    model = tiny()
    teacher = load(mae_file(model.state_dict()), img_size=size, position_embedding=method)
    height, width = (size, size) if isinstance(size, int) else size
    expected = resample_position(model.pos_embed.detach(), (4, 4), (height // 4, width // 4), 1, method)
    assert torch.equal(teacher.model.pos_embed, expected)
    assert teacher.report.resampled == {
        "pos_embed": f"from grid 4x4 to {height // 4}x{width // 4} ({method}'s bicubic)"
    }
    others = {key: value for key, value in model.state_dict().items() if key != "pos_embed"}
    assert all(torch.equal(teacher.model.state_dict()[key], value) for key, value in others.items())
    assert teacher.model(torch.randn(1, 3, height, width)).shape == (1, 16)


def test_without_a_size_the_weights_keep_their_own(tiny: Make, mae_file: Write) -> None:
    teacher = load(mae_file(tiny(img_size=24).state_dict()))
    assert teacher.model.patch_embed.img_size == (24, 24)
    assert not teacher.report.resampled


def test_a_grid_that_is_no_square_must_be_told(tiny: Make, mae_file: Write) -> None:
    model = tiny(img_size=(8, 20))
    path = mae_file(model.state_dict())
    with pytest.raises(CheckpointError, match=r"pos_embed has 11 tokens, .* give the images' size"):
        load(path)
    teacher = load(path, model_args={"img_size": (8, 20)})
    assert same_weights(teacher.model, model)
    resized = load(path, model_args={"img_size": (8, 20)}, img_size=(20, 8))
    assert resized.report.resampled == {"pos_embed": "from grid 2x5 to 5x2 (timm's bicubic)"}


def test_a_grid_of_as_many_tokens_but_another_shape_is_resampled(tiny: Make, mae_file: Write) -> None:
    teacher = load(mae_file(tiny().state_dict()), img_size=(8, 32))
    assert teacher.report.resampled == {"pos_embed": "from grid 4x4 to 2x8 (timm's bicubic)"}


@pytest.mark.parametrize("arguments", [
    {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 4}, {"reg_tokens": 4, "no_embed_class": True},
])  # fmt: skip
def test_prefix_tokens_stay_out_of_the_grid(tiny: Make, mae_file: Write, arguments: dict[str, Any]) -> None:
    model = tiny(**arguments)
    path = mae_file(model.state_dict())
    assert same_weights(load(path, model_args=arguments).model, model)
    resized = load(path, model_args=arguments, img_size=32)
    assert resized.report.resampled["pos_embed"].startswith("from grid 4x4 to 8x8")
    prefix = model.pos_embed.shape[1] - 16
    assert torch.equal(resized.model.pos_embed[:, :prefix], model.pos_embed[:, :prefix])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("blocks.1.mlp.fc1.bias"), r"missing keys: blocks\.1\.mlp\.fc1\.bias$"),
        (lambda t: t.update({"blocks.1.extra": torch.zeros(1)}), r"unexpected keys: blocks\.1\.extra$"),
        (lambda t: t.update({"cls_token": torch.zeros(1, 1, 8)}), r"cls_token is \(1, 1, 8\) and not \(1, 1, 16\)$"),
        (lambda t: t["norm.bias"].fill_(float("nan")), r"not finite in norm\.bias"),
        (lambda t: t["pos_embed"][0, 0, 0].fill_(float("inf")), r"not finite in pos_embed"),
        (lambda t: [t.pop(key) for key in list(t) if "attn" in key], r"missing keys: blocks\.0\..* and 4 more"),
        (lambda t: t.update({"pos_embed": t["pos_embed"][..., :8]}), r"embed is \(1, 17, 8\) and not \(1, 17, 16\)"),
        (lambda t: t.update({"patch_embed.proj.weight": torch.zeros(16, 3, 8, 8)}), r"patch_embed\.proj\.weight is"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("use", ["teacher", "init"])
def test_what_has_no_reason_is_refused_by_name(
    tiny: Make, mae_file: Write, change: Callable[[dict[str, Tensor]], object], said: str, use: str
) -> None:
    tensors = {key: value.clone() for key, value in tiny().state_dict().items()}
    change(tensors)
    path = mae_file(tensors)
    with pytest.raises(CheckpointError, match=said) as caught:
        load(path) if use == "teacher" else load_weights(tiny(), path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_teacher_with_a_head_needs_the_norm_that_its_head_was_trained_with(
    tiny: Make, mae_file: Write
) -> None:
    path = mae_file(tiny(num_classes=3).state_dict())
    with pytest.raises(
        CheckpointError, match=r"missing keys: fc_norm\.weight, fc_norm\.bias; unexpected keys: norm\."
    ):
        load(path, model_args={"global_pool": "avg"})
    headless = load(path, model_args={"global_pool": "avg"}, num_classes=0)
    assert set(headless.report.missing) == {"fc_norm.weight", "fc_norm.bias"}


def test_a_student_starts_from_mae_with_a_fresh_head_and_norm(tiny: Make, mae_file: Write) -> None:
    source, student = tiny(), tiny(global_pool="avg", num_classes=5, img_size=24)
    fresh = {key: value.clone() for key, value in student.state_dict().items()}
    report = load_weights(student, mae_file({**source.state_dict(), **decoder()}), position_embedding="mae")
    assert set(report.missing) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert set(report.unexpected) == {"norm.weight", "norm.bias", *decoder()}
    assert "mae's bicubic" in report.resampled["pos_embed"]
    now = student.state_dict()
    assert all(torch.equal(now[key], fresh[key]) for key in report.missing)
    assert all(torch.equal(now[key], source.state_dict()[key]) for key in now if key.startswith("blocks."))
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert "fresh head" in str(report)


@pytest.mark.parametrize(("source_classes", "kept"), [(5, True), (9, False), (0, False)])
def test_a_head_of_another_size_stays_fresh_and_is_reported(
    tiny: Make, mae_file: Write, source_classes: int, kept: bool
) -> None:
    source, student = tiny(num_classes=source_classes), tiny(num_classes=5)
    before = student.head.weight.clone()
    report = load_weights(student, mae_file(source.state_dict()))
    assert torch.equal(student.head.weight, source.head.weight if kept else before)
    assert ("head.weight" in report.missing) == (not kept)
    assert ("head.weight" in report.unexpected) == (source_classes == 9)
    headless = tiny()
    assert set(load_weights(headless, mae_file(source.state_dict())).unexpected) <= {
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize(
    ("width", "depth", "patch", "size", "name"),
    [
        (192, 12, 16, 32, "vit_tiny_patch16_224"), (192, 12, 4, 16, "vit_tiny_patch16_224"),
        (384, 12, 16, 32, "vit_small_patch16_224"), (384, 12, 8, 24, "vit_small_patch8_224"),
    ],
)  # fmt: skip
def test_a_plain_vit_is_known_by_its_shapes(
    mae_file: Write, width: int, depth: int, patch: int, size: int, name: str
) -> None:
    arguments = {
        "embed_dim": width,
        "depth": depth,
        "num_heads": width // 64,
        "patch_size": patch,
        "img_size": size,
    }
    model = timm.create_model(NAME, **arguments, num_classes=4, global_pool="avg", in_chans=1)
    teacher = load_pretrained(mae_file(model.state_dict()))
    assert teacher.architecture == name
    assert same_weights(teacher.model, model)
    images = torch.randn(1, 1, size, size)
    assert torch.equal(teacher.model(images), model.eval()(images))
    assert f"architecture: {name}, from the shapes" in teacher.report.summary()


@pytest.mark.parametrize(("width", "depth", "heads", "patch", "name"), [
    (768, 12, 12, 16, "vit_base_patch16_224"), (1024, 24, 16, 16, "vit_large_patch16_224"),
    (1280, 32, 16, 14, "vit_huge_patch14_224"),
])  # fmt: skip
def test_the_published_mae_sizes_are_known(width: int, depth: int, heads: int, patch: int, name: str) -> None:
    from graftvit.checkpoints.architecture import infer_architecture
    from graftvit.checkpoints.weight_files import Weights

    with without_memory():
        model = timm.create_model(name)
    assert (len(model.blocks), model.blocks[0].attn.num_heads) == (depth, heads)
    assert model.patch_embed.proj.weight.shape == (width, 3, patch, patch)
    assert infer_architecture(Weights(model.state_dict(), "x.pth", "")) == (name, {})


@pytest.mark.parametrize(
    "arguments", [{}, {"init_values": 0.1}, {"reg_tokens": 2}, {"qk_norm": True}, {"pre_norm": True}]
)
def test_other_shapes_are_asked_for(tiny: Make, mae_file: Write, arguments: dict[str, Any]) -> None:
    path = mae_file(tiny(**arguments, embed_dim=16 if not arguments else 192).state_dict())
    with pytest.raises(CheckpointError, match=r"does not say its architecture .* as teacher\.model"):
        load_pretrained(path)


@pytest.mark.parametrize(("model", "said"), [
    ("vit_tinny_patch16_224", "did you mean"), ("vit_tiny_patch16_224.nope", "no tag 'nope'.*valid: vit_tiny"),
])  # fmt: skip
def test_an_unknown_architecture_or_tag_is_answered(
    tiny: Make, mae_file: Write, model: str, said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        load(mae_file(tiny().state_dict()), model=model)


def test_a_tag_says_more_than_the_format(tiny: Make, tmp_path: Path) -> None:
    torch.save(tiny().state_dict(), tmp_path / "w.pth")
    arguments = {**TINY, "img_size": 16}
    teacher = load_pretrained(str(tmp_path / "w.pth"), model="vit_base_patch16_224.mae", model_args=arguments)
    assert (teacher.mean, teacher.std) == IMAGENET
    assert teacher.license == "cc-by-nc-4.0"
    assert teacher.architecture == "vit_base_patch16_224"


def test_arguments_that_timm_refuses_are_named(tiny: Make, mae_file: Write) -> None:
    with pytest.raises(CheckpointError, match=r"timm cannot build 'vit_tiny_patch16_224' with .*no_such"):
        load(mae_file(tiny().state_dict()), model_args={"no_such": 3})
    with pytest.raises(CheckpointError, match="timm cannot build"):
        load(mae_file(tiny().state_dict()), model_args={"num_heads": 3})


def test_loading_leaves_the_random_state_alone(tiny: Make, mae_file: Write) -> None:
    path = mae_file(tiny().state_dict())
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load(path)
    assert torch.equal(torch.rand(4), expected)


def test_half_precision_weights_load_into_a_float32_model(tiny: Make, mae_file: Write) -> None:
    model = tiny()
    teacher = load(mae_file({key: value.bfloat16() for key, value in model.state_dict().items()}))
    assert all(parameter.dtype == torch.float32 for parameter in teacher.model.parameters())
    assert torch.equal(teacher.model.norm.weight, model.norm.weight.bfloat16().float())


def test_facts_of_a_teacher(tiny: Make, mae_file: Write) -> None:
    teacher = load(mae_file({**tiny(num_classes=3).state_dict(), **decoder()}), img_size=(8, 16))
    facts = teacher_facts(teacher)
    assert facts["architecture"] == NAME
    assert (facts["depth"], facts["prefix tokens"], facts["patch grid"]) == ("2 blocks", "cls", "2 x 4")
    assert facts["attention"] == "2 heads of width 8, model width 16"
    assert facts["classes"] == "3"
    assert facts["images"].startswith(
        "3x8x16, mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225; evaluated at 0.9"
    )
    count = sum(parameter.numel() for parameter in teacher.model.parameters())
    assert facts["parameters"].startswith(f"{count:,} ")
    text = describe_teacher(teacher)
    for part in (
        "license",
        "unknown",
        "decoder of masked autoencoding",
        "from grid 4x4 to 2x4",
        "mask_token",
    ):
        assert part in text


def test_beit_tables_are_resampled_timms_way_only(tmp_path: Path) -> None:
    arguments = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4, "num_classes": 0}
    model = timm.create_model("beit_base_patch16_224", img_size=16, **arguments)
    torch.save(model.state_dict(), tmp_path / "beit.pth")
    keywords: dict[str, Any] = {"model": "beit_base_patch16_224", "model_args": {**arguments, "img_size": 16}}
    same = load_pretrained(str(tmp_path / "beit.pth"), **keywords)
    assert same_weights(same.model, model)
    resized = load_pretrained(str(tmp_path / "beit.pth"), img_size=24, **keywords)
    assert list(resized.report.resampled) == ["blocks.0.attn.relative_position_bias_table"]
    with pytest.raises(CheckpointError, match="position_embedding=timm does it"):
        load_pretrained(str(tmp_path / "beit.pth"), img_size=24, position_embedding="mae", **keywords)
