"""Multiply-adds and parameters of a model, counted from its layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .attention.base import QKV, Accounting, AttentionOperator, Operations
from .converted import ConvertedAttention, converted_layers
from .copied import CopiedAttention
from .copying.copying_operators import CopyMap
from .copying.teacher_view import LastAttention
from .errors import UnsupportedModelError
from .families import (
    NoAttention,
    Site,
    attention_blocks,
    family_of,
    find_family,
    image_size,
    native_host,
    sites,
    token_layout,
    vit,
    widths,
)
from .host import AttentionHost, GridHost


def counted_macs(step: Callable[[], object]) -> int:
    """Count the multiply-adds of matrix products and convolutions in a step, by `torch.utils.flop_counter`."""
    # torch does not count a product that is added to a tensor in place
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: _product_flops})
    with counter, sdpa_kernel(SDPBackend.MATH):  # the products of fused attention are not counted everywhere
        step()
    return counter.get_total_flops() // 2


def _product_flops(
    _added: Sequence[int], left: Sequence[int], right: Sequence[int], **_others: object
) -> int:
    """Return the operations of a batch of products, of the shapes (Z, N, M) and (Z, M, D)."""
    return 2 * math.prod(left) * right[-1]


def dense_macs(model: nn.Module) -> int:
    """Return the multiply-adds of one image in the patch embedding, the blocks' linear layers and the classifier.

    Together with the attention maps (`attention_macs`) this is the whole model except norms, activations and an
    attention pool. Projections that a copied layer takes from its teacher are not counted.
    """
    geometry = token_layout(model).geometry
    tokens, patches = geometry.num_tokens, geometry.num_patches
    blocks = attention_blocks(model)
    linear = [module for block in blocks for module in _linear(block)]
    heads = [head for name in ("head", "head_dist") for head in _linear(getattr(model, name, None))]
    return (
        patches * int(vit(model).patch_embed.proj.weight.numel())
        + tokens * (sum(layer.weight.numel() for layer in linear) - sum(map(_unused, blocks)))
        + sum(head.weight.numel() for head in heads)
    )


def copied_macs(model: nn.Module) -> tuple[int, int]:
    """Return the multiply-adds of one image in a student that copies attention, and in the part of its teacher."""
    teacher: nn.Module = vit(model).teacher.model
    width = _head_dim(attention_blocks(teacher)[0].attn)
    student = dense_macs(model) + sum(_map_macs(model, block, width) for block in attention_blocks(model))
    beside = sum(_map_macs(teacher, block, width) for block in attention_blocks(teacher)[:-1])
    return student, dense_macs(teacher) + beside


def copied_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of parameters of a student that copies attention, and of the part of its teacher."""
    teacher = sum(parameter.numel() for parameter in vit(model).teacher.parameters())
    return sum(parameter.numel() for parameter in model.parameters()) - teacher, teacher


def _map_macs(model: nn.Module, block: nn.Module, teacher_width: int) -> int:
    """Return the multiply-adds of softmax attention, 2 N² D per head, whichever model computes queries and keys."""
    attention: Any = block.attn
    tokens, own_width = token_layout(model).num_tokens, _head_dim(attention)
    own = 2 * tokens**2 * own_width * int(attention.num_heads)
    if not isinstance(attention, CopiedAttention) or not isinstance(attention.operator, CopyMap):
        return own
    link = attention.operator.link
    matched = len(link.tokens.student.index(tokens))
    copied = 2 * matched**2 * max(teacher_width, own_width) * sum(link.sizes)
    return copied + (own if "q" in attention.operator.taught_needs else 0)


def _head_dim(attention: Any) -> int:
    projection = attention._modules.get("qkv")
    rows = attention.q_proj.out_features if projection is None else projection.out_features // 3
    return int(rows) // int(attention.num_heads)


