"""How far a student's features are from its teacher's, in sums over batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.attention.kernels import precise
from ...models.copying.grids import GridRule, TokenMatch, match_tokens
from ...models.copying.tape import LayerPair
from ...models.errors import DataError, TransferError, UnsupportedModelError
from ...models.families import (
    attention_blocks,
    attention_shape,
    check_supported,
    pooling_of,
    token_layout,
    vit,
)
from ..methods.pairs import resolve_layers

# Weighted nearest neighbors: predict the classes of images from the features of a frozen model.

NEIGHBORS = 20
TEMPERATURE = 0.07
ROWS = 64
"""Images whose similarities to all training images are held at a time."""


class NearestNeighbors:
    """The classifier of instance discrimination (arXiv:1805.01978), with the values of DINO (arXiv:2104.14294).

    With f(x) the features divided by their length and N the k training images nearest to x by s_i = f(x)·f(x_i),
    class c gets Σ_{i in N, y_i = c} exp(s_i / T) votes; k = 20, T = 0.07. `features_ND` and `labels_N` are those of
    the training images. The result is (B, classes).
    """

    def __init__(
        self,
        features_ND: Tensor,
        labels_N: Tensor,
        num_classes: int,
        *,
        neighbors: int = NEIGHBORS,
        temperature: float = TEMPERATURE,
    ) -> None:
        self._features_ND = F.normalize(features_ND, dim=1)
        self._labels_N = labels_N
        self._num_classes = num_classes
        self._neighbors = min(neighbors, len(labels_N))
        self._temperature = temperature

    def __call__(self, features_BD: Tensor) -> Tensor:
        return torch.cat([self._votes(rows) for rows in F.normalize(features_BD, dim=1).split(ROWS)])

    def _votes(self, features_BD: Tensor) -> Tensor:
        similarity_BN = features_BD.to(self._features_ND.dtype) @ self._features_ND.T
        nearest_BK, index_BK = similarity_BN.topk(self._neighbors, dim=1)
        votes_BC = nearest_BK.new_zeros(len(nearest_BK), self._num_classes)
        return votes_BC.scatter_add_(1, self._labels_N[index_BK], (nearest_BK / self._temperature).exp())


# Sums and rows of all processes.


def several() -> bool:
    """Return whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def summed(values: Tensor) -> Tensor:
    """Return the sum over all processes, on each of them."""
    if several():
        dist.all_reduce(values)
    return values


def gathered(rows: Tensor) -> Tensor:
    """Return the rows of all processes, by rank, on each of them; every process gives equally many."""
    if not several():
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def first(values: Tensor) -> Tensor:
    """Return the values of the first process, on each of them: rounding may differ between devices."""
    if several():
        dist.broadcast(values, 0)
    return values


def exact(device: torch.device) -> torch.dtype:
    """Return the type that sums are kept in; MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


# A linear probe: multinomial logistic regression on the features of a frozen model.

STRENGTHS = tuple(10.0**power for power in range(-6, 6))
"""Values of C that are tried: the range of DINOv2's evaluation, one a decade instead of four."""
HELD_OUT = 10
"""One in so many training images chooses C."""
MAX_STEPS = 1000
TOLERANCE = 1e-6
"""Of the loss's gradient: its largest entry."""


@dataclass(frozen=True)
class LinearProbe:
    """`probe(features)` gives logits (B, classes). `strength` is the C that was chosen."""

    weight: Tensor
    bias: Tensor
    strength: float

    def __call__(self, features_BD: Tensor) -> Tensor:
        return F.linear(features_BD.to(self.weight.dtype), self.weight, self.bias)


