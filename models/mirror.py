"""Build a student of its own size from the teacher's native parts, freshly initialized.

Attention transfer from DINOv2, CLIP and BEiTv2 into a plain student failed, and worked once the student had the
teacher's own components, randomly initialized (arXiv:2605.07191).
"""

from __future__ import annotations

import inspect

from torch import nn

from .conversion import without_plan
from .errors import Json, JsonDict, TransferError, UnsupportedModelError, check_types
from .families import (
    attention_blocks,
    attention_shape,
    check_supported,
    create_timm_model,
    patch_size,
    sites,
    vit,
)
from .families.plain import (
    ACTIVATIONS,
    constructor_of,
    has_norm,
    hidden_ratio,
    is_post_norm,
    native_parts,
    poolings_of,
)
from .given import Model, as_model
from .small import without_memory


@check_types()
def mirror_arguments(teacher: Model, architecture: str, model_args: Json) -> tuple[str, JsonDict]:
    """Return the timm architecture and arguments of a student with the teacher's parts and its own size.

    Depth, width, heads, image and patch size, pooling and
    number of classes follow them, as does the MLP ratio if both MLPs are of one kind. The returned architecture is the
    teacher's, whose constructor sets the family, the MLP and the rotary embedding. The teacher's native parts override
    `model_args`.

    Args:
        teacher: in any form that `graftvit.as_model` takes.
        architecture: timm architecture of the requested student.
        model_args: arguments of its constructor.

    Raises:
        TransferError: the teacher's family does not take an argument or a size.
    """
    teacher = as_model(teacher, "teacher")
    student = _build_without_memory(architecture, model_args, "student.model")
    for model in (teacher, student):
        try:
            check_supported(model, to="mirroring")
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"student.mirror_teacher=true: {error}") from error
    family = constructor_of(teacher)
    accepted = inspect.signature(family.__init__).parameters
    _refuse_foreign(model_args, accepted, student, family)
    named = {**model_args, **_native(teacher)}
    arguments = {name: value for name, value in named.items() if name in accepted and value is not None}
    arguments |= {**_sizes(teacher, student), "global_pool": _pooling(teacher, student)}
    _build_without_memory(_architecture(teacher), arguments, "student.mirror_teacher=true, the teacher's")
    return _architecture(teacher), arguments


def _build_without_memory(architecture: str, model_args: Json, origin: str) -> nn.Module:
    try:
        with without_memory():
            return create_timm_model(architecture, **model_args)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise TransferError(
            f"{origin} {architecture} cannot be built with {dict(model_args)}: {error}"
        ) from error


def _architecture(teacher: nn.Module) -> str:
    config = getattr(teacher, "default_cfg", None) or {}
    if not config.get("architecture"):
        raise UnsupportedModelError(
            "student.mirror_teacher=true needs a teacher made by timm.create_model, and this "
            f"{type(teacher).__name__} does not know its architecture's name"
        )
    return without_plan(str(config["architecture"]), getattr(teacher, "_model_args", {}))[0]


def _sizes(teacher: nn.Module, student: nn.Module) -> JsonDict:
    shape = attention_shape(student)
    heads = sorted({site.num_heads for site in sites(student)})
    if len(heads) > 1:
        raise TransferError(
            f"student.mirror_teacher=true needs a student whose layers are alike, and this {type(student).__name__} "
            f"has layers of {' and '.join(map(str, heads))} heads: give another student.model"
        )
    height, width = vit(student).patch_embed.img_size
    rows, columns = patch_size(student)
    return {
        "img_size": height if height == width else (height, width),
        "patch_size": rows if rows == columns else (rows, columns),
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.num_heads,
        "mlp_ratio": _mlp_ratio(teacher, student, shape.width),
    }


def _mlp_ratio(teacher: nn.Module, student: nn.Module, width: int) -> float:
    """Return the ratio from which the teacher's constructor computes the exact hidden width."""
    same = native_parts(teacher).mlp == native_parts(student).mlp
    projection = attention_blocks(student if same else teacher)[0].mlp.fc2
    hidden = projection.in_features * width // projection.out_features * hidden_ratio(teacher)
    ratio = float(hidden / width)
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _pooling(teacher: nn.Module, student: nn.Module) -> str:
    """Return the student's pooling; a distilled DeiT can only read its two tokens.

    Raises TransferError: the teacher's family does not have this pooling.
    """
    if getattr(teacher, "dist_token", None) is not None:
        return "token"
    pooling = str(vit(student).global_pool)
    if pooling == "token" and vit(teacher).cls_token is None:
        raise TransferError(
            "student.global_pool=token needs a class token, which the teacher of student.mirror_teacher=true "
            "does not have; use avg"
        )
    known = poolings_of(teacher)
    if known is not None and pooling not in known:
        raise TransferError(
            f"student.global_pool={pooling} is not a pooling of {type(teacher).__name__}, which "
            f"student.mirror_teacher=true builds; valid: {', '.join(filter(None, known))}"
        )
    return pooling


def _native(teacher: nn.Module) -> JsonDict:
    """Return constructor arguments for the teacher's parts, in the names of all families; None for timm's default."""
    parts = native_parts(teacher)
    block = attention_blocks(teacher)[0]
    return {
        "class_token": vit(teacher).cls_token is not None,
        "reg_tokens": parts.registers,
        "num_reg_tokens": parts.registers,
        "no_embed_class": getattr(teacher, "no_embed_class", False),
        "pos_embed": "learn" if "learned absolute" in parts.position else "none",
        "use_abs_pos_emb": "learned absolute" in parts.position,
        "use_rel_pos_bias": "relative bias" in parts.position,
        "use_shared_rel_pos_bias": "shared relative bias" in parts.position,
        "use_rot_pos_emb": "rotary" in parts.position,
        "pre_norm": parts.pre_norm,
        "use_pre_transformer_norm": parts.pre_norm,
        "use_post_norm": is_post_norm(block),
        "qkv_bias": parts.qkv_bias,
        "qkv_fused": block.attn.qkv is not None,
        "qk_norm": parts.qk_norm,
        "scale_attn_norm": parts.attention_norm,
        "scale_attn_inner": parts.attention_norm,
        "scale_mlp_norm": has_norm(block.mlp.norm),
        "scale_mlp": has_norm(block.mlp.norm),
        "swiglu_mlp": parts.mlp.startswith("SwiGLU"),
        "act_layer": parts.activation if parts.activation in ACTIVATIONS.values() else None,
        "init_values": parts.layer_scale,
        "attn_only_layer_scale": parts.layer_scale is not None and getattr(block, "gamma_2", block) is None,
    }


def _refuse_foreign(model_args: Json, accepted: Json, student: nn.Module, family: type[nn.Module]) -> None:
    """Raise TransferError for arguments that the teacher's family does not know and its parts do not replace."""
    for name in model_args:
        if name not in accepted and name not in _native(student):
            raise TransferError(
                f"student.model_args.{name} is not an argument of timm's {family.__name__}, the family that "
                f"student.mirror_teacher=true builds; valid: {', '.join(sorted(set(accepted) - {'self'}))}"
            )
