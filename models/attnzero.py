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
AUTOFORMER: JsonDict = {
    "num_heads": (3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 3, 3),
    "mlp_ratio": (3.5, 3.5, 3, 3.5, 3, 3, 4, 4, 3.5, 4, 3.5, 4, 3.5),
    "qkv_bias": False,
    "global_pool": "avg",
}
"""Of AutoFormer-T: `num_heads` and `mlp_ratio` have a value for each layer."""
CSWIN_TINY: JsonDict = {"depths": (2, 4, 18, 1), "split_size": (0, 0, 7, 7)}
CSWIN_BIG: JsonDict = {"depths": (3, 6, 29, 2), "split_size": (0, 0, 7, 7)}
CSWIN_PLAN = "stage1-2: {}(local_size=0)"
"""LePE of CSwin is the convolution of the values that the program has elsewhere."""
BUILT: dict[str, tuple[str, str, JsonDict]] = {
    "attnzero_deit_t": ("deit_tiny_patch16_224", f"*: {WHOLE}", {}),
    "attnzero_deit_s": ("deit_small_patch16_224", f"*: {WHOLE}", {}),
    "attnzero_deit_b": ("deit_base_patch16_224", f"0-3: {WHOLE}", {}),
    "attnzero_deit_t_bias": ("deit_tiny_patch16_224", f"*: {PROGRAM}(prefix=program, bias=7)", {}),
    "attnzero_autoformer_t": ("vit_tiny_patch16_224", f"*: {WHOLE}", AUTOFORMER),
    "attnzero_pvt_t": ("pvt_tiny", ALL, UNREDUCED),
    "attnzero_pvt_s": ("pvt_small", ALL, UNREDUCED),
    "attnzero_pvt_m": ("pvt_medium", ALL, UNREDUCED),
    "attnzero_pvt_l": ("pvt_large", ALL, UNREDUCED),
    "attnzero_pvt_t_bias": ("pvt_tiny", f"*: {BIASED}", UNREDUCED),
    "attnzero_swin_t": ("swin_tiny_patch4_window7_224", f"stage1-3: {PROGRAM}", {}),
    "attnzero_swin_s": ("swin_small_patch4_window7_224", f"stage1-2: {PROGRAM}", {}),
    "attnzero_swin_b": (
        "swin_base_patch4_window7_224", f"stage1-2: {PROGRAM}; stage3.0-1: {PROGRAM}", {},
    ),
    "attnzero_swin_t_bias": ("swin_tiny_patch4_window7_224", f"stage1-3: {BIASED}", {}),
    **{
        f"attnzero_cswin_{size[0]}{end}": (f"cswin_{size}", CSWIN_PLAN.format(program), shape)
        for end, program in (("", PROGRAM), ("_140", "attnzero_140"))
        for size, shape in (("tiny", CSWIN_TINY), ("small", CSWIN_BIG), ("base", CSWIN_BIG))
    },
}  # fmt: skip
"""By name: what it is built from, its plan, and the arguments that make it the published size."""


def _described(name: str) -> JsonDict:
    if name.startswith("attnzero_cswin"):
        return pvt_models.described(**cswin_models.SHOWN)
    more = (
        {"classifier": "head.fc"} if "swin" in name else {} if "pvt" in name else {"fixed_input_size": True}
    )
    return pvt_models.described(**more)


default_cfgs = generate_default_cfgs({name: _described(name) for name in BUILT})


def _create(
    name: str, host: str, plan: str, shape: JsonDict, /, pretrained: bool = False, **given: Any
) -> nn.Module:
    def build(**arguments: Any) -> nn.Module:
        if name == "attnzero_autoformer_t":
            arguments = _layer_by_layer(**arguments)
        return _with_program(create_timm_model(host, **arguments), plan)

    features = {"feature_cls": "getter"} if "patch16" in host else {**pvt_models.FOUR}
    return build_model_with_cfg(build, name, pretrained, feature_cfg=features, **{**shape, **given})


for _name, _built in BUILT.items():
    register_model(pvt_models.as_constructor(_create, _name, *_built))


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

    return {
        "fc_norm": False,
        "norm_layer": partial(nn.LayerNorm, eps=1e-5),
        **arguments,
        "depth": len(num_heads),
        "block_fn": block,
    }


def _with_program(model: nn.Module, plan: str) -> nn.Module:
    """Return the model with the operators of the plan, which start as those of a fresh model."""
    if isinstance(model, PVT):
        model.norm = nn.Identity()
    model = convert_layers(model, plan, without=("bias",))
    start_fresh(model)
    return model
