"""The law of artefacts for objects: what a notebook holds, written or sent in any way, is the same model again."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
from graftvit.checkpoints import plan_upload
from graftvit.models import host_attention, resize
from graftvit.models.errors import CheckpointError
from support.hub.hub_client import use_hub
from support.hub.hub_uploads import serve_uploads
from support.models.pyramids import tiny as pyramid
from torch import Tensor, nn

NAME = "vit_tiny_patch16_224"
SIZES: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5,
}  # fmt: skip
MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.3, 0.4)


def vit(seed: int = 0, **more: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(NAME, **SIZES | more)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.pretrained_cfg |= {"mean": MEAN, "std": STD, "crop_pct": 0.7, "interpolation": "bilinear"}
    return model.eval()


def images(size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(7))


def new_head() -> nn.Module:
    model: Any = vit()
    model.reset_classifier(7)
    return model.eval()  # type: ignore[no-any-return]


def hosted() -> nn.Module:
    model = vit()
    host_attention(model)
    return model


def resized() -> nn.Module:
    model = vit()
    resize(model, (40, 24))
    return model


def tied() -> nn.Module:
    model: Any = vit()
    model.blocks[1].mlp = model.blocks[0].mlp
    model.norm.bias = model.blocks[0].norm1.bias
    return model  # type: ignore[no-any-return]


def of_one_storage() -> nn.Module:
    model = vit()
    flat = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(flat, model.parameters())
    return model


def not_finite() -> nn.Module:
    model: Any = vit()
    model.head.weight.data[0, 0] = float("nan")
    return model  # type: ignore[no-any-return]


class Scaled(nn.Linear):
    """A head that computes something else with the same weights."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def changed(path: str, part: nn.Module) -> Any:
    model = vit()
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, part)
    return model.eval()


def another_scale() -> nn.Module:
    model: Any = vit()
    model.blocks[1].attn.scale = 0.1
    return model  # type: ignore[no-any-return]


def pooled_later(tmp_path: Path) -> Any:
    known = loaded(tmp_path)
    known.model.reset_classifier(5, "avg")
    return known


def resized_later(tmp_path: Path) -> Any:
    known = loaded(tmp_path)
    resize(known.model, (40, 24))
    return known