def _unused(block: nn.Module) -> int:
    """Count the projection weights that a copied layer, or the last layer of a teacher's part, does not use."""
    attention: Any = block.attn
    if isinstance(attention, CopiedAttention):
        needs = attention.operator.taught_needs
    elif isinstance(block, LastAttention):
        needs = block.recorder.needs
    else:
        return 0
    fused = attention._modules.get("qkv")
    parts = [attention._modules.get(f"{part}_proj") for part in QKV if part not in needs]
    return sum(int(fused.weight.numel()) // 3 if part is None else int(part.weight.numel()) for part in parts)


def _linear(module: nn.Module | None) -> list[nn.Linear]:
    """Return the linear layers of the original model, without those of operators."""
    modules = [] if module is None else module.named_modules()
    return [each for name, each in modules if isinstance(each, nn.Linear) and ".operator." not in f".{name}."]


# Count the multiplications and additions of a model for one image, by hooks while it runs on the meta device.
#
# Both accountings leave out GELU, softmax's exponentials and divisions, the sign and residual additions.
#
#     true       linear layers and convolutions: their products, and an addition for each bias. A norm has 3
#                multiplications and 4 additions an element (mean, variance, scale and shift), batch norm at
#                           inference one
#                of each. Operators state their own.
#     published  the rules of EcoFormer's tables: a bias of a convolution is both, that of a linear layer is
#                nothing; a
#                norm has 2 of each an element; softmax also scales each of its logits; squares in the distance of
#                tokens to anchors are additions.

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYER_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


@dataclass
class OperationCount:
    """The operations of a model by kind."""

    linear: Operations = field(default_factory=Operations)
    convolution: Operations = field(default_factory=Operations)
    norm: Operations = field(default_factory=Operations)
    attention: Operations = field(default_factory=Operations)

    @property
    def total(self) -> Operations:
        return self.linear + self.convolution + self.norm + self.attention


def count_operations(model: nn.Module, accounting: Accounting = "true") -> OperationCount:
    """Return the operations of one image of the model's own size. A model without attention has those of its layers.

    Raises UnsupportedModelError: the model does not run at its size, or its attention is not known.
    """
    found = count_layers(model, accounting)
    if find_family(model) is not None:
        found.attention = sum(attention_operations(model, accounting), Operations())
    elif any(hasattr(module, "num_heads") for module in model.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} has attention of a kind whose operations are not known: give a plain vision "
            "transformer, a pyramid (PVT, PVTv2, Twins, Swin, CSwin), or a model without attention"
        )
    return found


def attention_operations(model: nn.Module, accounting: Accounting = "true") -> list[Operations]:
    """Return the operations of each layer's attention without projections; none without attention.

    A layer that is not converted has its native cost: reduced keys, or windows of the padded grid.
    """
    converted, found = converted_layers(model), []
    reads = family_of(model).reads_attention
    for site in sites(model):
        if not reads or isinstance(site.layer(model), NoAttention):
            found.append(Operations())
            continue
        if site.index in converted:
            own = converted[site.index].operator
            found.append(own.operations(site.shape.geometry, accounting) + _gate(own, site))
            continue
        pairs = native_host(model, site.block(model)).all_pairs(site.shape.geometry)
        found.append(softmax_operations(pairs, site.head_dim, accounting))
    return found


def _gate(operator: AttentionOperator, site: Site) -> Operations:
    """Return the operations of the gate after the heads, if there is one."""
    gate, tokens = operator.output_gate, site.shape.geometry.num_tokens
    products = 0 if gate is None else tokens * gate.weight.numel()
    return Operations(products, products)


def softmax_operations(pairs: int, head_dim: int, accounting: Accounting) -> Operations:
    """Return the operations of softmax attention over pairs of a query and a key, of all heads."""
    products = 2 * pairs * head_dim
    return Operations(products + (pairs if accounting == "published" else 0), products)


def count_layers(model: nn.Module, accounting: Accounting = "true") -> OperationCount:
    """Return the operations of all layers but attention, without those of operators.

    Raises UnsupportedModelError: the model does not run at its image size.
    """
    count, called = OperationCount(), set[nn.Module]()

    def see(module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
        called.add(module)
        kind, operations = _operations_of(module, inputs[0], out, accounting)
        setattr(count, kind, getattr(count, kind) + operations)

    hooks = [
        module.register_forward_hook(see)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, *CONVOLUTIONS, *LAYER_NORMS, *BATCH_NORMS))
        and ".operator." not in f".{name}."
    ]
    try:
        _run_on_meta(model)
    finally:
        for hook in hooks:
            hook.remove()
    if find_family(model) is not None:
        count.linear = sum(_uncalled(model, called, accounting), count.linear)
    return count


