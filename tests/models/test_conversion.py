"""Conversion of plain models and pyramids: what runs, is dropped, fresh, saved, loaded, resized, and refused."""

from __future__ import annotations

import copy
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import graftvit.checkpoints.pretrained as loading
import pytest
import timm
import torch
from graftvit.models.attention.base import AttentionOperator, Geometry, Heads, LayerShape, Traits
from graftvit.models.attention.softmax import SoftmaxAttention
from graftvit.models.calibration import fit_at_random
from graftvit.models.conversion import (
    ConvertedAttention,
    convert,
    converted_layers,
    new_parameters,
    plan_of,
    plan_size,
    resize,
)
from graftvit.models.converted import TokenGrid
from graftvit.models.copying.teacher_view import Normalization, WholeInput
from graftvit.models.cost import attention_macs
from graftvit.models.errors import ConfigError, GraftError, UnsupportedModelError
from graftvit.models.families import (
    attention_shape,
    check_supported,
    depths,
    image_size,
    sites,
    token_layout,
)
from graftvit.models.hosting import host_attention, release_attention
from graftvit.models.layer_plan import OPERATORS, Choice
from graftvit.models.small import without_memory
from graftvit.transfer import attention_maps
from support.models import dense, pyramids, tiny_families
from support.models.operator_cases import CASES
from support.models.tiny_students import save_folder
from torch import Tensor, nn

FIRST = {case.operator: case for case in reversed(CASES) if case.operator != "softmax"}
"""The first case of each operator."""
BIASED = ("beit", "beit_shared")
FAMILIES = [family for family in dense.FAMILIES if family not in BIASED]
WINDOWED = ("swin", "swinv2")
FEW = ("pvt", "pvt1", "svt", *WINDOWED)
SIZE, OTHER, LARGER = (32, 48), (48, 24), (48, 40)
TYPICAL = ("linear", "window")
"""Operators of every token alike and of the grid, which meet every family; the others meet `eva02` and one more."""
OTHERS = [operator for operator in FIRST if operator not in TYPICAL]
PLAIN = [family for family in FAMILIES if family != "eva02"]
kinds = pytest.mark.parametrize("kind", pyramids.TINY)


