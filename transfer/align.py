"""Alignment: every converted layer learns, on the teacher's own inputs, to do what the teacher's layer does.

The teacher runs once without gradients. At each converted layer the student's layer gets the same input, so the
layers learn independently of one another and no gradient passes between them; no label is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.attention.base import AttentionOperator, FirstRows, Geometry, Heads, LowRank, Sparse, Term
from ..models.attention.fused import apply_map, map_logsumexp
from ..models.attention.kernels import precise, same_dtype
from ..models.attention.softmax import softmax_rows
from ..models.conversion import ConvertedAttention, converted_layers
from ..models.copying.teacher_view import (
    TokensOnly,
    shallow,
    truncated,
)
from ..models.errors import JsonDict, TransferError, check_types, did_you_mean
from ..models.families import (
    Site,
    TokenLayout,
    attention_place,
    blocks_of,
    check_size,
    check_supported,
    depths,
    family_of,
    layout_of,
    native_host,
    refuse_replaced,
    sites,
    whole_grid,
)
from ..models.given import Model, as_model, check_images
from ..models.host import AttentionHost
from ..models.merges import describe_unequal
from .mode_config import MatchName

# Whether a student is a conversion of its teacher, layer by layer.


def check_alike(teacher: nn.Module, student: nn.Module, layers: Collection[int]) -> None:
    """Raise TransferError unless these `layers` have the same heads, widths and tokens in teacher and student."""
    if family_of(teacher) is not family_of(student) or depths(teacher) != depths(student):
        words = [f"a {type(model).__name__} of {depths(model)} blocks" for model in (teacher, student)]
        raise TransferError(
            f"the teacher is {words[0]} and the student {words[1]}: give the model that the student was converted from"
        )
    for theirs, ours in zip(sites(teacher), sites(student), strict=True):
        layouts = layout_of(teacher, theirs), layout_of(student, ours)
        sizes = (theirs.width, theirs.shape, layouts[0]), (ours.width, ours.shape, layouts[1])
        if ours.index in layers and sizes[0] != sizes[1]:
            raise TransferError(
                f"layer {ours.index} has {_sizes(theirs, layouts[0])} in the teacher and {_sizes(ours, layouts[1])} in "
                f"the student: {_advice(teacher, student)}"
            )


def _advice(teacher: nn.Module, student: nn.Module) -> str:
    """Return what to do about layers of other sizes: where merging alone makes them so, the teacher is not wrong."""
    sizes = [family_of(model).image_size(model) for model in (teacher, student)]
    merging = describe_unequal(teacher, student) if sizes[0] == sizes[1] else ""
    if merging:
        return f"{merging}; train with mode=transfer and transfer.method=feature, which needs no equal grids"
    return "give the model that the student was converted from, and leave teacher.img_size out"


def _sizes(site: Site, layout: TokenLayout) -> str:
    tokens = " + ".join((*layout.prefix, f"{layout.grid[0]}x{layout.grid[1]}"))
    return f"{site.num_heads} heads of {site.head_dim}, width {site.width} and {tokens} tokens"


# ‖A_t − A_s‖²_F of a teacher's softmax map and a student's map in terms, without forming either.
#
# With A_s = Σ terms,
#
#     ‖A_t − A_s‖² = ‖A_t‖² − 2 Σ ⟨A_t, term⟩ + Σ Σ ⟨term, term'⟩.
#
# ‖A_t‖² is a sum over rows of exp(lse(2 s Q Kᵀ) − 2 lse(s Q Kᵀ)), two log-sum-exps. For a low-rank term L Rᵀ,
# ⟨A_t, L Rᵀ⟩ = ⟨L, A_t R⟩, where A_t R is fused attention with R as its values, and the inner product of two of
# them is the trace of (L₁ᵀ L₂)(R₂ᵀ R₁). Sparse terms and the rows of prefix tokens are small as they are. All is
# linear in the number of tokens N, and exact.
#
# Shape suffixes: B batch, H heads, N tokens, D head width, S columns of a sparse row, P prefix rows.


def squared_distance(teacher: Heads, terms: list[Term]) -> Tensor:
    """‖A_t − A_s‖²_F of each image and head, (B, H), in float32 at least; the gradient is that of the terms."""
    terms = [_precise(term) for term in terms]
    lse_BHN = _logsumexp(teacher, 1.0)
    own = (_logsumexp(teacher, 2.0) - 2 * lse_BHN).exp().sum(-1)
    cross = torch.stack([_with_teacher(teacher, lse_BHN, term) for term in terms]).sum(0)
    pairs = [inner(a, b) for index, a in enumerate(terms) for b in terms[index + 1 :]]
    squares = torch.stack([inner(term, term) for term in terms]).sum(0)
    mixed = torch.stack(pairs).sum(0) if pairs else 0.0
    return own - 2 * cross + squares + 2 * mixed


def inner(a: Term, b: Term) -> Tensor:
    """⟨a, b⟩ of two terms as matrices, (B, H)."""
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        left = a.left.transpose(2, 3) @ b.left
        right = a.right.transpose(2, 3) @ b.right
        return (left * right).sum((2, 3))
    if isinstance(a, FirstRows) and isinstance(b, FirstRows):
        rows = min(a.weights.shape[2], b.weights.shape[2])
        return (a.weights[:, :, :rows] * b.weights[:, :, :rows]).sum((2, 3))
    if isinstance(a, Sparse) and isinstance(b, Sparse):
        if a is b and a.unique:
            return a.weights.square().sum((2, 3))
        same = (a.index[..., :, None] == b.index[..., None, :]).to(a.weights.dtype)
        shape = "nst" if same.dim() == 3 else "bhnst"
        return torch.einsum(f"bhns,{shape},bhnt->bh", a.weights, same, b.weights)
    if isinstance(b, LowRank) or isinstance(a, FirstRows):
        return inner(b, a)
    if isinstance(a, LowRank):
        if isinstance(b, FirstRows):
            rows = b.weights.shape[2]
            return (a.left[:, :, :rows] * (b.weights @ a.right)).sum((2, 3))
        return torch.einsum("bhns,bhnr,bhnsr->bh", b.weights, a.left, b.pick(a.right))
    rows = b.weights.shape[2]
    picked = b.weights.gather(3, a.columns()[:, :, :rows])
    return (a.weights[:, :, :rows] * picked).sum((2, 3))


def _with_teacher(teacher: Heads, lse_BHN: Tensor, term: Term) -> Tensor:
    """⟨A_t, term⟩, (B, H)."""
    q_BHND, k_BHND = teacher.qk()
    if isinstance(term, LowRank):
        mixed = apply_map(q_BHND, k_BHND, term.right, teacher.scale, teacher.bias)
        return (term.left * mixed).sum((2, 3))
    if isinstance(term, FirstRows):
        rows = torch.arange(term.weights.shape[2], device=q_BHND.device)
        return (term.weights * softmax_rows(teacher, rows)).sum((2, 3))
    logits_BHNS = _logits_at(teacher, term, lse_BHN.dtype)
    return (term.weights * (logits_BHNS - lse_BHN[..., None]).exp()).sum((2, 3))


def _logits_at(teacher: Heads, term: Sparse, dtype: torch.dtype) -> Tensor:
    """s q_i·k_j + b_ij for the columns j of the term, of what the kernel takes q, k and b for, yet summed precisely:
    exp(logit − lse) is at most 1 only where both are rounded alike."""
    q_BHND, k_BHND = teacher.qk()
    q_BHND, k_BHND, _, bias = same_dtype(q_BHND, k_BHND, k_BHND, teacher.bias)
    keys_BHNSD = term.pick(k_BHND).to(dtype)
    with torch.autocast(q_BHND.device.type, enabled=False):
        logits = teacher.scale * torch.einsum("bhnd,bhnsd->bhns", q_BHND.to(dtype), keys_BHNSD)
    if bias is None:
        return logits
    columns = term.columns()
    return logits + bias.expand(len(columns), -1, -1, -1).gather(3, columns)


def _logsumexp(teacher: Heads, factor: float) -> Tensor:
    q, k = teacher.qk()
    bias = None if teacher.bias is None else factor * teacher.bias.detach()
    return map_logsumexp(q.detach(), k.detach(), factor * teacher.scale, bias)


def _precise(term: Term) -> Term:
    """Return the term in float32, whose products would overflow in half precision."""
    if isinstance(term, LowRank):
        return LowRank(precise(term.left), precise(term.right))
    if isinstance(term, Sparse):
        return Sparse(precise(term.weights), term.index, term.unique)
    return FirstRows(precise(term.weights))


# What a converted layer is pulled towards, given the projections of the teacher's layer and its own.
#
# Each loss takes the operator, the student's heads and what the teacher's layer does, and gives a float32
# scalar: a mean over images and heads. No N x N map is formed, save the few rows that `rows` samples.

NUM_PROBES = 8
NUM_ROWS = 32
SMALLEST = 1e-12
"""No probability is taken to be smaller, so that the logarithm of a key out of reach is finite."""


class LayerTarget(NamedTuple):
    """What a layer of the teacher does on a batch."""

    heads: Heads
    """Its projections, without gradients."""
    output: Tensor
    """Its output (B, H, N, D) before the output projection: A_t V_t, within windows or of reduced keys as in timm."""


LayerLoss = Callable[[AttentionOperator, Heads, LayerTarget], Tensor]


def output_error(operator: AttentionOperator, student: Heads, teacher: LayerTarget) -> Tensor:
    """Mean squared error of the layer's output to A_t V_t, per head and before the output projection.

    The loss of LoLCATs (arXiv 2410.10254); the only one for operators that are not linear in V.
    """
    return F.mse_loss(precise(operator(student)), precise(teacher.output.detach()))


def map_error(operator: AttentionOperator, student: Heads, teacher: LayerTarget) -> Tensor:
    """‖A_t − A_s‖²_F / N, exact: the loss of MOHAWK (arXiv 2408.10189) without its maps."""
    terms = operator.terms(student)
    return squared_distance(teacher.heads, terms).mean() / teacher.heads.known.shape[2]


def probe_error(operator: AttentionOperator, student: Heads, teacher: LayerTarget) -> Tensor:
    """‖(A_t − A_s) P‖²_F / (r N) with fresh P ∈ {±1}^(N x r): an unbiased estimate of `map_error`."""
    q, k, v = teacher.heads.qkv()
    shape = (1, 1, q.shape[2], NUM_PROBES)
    signs = torch.randint(0, 2, shape, device=q.device).to(q.dtype).mul(2).sub(1)
    probes = signs.expand(*q.shape[:2], -1, -1)
    target = apply_map(q, k, probes, teacher.heads.scale, teacher.heads.bias)
    out = operator.attend(student.with_values(probes.to(v.dtype)))
    error = (precise(out) - precise(target)).square().sum((2, 3)).mean()
    return error / (NUM_PROBES * q.shape[2])


def row_error(operator: AttentionOperator, student: Heads, teacher: LayerTarget) -> Tensor:
    """Return cross-entropy of sampled rows of the student's map to the teacher's: of all prefix tokens and of random
    patches, fresh each step. The loss of Hedgehog (arXiv 2402.04347), on a sample."""
    tokens = teacher.heads.known.shape[2]
    prefix = 0 if student.geometry is None else student.geometry.num_prefix
    device = teacher.heads.known.device
    patches = torch.randperm(tokens - prefix, device=device)[: max(1, NUM_ROWS - prefix)] + prefix
    index = torch.cat([torch.arange(prefix, device=device), patches])
    target = softmax_rows(teacher.heads, index).detach()
    rows = precise(operator.rows(student, index)).clamp_min(SMALLEST)
    return -(target * rows.log()).sum(-1).mean()


LAYER_LOSSES: dict[str, LayerLoss] = {
    "output": output_error,
    "map": map_error,
    "probes": probe_error,
    "rows": row_error,
}


def check_layer_loss(
    name: str, layer: int, choice: str, operator: AttentionOperator, *, whole_maps: bool = True
) -> None:
    """Raise TransferError if the loss does not exist, or the layer of the student or of the teacher has no such thing.

    `whole_maps` says that the teacher's layer has a map of all pairs of tokens, without windows or reduced keys.
    """
    if name not in LAYER_LOSSES:
        raise TransferError(f"align.match={name}; {did_you_mean(name, LAYER_LOSSES)}")
    if name != "output" and not whole_maps:
        raise TransferError(
            f"align.match={name}: layer {layer} of the teacher has windows, reduced keys, mixed heads or a relative "
            "position bias, and so no map of all pairs of tokens to compare; use output"
        )
    traits = operator.traits
    if name != "output" and not traits.linear_in_v:
        why = f" ({operator.why_no_map})" if operator.why_no_map else ""
        raise TransferError(
            f"align.match={name}: {choice} of layer {layer} is not linear in V and has no map{why}; use output"
        )
    if name == "map" and type(operator).terms is AttentionOperator.terms:
        raise TransferError(
            f"align.match=map reads the method `terms`, which {type(operator).__name__} of layer {layer} lacks: define "
            "it, or use probes or output"
        )
    if name == "rows" and not (traits.nonnegative and traits.row_stochastic):
        raise TransferError(
            f"align.match=rows: the rows of {choice} in layer {layer} are no distributions, so they have no "
            "cross-entropy; use output, map or probes"
        )


def can_learn(name: str, operator: AttentionOperator) -> bool:
    """Return whether a parameter changes the loss; only `output` depends on values, the map of `uniform` on nothing."""
    return (
        name == "output"
        or not {"q", "k"}.isdisjoint(operator.needs)
        or any(True for _ in operator.parameters())
    )


class LayerLesson(NamedTuple):
    """What a layer of the teacher is given on a batch, which the student's layer is given too, and what it does."""

    inputs: tuple[Any, ...]
    keywords: JsonDict
    target: LayerTarget


