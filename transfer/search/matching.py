"""How well a program takes over a teacher's attention: measured on recorded inputs of its layers, without training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ...checkpoints.weight_files import read_file
from ...models.attention.base import Geometry, without_prefix
from ...models.attention.softmax import SoftmaxAttention
from ...models.converted import converted_layers
from ...models.errors import CheckpointError, ConfigError, TransferError, counted
from ...models.families import evaluating, family_of, sites
from ...models.host import AttentionHost
from ...models.hosting import Call, release_attention, watch_layer
from ...models.programs.primitives import Polynomial
from ...models.programs.program import Program

RIDGE = 1e-6
"""Of the least squares, relative to the squared size of each column."""
DIGITS = 3
"""Significant digits of a score, so that it is the same on every machine."""


@dataclass(frozen=True)
class RecordedLayer:
    """The projections and the output of a teacher's attention at its grid tokens, each (B, H, N, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor

    @property
    def size(self) -> str:
        """Return the norms of the tensors to two digits, which tell teachers apart and machines not."""
        return " ".join(f"{float(x.norm()):.2g}" for x in (self.q, self.k, self.v, self.out))

    def cost(self, polynomial: Polynomial) -> int:
        """Return the value of a cost of one head, for all heads."""
        return self.q.shape[1] * polynomial.at(*self.q.shape[2:])


@torch.no_grad()
def record_layers(teacher: nn.Module, images: Tensor) -> list[RecordedLayer]:
    """Run `teacher` on images (B, C, H, W) and record each layer.

    Raises TransferError: there is only one image, and half of them are for fitting; or a layer has lost its softmax.
    """
    if len(images) < 2:
        raise TransferError(
            f"{counted(len(images), 'image')}: give 2 or more, half to fit and half to measure"
        )
    for index, layer in converted_layers(teacher).items():
        if not isinstance(layer.operator, SoftmaxAttention):
            raise TransferError(
                f"layer {index} of the teacher has {layer.choice} in place of softmax attention: search with the model "
                "from which it was converted"
            )
    layers: list[RecordedLayer] = []

    def see(geometry: Geometry, native: AttentionHost, call: Call) -> None:
        heads = native.heads_of(*call.inputs, **call.keywords)
        found = (*heads.qkv(), native.attend(heads))
        layers.append(RecordedLayer(*(without_prefix(x, geometry).float() for x in found)))

    places = [site for site in sites(teacher) if site.num_heads]
    hooks = [watch_layer(teacher, site, partial(see, site.shape.geometry)) for site in places]
    try:
        with evaluating(teacher):
            family_of(teacher).features(teacher, images.to(next(teacher.parameters())))
    finally:
        for hook in hooks:
            hook.remove()
        release_attention(teacher)
    return layers


@torch.no_grad()
def mismatch(program: Program, layers: Sequence[RecordedLayer]) -> float:
    """Return the mean over layers and heads of ‖O W − T‖ / ‖T − mean(T)‖, where T is the teacher's output.

    O is the program's output with a column of ones. W is fitted for each head by least squares on the first half of the
    images, as a student's value and output projections can learn it, and the error is that of the second half. 1 is
    the error of a constant. Infinity: the program's outputs are not finite.
    """
    return rounded([layer_mismatch(program(q=each.q, k=each.k, v=each.v), each.out) for each in layers])


def rounded(errors: Sequence[Tensor]) -> float:
    """Return the mean over layers to three digits; infinity if it is not finite."""
    error = float(torch.stack(list(errors)).mean())
    return float(f"{error:.{DIGITS}g}") if error == error and error < 1e6 else float("inf")


def layer_mismatch(out: Tensor, wanted: Tensor) -> Tensor:
    """Fit on the first half of the images; return the mean error of the heads on the second half."""
    if not out.isfinite().all():
        return torch.tensor(torch.inf, dtype=torch.float64)
    half = len(out) // 2
    weights = _least_squares(_with_ones(out[:half]), _rows(wanted[:half]))
    return _relative_error(_with_ones(out[half:]) @ weights, _rows(wanted[half:]))