def taught(method: str, *, steps: int = 1) -> graftvit.DualViT:
    dual = graftvit.DualViT(vit(1), vit(), method=method)
    optimizer = torch.optim.SGD([each for each in dual.parameters() if each.requires_grad], lr=0.01)
    for _ in range(steps):
        out = dual(images())
        (out.logits.square().mean() + out.transfer_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dual.eval()


def loaded(tmp_path: Path) -> Any:
    graftvit.save(vit(), tmp_path / "first")
    return graftvit.load_pretrained(tmp_path / "first")


THINGS: dict[str, Callable[[Path], Any]] = {
    "plain": lambda _: vit(),
    "without a head": lambda _: vit(num_classes=0),
    "a new head": lambda _: new_head(),
    "resized": lambda _: resized(),
    "tied": lambda _: tied(),
    "of one storage": lambda _: of_one_storage(),
    "pooled": lambda _: vit(global_pool="avg"),
    "other norms": lambda _: vit(norm_layer=partial(nn.LayerNorm, eps=1e-3)),
    "converted": lambda _: graftvit.convert(vit(), "*: linear"),
    "calibrated": lambda _: graftvit.convert(vit(), "0: hedgehog; 1: hash", calibration=images()),
    "without attention": lambda _: graftvit.convert(pyramid("swin").float(), "1: none").eval(),
    "converted twice": lambda _: graftvit.convert(graftvit.convert(vit(), "*: linear"), "0: performer"),
    "pvt": lambda _: pyramid("pvt").float().eval(),
    "swin": lambda _: pyramid("swin").float().eval(),
    "converted swin": lambda _: graftvit.convert(
        pyramid("swin").float(), "stage1: linear", without=["bias"]
    ).eval(),
    "distilling": lambda _: taught("distill"),
    "distilled": lambda _: taught("distill").release().eval(),
    "copying": lambda _: taught("copy"),
    "copied": lambda _: taught("copy").release().eval(),
    "copying queries": lambda _: taught("copy_q"),
    "features": lambda _: taught("feature"),
    "logits": lambda _: taught("logits"),
    "converted student": lambda _: graftvit.DualViT(vit(1), graftvit.convert(vit(), "*: linear"), "feature"),
    "loaded": loaded,
    "loaded, then pooled": pooled_later,
    "loaded, then resized": resized_later,
    "a head put in": lambda _: changed("head", nn.Linear(24, 9)),
    "dropping": lambda _: vit(drop_path_rate=0.5, proj_drop_rate=0.5, patch_drop_rate=0.5),
    "dropping later": lambda _: changed("head_drop", nn.Dropout(0.5)),
    "hosted": lambda _: hosted(),
}


def answer(thing: Any) -> Tensor:
    """What it says of the images."""
    model = thing if isinstance(thing, nn.Module) else thing.model
    size = (
        (40, 24) if getattr(getattr(model, "patch_embed", None), "img_size", None) == (40, 24) else (32, 32)
    )
    model.eval()
    with torch.no_grad():
        return getattr(model, "predict", model)(images(size))  # type: ignore[no-any-return]


def by_save(thing: Any, tmp_path: Path) -> Any:
    return graftvit.load(graftvit.save(thing, tmp_path / "saved"))


def by_save_twice(thing: Any, tmp_path: Path) -> Any:
    again = graftvit.load_pretrained(graftvit.save(thing, tmp_path / "saved"))
    return graftvit.load(graftvit.save(again, tmp_path / "again"))


def by_shards(thing: Any, tmp_path: Path) -> Any:
    return graftvit.load(str(graftvit.save(thing, tmp_path / "saved", max_shard_size=4_000)))


def by_push(thing: Any, tmp_path: Path) -> Any:
    graftvit.push(thing, "tester/model", visibility="private", license="mit", confirm_license=True)
    return graftvit.load("hf-hub:tester/model")


def by_model(thing: Any, tmp_path: Path) -> Any:
    return graftvit.as_model(thing)


def by_pickle(thing: Any, tmp_path: Path) -> Any:
    return graftvit.as_model(pickle.loads(pickle.dumps(copy.deepcopy(thing))))


ROUTES = {
    "save": by_save,
    "save, load, save": by_save_twice,
    "shards": by_shards,
    "push": by_push,
    "as_model": by_model,
    "pickle": by_pickle,
}


@pytest.fixture
def _hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with serve_uploads() as (server, _):
        use_hub(monkeypatch, server, tmp_path / "home")
        yield


@pytest.mark.usefixtures("_hub")
@pytest.mark.parametrize("name", THINGS)
def test_it_is_the_same_model_again(name: str, tmp_path: Path) -> None:
    thing = THINGS[name](tmp_path)
    wanted = answer(thing)
    assert wanted.std() > 1e-3
    for route, take in ROUTES.items():
        (tmp_path / route).mkdir()
        got = answer(take(thing, tmp_path / route))
        assert torch.equal(got, wanted), route
    assert torch.equal(answer(thing), wanted), "the thing itself is as it was"


@pytest.mark.parametrize("before", [5, 0])
def test_a_loaded_model_takes_a_fresh_head_and_keeps_the_rest(tmp_path: Path, before: int) -> None:
    graftvit.save(vit(num_classes=before), tmp_path / "model")
    model: Any = graftvit.load(tmp_path / "model", num_classes=3)
    kept = graftvit.load(tmp_path / "model").state_dict()
    kept = {name: value for name, value in kept.items() if not name.startswith("head.")}
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items() if name in kept)
    graftvit.save(model, tmp_path / "out")
    assert torch.equal(answer(graftvit.load(tmp_path / "out")), answer(model))
    assert model.head.weight.requires_grad
    assert model.head.out_features == 3


def test_the_folder_says_how_images_are_made(tmp_path: Path) -> None:
    for name in ("plain", "converted", "distilling", "copied", "loaded"):
        folder = graftvit.save(THINGS[name](tmp_path / name), tmp_path / name / "saved")
        shown = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
        assert (tuple(shown["mean"]), tuple(shown["std"])) == (MEAN, STD), name
        assert (shown["crop_pct"], shown["interpolation"]) == (0.7, "bilinear"), name


