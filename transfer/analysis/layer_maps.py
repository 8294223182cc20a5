"""The attention map of each layer of a model, with the places of its keys.

Maps are formed densely here, (B, H, N, M) a layer: this is for a handful of images, not for training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ...checkpoints.preprocessing import Preprocessing
from ...models.attention.base import Geometry, Heads
from ...models.conversion import sharing_copy
from ...models.converted import ConvertedAttention
from ...models.copied import CopiedAttention
from ...models.copying.grids import interpolate_tokens
from ...models.errors import ConfigError, DataError, TransferError, check_types
from ...models.families import (
    Site,
    blocks_of,
    check_size,
    check_supported,
    depths,
    family_of,
    native_host,
    sites,
)
from ...models.given import Model, as_model, check_images
from ...models.host import AttentionHost
from ...models.hosting import Call, watch_layer
from ...models.map_structure import Size, Windows
from ...models.merges import merge_layers, merges_deformably
from ...models.token_merging import TokenMerging, tap_places
from ..config import DataConfig
from ..data.augment import eval_transform
from ..data.datasets import open_dataset
from ..data.image_folder import ImageSource, SourceView
from ..data.loading import BadImages, EvalBatches, Fetcher
from ..data.sampler import eval_requests
from ..methods.layer_choice import choose_layers

# Where the keys of an attention layer lie on the token grid of its stage.
#
# Shape suffixes: H heads, N tokens of the stage, M keys of a query.


@dataclass(frozen=True)
class Cells:
    """Reduced keys: each is made of a cell of tokens."""

    grid: Size
    """The rows and columns of the keys."""
    stride: Size | None
    """The rows and columns of a cell; None for cells that share the grid evenly, as adaptive pooling does."""

    def shares(self, tokens: Size) -> Tensor:
        """Return the part that each token has in each key, (M, N): rows sum to one."""
        strides: Size | tuple[None, None] = self.stride or (None, None)
        down, right = (
            _cover(keys, count, stride)
            for keys, count, stride in zip(self.grid, tokens, strides, strict=True)
        )
        return torch.kron(down, right)

    def extent(self, tokens: Size) -> tuple[float, float]:
        """Return the parts of the image's height and width that cells cover: remaining tokens are in none."""
        if self.stride is None:
            return 1.0, 1.0
        down, right = (
            keys * step / count for keys, step, count in zip(self.grid, self.stride, tokens, strict=True)
        )
        return down, right