def matching_error(out: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean error of the heads on the images of the fit, with gradients."""
    rows, targets = _with_ones(out), _rows(wanted)
    return _relative_error(rows @ _least_squares(rows, targets), targets)


def raw_error(out: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean error of the heads without a fit, with gradients."""
    return _relative_error(_rows(out), _rows(wanted))


def _relative_error(found: Tensor, targets: Tensor) -> Tensor:
    left = (found - targets).flatten(1).norm(dim=1)
    spread = (targets - targets.mean(1, keepdim=True)).flatten(1).norm(dim=1)
    errors: Tensor = left / spread.clamp_min(1e-12)
    return errors.mean()


def _rows(x_BHND: Tensor) -> Tensor:
    """Return all tokens of a head, (H, B N, D), in float64."""
    return x_BHND.transpose(0, 1).flatten(1, 2).double()


def _with_ones(x_BHND: Tensor) -> Tensor:
    """Return the rows and a column of ones, (H, B N, D + 1)."""
    rows = _rows(x_BHND)
    return torch.cat((rows, torch.ones_like(rows[..., :1])), 2)


def _least_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return W (H, D + 1, D) with the smallest ‖O W − T‖² + ridge."""
    gram = outputs.transpose(1, 2) @ outputs
    scale = gram.diagonal(dim1=1, dim2=2).clamp_min(1e-30)
    ridge = torch.diag_embed(RIDGE * scale)
    return torch.linalg.solve(gram + ridge, outputs.transpose(1, 2) @ targets)


# The mismatch of a program after a short fit of its queries, keys and values by gradients.

STEPS, LEARNING_RATE = 20, 1e-2


def fitted_mismatch(program: Program, layers: Sequence[RecordedLayer]) -> float:
    """Return the `mismatch` of a program whose inputs have passed affine maps of their own.

    Each of q, k and v becomes x A + b, with A (D, D) and b of each head, as new projections of a student can learn it.
    A and b start at I and 0 and take 20 steps of Adam on the first half of the images; in each step W is the solution
    of the least squares. The error is that of the second half.
    """
    return rounded([_fitted_error(program, layer) for layer in layers])


def _fitted_error(program: Program, layer: RecordedLayer) -> Tensor:
    inputs = {name: getattr(layer, name) for name in program.inputs}
    maps = fit_maps(program, inputs, layer.out)
    with torch.no_grad():
        return layer_mismatch(program(**_mapped(inputs, maps)), layer.out)


def fit_maps(program: Program, inputs: dict[str, Tensor], wanted: Tensor) -> dict[str, Tensor]:
    """Return the maps (H, D + 1, D) with the smallest error on the first half of the images, of all steps."""
    heads, width = wanted.shape[1], wanted.shape[3]
    start = torch.eye(width + 1, width).repeat(heads, 1, 1)
    maps = {name: start.clone().requires_grad_() for name in inputs}
    half = len(wanted) // 2
    seen = {name: x[:half] for name, x in inputs.items()}
    optimizer = torch.optim.Adam(maps.values(), lr=LEARNING_RATE)
    best, least = dict.fromkeys(inputs, start), float("inf")
    for _ in range(STEPS + 1):
        error = matching_error(program(**_mapped(seen, maps)), wanted[:half])
        if not error.isfinite():
            break
        if float(error.detach()) < least:
            best, least = {name: x.detach().clone() for name, x in maps.items()}, float(error.detach())
        optimizer.zero_grad()
        error.backward()
        if not all(x.grad is None or x.grad.isfinite().all() for x in maps.values()):
            break
        optimizer.step()
    return best


def _mapped(inputs: dict[str, Tensor], maps: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return x A + b for each input (B, H, N, D)."""
    return {name: x @ maps[name][:, :-1] + maps[name][:, -1:] for name, x in inputs.items()}


# Recorded layers as a file, which all processes of a search measure on.

PARTS = tuple(field.name for field in fields(RecordedLayer))


def layers_to_bytes(teachers: Sequence[Sequence[RecordedLayer]]) -> bytes:
    """Return the layers of each teacher as a safetensors file with the tensors `TEACHER.LAYER.PART`."""
    return save(
        {
            f"{teacher}.{index}.{part}": getattr(layer, part).contiguous()
            for teacher, layers in enumerate(teachers)
            for index, layer in enumerate(layers)
            for part in PARTS
        }
    )


def read_layers(path: Path) -> list[list[RecordedLayer]]:
    """Read the recorded layers of each teacher. Raises ConfigError: the file is missing or damaged."""
    try:
        tensors = read_file(path).tree
        layers = sorted({tuple(map(int, name.split(".")[:2])) for name in tensors})
        found: list[list[RecordedLayer]] = [[] for _ in {teacher for teacher, _ in layers}]
        for teacher, index in layers:
            if (teacher, index) != (teacher % len(found), len(found[teacher])):
                raise ValueError(f"it lacks a layer before {teacher}.{index}")
            parts = (tensors.pop(f"{teacher}.{index}.{part}") for part in PARTS)
            found[teacher].append(_checked(RecordedLayer(*parts)))
        if tensors or not found:
            raise ValueError("it has other tensors than layers")
        return found
    except (CheckpointError, KeyError, ValueError, IndexError) as error:
        raise ConfigError(
            f"{path} is not readable as recorded layers; remove it, and it is made again ({error})"
        ) from error


def _checked(layer: RecordedLayer) -> RecordedLayer:
    """Raise ValueError unless these are the projections and the output of one attention, of two images or more."""
    q, k, v, out = layer.q, layer.k, layer.v, layer.out
    fits = all(part.ndim == 4 and part.numel() and part.dtype == torch.float32 for part in (q, k, v, out))
    if not fits or not (
        len(q) > 1
        and k.shape == (*q.shape[:2], k.shape[2], q.shape[3])
        and v.shape == (*k.shape[:3], v.shape[3])
        and out.shape == (*q.shape[:3], v.shape[3])
    ):
        raise ValueError("its tensors are not of one attention")
    return layer


# Scores of a program on recorded layers that need neither a fit nor a training; higher is meant to be better.


@torch.no_grad()
def unfitted(program: Program, layers: Sequence[RecordedLayer]) -> float:
    """Return the negative mean over layers and heads of ‖O − T‖ / ‖T − mean(T)‖: the mismatch without least squares."""
    return -fmean(_finite(raw_error(_output(program, each), each.out), math.inf) for each in layers)


@torch.no_grad()
def rank(program: Program, layers: Sequence[RecordedLayer]) -> float:
    """Return the mean over layers and heads of the effective rank of the outputs' covariance, from 1 to D.

    exp(−Σ p log p), where p are the eigenvalues divided by their sum (Roy and Vetterli, EUSIPCO 2007).
    """
    return fmean(_effective_rank(_output(program, each)) for each in layers)


def sensitivity(program: Program, layers: Sequence[RecordedLayer]) -> float:
    """Return the mean over layers of log Σ |x ∂E/∂x|, where x are Q, K and V, and E is the error without a fit.

    It is the saliency of SNIP (ICLR 2019), of the inputs in place of weights. −∞: one is not finite, or all are 0.
    """
    return fmean(_saliency(program, each) for each in layers)


SCORES: Mapping[str, Callable[[Program, Sequence[RecordedLayer]], float]] = {
    "unfitted": unfitted,
    "rank": rank,
    "sensitivity": sensitivity,
}
"""Scores by name, beside the mismatches of `program_search.PROXIES`."""


def _output(program: Program, layer: RecordedLayer) -> Tensor:
    return program(q=layer.q, k=layer.k, v=layer.v)


def _effective_rank(out_BHND: Tensor) -> float:
    rows = out_BHND.transpose(0, 1).flatten(1, 2).double()
    if not rows.isfinite().all():
        return 0.0
    centered = rows - rows.mean(1, keepdim=True)
    values = torch.linalg.eigvalsh(centered.transpose(1, 2) @ centered).clamp_min(0)
    parts = values / values.sum(1, keepdim=True).clamp_min(1e-30)
    return float(torch.special.entr(parts).sum(1).exp().mean())


def _saliency(program: Program, layer: RecordedLayer) -> float:
    inputs = {name: getattr(layer, name).clone().requires_grad_() for name in program.inputs}
    gradients = torch.autograd.grad(
        raw_error(program(**inputs), layer.out), list(inputs.values()), allow_unused=True
    )
    pairs = zip(inputs.values(), gradients, strict=True)
    total = sum(float((x * g).detach().abs().sum()) for x, g in pairs if g is not None)
    return math.log(total) if _finite(total, 0.0) > 0 else -math.inf


def _finite(value: Tensor | float, otherwise: float) -> float:
    number = float(value)
    return number if math.isfinite(number) else otherwise
