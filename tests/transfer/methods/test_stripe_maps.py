"""Maps within stripes teach and learn as the maps of all tokens that they are, with zeros outside the stripes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graftvit.models.copying.teacher_view import Normalization
from graftvit.models.errors import TransferError
from graftvit.models.families import blocks_of
from graftvit.transfer.methods.dual import DualViT
from support.models.pyramids import images, tiny
from torch import Tensor, nn

SIZE, PADDED = (32, 32), (36, 32)
"""With stripes of 2 the first grids are 8 x 8, and 9 x 8."""
NORM = Normalization((0.5,) * 3, (0.5,) * 3)


def model(seed: int, size: tuple[int, int] = SIZE, **more: Any) -> Any:
    return tiny("cswin", size, seed=seed, **more).double()


def dual(method: str, teacher: nn.Module, student: nn.Module, **more: Any) -> DualViT:
    return DualViT(teacher, student, method, teacher_normalization=NORM, student_normalization=NORM, **more)


def maps(pyramid: Any, x: Tensor, index: int) -> Tensor:
    """Return the map (B, H, N, N) of a layer, with zeros outside of stripes, from the block's own input."""
    block, seen = blocks_of(pyramid)[index], []
    hook = block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    pyramid(x)
    hook.remove()
    ((tokens, (height, width)),) = seen
    layer = block.attn
    q, k, _ = layer.qkv(block.norm1(tokens)).unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    split = getattr(layer, "original", layer).split  # a layer that learns has a host
    if split:
        place = torch.arange(height * width)
        for half, stripe in enumerate((place % width // split, place // width // split)):
            heads = slice(half * layer.num_heads // 2, (half + 1) * layer.num_heads // 2)
            logits[:, heads] = logits[:, heads].masked_fill(stripe[:, None] != stripe, -torch.inf)
    return logits.softmax(-1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("split", [2, 0])
def test_distilled_stripes_are_maps_with_zeros(split: int, loss: str) -> None:
    """From stripes to the same stripes, and to all tokens."""
    teacher, student, x = model(1), model(2, split_size=(split, split)), images(SIZE).double()
    out = dual("distill", teacher, student, layers="0>0,1>1,3>3", loss=loss, weight=1.0)(x)
    expected = []
    for index in (0, 1, 3):
        theirs, ours = maps(teacher, x, index).detach(), maps(student, x, index)
        ce = -(theirs * ours.clamp_min(1e-300).log()).sum(-1)
        expected.append((ce + (torch.xlogy(theirs, theirs).sum(-1) if loss == "kl" else 0)).mean())
    torch.testing.assert_close(out.transfer_loss, torch.stack(expected).sum(), rtol=1e-9, atol=0)
    gradients = (
        torch.autograd.grad(each, list(student.parameters()), allow_unused=True, retain_graph=True)
        for each in (out.transfer_loss, torch.stack(expected).sum())
    )
    for ours, dense in zip(*gradients, strict=True):
        assert (ours is None) == (dense is None)
        if ours is not None and dense is not None:
            torch.testing.assert_close(ours, dense, rtol=1e-7, atol=1e-11)


def test_maps_of_all_tokens_are_not_distilled_into_stripes() -> None:
    with pytest.raises(TransferError):
        dual("distill", model(1, split_size=(0, 0)), model(2), layers="0>0")


@pytest.mark.parametrize("method", ["distill", "distill_k", "distill_v", "copy", "copy_q"])
def test_a_padded_stripe_is_refused_where_its_keys_are_compared(method: str) -> None:
    with pytest.raises(TransferError, match="padded"):
        dual(method, model(1, PADDED), model(2, PADDED), layers="0>0")


@pytest.mark.parametrize("method", ["attention_output", "distill_q", "block_output", "feature", "logits"])
def test_a_padded_stripe_teaches_the_rest(method: str) -> None:
    teacher, student, x = model(1, PADDED), model(2, PADDED), images(PADDED).double()
    layers = {} if method in ("feature", "logits") else {"layers": "0>0,1>1,3>3"}
    expected = student(x)
    out = dual(method, teacher, student, weight=1.0, **layers)(x)
    torch.testing.assert_close(out.logits, expected, rtol=1e-9, atol=1e-12)
    assert out.transfer_loss > 0


def test_attention_output_is_that_of_the_heads_without_lepe() -> None:
    """A padded layer has the same output, because padding is a key of its softmax."""
    teacher, student, x = model(1, PADDED), model(2, PADDED), images(PADDED).double()
    loss = dual("attention_output", teacher, student, layers="0>0", weight=1.0)(x).transfer_loss
    outs = []
    for each in (teacher, student):
        block = blocks_of(each)[0]
        tokens, grid = each.patch_embed(x)
        for lepe in block.attn.attns:
            nn.init.zeros_(lepe.get_v.weight)
            nn.init.zeros_(lepe.get_v.bias)
        layer: Any = getattr(block.attn, "original", block.attn)
        layer._modules["proj"] = nn.Identity()
        outs.append(layer(block.norm1(tokens), grid))
    torch.testing.assert_close(loss, F.mse_loss(*outs), rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", ["copy", "copy_q", "copy_k", "copy_v"])
def test_a_layer_copies_from_the_same_stripes(method: str) -> None:
    """A student with the teacher's weights in this layer computes what it did before."""
    teacher, x = model(1), images(SIZE).double()
    student = model(2)
    student.stage1_conv_embed.load_state_dict(teacher.stage1_conv_embed.state_dict())
    student.stage1[0].load_state_dict(teacher.stage1[0].state_dict())
    expected = student(x)
    out = dual(method, teacher, student, layers="0>0")(x)
    torch.testing.assert_close(out.logits, expected, rtol=1e-9, atol=1e-12)
