"""Maps of pyramids: with their layer's values they give its output, and each key lies where its tokens are."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from graftvit.models.attention.base import Geometry
from graftvit.models.conversion import convert, sharing_copy
from graftvit.models.converted import converted_layers
from graftvit.models.errors import TransferError
from graftvit.models.families import sites
from graftvit.models.host import AttentionHost, ReducedHost, WindowHost
from graftvit.models.hosting import Call, watch_layer
from graftvit.transfer.analysis.layer_maps import (
    Cells,
    KeyPlaces,
    LayerMap,
    attention_maps,
    divergence_by_layer,
    key_count,
    layer_maps,
)
from support.models.pyramids import SIZES, TINY, images, tiny
from torch import Tensor

EACH = [(kind, size) for kind in TINY for size in SIZES.values()]


def outputs(kind: str, size: tuple[int, int]) -> dict[int, tuple[LayerMap, AttentionHost, Tensor, Tensor]]:
    """By layer: its map, its host, its values and what timm's layer gives before its last projection."""
    model = tiny(kind, size)
    maps = layer_maps(model, images(size), range(len(sites(model))))
    assert all(key_count(model, site) == maps[site.index].weights.shape[-1] for site in sites(model))
    found: dict[int, tuple[LayerMap, AttentionHost, Tensor, Tensor]] = {}

    def see(index: int, host: AttentionHost, call: Call) -> None:
        heads = host.heads_of(*call.inputs, **call.keywords)
        found[index] = maps[index], host, heads.known if heads.v is None else heads.v, host.attend(heads)

    twin = sharing_copy(model)
    for site in sites(twin):
        watch_layer(twin, site, partial(see, site.index))
    with torch.no_grad():
        twin(images(size))
    return found


@pytest.mark.parametrize(("kind", "size"), EACH)
def test_a_map_with_the_values_gives_the_output_of_the_layer(kind: str, size: tuple[int, int]) -> None:
    inside_padded = []
    for seen, host, values, out in outputs(kind, size).values():
        assert (seen.weights >= 0).all()
        weights = seen.dense()
        given = weights @ values
        inside = weights.sum(-1, keepdim=True)
        if isinstance(host, WindowHost) and host.windows(seen.places.geometry.grid).is_padded:
            padding = host._zero().v  # every token of padding has this value, and takes what is left of a row
            assert padding is not None
            given = given + (1 - inside) * padding
            inside_padded.append(inside.min().item())
        else:
            torch.testing.assert_close(inside, torch.ones_like(inside))
        torch.testing.assert_close(given, out, atol=1e-5, rtol=1e-4)
    assert min(inside_padded, default=0) < 0.999


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("kind", ["pvt", "pvt_li", "svt", "pvt1"])
def test_a_reduced_key_lies_where_the_tokens_are_that_it_is_made_of(kind: str, size: tuple[int, int]) -> None:
    reduced = 0
    for seen, host, _, _ in outputs(kind, size).values():
        cells, geometry = seen.places.cells, seen.places.geometry
        if cells is None:
            continue
        assert isinstance(host, ReducedHost)
        reduced += 1
        tokens = torch.randn(1, geometry.num_patches, host.proj.in_features, requires_grad=True)  # type: ignore[union-attr]
        keys = host._reduced(tokens, geometry.grid)[0]
        shares = cells.shares(geometry.grid)
        torch.testing.assert_close(shares.sum(1), torch.ones(len(keys), dtype=torch.float64))
        for key, share in zip(keys, shares, strict=True):
            [made_of] = torch.autograd.grad(key.square().sum() + key[0], tokens, retain_graph=True)
            assert torch.equal(made_of[0].abs().sum(-1) > 0, share > 0)
        on_tokens = seen.on_tokens()
        assert on_tokens.shape[-2:] == (geometry.num_tokens,) * 2
        torch.testing.assert_close(on_tokens.sum(-1), torch.ones_like(on_tokens[..., 0]))
    assert reduced


def test_cells_that_do_not_cover_the_grid() -> None:
    cells = Cells((2, 1), (4, 4))
    places = KeyPlaces(Geometry(0, (10, 6)), cells=cells)
    assert places.grid == (2, 1)
    assert places.extent == (8 / 10, 4 / 6)
    shares = cells.shares((10, 6)).reshape(2, 10, 6)
    assert (shares[1, 4:8, :4] == 1 / 16).all()
    assert shares[:, 8:].sum() == shares[:, :, 4:].sum() == 0
    # From the first token to the four by four tokens of the first key.
    expected = sum((row**2 + column**2) ** 0.5 for row in range(4) for column in range(4)) / 16
    assert places.distances()[0, 0].item() == pytest.approx(expected)


def test_distances_and_pictures_of_windows_are_those_of_their_tokens() -> None:
    seen = layer_maps(tiny("swin", (40, 24)), images((40, 24)), [1])[1]  # shifted windows, and padding
    geometry, tokens = seen.places.geometry, seen.places.window_tokens()
    assert (tokens < 0).any()
    dense = seen.on_tokens()[0, 0]
    far = KeyPlaces(geometry).distances()
    torch.testing.assert_close(
        (seen.weights[0, 0] * seen.places.distances()).sum(-1), (dense * far).sum(-1), check_dtype=False
    )
    for query in range(geometry.num_tokens):
        assert query in tokens[query]  # a token is in its own window
        picture = seen.places.picture(seen.weights[0, 0, query], query)
        torch.testing.assert_close(picture, dense[query].reshape(geometry.grid))


@pytest.mark.parametrize("kind", ["pvt", "svt", "swin", "pvt1"])
def test_converted_and_removed_layers(kind: str) -> None:
    model = tiny(kind)
    student = convert(model, "stage1: none; stage2: linear", without=["bias"]).train()
    modes = [module.training for module in student.modules()]
    maps = attention_maps(student, images((32, 32)))
    assert modes == [module.training for module in student.modules()]
    assert maps.keys() == converted_layers(student).keys()
    tokens = sites(student)[-1].shape.geometry.num_tokens
    assert all(each.shape == (2, 2, tokens, tokens) for each in maps.values())
    last = len(sites(student)) - 1
    assert divergence_by_layer(model, student, images((32, 32)), pairs=[(last, last)])[0] > 1e-4
    assert max(divergence_by_layer(model, model, images((32, 32)))) == pytest.approx(0, abs=1e-6)
    with pytest.raises(TransferError, match=r"layer 0 of this .* has no attention"):
        divergence_by_layer(model, student, images((32, 32)))