@dataclass(frozen=True)
class KeyPlaces:
    """The keys of each query of a layer: all tokens, those of the query's window, or reduced keys."""

    geometry: Geometry
    """The tokens of the stage, which ask."""
    windows: Windows | None = None
    cells: Cells | None = None

    @property
    def grid(self) -> Size:
        """Return the rows and columns of a picture of a row of the map."""
        return self.geometry.grid if self.cells is None else self.cells.grid

    @property
    def extent(self) -> tuple[float, float]:
        """Return the parts of the image's height and width that this picture covers."""
        return (1.0, 1.0) if self.cells is None else self.cells.extent(self.geometry.grid)

    def window_tokens(self) -> Tensor:
        """Return the token of each key of each query, (N, M); -1 for a token of padding."""
        assert self.windows is not None
        numbers = torch.arange(self.geometry.num_patches, dtype=torch.float64).view(1, 1, -1, 1)
        by_window = self.windows.cut(numbers, numbers.new_full((1, 1, 1, 1), -1.0))
        of_queries = by_window.transpose(2, 3).expand(-1, -1, by_window.shape[2], -1)
        return self.windows.join(of_queries)[0, 0].long()

    def without_padding(self, weights: Tensor) -> Tensor:
        """Return weights (..., N, M) with zeros for tokens of padding, which are outside the image."""
        if self.windows is not None:
            return weights * (self.window_tokens() >= 0).to(weights)
        return weights if self.cells is not None else weights[..., : self.geometry.num_tokens]

    def on_tokens(self, weights: Tensor) -> Tensor:
        """Return weights (..., N, M) by token, (..., N, N): that of a reduced key is shared evenly by its tokens."""
        if self.cells is not None:
            prefix = torch.eye(self.geometry.num_prefix, dtype=torch.float64)
            shares: Tensor = torch.block_diag(prefix, self.cells.shares(self.geometry.grid))
            return weights @ shares.to(weights)
        if self.windows is None:
            return weights
        tokens = self.window_tokens().to(weights.device)
        whole = weights.new_zeros(*weights.shape[:-1], self.geometry.num_tokens)
        places = tokens.clamp_min(0).expand(weights.shape)
        return whole.scatter_add(-1, places, self.without_padding(weights))

    def distances(self) -> Tensor:
        """Return the Euclidean distance from each patch to the tokens of each of its keys, in patches, (N, M)."""
        apart = patch_distances(self.geometry)
        if self.cells is not None:
            return apart @ self.cells.shares(self.geometry.grid).to(apart).T
        return apart if self.windows is None else apart.gather(1, self.window_tokens().clamp_min(0))

    def picture(self, row: Tensor, query: int) -> Tensor:
        """Return the weights (M) of a query's keys as a grid (rows, columns), without prefix tokens."""
        if self.windows is not None:
            tokens = self.window_tokens()[query]
            whole = row.new_zeros(self.geometry.num_patches)
            row = whole.scatter_add(0, tokens.clamp_min(0), row * (tokens >= 0).to(row))
        return row[self.geometry.num_prefix :].reshape(self.grid)


def patch_distances(geometry: Geometry) -> Tensor:
    """Return the Euclidean distances between the patches of a grid, (P, P), in patches."""
    height, width = geometry.grid
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    return torch.cdist(places, places)