@pytest.mark.parametrize("name", ["converted", "copied", "swin"])
def test_its_graph_says_the_same(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    thing = THINGS[name](tmp_path)
    report = graftvit.export(thing, tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    torch.testing.assert_close(torch.from_numpy(found), answer(thing), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model", "part"), [
    (lambda: nn.Sequential(nn.Linear(3, 3)), "timm"),
    (lambda: vit(act_layer=partial(nn.GELU, approximate="tanh")), "act_layer"),
    (not_finite, "not finite in head.weight"),
])  # fmt: skip
def test_what_cannot_be_built_again_is_refused(
    model: Callable[[], nn.Module], part: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=part):
        graftvit.save(model(), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


CHANGED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "activation": (lambda: changed("blocks.1.mlp.act", nn.ReLU()), "blocks.1.mlp.act"),
    "a layer without weights": (lambda: changed("norm_pre", nn.Softmax(-1)), "norm_pre"),
    "another head": (lambda: changed("head", Scaled(24, 5)), "head"),
    "a setting": (another_scale, "blocks.1.attn has scale"),
    "a layer more": (lambda: changed("norm_pre", nn.Sequential(nn.ReLU())), "norm_pre"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_model_that_computes_something_else_is_refused(name: str, tmp_path: Path) -> None:
    make, part = CHANGED[name]
    takers: list[Callable[[], Any]] = [
        lambda: graftvit.save(make(), tmp_path / "saved"),
        lambda: graftvit.export(make(), tmp_path / "model.onnx"),
        lambda: graftvit.as_model(graftvit.DualViT(vit(1), make(), "logits")),
    ]
    if name != "a setting":
        takers.append(lambda: graftvit.save(graftvit.convert(make(), "*: linear"), tmp_path / "saved"))
    for take in takers:
        with pytest.raises(CheckpointError, match=part):
            take()
    assert list(tmp_path.iterdir()) == []


def test_plain_timm_loads_a_head_that_was_put_in(tmp_path: Path) -> None:
    model = changed("head", nn.Linear(24, 9))
    graftvit.save(model, tmp_path / "model")
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert torch.equal(again(images()), model(images()))


def test_license_and_classes_travel_with_the_model(tmp_path: Path) -> None:
    folder = graftvit.save(vit(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["license"], config["label_names"] = "cc-by-nc-4.0", list("abcde")
    (folder / "config.json").write_text(json.dumps(config))
    linear = graftvit.convert(graftvit.load(folder), "*: linear")
    student = graftvit.DualViT(vit(1), graftvit.load(folder), "logits")
    for name, thing in {
        "loaded": graftvit.load(folder),
        "converted": linear,
        "converted source": graftvit.convert(folder, "*: linear"),
        "student": graftvit.DualViT(folder, linear, "logits"),
        "of a teacher without a license": student,
        "its model": graftvit.as_model(student),
        "saved again": graftvit.load(graftvit.save(student, tmp_path / "first student")),
    }.items():
        out = graftvit.save(thing, tmp_path / name)
        config = json.loads((out / "config.json").read_text())
        assert config["label_names"] == list("abcde"), name
        with pytest.raises(CheckpointError, match="confirm_license"):
            plan_upload(out, "me/model", license="mit")
    assert config["pretrained_cfg"].get("license") is None
    other: Any = graftvit.load(folder)
    other.reset_classifier(7)
    again = json.loads((graftvit.save(other, tmp_path / "other") / "config.json").read_text())
    assert "label_names" not in again
    assert again["pretrained_cfg"]["license"] == "cc-by-nc-4.0"


@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vitamin_small_224", "xcit_nano_12_p16_224"])
def test_patches_behind_convolutions_have_their_size_again(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=5).eval()
    assert graftvit.load_pretrained(graftvit.save(model, tmp_path / "model")).preprocessing.input_size == (
        3, 224, 224
    )  # fmt: skip


def test_a_changed_model_is_not_written_as_another(tmp_path: Path) -> None:
    model: Any = vit()
    model.blocks[1].mlp = nn.Identity()
    with pytest.raises(CheckpointError, match="other weights"):
        graftvit.save(model, tmp_path / "saved")


@pytest.mark.parametrize("name", ["config.json", "README.md", "sub"])
def test_what_another_put_into_a_folder_is_not_replaced(name: str, tmp_path: Path) -> None:
    folder = graftvit.save(vit(), tmp_path / "model")
    (folder / "sub").mkdir() if name == "sub" else (folder / name).write_text('{"name": "webapp"}')
    with pytest.raises(CheckpointError, match="holds no model" if name == "config.json" else name):
        graftvit.save(vit(1), folder, overwrite=True)
    assert (folder / name).exists()
    assert (folder / "model.safetensors").exists()


def test_a_folder_of_shards_and_of_bins_is_replaced(tmp_path: Path) -> None:
    folder = graftvit.save(vit(), tmp_path / "model", max_shard_size=4_000)
    (folder / "pytorch_model.bin").touch()
    graftvit.save(vit(1), folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


class Named:
    """A path that is no pathlib.Path."""

    def __fspath__(self) -> str:
        return "model"


def test_what_was_written_is_read_by_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    wanted = answer(vit())
    for name in ("model", "~/model", Named(), Path(NAME)):
        folder = graftvit.save(vit(), name, overwrite=True)
        for read in (folder, name):
            assert torch.equal(answer(graftvit.load(read)), wanted)
    with pytest.raises(CheckpointError, match=f"local-dir:{NAME}"):
        graftvit.load(NAME)
    assert graftvit.export(vit(), "~/graph.pt2").path == tmp_path / "home" / "graph.pt2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "model", NAME]


def test_a_link_and_hidden_folders_beside_it_are_kept(tmp_path: Path) -> None:
    graftvit.save(vit(), tmp_path / "model")
    (tmp_path / ".model.old").mkdir()
    (tmp_path / "link").symlink_to("model")
    with pytest.raises(CheckpointError, match=str(tmp_path / "model")):
        graftvit.save(vit(1), tmp_path / "link", overwrite=True)
    graftvit.save(vit(1), tmp_path / "model", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.old", "link", "model"]
    assert torch.equal(answer(graftvit.load(tmp_path / "link")), answer(vit(1)))


def test_a_folder_whose_replacement_was_killed_is_named(tmp_path: Path) -> None:
    aside = graftvit.save(vit(), tmp_path / "model").rename(tmp_path / ".model.graftvit-old")
    with pytest.raises(CheckpointError, match=aside.name):
        graftvit.load(tmp_path / "model")