def fit_probe(features_ND: Tensor, labels_N: Tensor, num_classes: int) -> LinearProbe:
    """Return the probe of DINOv2's evaluation (arXiv:2304.07193): L-BFGS on the features as they are, in float64.

    It minimizes Σ_i CE(W f_i + b, y_i) + ‖W‖² / (2C). C is the one of `STRENGTHS` that names the most images right
    of a tenth of the training images, drawn at random, when fitted on the rest; the probe is then fitted on all.
    """
    features_ND = features_ND.to(exact(features_ND.device))
    # Off the mean and of one scale L-BFGS is faster, and the minimum is the same: the bias takes the one up and the
    # penalty, which then counts (scale)^-2 as much, the other.
    mean_D, scale = features_ND.mean(0), float(features_ND.std(correction=0)) or 1.0
    features_ND = (features_ND - mean_D) / scale
    order = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(0)).to(labels_N.device)
    chosen, rest = order[: len(order) // HELD_OUT], order[len(order) // HELD_OUT :]
    strength = STRENGTHS[len(STRENGTHS) // 2]
    if len(chosen):
        held = features_ND[chosen], labels_N[chosen]
        strength = _choose(features_ND[rest], labels_N[rest], held, num_classes, scale)
    weight, bias = _start(features_ND, num_classes)
    _fit((weight, bias), features_ND, labels_N, strength * scale**2)
    weight = weight.detach() / scale
    return LinearProbe(first(weight), first(bias.detach() - weight @ mean_D), strength)


def _choose(
    features_ND: Tensor, labels_N: Tensor, held: tuple[Tensor, Tensor], num_classes: int, scale: float
) -> float:
    """Return the strength with the most held-out images right, the least of equals; each fit starts from the one
    before."""
    parameters = _start(features_ND, num_classes)
    right = []
    for strength in STRENGTHS:
        _fit(parameters, features_ND, labels_N, strength * scale**2)
        with torch.no_grad():
            right.append((F.linear(held[0], *parameters).argmax(1) == held[1]).sum())
    return STRENGTHS[int(first(torch.stack(right)).argmax())]


def _start(features_ND: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    weight = features_ND.new_zeros(num_classes, features_ND.shape[1]).requires_grad_()
    return weight, features_ND.new_zeros(num_classes).requires_grad_()


@torch.enable_grad()
def _fit(parameters: tuple[Tensor, Tensor], features_ND: Tensor, labels_N: Tensor, strength: float) -> None:
    """Bring weight and bias to the minimum, divided by the number of images to keep the gradient's scale."""
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=MAX_STEPS,
        tolerance_grad=TOLERANCE,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        penalty = parameters[0].square().sum() / (2 * strength * len(labels_N))
        total = F.cross_entropy(F.linear(features_ND, *parameters), labels_N) + penalty
        total.backward()
        return total

    optimizer.step(loss)


# A model that shows its features: the input of its head, and the outputs of its blocks.

Predictor = Callable[[Tensor], Tensor]


@dataclass
class Reading:
    """Of one batch. DeiT's two heads read two tokens, and the mean of these is the feature."""

    logits: Tensor
    feature: Tensor
    """In float32."""
    blocks: dict[int, Tensor] = field(default_factory=dict)
    """By layer, (B, N, D)."""


class Reader:
    """`reader(images)` runs `predict`, in which `model` takes part, and keeps what passes through the model.

    The feature is the input of the model's classifier, which timm leaves in place as an identity where there is no
    head; tokens that are not pooled before it are averaged. The same images in a row are run once.
    """

    def __init__(
        self, model: nn.Module, predict: Predictor | None = None, layers: Collection[int] = ()
    ) -> None:
        self.model = model
        self._predict = model if predict is None else predict
        self._layers = layers
        self._last: tuple[Tensor, Reading] | None = None

    def __call__(self, images: Tensor) -> Reading:
        if self._last is None or self._last[0] is not images:
            self._last = images, self._read(images)
        return self._last[1]

    def logits(self, images: Tensor) -> Tensor:
        """Return what the head gives, (B, classes)."""
        return self(images).logits

    def feature(self, images: Tensor) -> Tensor:
        """Return what the head reads, (B, D)."""
        return self(images).feature

    def forget(self) -> None:
        """Let go of the last images: the weights may change."""
        self._last = None

    def _read(self, images: Tensor) -> Reading:
        features: list[Tensor] = []
        blocks: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            for head in _classifiers(self.model):
                hooks.callback(head.register_forward_pre_hook(partial(_keep_input, features)).remove)
            for layer in self._layers:
                block = attention_blocks(self.model)[layer]
                hooks.callback(block.register_forward_hook(partial(_keep_output, blocks, layer)).remove)
            logits = self._predict(images)
        return Reading(logits, torch.stack([_pooled(feature) for feature in features]).mean(0), blocks)


def describe_features(model: nn.Module) -> str:
    """Describe the features that nearest neighbors and a probe read: their number, and the pooling before the head."""
    pooling = pooling_of(model)
    pooled = "averaged over all tokens" if pooling == "" else f"pooled by {pooling or 'its own head'}"
    return f"{vit(model).head_hidden_size} features of an image, {pooled}"


def _classifiers(model: nn.Module) -> tuple[nn.Module, ...]:
    found = vit(model).get_classifier()
    return found if isinstance(found, tuple) else (found,)


def _keep_input(kept: list[Tensor], _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    kept.append(inputs[0])


def _keep_output(kept: dict[int, Tensor], layer: int, _: nn.Module, inputs: object, output: Tensor) -> None:
    kept[layer] = output


def _pooled(feature: Tensor) -> Tensor:
    feature = precise(feature)
    return feature.mean(1) if feature.ndim == 3 else feature.flatten(1)


@dataclass(frozen=True)
class Distance:
    """Of features S from features T, a row an image or a token.

    `relative_error` is ‖S − T‖ / ‖T‖ and `cosine` the mean over rows of s·t / (‖s‖ ‖t‖); None where the widths
    differ. Norms are Frobenius's.

    `cka` is the centered kernel alignment HSIC(S, T) / √(HSIC(S, S) HSIC(T, T)) with a linear kernel (arXiv:1905.00414)
    and the unbiased estimate of HSIC (Song et al. 2012, equation 5; arXiv:2010.15327, section 3): 1 for features that
    are equal up to rotation and scale, about 0 for independent ones, however few the rows. None with fewer than 4
    rows, for which there is no such estimate.
    """

    relative_error: float | None
    cosine: float | None
    cka: float | None
    rows: int


@dataclass(frozen=True)
class Distances:
    """Of the final feature, and of the outputs of the student's blocks by layer."""

    feature: Distance
    layers: Mapping[int, Distance] = field(default_factory=dict)


LEAST_ROWS = 4
"""The unbiased estimate of HSIC divides by rows − 3."""


@dataclass(frozen=True)
class _Moments:
    """Sums over rows z = (s, t) of features whose mean is taken off, with q = (‖s‖², ‖t‖²)."""

    products: Tensor
    """Σ z zᵀ."""
    cubes: Tensor
    """Σ q zᵀ."""
    squares: Tensor
    """Σ q qᵀ."""
    widths: tuple[int, int]

    @classmethod
    def of(cls, rows_ND: Tensor, widths: tuple[int, int], kind: torch.dtype) -> _Moments:
        """Return the moments of centered rows, in numbers of `kind`."""
        norms_N2 = torch.stack([part.square().sum(1) for part in rows_ND.split(widths, 1)], 1).to(kind)
        products_DD = (rows_ND.T @ rows_ND).to(kind)
        return cls(products_DD, norms_N2.T @ rows_ND.to(kind), norms_N2.T @ norms_N2, widths)

    def moved(self, count: Tensor, offset_D: Tensor) -> _Moments:
        """Return the moments of the rows z + offset; Σ z = 0 of the `count` rows.

        q becomes q + A z + r, with A z = 2 (s·offset_s, t·offset_t) and r = (‖offset_s‖², ‖offset_t‖²).
        """
        parts = offset_D.split(self.widths)
        turn_2D = 2 * torch.block_diag(*parts).to(offset_D)
        fixed_2 = torch.stack([part.square().sum() for part in parts])
        norms_2 = self._norms()
        linear_22 = self.cubes @ turn_2D.T + torch.outer(norms_2, fixed_2)
        return _Moments(
            self.products + count * torch.outer(offset_D, offset_D),
            self.cubes + turn_2D @ self.products + torch.outer(norms_2 + count * fixed_2, offset_D),
            self.squares + linear_22 + linear_22.T + turn_2D @ self.products @ turn_2D.T
            + count * torch.outer(fixed_2, fixed_2),
            self.widths,
        )  # fmt: skip

    def plus(self, other: _Moments) -> _Moments:
        return _Moments(
            self.products + other.products,
            self.cubes + other.cubes,
            self.squares + other.squares,
            self.widths,
        )

    def over_ranks(self) -> _Moments:
        return _Moments(summed(self.products), summed(self.cubes), summed(self.squares), self.widths)

    def alignment(self, rows: int) -> float:
        """Return the alignment of s and t; 0 where one of them varies no more than by chance.

        With rows that sum to zero, the kernels K = S Sᵀ and L = T Tᵀ without their diagonals give rows · (rows − 3) ·
        HSIC = ‖SᵀT‖² + Σ‖s‖² Σ‖t‖² / ((rows − 1) (rows − 2)) − rows / (rows − 2) · Σ ‖s‖² ‖t‖².
        """
        norms_2 = self._norms()
        halves = [half.split(self.widths, 1) for half in self.products.split(self.widths)]
        kernels_22 = torch.stack([torch.stack([part.square().sum() for part in half]) for half in halves])
        means_22 = torch.outer(norms_2, norms_2) / ((rows - 1) * (rows - 2))
        hsic_22 = kernels_22 + means_22 - rows / (rows - 2) * self.squares
        student, teacher = (float(hsic_22[part, part]) for part in (0, 1))
        least = torch.finfo(hsic_22.dtype).eps * float(means_22.diagonal().max())
        return float(hsic_22[0, 1]) / (student * teacher) ** 0.5 if min(student, teacher) > least else 0.0

    def _norms(self) -> Tensor:
        """Return Σ q."""
        return torch.stack([part.sum() for part in self.products.diagonal().split(self.widths)])


class DistanceSums:
    """Sums over batches of rows, from which a `Distance` follows. Nothing here waits for the device.

    Means and products are merged batch by batch (Chan, Golub and LeVeque 1983): features have columns whose mean
    is far larger than their deviation, and sums of plain squares would lose the latter.
    """

    def __init__(self) -> None:
        self._widths: tuple[int, int] | None = None
        self._sums: Tensor
        self._count: Tensor
        self._mean_D: Tensor
        self._moments: _Moments

    def update(self, student_ND: Tensor, teacher_ND: Tensor, valid_N: Tensor) -> None:
        """Add the rows that are `valid_N`."""
        kind = torch.promote_types(torch.float32, torch.promote_types(student_ND.dtype, teacher_ND.dtype))
        student_ND, teacher_ND = (
            torch.where(valid_N[:, None], rows.to(kind), 0) for rows in (student_ND, teacher_ND)
        )
        both_ND = torch.cat([student_ND, teacher_ND], dim=1)
        widths = student_ND.shape[1], teacher_ND.shape[1]
        if self._widths is None:
            self._begin(widths, student_ND.device)
        if student_ND.shape[1] == teacher_ND.shape[1]:
            terms = torch.stack([
                (student_ND - teacher_ND).square().sum(1),
                teacher_ND.square().sum(1),
                F.cosine_similarity(student_ND, teacher_ND),
            ])  # fmt: skip
            self._sums += terms.to(self._sums).sum(1)
        count = valid_N.sum().to(self._count)
        mean_D = both_ND.to(self._mean_D).sum(0) / count.clamp(min=1)
        centered_ND = torch.where(valid_N[:, None], both_ND - mean_D.to(kind), 0)
        batch = _Moments.of(centered_ND, widths, self._moments.products.dtype)
        total = self._count + count
        offset_D = (mean_D - self._mean_D) * (count / total.clamp(min=1))
        ours = self._moments.moved(self._count, -offset_D)
        self._moments = ours.plus(batch.moved(count, mean_D - self._mean_D - offset_D))
        self._mean_D, self._count = self._mean_D + offset_D, total

    def result(self) -> Distance:
        """Return the distance over all rows of all processes, which all call it. Raises DataError without rows."""
        if self._widths is None or not (rows := round(float(count := summed(self._count.clone())))):
            raise DataError("no image could be compared: the split is empty")
        mean_D = summed(self._count * self._mean_D) / count
        moments = self._moments.moved(self._count, self._mean_D - mean_D).over_ranks()
        cka = None if rows < LEAST_ROWS else moments.alignment(rows)
        if self._widths[0] != self._widths[1]:
            if cka is None:
                raise DataError(
                    f"features of widths {self._widths[0]} and {self._widths[1]} are compared by CKA alone, which "
                    f"needs {LEAST_ROWS} images: there are {rows}"
                )
            return Distance(None, None, cka, rows)
        difference, size, cosines = summed(self._sums.clone()).tolist()
        return Distance((difference / size) ** 0.5 if size else 0.0, cosines / rows, cka, rows)

    def _begin(self, widths: tuple[int, int], device: torch.device) -> None:
        self._widths, width = widths, sum(widths)
        self._sums, self._count, self._mean_D = (
            torch.zeros(shape, dtype=exact(device), device=device) for shape in ((3,), (), (width,))
        )
        nothing_ND = torch.zeros(0, width, device=device)
        self._moments = _Moments.of(nothing_ND, widths, exact(device))


@dataclass(frozen=True)
class ComparedLayers:
    """Which blocks' outputs are compared, and which tokens of theirs."""

    pairs: tuple[LayerPair, ...] = ()
    tokens: TokenMatch | None = None

    @property
    def teacher(self) -> tuple[int, ...]:
        return tuple({pair.teacher for pair in self.pairs})

    @property
    def student(self) -> tuple[int, ...]:
        return tuple(pair.student for pair in self.pairs)

    def rows(
        self, pair: LayerPair, student: Reading, teacher: Reading, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens of a pair of blocks as rows, the student's and the teacher's, and which of them are
        valid."""
        student_BND, teacher_BND = student.blocks[pair.student], teacher.blocks[pair.teacher]
        if self.tokens is not None:
            student_BND = self.tokens.student.pick(student_BND, 1)
            teacher_BND = self.tokens.teacher.pick(teacher_BND, 1)
        valid_N = valid.repeat_interleave(student_BND.shape[1])
        return student_BND.flatten(0, 1), teacher_BND.flatten(0, 1), valid_N


def compared_layers(teacher: nn.Module, student: nn.Module) -> ComparedLayers:
    """Return each student's block with the teacher's at the same share of the depth; none where the patch grids
    differ."""
    try:
        for model in (teacher, student):
            check_supported(model, to="measuring")
        tokens = match_tokens(token_layout(teacher), token_layout(student), GridRule(copy=True))
    except (TransferError, UnsupportedModelError):
        return ComparedLayers()
    depths = [attention_shape(teacher).depth], [attention_shape(student).depth]
    return ComparedLayers(resolve_layers("all", *depths), tokens)


@torch.no_grad()
def measure_distances(
    students: Mapping[str, Reader],
    teacher: Reader,
    layers: Mapping[str, ComparedLayers],
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    device: torch.device,
) -> dict[str, Distances]:
    """Return each student's distances from the teacher over `batches` of (images, targets, valid), in one pass.

    Call it on all processes. The models are in eval mode already. Raises DataError: there is no image.
    """
    features = {name: DistanceSums() for name in students}
    blocks = {name: {pair: DistanceSums() for pair in layers[name].pairs} for name in students}
    for images, _, valid in batches:
        images, valid = images.to(device, non_blocking=True), valid.to(device, non_blocking=True)
        theirs = teacher(images)
        for name, student in students.items():
            ours = student(images)
            features[name].update(ours.feature, theirs.feature, valid)
            for pair, comparison in blocks[name].items():
                comparison.update(*layers[name].rows(pair, ours, theirs, valid))
    for reader in (*students.values(), teacher):
        reader.forget()
    return {
        name: Distances(
            features[name].result(), {pair.student: each.result() for pair, each in blocks[name].items()}
        )
        for name in students
    }