def _cover(keys: int, tokens: int, stride: int | None) -> Tensor:
    """Return the part of each token of a line in each key of it, (keys, tokens)."""
    found = torch.zeros(keys, tokens, dtype=torch.float64)
    for key in range(keys):
        start = key * tokens // keys if stride is None else key * stride
        stop = -(-(key + 1) * tokens // keys) if stride is None else start + stride
        found[key, start:stop] = 1 / (stop - start)
    return found


@dataclass(frozen=True)
class LayerMap:
    """A layer's map on some images, (B, H, N, M) in float32, and the places of its keys."""

    weights: Tensor
    places: KeyPlaces

    def on_tokens(self) -> Tensor:
        """Return the map over all tokens of the stage, (B, H, N, N)."""
        return self.places.on_tokens(self.weights)

    def dense(self) -> Tensor:
        """Return the map over all keys of the layer: zero for those outside of a query's window."""
        return self.weights if self.places.windows is None else self.on_tokens()


@torch.no_grad()
def layer_maps(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[int],
    *,
    asking: Mapping[int, int] | None = None,
    grid: Size | None = None,
) -> dict[int, LayerMap]:
    """Return the maps of layers by number, without those of blocks that have no attention.

    `asking` has one token for each layer, whose row alone is returned, (B, H, 1, M): rows of an operator that is not
    linear in V are expensive. With `grid` the softmax is over queries and keys that are interpolated to this patch grid
    (`interpolate_tokens`); layers of which that cannot be said are left out. The model runs in eval mode and is left as
    it was.

    Raises UnsupportedModelError: a model of another kind.
    """
    check_supported(model, copied=True)
    asking = asking or {}
    twin, maps = sharing_copy(model).eval(), dict[int, LayerMap]()
    check_size(twin, (images.shape[-2], images.shape[-1]))
    stages = family_of(twin).geometries(twin, (images.shape[-2], images.shape[-1]))
    for site in sites(twin):
        if site.index in layers and site.num_heads:
            keep = partial(_keep, maps, site.index, asking.get(site.index), stages[site.stage], grid)
            watch_layer(twin, site, keep)
    twin(images)
    return maps


def key_count(model: nn.Module, site: Site) -> int:
    """Return the number of keys of each query of a layer; 0 for a block without attention."""
    if not site.num_heads:
        return 0
    return native_host(model, site.block(model)).native_pairs(site.shape.geometry)[1]


def softmax_map(heads: Heads) -> Tensor:
    """Return the softmax map (B, H, N, M) of projections, in float32."""
    q, k = heads.qk()
    if heads.to_map is not None:
        return heads.to_map((heads.scale * q) @ k.transpose(-2, -1)).float()
    with torch.autocast(q.device.type, enabled=False):
        logits_BHNM = (q.float() @ k.float().transpose(-2, -1)) * heads.scale
        if heads.bias is not None:
            logits_BHNM = logits_BHNM + heads.bias.float()
        return logits_BHNM.softmax(dim=-1)


def _operator_map(layer: ConvertedAttention, heads: Heads, asking: int | None) -> Tensor:
    """Return the map of an operator, or one row of it."""
    if asking is None:
        return layer.operator.matrix(heads).float()
    return layer.operator.rows(heads, torch.tensor([asking], device=heads.known.device)).float()


def _row(map_BHNM: Tensor, asking: int | None) -> Tensor:
    return map_BHNM if asking is None else map_BHNM[:, :, asking, None]


def _keep(
    maps: dict[int, LayerMap],
    index: int,
    asking: int | None,
    geometry: Geometry,
    grid: Size | None,
    host: AttentionHost,
    call: Call,
) -> None:
    """Keep the map that a layer applies: of a copied layer the teacher's, where it copies it."""
    heads, places = host.heads_of(*call.inputs, **call.keywords), KeyPlaces(geometry)
    if grid is not None:
        resampled = _on_grid(host, heads, geometry, grid)
        if resampled is not None:
            maps[index] = LayerMap(softmax_map(resampled), KeyPlaces(replace(geometry, grid=grid)))
        return
    if isinstance(host, ConvertedAttention):
        weights = _operator_map(host, heads, asking)
    elif isinstance(host, CopiedAttention):
        weights = _row(host.operator.map(heads).float(), asking)
    else:
        attended = host.attended(heads)
        places = _key_places(host, attended, geometry)
        weights = _row(places.without_padding(attended.joined(softmax_map(attended))), asking)
    maps[index] = LayerMap(weights, places)


def _on_grid(host: AttentionHost, heads: Heads, geometry: Geometry, grid: Size) -> Heads | None:
    """Return projections on another grid; None where the layer has no whole map of queries and keys alone."""
    if isinstance(host, ConvertedAttention | CopiedAttention) or not host.structure(geometry.grid).is_whole:
        return None
    attended = host.attended(heads)
    if attended.bias is not None:
        return None
    return attended.each(lambda x: interpolate_tokens(x, geometry.num_prefix, geometry.grid, grid), None)


def _key_places(host: AttentionHost, attended: Heads, geometry: Geometry) -> KeyPlaces:
    """Return where the keys lie on which a layer takes its softmax."""
    height, width = geometry.grid
    kind, (rows, columns) = host.structure(geometry.grid).reduction or ("", (1, 1))
    cells = {
        "pool": Cells((rows, columns), None),
        "stride": Cells((height // rows, width // columns), (rows, columns)),
    }
    return KeyPlaces(geometry, attended.windows, cells.get(kind))


# Attention maps of a model, and how far two models' maps are apart.
#
# Maps are formed densely here, (B, H, N, N) a layer: this is for a handful of images, not for training.


@check_types("images")
def attention_maps(
    model: Model, images: Tensor, layers: Sequence[int] | int | str | None = None
) -> dict[int, Tensor]:
    """Return the attention maps of `model` on `images`: (B, heads, N, N) by layer, in float32.

    The keys of the result are the numbers of layers as given. Maps of pyramids are over the N tokens of the layer's
    stage, zero outside of a query's window, or (B, heads, N, M) over M reduced keys. Blocks without attention are left
    out. The model runs in eval mode and is left as it was.

    Args:
        model: in any form that `graftvit.as_model` takes.
        images: (B, C, H, W), normalized for the model.
        layers: numbers, or words of `transfer.layers` (`0,5,9-11`, `first:2`), negative ones from the end; all if None.

    Raises:
        TransferError: a layer that the model does not have.
        UnsupportedModelError: a model of another kind.
    """
    return {layer: each.dense() for layer, each in _chosen_maps(as_model(model), images, layers).items()}


def _chosen_maps(
    model: nn.Module, images: Tensor, layers: Sequence[int] | int | str | None
) -> dict[int, LayerMap]:
    """Return the maps under the numbers of `layers` as given, such as -1."""
    check_supported(model, copied=True)
    depth = len(blocks_of(model))
    check_images(images, model, values=True)
    if isinstance(layers, str):
        layers = [layer for _, layer in choose_layers(layers, depths(model), depths(model))]
    wanted = list(range(depth)) if layers is None else [layers] if isinstance(layers, int) else list(layers)
    for layer in wanted:
        if not -depth <= layer < depth:
            raise TransferError(f"layer {layer} does not exist: the model has {depth} blocks.")
    found = layer_maps(model, images, sorted({layer % depth for layer in wanted}))
    return {layer: found[layer % depth] for layer in wanted if layer % depth in found}


@check_types()
def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of distributions over the last dimension, in nats (0 to ln 2).

    (KL(p ‖ m) + KL(q ‖ m)) / 2 with m = (p + q) / 2; the other dimensions are broadcast and kept.

    Args:
        p: probabilities (..., N).
        q: probabilities (..., N).
    """
    if p.shape[-1] != q.shape[-1]:
        raise TransferError(f"p has {p.shape[-1]} entries in its last dimension and q {q.shape[-1]}")
    middle = (p + q) / 2
    terms = torch.xlogy(p, p) + torch.xlogy(q, q) - 2 * torch.xlogy(middle, middle)
    return (terms.sum(dim=-1) / 2).clamp_min(0.0)


def map_divergence(teacher_BHNN: Tensor, student_BHNN: Tensor, *, match_heads: bool = False) -> float:
    """Return the mean Jensen-Shannon divergence of two layers' maps over images, heads and queries, in nats.

    Head h is compared with head h, or, with `match_heads`, with its partner in the assignment of least total
    divergence (needed where the two have unequal numbers of heads; heads without a partner are left out).

    Raises:
        TransferError: unequal numbers of tokens, or of heads without `match_heads`.
    """
    from scipy.optimize import linear_sum_assignment  # here: it takes long, and few runs need it

    _check_comparable(teacher_BHNN, student_BHNN, match_heads)
    if not match_heads:
        return js_divergence(teacher_BHNN, student_BHNN).mean().item()
    cost_TS = torch.stack(
        [js_divergence(head, student_BHNN).mean(dim=(0, 2)) for head in teacher_BHNN.split(1, dim=1)]
    )
    rows, columns = linear_sum_assignment(cost_TS.cpu().numpy())
    return cost_TS[torch.as_tensor(rows), torch.as_tensor(columns)].mean().item()


@check_types("images", "teacher_images")
def divergence_by_layer(
    teacher: Model,
    student: Model,
    images: Tensor,
    *,
    teacher_images: Tensor | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
    match_heads: bool = False,
) -> list[float]:
    """Return `map_divergence` for each (teacher layer, student layer) pair; all layers by default.

    Args:
        teacher: in any form that `graftvit.as_model` takes.
        student: in the same forms.
        images: (B, C, H, W), normalized for the student.
        teacher_images: the same images as the teacher wants them, where the two are normalized differently.
        pairs: numbers of a teacher layer and a student layer each; by default all layers of equal depth.
        match_heads: compare the heads in the pairing of least distance, not by number.

    Raises:
        TransferError: unequal depths without `pairs`, or maps that cannot be compared: of other numbers of tokens, or
            of a block without attention.
    """
    teacher, student = as_model(teacher, "teacher"), as_model(student, "student")
    if pairs is None:
        depths = len(blocks_of(teacher)), len(blocks_of(student))
        if depths[0] != depths[1]:
            raise TransferError(
                f"the teacher has {depths[0]} blocks and the student {depths[1]}: "
                "name the (teacher, student) pairs."
            )
        pairs = [(layer, layer) for layer in range(depths[0])]
    theirs = _maps_on_tokens(
        teacher, images if teacher_images is None else teacher_images, [t for t, _ in pairs]
    )
    ours = _maps_on_tokens(student, images, [s for _, s in pairs])
    return [map_divergence(theirs[t], ours[s], match_heads=match_heads) for t, s in pairs]


def _maps_on_tokens(model: nn.Module, images: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """Return the maps over all tokens. Raises TransferError: a block has no attention."""
    found = _chosen_maps(model, images, layers)
    missing = next((layer for layer in layers if layer not in found), None)
    if missing is not None:
        raise TransferError(
            f"layer {missing} of this {type(model).__name__} has no attention: name other pairs"
        )
    return {layer: each.on_tokens() for layer, each in found.items()}


def _check_comparable(teacher_BHNN: Tensor, student_BHNN: Tensor, match_heads: bool) -> None:
    if teacher_BHNN.shape[-2:] != student_BHNN.shape[-2:]:
        raise TransferError(
            f"maps over {teacher_BHNN.shape[-1]} and {student_BHNN.shape[-1]} tokens cannot be compared."
        )
    if not match_heads and teacher_BHNN.shape[1] != student_BHNN.shape[1]:
        raise TransferError(
            f"the teacher has {teacher_BHNN.shape[1]} heads and the student {student_BHNN.shape[1]}: "
            "match_heads=True compares each with its nearest."
        )


# Where deformable merges read: the four places of the input that each merged token is made of.
#
# Shape suffixes: h and w after merging, P places; t is a tap.

Place = tuple[float, float]


@dataclass(frozen=True)
class MergePlaces:
    """The places that a deformable merge reads on one image."""

    stage: int
    """The stage that is merged, from 0."""
    grid: tuple[int, int]
    """Rows and columns of its tokens."""
    token: Place
    """Height and width of one of them, in parts of the image."""
    image: tuple[int, int]
    """Height and width of the image in pixels, as the model takes it."""
    places_hwt2: Tensor
    """Row and column of each place, in tokens: 0, 0 is the middle of the first token."""

    @property
    def merged(self) -> tuple[int, int]:
        """Return rows and columns after the merge."""
        return self.places_hwt2.shape[0], self.places_hwt2.shape[1]

    def in_image(self) -> Tensor:
        """Return down and right of each place in parts of the image, (h, w, 4, 2)."""
        return (self.places_hwt2 + 0.5) * self.places_hwt2.new_tensor(self.token)

    def shift(self) -> Tensor:
        """Return the distance of each place from that of an ordinary convolution, in pixels, (h, w, 4)."""
        regular = _by_token(tap_places(self.places_hwt2.new_zeros(1, 8, *self.merged)))
        pixels = [part * side for part, side in zip(self.token, self.image, strict=True)]
        apart = (self.places_hwt2 - regular) * regular.new_tensor(pixels)
        return torch.linalg.vector_norm(apart, dim=-1)

    def outside(self) -> Tensor:
        """Return the share of places outside of the grid, where a merge reads zeros only, (h, w, 4)."""
        sides = self.places_hwt2.new_tensor(self.grid)
        return ((self.places_hwt2 <= -1) | (self.places_hwt2 >= sides)).any(-1).float()

    def token_at(self, place: Place) -> tuple[int, int] | None:
        """Return row and column of the merged token over a place of the image, in parts of its sides.

        None where no token is: a merge leaves out the last row or column of an odd grid.
        """
        row, column = (int(part / (2 * side)) for part, side in zip(place, self.token, strict=True))
        height, width = self.merged
        return (row, column) if row < height and column < width else None


def trace(merges: Sequence[MergePlaces], token: tuple[int, int]) -> Tensor:
    """Return the places that a token after the last of `merges` reads, down to the first, in parts of the image.

    The four places of the token lie on the grid before the merge. The nearest token of each, which an earlier merge
    has made, has four places of its own, and so on: at most 4^merges places, (P, 2). Places outside of a grid have no
    token and end there (Pan et al. 2022, figure 4).
    """
    tokens = torch.tensor([token])
    for merge in reversed(merges):
        height, width = merge.merged
        inside = (tokens >= 0).all(1) & (tokens[:, 0] < height) & (tokens[:, 1] < width)
        rows, columns = tokens[inside].T
        reached = merge.places_hwt2[rows, columns].flatten(0, 1)
        tokens = (reached + 0.5).floor().long()
    return (reached + 0.5) * reached.new_tensor(merges[0].token)


@contextmanager
def collect_merges(model: nn.Module, image: Tensor) -> Iterator[list[MergePlaces]]:
    """Collect the places of each deformable merge while the model runs on one image; none of other models."""
    sides = (image.shape[-2], image.shape[-1])
    found: list[MergePlaces] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor], offsets_BThw: Tensor) -> None:
        height, width = inputs[0].shape[2:]
        before = found[0].grid if found else (height, width)
        token = (2 ** len(found) / before[0], 2 ** len(found) / before[1])
        places = _by_token(tap_places(offsets_BThw.float())).cpu()
        found.append(MergePlaces(len(found), (height, width), token, sides, places))

    layers: list[TokenMerging] = merge_layers(model) if merges_deformably(model) else []
    hooks = [layer.dconv.conv_offset.register_forward_hook(keep) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _by_token(places_Bt2hw: Tensor) -> Tensor:
    """Return the places of the first image, (h, w, 4, 2)."""
    return places_Bt2hw[0].permute(2, 3, 0, 1)


# Images that stand for a data set: as many as wanted, spread evenly over a split in its own order.


def spread_images(config: DataConfig, channels: int, count: int | None) -> ImageSource:
    """Return `count` images of `config.val_split`; all for None, or where there are no more.

    A folder lists its images by class, so the first ones would be of one class: image k is the middle one of the k-th
    of `count` equal parts.

    Raises DataError as `open_dataset`, and for a stream, whose images cannot be chosen; ConfigError without a split.
    """
    if config.val_split is None:
        raise ConfigError("data.val_split=none, and this needs images: name a split")
    source = open_dataset(config, config.val_split, channels, training=False, by_training=False)
    if isinstance(source, IterableDataset):
        raise DataError(f"images of {config.dataset} come as a stream and cannot be chosen: give a folder")
    size = len(source)
    if count is None or count >= size:
        return source
    chosen = [(2 * part + 1) * size // (2 * count) for part in range(count)]
    return SourceView(source, source.class_names, chosen)


def preprocessed(
    source: ImageSource, config: DataConfig, spec: Preprocessing, batch_size: int
) -> Iterator[Tensor]:
    """Yield batches (B, C, H, W) of the images as the model of `spec` takes them in evaluation.

    Raises DataError: more cannot be read than `max_bad_images` allows.
    """
    batches = EvalBatches(source, eval_transform(spec), spec.input_size, None)
    requests = eval_requests(range(len(source)), batch_size=batch_size, rank=0, world_size=1)
    bad = BadImages(config.max_bad_images, len(source))
    for images, _, valid in Fetcher(batches, config, bad).fetch(requests):
        if valid.any():
            yield images[valid]
