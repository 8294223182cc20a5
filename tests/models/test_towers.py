"""Towers of transformers in memory: hosted, converted, saved and loaded, exported, and refused by name."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graftvit
import pytest
import torch
import torch.nn.functional as F
from graftvit.models.attention.base import Heads
from graftvit.models.conversion import convert, converted_layers
from graftvit.models.errors import CheckpointError, ConfigError, UnsupportedModelError
from graftvit.models.families import attention_of, blocks_of, sites, towers
from graftvit.models.families.towers import PLAN, TOWERS, TowerHost, layer_paths
from graftvit.models.hosting import host_attention, release_attention
from support.models.operator_cases import CASES, dense_local
from torch import Tensor, nn

transformers: Any = pytest.importorskip("transformers")
from support.models.tiny_towers import ORDERED, SIZES, attending, drawn, images, tokens, tower  # noqa: E402

ROOT = Path(__file__).parents[2]
FIRST = {case.operator: case for case in reversed(CASES) if case.operator != "softmax"}
"""The first case of each operator."""
EXPORTED = ("vit", "dinov3_vit", "vit_mae")
"""Types that every run of the tests exports; an export takes seconds."""
SOME = [kind for kind in list(TOWERS)[::3] if kind not in EXPORTED]
kinds = pytest.mark.parametrize("kind", TOWERS)


def hosted(model: Any) -> Any:
    """A copy whose layers have hosts with a softmax."""
    twin = copy.deepcopy(model)
    assert len(host_attention(twin)) == len(blocks_of(twin))
    return twin


@kinds
def test_hosted_softmax_is_the_model(kind: str) -> None:
    model, x = tower(kind), images()
    twin = hosted(model)
    assert twin.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(tokens(twin, x), tokens(model, x), rtol=1e-5, atol=1e-5)
    assert [type(each) for each in release_attention(twin).modules()] == [
        type(each) for each in model.modules()
    ]


@kinds
def test_a_host_gives_the_projections_and_takes_the_output(kind: str) -> None:
    model, x = tower(kind), images()
    calls: list[tuple[TowerHost, Any, Any, Any]] = []

    def see(layer: nn.Module, inputs: Any, keywords: Any, out: Any) -> None:
        calls.append((TowerHost(layer), inputs, keywords, out[0]))

    for layer in map(attention_of, blocks_of(model)):
        layer.register_forward_hook(see, with_kwargs=True)
    tokens(model, x)
    assert len(calls) == SIZES["num_hidden_layers"]
    for host, inputs, keywords, out in calls:
        found, _ = host.merge(host.attend(host.heads_of(*inputs, **keywords)), x)
        torch.testing.assert_close(found, out, rtol=1e-5, atol=1e-5)


@kinds
def test_sites_are_those_of_the_configuration(kind: str) -> None:
    model = tower(kind)
    found = sites(model)
    assert [site.path for site in found] == layer_paths(model)
    assert {(site.width, site.num_heads, site.head_dim) for site in found} == {(32, 4, 8)}
    count = tokens(model, images()).shape[1]
    if kind in ORDERED:
        assert {site.shape.geometry.num_tokens for site in found} == {count}


def dense_linear(heads: Heads) -> Tensor:
    """phi(q) phi(k - mean of k)^T V with rows that sum to one, phi = elu + 1, by its dense map."""
    q, k, v = heads.qkv()
    weights = (F.elu(q) + 1) @ (F.elu(k - k.mean(2, keepdim=True)) + 1).transpose(2, 3)
    return weights / weights.sum(-1, keepdim=True) @ v


@kinds
def test_converted_to_linear_it_is_the_dense_definition(kind: str) -> None:
    check_definition(tower(kind), convert(tower(kind), "*: linear"), dense_linear)


@pytest.mark.parametrize("kind", ORDERED)
def test_converted_to_windows_it_is_the_dense_definition(kind: str) -> None:
    student = convert(tower(kind), "*: window(window=3)")
    check_definition(tower(kind), student, lambda heads: dense_local(None, heads, window=3))


@pytest.mark.parametrize("operator", FIRST)
def test_every_operator_is_given_the_heads_of_its_layer(operator: str) -> None:
    model = tower("dinov2_with_registers", num_hidden_layers=1)
    student = with_operators_ready(convert(model, f"*: {FIRST[operator]}"))
    [layer] = converted_layers(student).values()
    check_definition(model, student, copy.deepcopy(layer.operator).double())


def check_definition(model: Any, student: Any, definition: Callable[[Heads], Tensor]) -> None:
    model, student, x = model.double(), student.double(), images().double()
    assert type(student) is type(model)
    with torch.no_grad():
        with attending(model, definition):
            wanted = tokens(model, x)
        torch.testing.assert_close(tokens(student, x), wanted, rtol=1e-9, atol=1e-10)


def with_operators_ready(student: Any) -> Any:
    """The same with operators that can run, if they must be fitted first."""
    for layer in converted_layers(student).values():
        if not layer.operator.fitted:
            layer.operator.fit([], seed=1)
    return student


@kinds
def test_saved_and_loaded_it_is_the_same(kind: str, tmp_path: Path) -> None:
    student, x = drawn(convert(tower(kind), "0: hedgehog")), images()
    student.save_pretrained(tmp_path)
    again: Any = graftvit.load(tmp_path)
    assert type(again) is type(student)
    assert getattr(again.config, PLAN) == "0: hedgehog; 1: softmax"
    assert list(again.state_dict()) == list(student.state_dict())
    torch.testing.assert_close(tokens(again, x), tokens(student, x), rtol=0, atol=0)


@pytest.mark.parametrize("operator", FIRST)
def test_every_operator_is_saved_and_loaded(operator: str, tmp_path: Path) -> None:
    student, x = with_operators_ready(convert(tower("vit"), f"*: {FIRST[operator]}")), images()
    student.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(tokens(graftvit.load(tmp_path), x), tokens(student, x), rtol=0, atol=0)


BIAS = {"use_relative_position_bias": True}


def test_a_relative_bias_arrives_at_the_operator() -> None:
    model, x = tower("beit", **BIAS), images()
    torch.testing.assert_close(tokens(hosted(model), x), tokens(model, x), rtol=1e-5, atol=1e-5)
    layer = TowerHost(attention_of(blocks_of(model)[0]))
    seen: list[Any] = []
    hook = layer.original.register_forward_pre_hook(
        lambda _, inputs, keywords: seen.append(layer.heads_of(*inputs, **keywords)), with_kwargs=True
    )
    tokens(model, x)
    assert seen[0].bias.shape == (1, 4, 17, 17)
    hook.remove()
    with pytest.raises(UnsupportedModelError, match="layer 0 has a relative position bias"):
        convert(model, "*: linear")


def test_images_of_another_size_have_their_own_grid() -> None:
    model = tower("dinov2_with_registers").double()
    student, x = convert(model, "*: window(window=3)"), images(size=(24, 48)).double()
    with torch.no_grad():
        with attending(model, lambda heads: dense_local(None, heads, window=3), (24, 48)):
            wanted = tokens(model, x)
        torch.testing.assert_close(tokens(student, x), wanted, rtol=1e-9, atol=1e-10)


def test_gradients_reach_every_parameter_also_with_checkpointing() -> None:
    student, x = convert(tower("vit"), "*: hedgehog").train(), images()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            student.gradient_checkpointing_enable()
        student.zero_grad()
        tokens(student, x).square().sum().backward()
        found.append([parameter.grad for parameter in student.layers.parameters()])
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in found[0])
    torch.testing.assert_close(found[0], found[1])


def test_compiled_it_is_the_same() -> None:
    student, x = convert(tower("vit"), "0: linear; 1: window(window=2)"), images()
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(tokens(compiled, x), tokens(student, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [*EXPORTED, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SOME)])
def test_exported_it_is_the_same(kind: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    student, x = convert(tower(kind), "0: linear; 1: hedgehog"), images()
    keywords = {"noise": torch.arange(16.0).expand(2, -1)} if kind not in ORDERED else {}
    wrapped = _Tokens(student).eval()
    program = torch.onnx.export(wrapped, (x, *keywords.values()), dynamo=True, verbose=False)
    program.save(tmp_path / "tower.onnx")
    session = runtime.InferenceSession(tmp_path / "tower.onnx")
    given = dict(zip((each.name for each in session.get_inputs()), (x, *keywords.values()), strict=True))
    [found] = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
    torch.testing.assert_close(torch.as_tensor(found), tokens(student, x).detach(), rtol=1e-4, atol=1e-4)


class _Tokens(nn.Module):
    """A tower as a function that returns a tensor."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, *noise: Tensor) -> Tensor:
        return tokens(self.model, x)


