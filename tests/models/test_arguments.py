"""Wrong calls of every public function: one sentence each, whatever a notebook holds in place of what is meant."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

import graftvit
import numpy as np
import pytest
import timm
import torch
from graftvit import checkpoints, models, transfer
from graftvit.launch import load_config
from graftvit.models.errors import CheckpointError, ConfigError, DataError, GraftError, TransferError
from graftvit.models.errors import UnsupportedModelError as NoModel
from graftvit.models.families.site import Family
from graftvit.models.layer_plan import OPERATORS
from graftvit.transfer.methods.registry import find_method
from PIL import Image
from timm.layers import Attention
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

NAME = "vit_tiny_patch16_224"
SIZES: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 5,
}  # fmt: skip
PICTURE = Image.new("RGB", (32, 32))
X, Y = torch.zeros(2, 3, 32, 32), torch.tensor([0, 1])


def vit(**changes: Any) -> Any:
    return timm.create_model(NAME, **{**SIZES, **changes}).eval()


def headed(classes: int) -> nn.Module:
    model = vit()
    model.head = nn.Linear(12, classes)
    return model


class Doubled(Attention):
    """Attention that somebody changed."""


def attending(kind: type[nn.Module] | None = Attention, **parts: Any) -> nn.Module:
    """A model whose first attention is of another kind, or has other parts."""
    model = vit()
    model.blocks[0].attn = nn.Identity() if kind is None else kind(12, 2, qkv_bias=True)
    for name, part in parts.items():
        setattr(model.blocks[0].attn, name, part)
    return model


def watched(part: str = "") -> nn.Module:
    model = vit()
    model.blocks[1].attn.get_submodule(part).register_forward_hook(lambda module, inputs, out: 2 * out)
    return model


def sharing() -> nn.Module:
    model = vit()
    model.blocks[1] = model.blocks[0]
    return model


def blocked() -> nn.Module:
    model = vit()
    model.blocks[1] = nn.Identity()
    return model


def poisoned() -> nn.Module:
    model = vit()
    model.head.weight.data.fill_(torch.nan)
    return model


@cache
def one() -> nn.Module:
    return vit()


@cache
def resnet() -> nn.Module:
    return timm.create_model("resnet10t", num_classes=5).eval()


def replaced(path: str = "", method: str = "forward") -> nn.Module:
    """A model of which a method is a function that runs what was there, as one of torch.compile does."""
    model = vit()
    module = model.get_submodule(path)
    before = getattr(module, method)
    setattr(module, method, lambda x, **options: before(x, **options))
    return model


def compiled_block() -> nn.Module:
    model = vit()
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    return model


def maps_alone() -> nn.Module:
    sizes = {key: value for key, value in SIZES.items() if key not in ("depth", "num_classes")}
    return timm.create_model(NAME, features_only=True, **sizes)


def dual(*models_: Any, **options: Any) -> graftvit.DualViT:
    teacher, student = models_ or (vit(), vit())
    return graftvit.DualViT(teacher, student, **({"method": "distill"} | options))


def taught_of() -> Any:
    learner = dual(method="logits")
    return learner(X[:1], learner.teach(X))


def frozen() -> nn.Module:
    return graftvit.convert(one(), "*: linear").requires_grad_(False)


class Mean(models.AttentionOperator):
    """Linear in the values, with its rows and without its terms."""

    traits = models.Traits(linear_in_v=True)  # type: ignore[assignment]

    def attend(self, heads: Any) -> Tensor:
        return heads.qkv()[2].mean(2, keepdim=True).expand_as(heads.qkv()[2])  # type: ignore[no-any-return]

    def macs(self, geometry: Any) -> int:
        return 0


def method_named(name: object) -> transfer.TransferMethod:
    method = copy(find_method("distill"))
    method.name = name  # type: ignore[assignment]
    return method


def nothing_of_a_family() -> Family:
    kind = type("Nothing", (Family,), {})
    kind.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    return kind()


def measured() -> graftvit.DualViT:
    return dual(method="feature", standardize="dimension")


@pytest.fixture(autouse=True)
def _operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftvit.models.layer_plan.OPERATORS", dict(OPERATORS))
    models.register_operator("mean_here", Mean)
    models.register_operator("none_at_all", lambda shape: nn.Identity())  # type: ignore[arg-type, return-value]


a: Any = graftvit
m: Any = models
t: Any = transfer
c: Any = checkpoints

IMAGES: dict[str, tuple[Any, type[GraftError]]] = {
    "one image": (X[0], DataError),
    "uint8": (X.byte(), DataError),
    "float64": (X.double(), DataError),
    "half": (X.half(), DataError),
    "one channel": (X[:, :1], DataError),
    "none of them": (X[:0], DataError),
    "another device": (X.to("meta"), DataError),
    "a list": ([X[0]], DataError),
    "numpy": (np.zeros((2, 3, 32, 32), np.float32), DataError),
    "a picture": (PICTURE, DataError),
    "a path": ("cat.png", DataError),
    "nothing": (None, DataError),
    "another size": (torch.zeros(2, 3, 48, 48), GraftError),
}
TAKERS: dict[str, Callable[[Any], Any]] = {
    "attention_maps": lambda x: t.attention_maps(one(), x),
    "divergence_by_layer": lambda x: t.divergence_by_layer(one(), one(), x),
    "convert": lambda x: a.convert(one(), "*: hedgehog", calibration=7 if x is None else x),
    "DualViT": lambda x: dual()(x),
    "DualViT.predict": lambda x: dual().predict(x),
    "DualViT.teach": lambda x: dual(method="logits").teach(x),
    "Alignment": lambda x: a.Alignment(one(), a.convert(one(), "*: linear"))(x),
}
THINGS: dict[str, tuple[Any, type[GraftError]]] = {
    "nothing": (None, NoModel),
    "a number": (3, NoModel),
    "a list": ([1], NoModel),
    "a class": (nn.Linear, NoModel),
    "a tensor": (X, NoModel),
    "a typo": ("vit_tiny_patch16_22", CheckpointError),
    "a path": (Path("runs/nothing/student"), CheckpointError),
    "compiled": (torch.compile(nn.Identity()), NoModel),
    "parallel": (nn.DataParallel(nn.Identity()), NoModel),
    "an average": (AveragedModel(nn.Identity()), NoModel),
    "an average of timm": (ModelEmaV3(nn.Linear(2, 2)), NoModel),
    "scripted": (torch.jit.script(nn.Linear(2, 2)), NoModel),
}
MODELS: dict[str, Callable[[Any], Any]] = {
    "as_model": lambda thing: a.as_model(thing),
    "convert": lambda thing: a.convert(thing, "*: linear"),
    "attention_maps": lambda thing: t.attention_maps(thing, X),
    "divergence_by_layer": lambda thing: t.divergence_by_layer(one(), thing, X),
    "compare_models": lambda thing: t.compare_models(one(), thing),
    "mirror_arguments": lambda thing: m.mirror_arguments(thing, NAME, {}),
    "teacher": lambda thing: dual(thing, vit()),
    "student": lambda thing: dual(vit(), thing),
    "Alignment": lambda thing: a.Alignment(one(), thing),
    "save": lambda thing: a.save(thing, "out"),
    "export": lambda thing: a.export(thing, "out.pt2"),
    "evaluate": lambda thing: t.evaluate(thing, [(X, torch.tensor([0, 1]))]),
    "push": lambda thing: a.push(thing, "me/model"),
    "deploy": lambda thing: a.deploy(thing, "out", "images"),
    "visualize": lambda thing: a.visualize(thing, X),
    "visualize: teacher": lambda thing: a.visualize(one(), X, teacher=3 if thing is None else thing),
}
OTHERS: dict[str, tuple[Callable[[], Any], type[GraftError]]] = {
    "load: a module": (lambda: a.load(one()), CheckpointError),
    "load: nothing": (lambda: a.load(None), CheckpointError),
    "load: a list": (lambda: a.load(["a"]), CheckpointError),
    "load: a keyword": (lambda: a.load(NAME, imgsize=3), ConfigError),
    "load: a dtype by name": (lambda: a.load(NAME, dtype="bf16"), ConfigError),
    "load_pretrained: a method": (lambda: a.load_pretrained(NAME, position_embedding="zz"), ConfigError),
    "load_pretrained: a size": (lambda: a.load_pretrained(NAME, img_size="224"), ConfigError),
    "load_pretrained: three sides": (lambda: a.load_pretrained(NAME, img_size=(1, 2, 3)), ConfigError),
    "load_pretrained: a switch": (lambda: a.load_pretrained(NAME, num_classes=True), ConfigError),
    "load_weights: a module": (lambda: c.load_weights(one(), one()), ConfigError),
    "convert: nothing": (lambda: a.convert(one(), None), ConfigError),
    "convert: no plan": (lambda: a.convert(one()), ConfigError),
    "convert: an empty plan": (lambda: a.convert(one(), ""), ConfigError),
    "convert: an operator": (lambda: a.convert(one(), "*: liner"), ConfigError),
    "convert: a list": (lambda: a.convert(one(), ["linear"]), ConfigError),
    "convert: a layer": (lambda: a.convert(one(), {7: "linear"}), ConfigError),
    "convert: a word": (lambda: a.convert(one(), {"a": "linear"}), ConfigError),
    "convert: a keyword": (lambda: a.convert(one(), "*: linear", weight="all"), ConfigError),
    "convert: weights": (lambda: a.convert(one(), "*: linear", weights="al"), ConfigError),
    "convert: without": (lambda: a.convert(one(), "*: linear", without="bias"), ConfigError),
    "convert: a seed": (lambda: a.convert(one(), "*: linear", seed="a"), ConfigError),
    "convert: no attention": (lambda: a.convert(resnet(), "*: linear"), NoModel),
    "attention_maps: a layer": (lambda: t.attention_maps(one(), X, 9), TransferError),
    "attention_maps: layers": (lambda: t.attention_maps(one(), X, "0-9"), TransferError),
    "attention_maps: words": (lambda: t.attention_maps(one(), X, ["a"]), ConfigError),
    "attention_maps: no attention": (lambda: t.attention_maps(resnet(), X), NoModel),
    "divergence_by_layer: no pairs": (
        lambda: t.divergence_by_layer(one(), one(), X, pairs=[0, 1]),
        ConfigError,
    ),
    "divergence_by_layer: a word": (lambda: t.divergence_by_layer(one(), one(), X, pairs="0:1"), ConfigError),
    "divergence_by_layer: a layer": (
        lambda: t.divergence_by_layer(one(), one(), X, pairs=[(0, 9)]),
        TransferError,
    ),
    "mirror_arguments: a name": (lambda: m.mirror_arguments(one(), "vit_smal", {}), TransferError),
    "mirror_arguments: nothing": (lambda: m.mirror_arguments(one(), NAME, None), ConfigError),
    "mirror_arguments: a keyword": (lambda: m.mirror_arguments(one(), NAME, {"dept": 3}), TransferError),
    "js_divergence: nothing": (lambda: t.js_divergence(None, X), ConfigError),
    "js_divergence: a shape": (lambda: t.js_divergence(X, X[..., :3]), TransferError),
    "report_mismatch: nothing": (lambda: t.report_mismatch(None), ConfigError),
    "evaluate: no batches": (lambda: t.evaluate(one(), X), DataError),
    "evaluate: no labels": (lambda: t.evaluate(one(), [X]), DataError),
    "evaluate: a label": (lambda: t.evaluate(one(), [(X, torch.tensor([0, 9]))]), DataError),
    "evaluate: a label below": (lambda: t.evaluate(one(), [(X, torch.tensor([0, -1]))]), DataError),
    "evaluate: no head": (lambda: t.evaluate(vit(num_classes=0), [(X, Y)]), DataError),
    "evaluate: weights not finite": (lambda: t.evaluate(poisoned(), [(X, Y)]), DataError),
    "evaluate: no logits": (lambda: t.evaluate(vit().patch_embed, [(X, Y)]), NoModel),
    "evaluate: no images": (lambda: t.evaluate(nn.Linear(3, 3), [(X, Y)]), NoModel),
    "evaluate: too few logits": (lambda: t.evaluate(headed(1), [(X, Y)]), DataError),
    "evaluate: another size": (
        lambda: t.evaluate(one(), [(torch.zeros(2, 3, 48, 48), torch.tensor([0, 1]))]),
        GraftError,
    ),
    "evaluate: a state dict": (lambda: t.evaluate(one().state_dict(), [(X, X)]), ConfigError),
    "save: whole numbers": (lambda: a.save(one(), "out", dtype=torch.int8), ConfigError),
    "save: a float of 8 bits": (lambda: a.save(one(), "out", dtype=torch.float8_e4m3fn), ConfigError),
    "load: a float of 8 bits": (lambda: a.load(NAME, dtype=torch.float8_e4m3fn), ConfigError),
    "save: a NUL": (lambda: a.save(one(), "a\0b"), CheckpointError),
    "save: a long name": (lambda: a.save(one(), "a" * 300), CheckpointError),
    "export: a long name": (lambda: a.export(one(), f"{'a' * 300}.pt2"), CheckpointError),
    "save: maps alone": (lambda: a.save(maps_alone(), "out"), NoModel),
    "export: maps alone": (lambda: a.export(maps_alone(), "a.pt2"), NoModel),
    "export: no values": (lambda: a.export(vit().to("meta"), "a.pt2"), CheckpointError),
    "save: a shard": (lambda: a.save(one(), "out", max_shard_size="foo"), GraftError),
    "save: a keyword": (lambda: a.save(one(), "out", overwite=True), ConfigError),
    "save: no values": (lambda: a.save(vit().to("meta"), "out"), CheckpointError),
    "save: another forward": (lambda: a.save(replaced(), "out"), CheckpointError),
    "DualViT: a half student": (lambda: dual(vit(), vit().half())(X.half()), TransferError),
    "DualViT: a double teacher": (lambda: dual(vit().double(), vit())(X), TransferError),
    "DualViT: a teacher elsewhere": (lambda: dual(vit().to("meta"), vit())(X), TransferError),
    "LossConfig: a weight": (lambda: t.LossConfig(weight=-1), ConfigError),
    "LossEntry: a keyword": (lambda: t.LossEntry(foo=1), ConfigError),
    "TransferConfig: an entry": (lambda: t.TransferConfig(losses=[1]), ConfigError),
    "train: an unchecked copy": (
        lambda: t.train(a.RunConfig().model_copy(update={"seed": "abc"})),
        ConfigError,
    ),
    "RunConfig: changed": (lambda: setattr(a.RunConfig(), "seed", 3), ConfigError),
    "attention_maps: a layer without attention": (lambda: t.attention_maps(resnet(), X, [0]), NoModel),
    "convert: attention of a subclass": (lambda: a.convert(attending(Doubled), "*: linear"), NoModel),
    "convert: a forward": (lambda: a.convert(attending(forward=torch.relu), "*: linear"), NoModel),
    "convert: a method of the model": (
        lambda: a.convert(replaced("", "forward_features"), "*: linear"),
        NoModel,
    ),
    "convert: a method of an MLP": (lambda: a.convert(replaced("blocks.0.mlp"), "*: linear"), NoModel),
    "convert: a compiled block": (lambda: a.convert(compiled_block(), "*: linear"), NoModel),
    "attention_maps: a method of a block": (lambda: t.attention_maps(replaced("blocks.0"), X), NoModel),
    "DualViT: a method of the teacher": (lambda: dual(replaced("", "forward_features"), vit()), NoModel),
    "Alignment: a method of the teacher": (
        lambda: a.Alignment(replaced("blocks.1"), a.convert(one(), "*: linear")),
        NoModel,
    ),
    "save: a method of the model": (lambda: a.save(replaced("", "forward_features"), "out"), CheckpointError),
    "save: a compiled block": (lambda: a.save(compiled_block(), "out"), NoModel),
    "convert: a projection": (lambda: a.convert(attending(proj=nn.Identity()), "*: linear"), NoModel),
    "convert: hooks": (lambda: a.convert(watched(), "*: linear"), NoModel),
    "convert: shared attention": (lambda: a.convert(sharing(), "0: linear; 1: softmax"), NoModel),
    "convert: no block": (lambda: a.convert(blocked(), "*: linear"), NoModel),
    "compare_models: no block": (lambda: t.compare_models(blocked(), one()), NoModel),
    "compare_models: no attention": (lambda: t.compare_models(attending(None), one()), NoModel),
    "attention_maps: a projection": (lambda: t.attention_maps(attending(proj=nn.Identity()), X), NoModel),
    "DualViT: attention of a subclass": (lambda: dual(vit(), attending(Doubled)), NoModel),
    "DualViT: a teacher of a subclass": (lambda: dual(attending(Doubled), vit()), NoModel),
    "DualViT: a projection": (lambda: dual(vit(), attending(qkv=nn.Identity())), NoModel),
    "DualViT: hooks on the map": (lambda: dual(vit(), watched("attn_drop")), NoModel),
    "DualViT: a teacher with hooks on the map": (lambda: dual(watched("attn_drop"), vit()), NoModel),
    "DualViT: hooks": (lambda: dual(vit(), watched()), NoModel),
    "DualViT: a teacher with hooks": (lambda: dual(watched(), vit()), NoModel),
    "attention_maps: sparse": (lambda: t.attention_maps(one(), X.to_sparse()), DataError),
    "attention_maps: broken patches": (
        lambda: t.attention_maps(vit(dynamic_img_size=True), torch.zeros(1, 3, 41, 41)),
        NoModel,
    ),
    "convert: a tensor of parts": (lambda: a.convert(one(), "*: linear", without=X), ConfigError),
    "convert: an array": (lambda: a.convert(one(), "*: linear", weights=np.zeros(3)), ConfigError),
    "export: an array": (lambda: a.export(one(), "a.onnx", dynamic=np.zeros(2)), ConfigError),
    "evaluate: a tensor": (lambda: t.evaluate(one(), torch.tensor(1.0)), DataError),
    "visualize: bytes": (lambda: a.visualize(one(), b"x.png"), ConfigError),
    "visualize: another size": (lambda: a.visualize(one(), torch.zeros(1, 3, 40, 40)), DataError),
    "visualize: not finite": (lambda: a.visualize(one(), X / 0), DataError),
    "DualViT: a deviation of zero": (
        lambda: dual(teacher_normalization=t.Normalization((0, 0, 0), (0, 0, 0))),
        ConfigError,
    ),
    "DualViT: another teacher to compile": (lambda: dual().compile_teachers(["other"]), TransferError),
    "DualViT: no batches": (lambda: dual().standardize(3), ConfigError),  # type: ignore[arg-type]
    "DualViT: taught of others": (lambda: taught_of(), TransferError),
    "Alignment: frozen": (lambda: a.Alignment(one(), frozen()), TransferError),
    "MaskedAutoencoder: a size": (lambda: m.MaskedAutoencoder(vit())(torch.zeros(1, 3, 40, 40)), NoModel),
    "MaskedAutoencoder: no images": (lambda: m.MaskedAutoencoder(vit())(None), DataError),
    "MaskedAutoencoder: a ratio": (lambda: m.MaskedAutoencoder(vit(), mask_ratio="x"), ConfigError),
    "MaskedAutoencoder: no ratio": (lambda: m.MaskedAutoencoder(vit(), mask_ratio=torch.nan), ConfigError),
    "convert: not finite": (lambda: a.convert(one(), "*: linear", calibration=X / 0), DataError),
    "attention_maps: not finite": (lambda: t.attention_maps(one(), X / 0), DataError),
    "evaluate: not finite": (lambda: t.evaluate(one(), [(X / 0, torch.tensor([0, 1]))]), DataError),
    "evaluate: labels of floats": (lambda: t.evaluate(one(), [(X, X[:, 0, 0, 0])]), DataError),
    "evaluate: a number": (lambda: t.evaluate(one(), 3), ConfigError),
    "evaluate: a folder": (lambda: t.evaluate(one(), "nowhere"), DataError),
    "evaluate: no model": (lambda: t.evaluate({}, [(X, X)]), ConfigError),
    "visualize: one image": (lambda: a.visualize(one(), X[0]), DataError),
    "visualize: a keyword": (lambda: a.visualize(one(), X, img_size=32), ConfigError),
    "visualize: images": (lambda: t.visualize("nowhere/at/all", 3, "out"), ConfigError),
    "save: nowhere": (lambda: a.save(one(), None), ConfigError),
    "save: a list": (lambda: a.save(one(), ["b"]), ConfigError),
    "save: of a source": (lambda: a.save(one(), "out", img_size=64), ConfigError),
    "save: not of timm": (lambda: a.save(nn.Linear(2, 2), "out"), CheckpointError),
    "export: nowhere": (lambda: a.export(one(), None), ConfigError),
    "export: a suffix": (lambda: a.export(one(), "a.xyz"), CheckpointError),
    "export: a format": (lambda: a.export(one(), "a.onnx", format="onx"), ConfigError),
    "export: dynamic": (lambda: a.export(one(), "a.pt2", dynamic="batch"), ConfigError),
    "export: dynamics": (lambda: a.export(one(), "a.pt2", dynamic=["bach"]), ConfigError),
    "push: no repository": (lambda: a.push(one(), None), ConfigError),
    "push: a repository": (lambda: a.push(one(), "a b"), CheckpointError),
    "push: visibility": (lambda: a.push(one(), "me/a", visibility="hidden"), ConfigError),
    "plan_upload: a module": (lambda: c.plan_upload(one(), "me/a"), ConfigError),
    "push_student: a module": (lambda: c.push_student(one()), ConfigError),
    "DualViT: a method": (lambda: dual(method="distil"), ConfigError),
    "DualViT: a number": (lambda: a.DualViT(vit(), vit(), 3), ConfigError),
    "DualViT: a keyword": (lambda: dual(layer="all"), ConfigError),
    "DualViT: a layer": (lambda: dual(layers=[9]), GraftError),
    "DualViT: a weight": (lambda: dual(weight="big"), ConfigError),
    "DualViT: losses": (lambda: a.DualViT(vit(), vit(), losses="distill"), ConfigError),
    "DualViT: a key of losses": (lambda: a.DualViT(vit(), vit(), losses=[{"methd": "feature"}]), ConfigError),
    "DualViT: both forms": (lambda: dual(method="copy", losses=[{"method": "distill"}]), ConfigError),
    "DualViT: itself": (lambda: dual(one(), one()), TransferError),
    "DualViT: no teacher": (lambda: a.DualViT({}, vit()), ConfigError),
    "DualViT: a dual as the student": (lambda: dual(vit(), dual()), TransferError),
    "DualViT: a normalization": (lambda: dual(student_normalization=(1, 2)), ConfigError),
    "DualViT: calibration": (lambda: dual(calibration=3), ConfigError),
    "DualViT: taught": (lambda: dual()(X, {"teacher.classes": X}), TransferError),
    "DualViT: taught a number": (lambda: dual(method="logits")(X, 3), TransferError),
    "DualViT.save: nowhere": (lambda: dual().save(None), ConfigError),  # type: ignore[arg-type]
    "DualViT.with_student: a name": (lambda: dual().with_student("a"), ConfigError),  # type: ignore[arg-type]
    "Alignment: not converted": (lambda: a.Alignment(one(), vit()), TransferError),
    "Alignment: a loss": (
        lambda: a.Alignment(one(), a.convert(one(), "*: linear"), loss="outptu"),
        GraftError,
    ),
    "token_layout: a name": (lambda: m.token_layout("vit"), NoModel),
    "attention_shape: nothing": (lambda: m.attention_shape(None), NoModel),
    "plan_of: nothing": (lambda: m.plan_of(None), NoModel),
    "converted_layers: a name": (lambda: m.converted_layers("a"), NoModel),
    "copied_layers: nothing": (lambda: m.copied_layers(None), ConfigError),
    "new_parameters: a name": (lambda: m.new_parameters("a"), NoModel),
    "check_supported: nothing": (lambda: m.check_supported(None), NoModel),
    "host_attention: a name": (lambda: m.host_attention("a"), NoModel),
    "release_attention: nothing": (lambda: m.release_attention(None), ConfigError),
    "resize: a word": (lambda: m.resize(vit(), "big"), ConfigError),
    "resize: nothing": (lambda: m.resize(None, 32), ConfigError),
    "parse_plan: a number": (lambda: m.parse_plan(3, 12), ConfigError),
    "parse_plan: a depth": (lambda: m.parse_plan("*: linear", "a"), ConfigError),
    "register_operator: no factory": (lambda: m.register_operator("x"), ConfigError),
    "register_operator: abstract": (lambda: m.register_operator("x", m.AttentionOperator), ConfigError),
    "register_operator: another class": (lambda: m.register_operator("x", nn.Linear), ConfigError),
    "register_operator: a name": (lambda: m.register_operator("My mean", Mean), ConfigError),
    "register_operator: no word": (lambda: m.register_operator("my:mean", Mean), ConfigError),
    "register_operator: keep": (lambda: m.register_operator("keep", Mean), ConfigError),
    "register_method: no name": (lambda: t.register_method(method_named(None)), ConfigError),
    "register_method: no word": (lambda: t.register_method(method_named("My method")), ConfigError),
    "register_family: of nothing": (lambda: m.register_family(nothing_of_a_family()), ConfigError),
    "convert: an unknown operator": (lambda: a.convert(one(), "*: none_at_all"), ConfigError),
    "Alignment: no terms": (
        lambda: a.Alignment(one(), a.convert(one(), "*: mean_here"), "map"),
        TransferError,
    ),
    "DualViT: an idle teacher": (
        lambda: a.DualViT({"a": vit(), "b": vit()}, vit(), losses=[{"method": "distill", "teacher": "a"}]),
        ConfigError,
    ),
    "DualViT: a second teacher": (lambda: a.DualViT({"a": vit(), "b": vit()}, vit()), ConfigError),
    "standardize: a number": (lambda: measured().standardize([3]), DataError),
    "standardize: one batch": (lambda: measured().standardize(X), DataError),
    "standardize: a dictionary": (lambda: measured().standardize([{"image": X}]), DataError),
    "standardize: labels first": (lambda: measured().standardize([(torch.zeros(2), X)]), DataError),
    "register_method: a name": (lambda: t.register_method("x"), ConfigError),
    "register_family: nothing": (lambda: m.register_family(None), ConfigError),
    "Adapter: nothing": (lambda: m.Adapter(nn.Linear), ConfigError),
    "describe_source: a module": (lambda: c.describe_source(one()), ConfigError),
    "describe_file: nothing": (lambda: c.describe_file(None), ConfigError),
    "extract: nothing": (lambda: c.extract(None, "a"), ConfigError),
    "read_state: nothing": (lambda: c.read_state(None), ConfigError),
    "RunConfig: a key": (lambda: a.RunConfig(optim={"epoch": 3}), ConfigError),
    "RunConfig: a section": (lambda: a.RunConfig(optimizer={}), ConfigError),
    "RunConfig: a word": (lambda: a.RunConfig(optim={"epochs": "many"}), ConfigError),
    "RunConfig: nothing": (lambda: a.RunConfig(optim=None), ConfigError),
    "RunConfig: a sign": (lambda: a.RunConfig(optim={"epochs": -1}), ConfigError),
    "train: a recipe": (lambda: a.train("digits_scratch"), ConfigError),
    "train: a dictionary": (lambda: a.train({"optim": {}}), ConfigError),
    "load_config: a number": (lambda: load_config(3), ConfigError),  # type: ignore[arg-type]
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    assert list(tmp_path.iterdir()) == []


def says(error: type[GraftError], call: Callable[[], Any]) -> None:
    """One sentence of this kind, and of ours alone: without the words of pydantic."""
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert 10 < len(text) < 800
    assert "Input should" not in text


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("images", IMAGES)
def test_images_that_cannot_be_shown(taker: str, images: str) -> None:
    value, error = IMAGES[images]
    says(error, lambda: TAKERS[taker](value))


@pytest.mark.parametrize("taker", MODELS)
@pytest.mark.parametrize("thing", THINGS)
def test_what_is_not_a_model(taker: str, thing: str) -> None:
    value, error = THINGS[thing]
    says(error, lambda: MODELS[taker](value))


@pytest.mark.parametrize("name", OTHERS)
def test_a_wrong_argument(name: str) -> None:
    call, error = OTHERS[name]
    says(error, call)


def test_the_check_would_notice() -> None:
    for call in (lambda: None, lambda: [][0]):
        with suppress(IndexError), pytest.raises(pytest.fail.Exception):
            says(GraftError, call)


def test_what_an_annotation_allows_is_taken() -> None:
    small = vit()
    assert graftvit.convert(small, {0: "linear"}, without=[], calibration=None, seed=torch.tensor(1).item())
    maps: dict[int, Tensor] = graftvit.attention_maps(small, X, "0-1")
    assert list(maps) == [0, 1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dual()(X).logits.isfinite().all()


@pytest.mark.parametrize("call", [
    lambda: graftvit.visualize(one(), X, layer=[0]),
    lambda: graftvit.load(NAME, devices="cpu"),
])  # fmt: skip
def test_a_list_of_valid_arguments_is_that_of_the_function(call: Any) -> None:
    with pytest.raises(ConfigError, match=r"^(visualize\(\) .*, layers, .*, queries, |load\(\) .*, dtype, )"):
        call()


def test_statistics_are_measured_on_batches_of_a_loader() -> None:
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    torch.manual_seed(0)
    one_, other = measured(), measured()
    other.load_state_dict(one_.state_dict())
    other.teacher.load_state_dict(one_.teacher.state_dict())
    one_.standardize(DataLoader(TensorDataset(images, labels), batch_size=2))
    other.standardize(images.split(2))
    assert torch.equal(one_.eval()(images).transfer_loss, other.eval()(images).transfer_loss)


def test_a_copy_is_still_named_by_its_signature() -> None:
    """A decorated function keeps its help."""
    assert "calibration" in str(__import__("inspect").signature(graftvit.convert))
