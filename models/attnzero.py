"""The models of AttnZero (ECCV 2024): DeiT, PVT, Swin, CSwin and AutoFormer with the attention program `attnzero_105`.

They are models of timm, and our PVT, with a layer plan. PVT has no reduction of keys, no class token and no norm before
the classifier. The other layers of DeiT-B and Swin keep softmax. Layers with a program see the whole grid and have no
relative position bias. A class token is one more token of the program. The models whose name ends in `bias` add a table
of positions inside the program; those whose name ends in `140` have `attnzero_140`. In CSwin the layer's own
convolution of the values (LePE) takes the place of the program's. Importing this package's models registers them with
timm.

| name                  | built from                    | layers with the program | parameters | multiply-adds  |
| --------------------- | ----------------------------- | ----------------------- | ---------- | -------------- |
| attnzero_deit_t       | deit_tiny_patch16_224         | all                     | 5,740,456  | 1,137,013,248  |
| attnzero_deit_s       | deit_small_patch16_224        | all                     | 22,096,744 | 4,365,542,400  |
| attnzero_deit_b       | deit_base_patch16_224         | the first 4 of 12       | 86,598,376 | 17,408,268,288 |
| attnzero_deit_t_bias  | deit_tiny_patch16_224         | all                     | 5,920,168  | 1,137,013,248  |
| attnzero_autoformer_t | vit_tiny_patch16_224          | all                     | 5,736,232  | 1,140,983,040  |
| attnzero_pvt_t        | pvt_tiny                      | all                     | 11,376,872 | 2,024,185,344  |
| attnzero_pvt_s        | pvt_small                     | all                     | 20,224,936 | 4,005,209,088  |
| attnzero_pvt_m        | pvt_medium                    | all                     | 35,058,856 | 6,998,458,368  |
| attnzero_pvt_l        | pvt_large                     | all                     | 47,508,840 | 10,325,992,704 |
| attnzero_pvt_t_bias   | pvt_tiny                      | all                     | 11,538,152 | 2,024,185,344  |
| attnzero_swin_t       | swin_tiny_patch4_window7_224  | stages 1 to 3           | 28,301,944 | 4,456,697,856  |
| attnzero_swin_s       | swin_small_patch4_window7_224 | stages 1 and 2          | 49,608,976 | 8,718,296,064  |
| attnzero_swin_b       | swin_base_patch4_window7_224  | stages 1, 2, 2 of 3     | 87,776,680 | 15,395,823,616 |
| attnzero_swin_t_bias  | swin_tiny_patch4_window7_224  | stages 1 to 3           | 28,550,584 | 4,456,697,856  |
| attnzero_cswin_t      | cswin_tiny                    | stages 1 and 2          | 20,393,320 | 4,303,379,968  |
| attnzero_cswin_s      | cswin_small                   | stages 1 and 2          | 32,716,072 | 6,760,624,128  |
| attnzero_cswin_b      | cswin_base                    | stages 1 and 2          | 73,053,640 | 14,866,311,168 |
| attnzero_cswin_t_140  | cswin_tiny                    | stages 1 and 2          | 20,393,320 | 4,303,379,968  |
| attnzero_cswin_s_140  | cswin_small                   | stages 1 and 2          | 32,716,072 | 6,760,624,128  |
| attnzero_cswin_b_140  | cswin_base                    | stages 1 and 2          | 73,053,640 | 14,866,311,168 |

Counted with 1,000 classes at 224 x 224. attnzero_swin_b with `img_size=384, window_size=12` has 87,891,880 parameters
and 46,195,449,856 multiply-adds. AutoFormer-T is a subnet of the space of AutoFormer (Chen et al. 2021,
arXiv:2107.00651): its layers differ in heads and in the width of their MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from . import cswin_models, pvt_models
from .conversion import convert_layers
from .converted import start_fresh
from .errors import ConfigError, JsonDict
from .families import create_timm_model
from .families.plain import plain_block
from .families.pvt import PVT

PROGRAM = "attnzero_105"
WHOLE = f"{PROGRAM}(prefix=program)"
"""The program on all tokens, the class token among them."""
ALL = f"*: {PROGRAM}"
BIASED = f"{PROGRAM}(bias=7)"
UNREDUCED: JsonDict = {"sr_ratios": (1, 1, 1, 1), "global_pool": "avg"}
HEADS = (3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 3, 3)
MLP_RATIOS = (3.5, 3.5, 3, 3.5, 3, 3, 4, 4, 3.5, 4, 3.5, 4, 3.5)
"""Of the layers of AutoFormer-T."""
PLAIN_NAMES = (
    "attnzero_deit_t", "attnzero_deit_s", "attnzero_deit_b", "attnzero_deit_t_bias", "attnzero_autoformer_t",
)  # fmt: skip
PVT_NAMES = ("attnzero_pvt_t", "attnzero_pvt_s", "attnzero_pvt_m", "attnzero_pvt_l", "attnzero_pvt_t_bias")
SWIN_NAMES = ("attnzero_swin_t", "attnzero_swin_s", "attnzero_swin_b", "attnzero_swin_t_bias")
CSWIN_NAMES = tuple(f"attnzero_cswin_{size}{trial}" for trial in ("", "_140") for size in "tsb")
CSWIN_TINY: JsonDict = {"depths": (2, 4, 18, 1), "split_size": (0, 0, 7, 7)}
CSWIN_BIG: JsonDict = {"depths": (3, 6, 29, 2), "split_size": (0, 0, 7, 7)}
CSWIN_PLAN = "stage1-2: {}(local_size=0)"
"""LePE of CSwin is the convolution of the values that the program has elsewhere."""

default_cfgs = generate_default_cfgs(
    {
        **dict.fromkeys(PLAIN_NAMES, pvt_models.described(fixed_input_size=True)),
        **dict.fromkeys(PVT_NAMES, pvt_models.described()),
        **dict.fromkeys(SWIN_NAMES, pvt_models.described(classifier="head.fc")),
        **dict.fromkeys(CSWIN_NAMES, pvt_models.described(**cswin_models.SHOWN)),
    }
)


@register_model
def attnzero_deit_t(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """AttnZero-DeiT-T."""
    return _create("attnzero_deit_t", pretrained, "deit_tiny_patch16_224", f"*: {WHOLE}", arguments)


@register_model
def attnzero_deit_s(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """AttnZero-DeiT-S."""
    return _create("attnzero_deit_s", pretrained, "deit_small_patch16_224", f"*: {WHOLE}", arguments)


@register_model
def attnzero_deit_b(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """AttnZero-DeiT-B: layers 4 to 11 have softmax."""
    return _create("attnzero_deit_b", pretrained, "deit_base_patch16_224", f"0-3: {WHOLE}", arguments)


@register_model
def attnzero_deit_t_bias(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """AttnZero-DeiT-T with a table of positions in each layer."""
    plan = f"*: {PROGRAM}(prefix=program, bias=7)"
    return _create("attnzero_deit_t_bias", pretrained, "deit_tiny_patch16_224", plan, arguments)


@register_model
def attnzero_autoformer_t(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """AttnZero-AutoFormer-T: the mean of the patch tokens goes to the classifier.

    `num_heads` and `mlp_ratio` have a value for each layer.
    """
    shape: JsonDict = {"num_heads": HEADS, "mlp_ratio": MLP_RATIOS, "qkv_bias": False, "global_pool": "avg"}
    given = {**shape, "norm_layer": partial(nn.LayerNorm, eps=1e-5), **arguments}
    return _create("attnzero_autoformer_t", pretrained, "vit_tiny_patch16_224", f"*: {WHOLE}", given)


@register_model
def attnzero_pvt_t(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """AttnZero-PVT-T."""
    return _create("attnzero_pvt_t", pretrained, "pvt_tiny", ALL, {**UNREDUCED, **arguments})


@register_model
def attnzero_pvt_s(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """AttnZero-PVT-S."""
    return _create("attnzero_pvt_s", pretrained, "pvt_small", ALL, {**UNREDUCED, **arguments})


@register_model
def attnzero_pvt_m(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """AttnZero-PVT-M."""
    return _create("attnzero_pvt_m", pretrained, "pvt_medium", ALL, {**UNREDUCED, **arguments})


@register_model
def attnzero_pvt_l(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """AttnZero-PVT-L."""
    return _create("attnzero_pvt_l", pretrained, "pvt_large", ALL, {**UNREDUCED, **arguments})


@register_model
def attnzero_pvt_t_bias(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """AttnZero-PVT-T with a table of positions in each layer."""
    given = {**UNREDUCED, **arguments}
    return _create("attnzero_pvt_t_bias", pretrained, "pvt_tiny", f"*: {BIASED}", given)


@register_model
def attnzero_swin_t(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """AttnZero-Swin-T: stage 4 has softmax within windows."""
    host = "swin_tiny_patch4_window7_224"
    return _create("attnzero_swin_t", pretrained, host, f"stage1-3: {PROGRAM}", arguments)


@register_model
def attnzero_swin_s(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """AttnZero-Swin-S: stages 3 and 4 have softmax within windows."""
    host = "swin_small_patch4_window7_224"
    return _create("attnzero_swin_s", pretrained, host, f"stage1-2: {PROGRAM}", arguments)


@register_model
def attnzero_swin_b(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """AttnZero-Swin-B: stage 4, and stage 3 from its third block on, have softmax within windows."""
    host, plan = "swin_base_patch4_window7_224", f"stage1-2: {PROGRAM}; stage3.0-1: {PROGRAM}"
    return _create("attnzero_swin_b", pretrained, host, plan, arguments)


@register_model
def attnzero_swin_t_bias(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """AttnZero-Swin-T with a table of positions in each layer that has the program."""
    host = "swin_tiny_patch4_window7_224"
    return _create("attnzero_swin_t_bias", pretrained, host, f"stage1-3: {BIASED}", arguments)


@register_model
def attnzero_cswin_t(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """AttnZero-CSwin-T: stages 3 and 4 have softmax within stripes."""
    return _create(
        "attnzero_cswin_t", pretrained, "cswin_tiny", CSWIN_PLAN.format(PROGRAM), {**CSWIN_TINY, **arguments}
    )


@register_model
def attnzero_cswin_s(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """AttnZero-CSwin-S: stages 3 and 4 have softmax within stripes."""
    return _create(
        "attnzero_cswin_s", pretrained, "cswin_small", CSWIN_PLAN.format(PROGRAM), {**CSWIN_BIG, **arguments}
    )


@register_model
def attnzero_cswin_b(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """AttnZero-CSwin-B: stages 3 and 4 have softmax within stripes."""
    return _create(
        "attnzero_cswin_b", pretrained, "cswin_base", CSWIN_PLAN.format(PROGRAM), {**CSWIN_BIG, **arguments}
    )


@register_model
def attnzero_cswin_t_140(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """AttnZero-CSwin-T with the program 140: stages 3 and 4 have softmax within stripes."""
    return _create(
        "attnzero_cswin_t_140",
        pretrained,
        "cswin_tiny",
        CSWIN_PLAN.format("attnzero_140"),
        {**CSWIN_TINY, **arguments},
    )


@register_model
def attnzero_cswin_s_140(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """AttnZero-CSwin-S with the program 140: stages 3 and 4 have softmax within stripes."""
    return _create(
        "attnzero_cswin_s_140",
        pretrained,
        "cswin_small",
        CSWIN_PLAN.format("attnzero_140"),
        {**CSWIN_BIG, **arguments},
    )


@register_model
def attnzero_cswin_b_140(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """AttnZero-CSwin-B with the program 140: stages 3 and 4 have softmax within stripes."""
    return _create(
        "attnzero_cswin_b_140",
        pretrained,
        "cswin_base",
        CSWIN_PLAN.format("attnzero_140"),
        {**CSWIN_BIG, **arguments},
    )


def _create(name: str, pretrained: bool, host: str, plan: str, given: JsonDict) -> nn.Module:
    def build(**arguments: Any) -> nn.Module:
        if name == "attnzero_autoformer_t":
            arguments = _layer_by_layer(**arguments)
        return _with_program(create_timm_model(host, **arguments), plan)

    pyramid = {} if name in PLAIN_NAMES else {"out_indices": (0, 1, 2, 3)}
    features = {"feature_cls": "getter", **pyramid}
    return build_model_with_cfg(build, name, pretrained, feature_cfg=features, **given)


def _layer_by_layer(num_heads: Sequence[int], mlp_ratio: Sequence[float], **arguments: Any) -> JsonDict:
    """Return the arguments of a vision transformer whose layers have their own heads and width of the MLP.

    Raises ConfigError: the numbers are of different numbers of layers, or the width is no multiple of the heads.
    """
    if len(num_heads) != len(mlp_ratio):
        raise ConfigError(
            f"num_heads has values for {len(num_heads)} layers, and mlp_ratio for {len(mlp_ratio)}: give one for each"
        )
    width = arguments.get("embed_dim", 192)
    for heads in num_heads:
        if width % heads:
            raise ConfigError(f"num_heads={heads} in a layer of width {width}; give a divisor of it")
    layers = iter(zip(num_heads, mlp_ratio, strict=True))

    def block(**given: Any) -> nn.Module:
        heads, ratio = next(layers)
        return plain_block(**{**given, "num_heads": heads, "mlp_ratio": ratio})

    return {"fc_norm": False, **arguments, "depth": len(num_heads), "block_fn": block}


def _with_program(model: nn.Module, plan: str) -> nn.Module:
    """Return the model with the operators of the plan, which start as those of a fresh model."""
    if isinstance(model, PVT):
        model.norm = nn.Identity()
    model = convert_layers(model, plan, without=("bias",))
    start_fresh(model)
    return model