class AlignedLayer(nn.Module):
    """The teacher's layer, which keeps what the student's layer of the same depth learns from."""

    def __init__(self, native: AttentionHost) -> None:
        super().__init__()
        self.native = native
        self.lesson: LayerLesson | None = None

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        heads = self.native.heads_of(*inputs, **keywords)
        target = LayerTarget(heads, self.native.attend(heads))
        self.lesson = LayerLesson(inputs, keywords, target)
        out = self.native.with_local(target.output, heads)
        return self.native.merge(out, next(iter((*inputs, *keywords.values()))))


class Alignment(nn.Module):
    """Losses of all converted layers of `student` on the inputs of `teacher`; `forward(images)` gives them by layer.

    Teacher and student have the same depth, heads and tokens, as a model and its conversion do. The teacher is
    frozen, never registered, and stops after the last converted layer; a pyramid runs to its last block.

    Args:
        teacher: the model that the student was converted from, in any form that `graftvit.as_model` takes.
        student: the converted model, in the same forms.
        loss: of each layer, where its operator takes it: "output", the output error; "map", the exact map error;
            "probes", its estimate by random probes; "rows", the cross-entropy of sampled rows.

    Raises:
        TransferError: nothing is converted, the two differ, the loss is not one of an operator, or no layer can learn.
        UnsupportedModelError: no adapter covers the teacher.
    """

    @check_types("loss")
    def __init__(self, teacher: Model, student: Model, loss: MatchName = "output") -> None:
        super().__init__()
        teacher, student = as_model(teacher, "teacher"), as_model(student, "student")
        layers = converted_layers(student)
        check_supported(teacher)
        refuse_replaced(teacher)
        if converted_layers(teacher):
            raise TransferError("the teacher is converted itself: give the model that it was converted from")
        if not layers:
            raise TransferError("nothing to align: no layer of the student is converted; give it a plan")
        check_alike(teacher, student, layers)
        for index, layer in layers.items():
            site = sites(teacher)[index]
            whole = native_host(teacher, site.block(teacher)).has_whole_map(site.shape.geometry)
            check_layer_loss(loss, index, str(layer.choice), layer.operator, whole_maps=whole)
        self._learning = [layer for layer in layers.values() if can_learn(loss, layer.operator)]
        if not self._learning:
            names = ", ".join(sorted({str(layer.choice) for layer in layers.values()}))
            raise TransferError(
                f"align.match={loss}: the maps of {names} depend on no parameter, so no layer would learn; use output"
            )
        if not any(each.requires_grad for each in self.used_parameters()):
            raise TransferError(
                "every weight that this loss depends on is frozen, so nothing would learn: call requires_grad_(True) "
                "of the student"
            )
        self.student = student
        self._loss = LAYER_LOSSES[loss]
        self._hosts: dict[int, AlignedLayer] = {}
        self._view = (self._viewed(teacher, layers),)

    @property
    def layers(self) -> list[int]:
        """Return the numbers of the layers that learn."""
        return list(self._hosts)

    def _viewed(self, teacher: nn.Module, layers: dict[int, ConvertedAttention]) -> TokensOnly:
        """Return the teacher up to its last layer that teaches."""
        blocks: list[nn.Module] = []
        for index, block in enumerate(blocks_of(teacher)[: max(layers) + 1]):
            twin = shallow(whole_grid(block) if index in layers else block)
            if index in layers:
                self._hosts[index] = AlignedLayer(family_of(teacher).host(teacher, block))
                twin._modules[attention_place(twin)] = self._hosts[index]
            blocks.append(twin)
        return truncated(teacher, blocks).eval()

    def forward(self, images: Tensor, taught: Mapping[int, LayerLesson] | None = None) -> dict[int, Tensor]:
        """Return the loss of each converted layer, a float32 scalar with a gradient for that layer alone.

        With `taught`, which `teach` of an alignment of the same layers gave for these images, the teacher does not run.
        """
        (view,) = self._view
        check_images(images, self.student)
        check_size(self.student, (images.shape[-2], images.shape[-1]))
        self._take_grid(view.model, (images.shape[-2], images.shape[-1]))
        layers, losses = converted_layers(self.student), {}
        for index, (inputs, keywords, target) in (self.teach(images) if taught is None else taught).items():
            heads = layers[index].heads_of(*inputs, **keywords)
            losses[index] = self._loss(layers[index].operator, heads, target)
        return losses

    def teach(self, images: Tensor) -> dict[int, LayerLesson]:
        """Return what passes through the teacher's layers, by layer, on images (B, C, H, W) as it wants them."""
        with torch.no_grad():
            self._view[0](images)
        lessons = {}
        for index, host in self._hosts.items():
            assert host.lesson is not None
            lessons[index], host.lesson = host.lesson, None
        return lessons

    def _take_grid(self, teacher: nn.Module, images: tuple[int, int]) -> None:
        """Give the grid of these images to the student's operators that read it from their model, which does not run.

        TransferError where the student has one grid, and this is another.
        """
        layers = {
            index: layer for index, layer in converted_layers(self.student).items() if not layer.gets_grid
        }
        if not layers:
            return
        stages, places = family_of(teacher).geometries(teacher, images), sites(self.student)
        is_strict = family_of(self.student).is_strict(self.student)
        for index, layer in layers.items():
            grid, own = stages[places[index].stage].grid, places[index].shape.geometry.grid
            if grid != own and is_strict:
                raise TransferError(
                    f"images of {images[0]}x{images[1]} have the patch grid {grid[0]}x{grid[1]} in the teacher, and "
                    f"the student has {own[0]}x{own[1]} alone: align them on images of the student's size"
                )
            layer.tokens.geometry = Geometry(layer.tokens.geometry.num_prefix, grid)

    def used_parameters(self) -> list[nn.Parameter]:
        """Return the student's parameters that a loss depends on: of layers that learn, all but the output
        projection."""
        return [
            parameter
            for layer in self._learning
            for name, child in layer.named_children()
            if name not in layer.after_heads
            for parameter in child.parameters()
        ] + [p for layer in self._learning for p in layer.parameters(recurse=False)]

    def freeze_others(self) -> None:
        """Freeze all parameters of the student but those that a loss depends on."""
        used = {id(parameter) for parameter in self.used_parameters()}
        for parameter in self.student.parameters():
            parameter.requires_grad_(id(parameter) in used)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Alignment:
        self._view[0]._apply(fn)  # the teacher is no part of the module, but goes where it goes
        super()._apply(fn, recurse)
        return self