def _operations_of(module: Any, x: Tensor, out: Tensor, accounting: Accounting) -> tuple[str, Operations]:
    """Return the kind of a layer, and the operations of one call."""
    if isinstance(module, nn.Linear):
        bias = out.numel() if module.bias is not None and accounting == "true" else 0
        products = out.numel() * module.in_features
        return "linear", Operations(products, products + bias)
    if isinstance(module, CONVOLUTIONS):
        products = out.numel() * module.weight[0].numel()
        bias = out.numel() if module.bias is not None else 0
        return "convolution", Operations(
            products + (bias if accounting == "published" else 0), products + bias
        )
    if accounting == "published":
        return "norm", Operations(2 * x.numel(), 2 * x.numel())
    if isinstance(module, BATCH_NORMS):
        return "norm", Operations(x.numel(), x.numel())
    return "norm", Operations(3 * x.numel(), 4 * x.numel())


def _uncalled(model: nn.Module, called: set[nn.Module], accounting: Accounting) -> list[Operations]:
    """Return the operations of fused projections whose weights are used without a call of their module.

    So do BEiT, EVA and Swin V2, and a converted layer that needs only some of queries, keys and values.
    """
    found = []
    for site in sites(model):
        attention = site.layer(model)
        fused = attention._modules.get("qkv")
        if fused is None or not called.isdisjoint(fused.modules()):
            continue
        (rows, inner), biases = widths(fused), 0
        if isinstance(attention, ConvertedAttention) and not isinstance(attention, GridHost):
            rows = rows // 3 * len([part for part in QKV if part in attention.operator.needs])
        tokens = site.shape.geometry.num_tokens
        if not isinstance(attention, AttentionHost):  # timm pads the grid before it projects
            tokens, _ = native_host(model, site.block(model)).native_pairs(site.shape.geometry)
        has_bias = fused.bias is not None or getattr(attention, "q_bias", None) is not None
        if has_bias and accounting == "true":
            biases = tokens * rows
        products = tokens * rows * inner
        found.append(Operations(products, products + biases))
    return found


def _run_on_meta(model: nn.Module) -> None:
    """Run the model on an image without values; operators are left out, which have a count of their own."""
    height, width, channels = _input_of(model)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    empty = {name: tensor.to("meta") for name, tensor in tensors.items()}
    dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
    image = torch.empty(1, channels, height, width, dtype=dtype, device="meta")
    layers = converted_layers(model).values() if find_family(model) is not None else []
    training = model.training
    for layer in layers:
        layer.__dict__["attend"] = lambda heads: heads.known  # has the shape of the output
    try:
        with torch.no_grad():
            functional_call(model.eval(), empty, (image,))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run on images of {height}x{width}: {reason}"
        ) from error
    finally:
        model.train(training)
        for layer in layers:
            del layer.__dict__["attend"]


def _input_of(model: nn.Module) -> tuple[int, int, int]:
    """Return height, width and channels of the model's images."""
    family = find_family(model)
    size = image_size(model) if family is None else family.image_size(model)
    described: Any = getattr(model, "pretrained_cfg", None) or {}
    height, width = size or tuple(described.get("input_size", (3, 224, 224))[1:])
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return int(height), int(width), 3 if first is None else first.in_channels


# Multiply-adds of a model, layer by layer, and of everything but its attention.


def attention_macs(model: nn.Module) -> list[int]:
    """Return the multiply-adds of one image in each layer's attention, without projections; 0 without attention.

    A layer that is not converted has its native cost: reduced keys, or windows of the padded grid.
    """
    converted = converted_layers(model)
    return [
        converted[index].operator.macs(site.shape.geometry) + _gate(converted[index].operator, site).additions
        if index in converted
        else operations.additions
        for index, (site, operations) in enumerate(
            zip(sites(model), attention_operations(model), strict=True)
        )
    ]


def other_macs(model: nn.Module) -> int:
    """Return the multiply-adds of one image in the linear layers and convolutions, without those of operators.

    Raises UnsupportedModelError: the model does not run at its image size.
    """
    count = count_layers(model)
    return (count.linear + count.convolution).multiplications