def test_converted_again_it_starts_from_its_softmax_layers() -> None:
    model, x = tower("vit"), images()
    again = convert(convert(model, "*: hedgehog"), "1: linear")
    torch.testing.assert_close(tokens(again, x), tokens(convert(model, "1: linear"), x), rtol=0, atol=0)
    assert getattr(again.config, PLAN) == "0: softmax; 1: linear"
    assert getattr(model.config, PLAN, None) is None


@pytest.mark.parametrize(
    ("weights", "changed"), [("all", []), ("mlp", ["q_proj"]), ("none", ["q_proj", "fc1"])]
)
def test_weights_are_kept_as_asked(weights: Any, changed: list[str]) -> None:
    model = tower("vit")
    before, after = model.state_dict(), convert(model, "0: linear", weights=weights).state_dict()
    for name in ("q_proj", "fc1"):
        key = next(key for key in before if key.startswith("layers.0.") and key.endswith(f"{name}.weight"))
        assert torch.equal(before[key], after[key]) is (name not in changed)


def test_layers_of_another_version_are_refused_by_name() -> None:
    model = tower("vit")
    layers = model._modules.pop("layers")
    with pytest.raises(UnsupportedModelError, match="ViTModel has no layers"):
        sites(model)
    model.layers = layers
    del layers[0].attention.q_proj
    with pytest.raises(UnsupportedModelError, match="ViTAttention"):
        convert(model, "*: linear")


SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": 4,
}

TEXT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "vocab_size": 20,
}  # fmt: skip


def test_what_is_not_supported_is_refused_by_name() -> None:
    swin = transformers.SwinModel(transformers.SwinConfig(**SWIN))
    with pytest.raises(UnsupportedModelError, match=r"SwinModel .*'swin'.*vit"):
        convert(swin, "*: linear")
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=SIZES, projection_dim=8)
    clip = transformers.CLIPModel(config)
    with pytest.raises(UnsupportedModelError, match="CLIPModel takes text"):
        convert(clip, "*: linear")
    convert(clip.vision_model, "*: linear")
    with pytest.raises(UnsupportedModelError, match="window needs the whole token grid"):
        convert(tower("vit_mae"), "*: window")
    with pytest.raises(UnsupportedModelError, match=r"attn_drop 0\.5"):
        convert(tower("vit", attention_probs_dropout_prob=0.5), "*: linear")
    with pytest.raises(ConfigError, match="none"):
        convert(tower("vit"), "*: none")
    with pytest.raises(ConfigError, match="without"):
        convert(tower("vit"), "*: linear", without=["bias"])


def test_a_mask_that_hides_tokens_is_refused() -> None:
    layer = TowerHost(tower("vit").layers[0].attention)
    mask = torch.ones(1, 1, 17, 17, dtype=torch.bool)
    with pytest.raises(UnsupportedModelError, match="ViTAttention hides tokens"):
        layer(torch.zeros(1, 17, 32), mask)
    with pytest.raises(UnsupportedModelError, match="ViTAttention hides tokens"):
        convert(tower("vit"), "0: linear")(pixel_values=images(), attention_mask=torch.ones(2, 17))


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    student = convert(tower("vit"), "*: hedgehog")
    student.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    for old, new in (("hedgehog", "hedgefox"), ('"ViTModel"', '"ViTNodel"'), ('"ViTModel"', '"torch"')):
        (tmp_path / "config.json").write_text(config.replace(old, new))
        with pytest.raises(CheckpointError):
            graftvit.load(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"graftvit\.load"):
        graftvit.load_pretrained(f"local-dir:{tmp_path}")
    with pytest.raises(CheckpointError, match="num_classes"):
        graftvit.load(tmp_path, num_classes=3)