def described(family: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a small model of a family."""
    if family in pyramids.TINY:
        return pyramids.TINY[family][0], pyramids.arguments(family, SIZE)
    name, options = dense.FAMILIES[family]
    return name, {**dense.TINY, "depth": 1, "embed_dim": 16, "num_heads": 2, **options}


@cache
def teacher(family: str, **changes: Any) -> Any:
    """A random model; `convert` copies it, so that all tests can have the same one."""
    if family in pyramids.TINY:
        return pyramids.tiny(family, SIZE, **changes)
    return dense.tiny(family, dtype=torch.float32, **{**described(family)[1], **changes})


def images(size: tuple[int, int] = SIZE) -> Tensor:
    return dense.images(2, dtype=torch.float32, size=size)


def ready(model: nn.Module, plan: str, **more: Any) -> Any:
    """Convert a model; operators that must be fitted can run, and biases of windows are given up."""
    student = convert(model, plan, **({"without": ["bias"]} if len(depths(model)) > 1 else {}), **more)
    fit_at_random(converted_layers(student))
    return student.eval()


def save(model: nn.Module, family: str, folder: Path, **changes: Any) -> str:
    name, arguments = described(family)
    return save_folder(model, folder, name, {**arguments, **changes})


def train_a_step(student: nn.Module) -> None:
    """Each parameter gets a finite gradient, but those of projections that an operator of a plain model leaves out."""
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    student.train()(images()).square().mean().backward()
    unused = _unused(student) if hasattr(student, "blocks") else set()
    for name, parameter in student.named_parameters():
        assert name in unused or parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    optimizer.step()
    student.eval()


def _unused(student: nn.Module) -> set[str]:
    return {
        f"blocks.{index}.attn.{name}"
        for index, layer in converted_layers(student).items()
        for name, _ in layer.named_parameters()
        if name[:2] in {f"{part}_" for part in "qkv" if part not in layer.operator.needs}
    }


@pytest.mark.parametrize(
    ("operator", "family"),
    [
        *((operator, family) for operator in TYPICAL for family in FAMILIES),
        *((operator, "eva02") for operator in OTHERS),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in zip(OTHERS, cycle(PLAIN), strict=False)),
        *(
            (operator, kind)
            for operator in ("linear", "attnzero_105", "attnzero_174")
            for kind in pyramids.TINY
        ),
    ],
)
def test_an_operator_in_a_family(operator: str, family: str, tmp_path: Path) -> None:
    plan = f"*: {FIRST[operator]}"
    student = ready(teacher(family), plan)
    train_a_step(student)
    folder = save(student, family, tmp_path / "student")
    logits = student(images())
    loaded = loading.load(folder)
    assert plan_of(loaded) == plan_of(student) == plan
    assert torch.equal(loaded(images()), logits)
    torch.testing.assert_close(copy.deepcopy(student)(images()), logits)
    resize(student, OTHER)
    assert image_size(student) == OTHER
    resized = student(images(OTHER))
    assert resized.isfinite().all()
    assert torch.equal(loading.load(folder, img_size=OTHER)(images(OTHER)), resized)


@pytest.mark.parametrize("family", dense.FAMILIES)
def test_softmax_as_an_operator_gives_the_same_bits(family: str) -> None:
    model = teacher(family)
    layout, shape = token_layout(model), attention_shape(model)
    tokens = TokenGrid(model, Geometry(layout.num_prefix, layout.grid), SIZE)
    expected = model(images())
    assert torch.equal(convert(model, "*: softmax")(images()), expected)
    assert torch.equal(convert(model, "0: keep")(images()), expected)
    model = copy.deepcopy(model)
    for block in model.blocks:
        operator = SoftmaxAttention(LayerShape(shape.num_heads, shape.head_dim, tokens.geometry))
        block.attn = ConvertedAttention(block.attn, operator, Choice("softmax"), tokens)
    assert torch.equal(model(images()), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_plan_keeps_what_it_keeps(family: str, tmp_path: Path) -> None:
    model, names = teacher(family, depth=4), list(FIRST)
    student = ready(model, f"*: {FIRST[names[0]]}; 1: keep; 3: {FIRST[names[-1]]}")
    assert list(converted_layers(student)) == [0, 2, 3]
    assert type(student.blocks[1].attn) is type(model.blocks[1].attn)
    folder = save(student, family, tmp_path / "student", depth=4)
    assert torch.equal(loading.load(folder)(images()), student(images()))


@pytest.mark.parametrize("family", BIASED)
@pytest.mark.parametrize("operator", FIRST)
def test_a_relative_bias_is_refused_or_honoured(operator: str, family: str) -> None:
    model = teacher(family, depth=2)
    if FIRST[operator].build(Geometry(1, (4, 6))).traits.bias:
        assert convert(model, f"*: {FIRST[operator]}")(images()).isfinite().all()
        return
    with pytest.raises(UnsupportedModelError, match=rf"layer 1 has a relative position bias.* {operator} "):
        convert(model, f"1: {FIRST[operator]}")


@pytest.mark.parametrize("operator", TYPICAL)
@pytest.mark.parametrize(
    ("family", "prefix"), [("vit_no_prefix", 0), ("vit", 1), ("deit_distilled", 2), ("dinov2_registers", 5)]
)
def test_prefix_tokens_are_known_to_the_operator(operator: str, family: str, prefix: int) -> None:
    student = ready(teacher(family), f"*: {FIRST[operator]}")
    assert student(images()).isfinite().all()
    for layer in converted_layers(student).values():
        assert layer.geometry == Geometry(prefix, (4, 6))
        assert cast(AttentionOperator, layer.operator).shape.geometry == layer.geometry


@pytest.mark.parametrize("operator", FIRST)
def test_a_resized_student_is_saved_as_it_is(operator: str, tmp_path: Path) -> None:
    student = ready(teacher("vit"), f"*: {FIRST[operator]}")
    resize(student, OTHER)
    folder = save(student, "vit", tmp_path / "student", img_size=OTHER)
    assert torch.equal(loading.load(folder)(images(OTHER)), student(images(OTHER)))
    resize(student, (64, 64))
    assert torch.equal(loading.load(folder, img_size=64)(images((64, 64))), student(images((64, 64))))


@pytest.mark.parametrize("operator", FIRST)
def test_a_free_image_size_reaches_the_operator(operator: str) -> None:
    fixed = ready(teacher("vit"), f"*: {FIRST[operator]}")
    student = convert(teacher("vit", dynamic_img_size=True), f"*: {FIRST[operator]}").eval()
    student.load_state_dict(fixed.state_dict())
    assert torch.equal(student(images()), fixed(images()))
    free = student(images(OTHER))
    assert all(layer.geometry.grid == (6, 3) for layer in converted_layers(student).values())
    assert torch.equal(student(images()), fixed(images()))
    resize(fixed, OTHER)
    torch.testing.assert_close(free, fixed(images(OTHER)), rtol=1e-3, atol=1e-4)


def test_a_plan_changes_the_layers_that_it_names_and_nothing_else() -> None:
    model = teacher("vit", depth=3)
    before = copy.deepcopy(model.state_dict())
    student: Any = convert(model, "1: linear")
    assert plan_of(model) is None
    assert plan_of(student) == "0: softmax; 1: linear; 2: softmax"
    after = student.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert after.keys() - before.keys() == {"blocks.1.attn.operator.choice"}
    tokens = torch.ones(1, 25, 16)
    assert torch.equal(student.blocks[0](tokens), model.blocks[0](tokens))
    assert not torch.allclose(student(images()), model(images()))
    student(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    again = convert(convert(model, "*: linear"), "*: softmax")
    assert plan_of(again) is None
    assert torch.equal(again(images()), model(images()))


def test_a_converted_layer_is_its_equation_in_the_model() -> None:
    layer: Any = convert(teacher("vit"), "*: linear").blocks[0].attn
    tokens = torch.randn(2, 25, 16)
    q, k, v = layer.original.qkv(tokens).reshape(2, 25, 3, 2, 8).permute(2, 0, 3, 1, 4)
    q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k - k.mean(2, keepdim=True)))
    weights = q @ k.transpose(2, 3)
    mapped = (weights / weights.sum(-1, keepdim=True)) @ v
    expected = layer.original.proj(mapped.transpose(1, 2).reshape(2, 25, 16))
    torch.testing.assert_close(layer(tokens), expected, rtol=1e-4, atol=1e-5)


def test_converted_layers_are_no_temporary_hosts() -> None:
    student = convert(teacher("vit"), "0: linear")
    assert plan_of(release_attention(student)) == plan_of(student) is not None
    layer = student.blocks[0].attn
    assert host_attention(student)[0] is layer
    assert release_attention(student).blocks[0].attn is layer


# Which weights a conversion keeps, held against the teacher's, parameter by parameter.


def kept(student: nn.Module, model: nn.Module) -> set[str]:
    """The parameters that are bit for bit the teacher's."""
    own = dict(model.named_parameters())
    return {key for key, value in student.named_parameters() if key in own and torch.equal(value, own[key])}


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_kept_or_fresh(family: str) -> None:
    model = teacher(family, depth=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names = dict(model.named_parameters()).keys()
    assert kept(convert(model, "*: linear"), model) == names
    assert kept(convert(model, "*: linear; 1: keep", weights="none"), model) == set()
    student = convert(model, "1: linear", weights="mlp")
    fresh = {key for key in names if key.startswith("blocks.1.attn.")}
    assert kept(student, model) == names - fresh
    drawn = [value for key, value in student.named_parameters() if key in fresh and key.endswith("weight")]
    assert all(0 < x.std() < 0.03 for x in drawn if x.ndim == 2), "timm draws projections with deviation 0.02"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@kinds
@pytest.mark.parametrize("weights", ["mlp", "none"])
def test_fresh_weights_of_a_pyramid(kind: str, weights: str) -> None:
    model = teacher(kind)
    student = ready(model, "0: linear", weights=weights)
    own = {name for name, _ in student.named_parameters()} & dict(model.named_parameters()).keys()
    changed = own - kept(student, model)
    within = {name for name in changed if name.startswith(f"{sites(model)[0].path}.attn.")}
    assert within
    assert (changed == within) == (weights == "mlp")


@pytest.mark.parametrize(("plan", "weights"), [("*: linear", "none"), ("*: performer", "all")])
def test_a_seed_says_what_is_drawn(plan: str, weights: Any) -> None:
    before = torch.get_rng_state()
    drawn = [convert(teacher("vit"), plan, weights=weights, seed=seed).state_dict() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, drawn[1][key]) for key, value in drawn[0].items())
    assert not all(torch.equal(value, drawn[2][key]) for key, value in drawn[0].items())


def test_operators_have_the_models_dtype_and_device() -> None:
    student = convert(copy.deepcopy(teacher("vit")).double(), "*: hybrid(window=4)")
    assert {parameter.dtype for parameter in new_parameters(student)} == {torch.float64}
    on_meta = convert(copy.deepcopy(teacher("vit")).to("meta"), "*: hybrid(window=4)", weights="mlp")
    assert {parameter.device.type for parameter in on_meta.parameters()} == {"meta"}


# Pyramids.


@kinds
def test_a_layer_of_a_pyramid_is_its_equation_on_the_whole_grid(kind: str) -> None:
    model = pyramids.tiny(kind).double()
    student = convert(model, "*: softmax", without=["bias"]).double()
    site = sites(student)[1]
    layer: Any = site.block(student).attn
    tokens, grid = (
        torch.randn(2, site.shape.geometry.num_tokens, site.width).double(),
        site.shape.geometry.grid,
    )
    given = (tokens.unflatten(1, grid), None) if kind in WINDOWED else (tokens, grid)
    heads = layer.project(*given)
    q, k, v = heads.qkv()
    logits = heads.scale * q @ k.transpose(2, 3) + (0 if heads.bias is None else heads.bias)
    mapped = layer.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer.merge(layer.attend(heads), tokens), mapped)
    own: Any = sites(model)[1].block(model).attn
    weight = torch.cat([own.q.weight, own.kv.weight]) if hasattr(own, "kv") else own.qkv.weight
    assert torch.equal(torch.cat(rows_of(layer)), weight)


