"""The models of AttnZero (ECCV 2024): DeiT, PVT and Swin with the attention program `attnzero_105`.

They are models of timm, and our PVT, with a layer plan. PVT has no reduction of keys, no class token and no norm before
the classifier. The other layers of DeiT-B and Swin keep softmax. Layers with a program see the whole grid and have no
relative position bias. Importing this package's models registers them with timm.

| name            | built from                    | layers with the program | parameters | multiply-adds |
| --------------- | ----------------------------- | ----------------------- | ---------- | ------------- |
| attnzero_deit_t | deit_tiny_patch16_224         | all                     | 5,740,456  | 1.138 G       |
| attnzero_deit_s | deit_small_patch16_224        | all                     | 22,096,744 | 4.367 G       |
| attnzero_deit_b | deit_base_patch16_224         | the first 4 of 12       | 86,598,376 | 17.409 G      |
| attnzero_pvt_t  | pvt_tiny                      | all                     | 11,376,872 | 2.024 G       |
| attnzero_pvt_s  | pvt_small                     | all                     | 20,224,936 | 4.005 G       |
| attnzero_pvt_m  | pvt_medium                    | all                     | 35,058,856 | 6.998 G       |
| attnzero_pvt_l  | pvt_large                     | all                     | 47,508,840 | 10.326 G      |
| attnzero_swin_t | swin_tiny_patch4_window7_224  | stages 1 to 3           | 28,301,944 | 4.457 G       |
| attnzero_swin_s | swin_small_patch4_window7_224 | stages 1 and 2          | 49,608,976 | 8.718 G       |
| attnzero_swin_b | swin_base_patch4_window7_224  | stages 1, 2, 2 of 3     | 87,776,680 | 15.396 G      |

Counted with 1,000 classes at 224 x 224. attnzero_swin_b with `img_size=384, window_size=12` has 87,891,880 parameters
and 46.195 G multiply-adds.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from . import pvt_models
from .converted import start_fresh
from .errors import JsonDict
from .families import create_timm_model, is_pyramid
from .plain_conversion import convert_plain
from .pvt_v1 import PVT
from .pyramid_conversion import convert_pyramid

PROGRAM = "attnzero_105"
ALL = f"*: {PROGRAM}"
UNREDUCED: JsonDict = {"sr_ratios": (1, 1, 1, 1), "global_pool": "avg"}
DEIT_NAMES = ("attnzero_deit_t", "attnzero_deit_s", "attnzero_deit_b")
PVT_NAMES = ("attnzero_pvt_t", "attnzero_pvt_s", "attnzero_pvt_m", "attnzero_pvt_l")
SWIN_NAMES = ("attnzero_swin_t", "attnzero_swin_s", "attnzero_swin_b")

default_cfgs = generate_default_cfgs(
    {
        **dict.fromkeys(DEIT_NAMES, pvt_models.described(fixed_input_size=True)),
        **dict.fromkeys(PVT_NAMES, pvt_models.described()),
        **dict.fromkeys(SWIN_NAMES, pvt_models.described(classifier="head.fc")),
    }
)


@register_model
def attnzero_deit_t(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """AttnZero-DeiT-T."""
    return _create("attnzero_deit_t", pretrained, "deit_tiny_patch16_224", ALL, arguments)


@register_model
def attnzero_deit_s(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """AttnZero-DeiT-S."""
    return _create("attnzero_deit_s", pretrained, "deit_small_patch16_224", ALL, arguments)


@register_model
def attnzero_deit_b(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """AttnZero-DeiT-B: layers 4 to 11 have softmax."""
    return _create("attnzero_deit_b", pretrained, "deit_base_patch16_224", f"0-3: {PROGRAM}", arguments)


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


def _create(name: str, pretrained: bool, host: str, plan: str, given: JsonDict) -> nn.Module:
    def build(**arguments: Any) -> nn.Module:
        return _with_program(create_timm_model(host, **arguments), plan)

    pyramid = {} if name in DEIT_NAMES else {"out_indices": (0, 1, 2, 3)}
    features = {"feature_cls": "getter", **pyramid}
    built: nn.Module = build_model_with_cfg(build, name, pretrained, feature_cfg=features, **given)
    return built


def _with_program(model: nn.Module, plan: str) -> nn.Module:
    """Return the model with the operators of the plan, which start as those of a fresh model."""
    if is_pyramid(model):
        if isinstance(model, PVT):
            model.norm = nn.Identity()
        model = convert_pyramid(model, plan, weights="all", calibration=None, without=("bias",))
    else:
        model = convert_plain(model, plan, weights="all", calibration=None)
    start_fresh(model)
    return model