@pytest.mark.parametrize("kind", ["ViT", "Siglip", "Dinov2WithRegisters"])
def test_classifiers_are_towers_too(kind: str, tmp_path: Path) -> None:
    sizes = {"vision_config": SIZES, "text_config": TEXT} if kind == "Siglip" else SIZES
    config = getattr(transformers, f"{kind}Config")(**sizes, num_labels=5)
    model = getattr(transformers, f"{kind}ForImageClassification")(config)
    student, x = drawn(convert(model, "*: hedgehog")), images()
    student.save_pretrained(tmp_path)
    again: Any = graftvit.load(tmp_path)
    torch.testing.assert_close(again(pixel_values=x).logits, student(pixel_values=x).logits, rtol=0, atol=0)


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "conversion.md").read_text()
    [code] = [code for code in re.findall("```python\n(.*?)```", page, re.DOTALL) if "transformers" in code]
    asked: list[str] = []

    def published(name: str) -> Any:
        asked.append(name)
        return tower("dinov2_with_registers", num_hidden_layers=12)

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", published)
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {}
    exec(code, values)
    assert len(asked) == 1
    x = images()
    torch.testing.assert_close(tokens(values["again"], x), tokens(values["student"], x), rtol=0, atol=0)


def test_a_row_of_ones_own_is_a_type(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    [code] = [code for code in re.findall("```python\n(.*?)```", page, re.DOTALL) if "TOWERS" in code]
    monkeypatch.setattr(towers, "TOWERS", dict(TOWERS))
    exec(code, {})
    model, x = tower("pixio", image_size=32), images()
    torch.testing.assert_close(tokens(hosted(model), x), tokens(model, x), rtol=1e-5, atol=1e-5)
    assert tokens(model, x).shape[1] == sites(model)[0].shape.geometry.num_tokens
    convert(model, "*: window(window=2)")(pixel_values=x)


def test_the_page_names_the_types() -> None:
    page = (ROOT / "docs" / "conversion.md").read_text()
    assert all(f"`{kind}`" in page for kind in TOWERS if not kind.endswith("_vision_model"))


def test_a_folder_keeps_the_type_of_its_weights_and_its_library(tmp_path: Path) -> None:
    half = convert(tower("vit").to(torch.bfloat16), "0: linear")
    half.save_pretrained(tmp_path / "half")
    assert {each.dtype for each in graftvit.load(tmp_path / "half").parameters()} == {torch.bfloat16}
    convert(tower("vit"), "*: softmax").save_pretrained(tmp_path / "softmax")
    again = graftvit.load(tmp_path / "softmax")
    assert type(again) is type(tower("vit"))
    torch.testing.assert_close(tokens(again, images()), tokens(tower("vit"), images()))


def test_a_model_of_text_is_not_told_of_a_vision_tower() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    text = transformers.BertModel(transformers.BertConfig(vocab_size=10, **sizes))
    with pytest.raises(UnsupportedModelError, match="takes no images"):
        convert(text, "*: linear")