def rows_of(layer: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in layer.named_parameters() if name in ("q.weight", "kv.weight", "qkv.weight")]


@pytest.mark.parametrize("kind", ["pvt", "pvt1", "pcpvt", "swin", "swinv2"])
def test_softmax_over_a_grid_of_one_window_is_what_windows_are(kind: str) -> None:
    """One window as large as the grid is the whole grid, with its bias; so is a reduction of nothing."""
    model = pyramids.tiny(
        kind, **({"window_size": 8} if kind in WINDOWED else {"sr_ratios": (1, 1)})
    ).double()
    student, inputs = convert(model, "*: softmax"), images((32, 32)).double()
    torch.testing.assert_close(student(inputs), model(inputs), rtol=1e-10, atol=1e-11)
    assert plan_of(student) == "*: softmax"


@kinds
def test_keep_is_the_layer_as_it_is(kind: str) -> None:
    model = teacher(kind)
    same = convert(model, "*: keep")
    assert plan_of(same) is None
    assert torch.equal(same(images()), model(images()))
    hosts = copy.deepcopy(model)
    host_attention(hosts)
    assert torch.equal(convert(hosts, "*: keep")(images()), model(images())), "hosts do not stay"


@kinds
def test_none_takes_attention_and_norm_out(kind: str, tmp_path: Path) -> None:
    model = copy.deepcopy(teacher(kind))
    student = convert(model, "stage1: none").eval()
    gone = {site.path for site in sites(model) if site.stage == 0}
    lost = tuple(f"{path}.{part}." for path in gone for part in ("attn", "norm1"))
    assert student.state_dict().keys() == {key for key in model.state_dict() if not key.startswith(lost)}
    assert plan_of(student) == ("0: none; 1-2: keep" if len(gone) == 1 else "0-1: none; 2-3: keep")
    folder = save(student, kind, tmp_path / "student")
    assert torch.equal(loading.load(folder)(images()), student(images()))
    student.train()(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    with torch.no_grad():  # the same model, with an attention that gives zeros
        for site in sites(model):
            if site.stage == 0:
                block: Any = site.block(model)
                last = block.norm1 if kind == "swinv2" else block.attn.proj
                last.weight.zero_()
                last.bias.zero_()
    torch.testing.assert_close(student.eval()(images()), model(images()))


class QueriesAndValues(AttentionOperator):
    """An operator that needs no keys, as hashing has none."""

    needs = ("q", "v")

    @property
    def traits(self) -> Traits:
        return Traits()

    def attend(self, heads: Heads) -> Tensor:
        assert heads.q is not None
        return heads.q * heads.values().mean(2, keepdim=True)

    def macs(self, geometry: Geometry) -> int:
        return 0


@kinds
def test_needless_rows_are_dropped(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(OPERATORS, "qv", QueriesAndValues)
    model = teacher(kind)
    for operator, parts in (("qv", 2), ("uniform", 1)):
        student = ready(model, f"*: {operator}")
        for site in sites(student):
            assert sum(len(rows) for rows in rows_of(site.block(student).attn)) == parts * site.width
        student(images()).sum().backward()
        assert all(parameter.grad is not None for parameter in student.parameters())
        folder = save(student, kind, tmp_path / operator)
        assert torch.equal(loading.load(folder)(images()), student(images()))
    own, found = (rows_of(sites(each)[0].block(each).attn)[-1] for each in (model, student))
    assert torch.equal(found, own[-8:]), "what stays are the values"


@pytest.mark.parametrize(("name", "parameters"), [
    ("pvt_v2_b0", 3_136_328), ("pvt_v2_b1", 11_891_368), ("pvt_v2_b2", 20_367_528), ("pvt_v2_b3", 34_084_008),
    ("pvt_v2_b4", 45_665_704), ("twins_svt_small", 21_522_088),
])  # fmt: skip
def test_parameters_of_ecoformer_are_the_published_ones(name: str, parameters: int) -> None:
    """arXiv:2209.09004: stages 1 to 3 have rows of queries and values alone."""
    with without_memory():
        model = timm.create_model(name)
    last = "softmax" if "twins" in name else "keep"
    student = convert(model, f"stage1: hash; stage2: hash; stage3: hash; stage4: {last}")
    assert sum(parameter.numel() for parameter in student.parameters()) == parameters


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_relative_position_bias_is_given_up_only_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match="layer 0 has a relative position bias, which linear"):
        convert(teacher(kind), "*: linear")
    mixed = convert(teacher(kind), "stage1: linear; stage2: softmax", without=["bias"])
    tables = ("relative_position_bias_table", "cpb_mlp")
    names = [name for name, _ in mixed.named_parameters() if any(table in name for table in tables)]
    assert names
    assert all(name.startswith("layers.1.") for name in names)
    with pytest.raises(ConfigError, match="without='bios'; did you mean 'bias'"):
        convert(teacher(kind), "*: softmax", without=["bios"])


@pytest.mark.parametrize("kind", FEW)
def test_a_saved_student_cannot_become_what_it_has_lost(kind: str, tmp_path: Path) -> None:
    student = loading.load(save(ready(teacher(kind), "0: linear; 1: none"), kind, tmp_path / "student"))
    for plan, weights, words in (
        ("0: softmax", "all", "layer 0 was converted to linear and has lost"),
        ("1: linear", "all", "lost its attention"),
        ("2: linear", "mlp", "weights=mlp needs a model that is not converted yet"),
    ):
        with pytest.raises(UnsupportedModelError, match=words):
            convert(student, plan, weights=weights, without=["bias"])  # type: ignore[arg-type]
    assert str(plan_of(ready(student, "2: linear"))).startswith("0: linear; 1: none; 2: linear")
    assert str(plan_of(convert(student, "0: none"))).startswith("0-1: none")


@kinds
def test_calibration_fits_each_layer_to_timms_on_its_own_inputs(kind: str) -> None:
    student = ready(teacher(kind), "*: hedgehog", calibration=dense.images(4, dtype=torch.float32))
    errors = [layer.calibration for layer in converted_layers(student).values()]
    assert all(error is not None and error[1] <= error[0] for error in errors)
    assert any(error is not None and error[1] < error[0] for error in errors)


def test_layers_share_only_within_a_stage() -> None:
    student = convert(teacher("svt"), "*: linformer(sharing=layerwise)")
    layers: Any = converted_layers(student)
    assert [len(list(layer.operator.parameters())) > 0 for layer in layers.values()] == [True, False] * 2
    assert student(images()).shape == (2, 3)


def test_what_cannot_be_converted_is_named() -> None:
    plain = teacher("vit")
    for model, plan, more, error, words in (
        (teacher("pvt"), "stage3: linear", {}, ConfigError, "there is no stage 3; the model has stages 1 to 2"),
        (teacher("pvt"), "0: none(x=1)", {}, ConfigError, "none has no option 'x'"),
        (teacher("pvt", attn_drop_rate=0.1), "*: linear", {}, UnsupportedModelError,
         r"layer 0 has attn_drop 0\.1, and linear has no map"),
        (plain, "0: none", {}, ConfigError, "plan: 'none' takes the attention out of a layer"),
        (plain, "0: linear", {"without": ["bias"]}, ConfigError, "without=bias: a VisionTransformer keeps"),
        (plain, "*: linear", {"weights": "mpl"}, ConfigError, "weights='mpl'; did you mean 'mlp'"),
        (timm.create_model("resnet10t"), "0: linear", {}, UnsupportedModelError, "ResNet is not a supported model"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            convert(model, plan, **more)
    with pytest.raises(UnsupportedModelError, match="images of 4x4 leave no token in stage 2"):
        resize(pyramids.tiny("svt"), 4)


@pytest.mark.parametrize("kind", FEW)
def test_a_converted_pyramid_is_known_as_one(kind: str) -> None:
    student = ready(teacher(kind), "1: linear")
    check_supported(student)
    with pytest.raises(GraftError, match="is a pyramid"):
        check_supported(student, to="copying")
    assert plan_size(student) is None
    assert list(converted_layers(student)) == [1]


@pytest.mark.parametrize("kind", ["pvt", "pvt1", "swin", "swinv2"])
def test_gradient_checkpointing_gives_the_same_gradients(kind: str) -> None:
    gradients = []
    for checkpointed in (False, True):
        student = ready(teacher(kind, drop_path_rate=0.0), "*: linear").train()
        student.set_grad_checkpointing(checkpointed)
        student(images()).square().sum().backward()
        gradients.append([parameter.grad for parameter in student.parameters()])
    torch.testing.assert_close(*gradients)


# Pyramids at another image size: their windows stay, and what was resized is built again from its folder.

PLANS = (None, "*: softmax", "stage2: linear", "0: softmax; 2: none")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(images(LARGER))  # type: ignore[no-any-return]


def written(model: nn.Module, kind: str, folder: Path) -> nn.Module:
    """Return the model as it is loaded from a folder that was described by the arguments of the smaller one."""
    name, arguments = pyramids.TINY[kind][0], pyramids.arguments(kind)
    return loading.load(save_folder(model, folder, name, arguments, {"input_size": (3, *LARGER)}))


@pytest.mark.parametrize("kind", WINDOWED)
def test_windows_stay_as_timms_constructor_makes_them(kind: str) -> None:
    model = pyramids.tiny(kind)
    resize(model, LARGER)
    built = pyramids.tiny(kind, LARGER)
    built.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(built))
    resize(model, (8, 8))  # smaller than a window
    resize(model, LARGER)
    assert torch.equal(logits(model), logits(built)) or kind == "swin"  # whose tables were resampled


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", ["pvt", "svt", "swin", "swinv2"])
def test_a_resized_pyramid_is_built_again_from_its_folder(
    kind: str, plan: str | None, tmp_path: Path
) -> None:
    model = pyramids.tiny(kind)
    model = model if plan is None else convert(model, plan, without=[] if plan == PLANS[1] else ["bias"])
    resize(model, LARGER)
    assert torch.equal(logits(written(model, kind, tmp_path / "folder")), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", WINDOWED)
def test_windows_that_timm_scaled_are_built_again(kind: str, plan: str | None, tmp_path: Path) -> None:
    model: Any = pyramids.tiny(kind)
    model.set_input_size(img_size=LARGER)
    assert model.layers[0].blocks[0].window_size == (4, 3)
    student = model if plan is None else convert(model, plan, without=["bias"])
    loaded = written(student, kind, tmp_path / "folder")
    assert torch.equal(logits(loaded), logits(student))
    assert torch.equal(logits(written(loaded, kind, tmp_path / "again")), logits(student))


def test_images_of_the_teachers_own_size_are_not_said_to_be_resized() -> None:
    """PVTv2 takes images of any size, and this student those of its teacher."""
    norm = Normalization((0.5,), (0.5,))
    assert WholeInput(pyramids.tiny("swin"), pyramids.tiny("pvt"), norm, norm).describe() == []
    assert WholeInput(pyramids.tiny("swin"), pyramids.tiny("pvt", (40, 40)), norm, norm).describe() != []


def test_a_frozen_model_becomes_one_that_learns() -> None:
    model = copy.deepcopy(teacher("vit")).requires_grad_(False)
    assert all(each.requires_grad for each in convert(model, "*: hedgehog").parameters())
    assert not any(each.requires_grad for each in model.parameters())
    model.head.requires_grad_(True)
    student = convert(model, "*: linear")
    assert [name for name, each in student.named_parameters() if each.requires_grad] == [
        "head.weight",
        "head.bias",
    ]


def test_a_gate_follows_the_heads_of_any_operator(tmp_path: Path) -> None:
    """With W = 0 it is 1; with another W it is 2 σ(x W) of the layer's input x, before the projection."""
    model, x = teacher("vit"), images()
    plain, gated = (convert(model, f"*: linear{options}").eval() for options in ("", "(gate=true)"))
    torch.testing.assert_close(gated(x), plain(x))
    layer: Any = gated.blocks[0].attn  # type: ignore[union-attr, index]
    with torch.no_grad():
        layer.operator.output_gate.weight.normal_()
    given = torch.randn(2, 25, layer.proj.in_features, dtype=x.dtype)
    out = layer.operator(layer.heads_of(given)).transpose(1, 2).flatten(2)
    weight = layer.operator.output_gate.weight.to(x.dtype)
    torch.testing.assert_close(layer(given), layer.proj(out * 2 * (given @ weight.T).sigmoid()))
    gated(x).sum().backward()
    assert layer.operator.output_gate.weight.grad.any()
    assert plan_of(gated) == "*: linear(gate=true)"
    assert sum(attention_macs(gated)) - sum(attention_macs(plain)) == 25 * weight.numel()
    assert len(converted_layers(convert(model, "0: softmax(gate=true)"))) == 1
    folder = save(gated.float(), "vit", tmp_path)
    torch.testing.assert_close(loading.load(folder)(x.float()), gated(x.float()))
    with pytest.raises(ConfigError, match="gate"):
        convert(model, "*: linear(gate=2)")


@pytest.mark.parametrize("kind", ["levit", "visformer", "hiera"])
def test_a_layer_that_does_not_show_its_tokens_takes_no_gate(kind: str) -> None:
    model = tiny_families.tiny(kind)
    without = ["bias"] if tiny_families.TINY[kind].gives_up else []
    with pytest.raises(UnsupportedModelError, match="gate=true"):
        convert(model, "*: linear(gate=true)", without=without)


def test_what_a_hook_kept_in_a_model_does_not_keep_it_from_conversion() -> None:
    """A notebook's hook that stores the output of a block leaves a tensor with its graph in the model."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3).eval()
    model.blocks[0].register_forward_hook(lambda block, inputs, out: setattr(block, "seen", out))
    images = torch.randn(2, 3, 32, 32)
    model(images)
    student = convert(model, "*: linear")
    student(images).sum().backward()
    assert all(weight.grad is None for weight in model.parameters())
    assert set(attention_maps(model, images)) == {0, 1}
