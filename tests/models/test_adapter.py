"""Models of other libraries, read by an adapter: torchvision's vision transformer, and one of one's own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graftvit.models import Adapter, convert, converted_layers, plan_of, register_family
from graftvit.models.cost import attention_macs
from graftvit.models.errors import ConfigError, UnsupportedModelError
from graftvit.models.families import FAMILIES, family_of, sites
from graftvit.models.hosting import host_attention, release_attention
from graftvit.transfer import DualViT
from graftvit.transfer.align import Alignment
from graftvit.transfer.analysis.layer_maps import attention_maps
from torch import Tensor, nn
from torchvision.models import VisionTransformer

PAGE = Path(__file__).resolve().parents[2] / "docs/extending.md"


class Own(nn.Module):
    """An attention layer as one would write it: three projections, and a bias for each pair of tokens."""

    def __init__(self, width: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.join = (nn.Linear(width, width) for _ in range(4))
        self.bias = nn.Parameter(torch.randn(1, heads, tokens, tokens))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            each(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for each in (self.query, self.key, self.value)
        )
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        logits = logits if self.bias is None else logits + self.bias
        out: Tensor = self.join((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out


class OwnBlock(nn.Module):
    def __init__(self, width: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.norm, self.mixing, self.mlp = (
            nn.LayerNorm(width),
            Own(width, heads, tokens),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixing(self.norm(x))
        out: Tensor = x + self.mlp(x)
        return out


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 8, 8)
        self.blocks_ = nn.ModuleList(OwnBlock(24, 3, 12) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2)
        for block in self.blocks_:
            x = block(x)
        out: Tensor = x.mean(1)
        return out


class OwnViT(Base):
    """The model of the page."""


class OtherViT(Base):
    """The same, for adapters that are wrong."""


@pytest.fixture(autouse=True)
def adapters() -> Iterator[None]:
    """Run the two adapters of the page, the second for the model above."""
    before = list(FAMILIES)
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        if "Adapter(" in code:
            exec(code, {"OwnViT": OwnViT})
    assert len(FAMILIES) == len(before) + 2
    yield
    FAMILIES[:] = before


def tiny(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = OwnViT() if kind == "own" else VisionTransformer(32, 8, 2, 3, 24, 48, num_classes=5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def images(kind: str) -> Tensor:
    return torch.randn(2, 3, *((24, 32) if kind == "own" else (32, 32)), dtype=torch.float64)


BOTH = pytest.mark.parametrize("kind", ["own", "torchvision"])


@BOTH
def test_hosted_it_computes_the_same_and_is_released(kind: str) -> None:
    model, x = tiny(kind), images(kind)
    before, keys = model(x), list(model.state_dict())
    hosts = host_attention(model)
    assert len(hosts) == 2
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert list(model.state_dict()) == keys
    release_attention(model)
    assert torch.equal(model(x), before)


@BOTH
def test_sites_have_its_heads_and_tokens(kind: str) -> None:
    found = sites(tiny(kind))
    tokens = 12 if kind == "own" else 17
    assert [(site.num_heads, site.head_dim, site.width) for site in found] == [(3, 8, 24)] * 2
    assert {site.shape.geometry.num_tokens for site in found} == {tokens}
    assert attention_macs(tiny(kind)) == [2 * tokens**2 * 24] * 2


def test_a_converted_layer_is_its_equation() -> None:
    model = tiny("torchvision")
    student, x = convert(model, "*: uniform"), images("torchvision")
    assert plan_of(student) == "*: uniform"
    seen: list[tuple[Tensor, Tensor]] = []
    layer = converted_layers(student)[0]
    layer.register_forward_hook(lambda _, given, out: seen.append((given[0], out[0])))
    student(x)
    [(tokens, out)], own = seen, model.encoder.layers[0].self_attention
    v = F.linear(tokens, own.in_proj_weight[48:], own.in_proj_bias[48:])
    torch.testing.assert_close(out, own.out_proj(v.mean(1, keepdim=True).expand_as(v)), rtol=0, atol=1e-12)
    again = convert(tiny("torchvision"), "*: uniform")
    again.load_state_dict(student.state_dict())
    assert torch.equal(again(x), student(x))
    with pytest.raises(UnsupportedModelError, match="relative position bias"):
        convert(tiny("own"), "*: linear")


@BOTH
def test_its_maps_are_those_of_the_layer(kind: str) -> None:
    model, x = tiny(kind), images(kind)
    maps = attention_maps(model, x)
    assert list(maps) == [0, 1]
    assert torch.allclose(maps[0].sum(-1), torch.ones(1), atol=1e-5)
    if kind == "own":
        tokens, block = model.stem(x).flatten(2).transpose(1, 2), model.blocks_[0]
        own = block.mixing
        q, k = (f(block.norm(tokens)).unflatten(2, (3, 8)).transpose(1, 2) for f in (own.query, own.key))
        expected = (q @ k.transpose(-2, -1) * 8**-0.5 + own.bias).softmax(-1)
        torch.testing.assert_close(maps[0].double(), expected, rtol=0, atol=1e-6)


def test_it_is_aligned_and_taught() -> None:
    model, x = tiny("torchvision"), images("torchvision")
    student = convert(model, "*: linear", calibration=x)
    losses = Alignment(model, student, "output")(x)
    assert set(losses) == {0, 1}
    assert all(loss.requires_grad for loss in losses.values())
    for method in ("distill", "attention_output", "block_output"):
        pupil = tiny("torchvision")
        for parameter in pupil.parameters():
            parameter.data += 0.1
        loss = DualViT(model, pupil, method)(x).transfer_loss
        loss.backward()
        assert loss > 0
        assert pupil.conv_proj.weight.grad.abs().sum() > 0


def test_it_copies_as_the_page_says() -> None:
    x = images("torchvision")
    dual = DualViT(tiny("torchvision"), tiny("torchvision"), "copy")
    dual(x).logits.sum().backward()
    assert dual.student.conv_proj.weight.grad.abs().sum() > 0


def test_a_model_has_one_family_and_one_size() -> None:
    with pytest.raises(ConfigError, match="VisionTransformer is a model of the family"):
        register_family(FAMILIES[-2])
    with pytest.raises(UnsupportedModelError, match="cannot resize it"):
        FAMILIES[-1].resize(tiny("own"), (8, 8))


def like_that_of_the_page(model: type[nn.Module], **changes: Any) -> Adapter:
    right = FAMILIES[-1]
    assert isinstance(right, Adapter)
    given = {
        "layers": "blocks_.*", "attention": "mixing", "qkv": right.qkv, "out": right.out, "grid": right.grid,
        "image_size": right.size, "embedding": "stem", "prefix": (), "num_heads": "heads", "bias": right.bias,
    }  # fmt: skip
    return Adapter(model, **{**given, **changes})


def without_bias() -> OtherViT:
    """Return a model whose adapter reads a bias that its layers do not have."""
    torch.manual_seed(0)
    model = OtherViT()
    for block in model.blocks_:
        del block.mixing.bias
        block.mixing.bias = None
    return model.eval()


@pytest.mark.parametrize("operator", ["window(window=2)", "linformer", "monarch"])
@pytest.mark.parametrize("size", [(32, 24), (48, 64)])
def test_images_of_another_size_have_their_own_grid(operator: str, size: tuple[int, int]) -> None:
    register_family(like_that_of_the_page(OtherViT))
    model, x = without_bias(), torch.randn(2, 3, *size)
    student = convert(model, f"*: {operator}")
    found = student(x)
    assert converted_layers(student)[0].geometry.grid == (size[0] // 8, size[1] // 8)
    assert found.isfinite().all()
    if operator != "linformer":  # its parameters are of the size of the conversion
        FAMILIES[-1] = like_that_of_the_page(OtherViT, image_size=lambda model: size)
        torch.testing.assert_close(found, convert(model, f"*: {operator}")(x))


def test_other_tokens_than_the_adapter_says_are_refused() -> None:
    register_family(like_that_of_the_page(OtherViT))
    student = convert(without_bias(), "*: window(window=2)")
    with pytest.raises(UnsupportedModelError, match="gets 13 tokens"):
        converted_layers(student)[0](torch.zeros(1, 13, 24))


def test_an_adapter_reads_half_precision() -> None:
    model = tiny("own").bfloat16()
    assert len(host_attention(model)) == 2


def test_the_adapter_of_the_nearest_class_is_taken() -> None:
    class Derived(OwnViT):
        """A model with an adapter of its own."""

    own = like_that_of_the_page(Derived)
    register_family(own)
    assert family_of(Derived()) is own
    assert family_of(OwnViT()) is FAMILIES[-2]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"layers": "nope.*"}, "has no nope"),
        ({"attention": "nope"}, "has no nope, but norm, mixing, mlp"),
        ({"qkv": lambda layer, x: (layer.value(x), layer.key(x), layer.query(x))}, "does not compute"),
        ({"out": lambda layer, joined: joined}, "does not compute"),
        ({"bias": None}, "does not compute"),
        ({"qkv": lambda layer, x: None}, "cannot read a block: TypeError"),
        ({"num_heads": "nope"}, "cannot read a block: AttributeError"),
        ({"grid": lambda model, size: 3}, "cannot read a block: TypeError"),
        ({"embedding": "stm"}, "has no stm"),
        ({"embedding": "blocks_"}, "does not get the images"),
        ({"prefix": ("cls",)}, "gets 12 tokens"),
        ({"grid": lambda model, size: (size[0] // 4, size[1] // 4)}, "gets 12 tokens"),
    ],
)
def test_a_wrong_adapter_is_refused(wrong: dict[str, Any], words: str) -> None:
    register_family(like_that_of_the_page(OtherViT, **wrong))
    with pytest.raises(UnsupportedModelError, match=words):
        convert(OtherViT(), "*: uniform")


def test_what_an_adapter_does_not_read_is_refused() -> None:
    model, x = tiny("torchvision"), images("torchvision")
    with pytest.raises(UnsupportedModelError, match="another method than feature"):
        DualViT(model, tiny("torchvision"), "feature")
    assert DualViT(model, tiny("torchvision"), "logits")(x).transfer_loss.abs() < 1e-12  # two equal models
    host = host_attention(tiny("own"))[0]
    with pytest.raises(UnsupportedModelError, match="mask or another tensor"):
        host(torch.zeros(1, 12, 24, dtype=torch.float64), torch.zeros(12, 12))
    with pytest.raises(ConfigError, match="prefix='cls'"):
        Adapter(
            OtherViT, layers="l.*", attention="a", qkv=lambda layer, x: (x, x, x), out=lambda layer, x: x,
            grid=lambda model, size: size, image_size=lambda model: (8, 8), embedding="e", prefix="cls",  # type: ignore[arg-type]
        )  # fmt: skip
