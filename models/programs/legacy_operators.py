"""The operators of AttnZero's code by their numbers, with its numbers: mistakes and changes in place included.

Statistics run over the whole tensor, the batch included (6, 13). The cosine compares a tensor with itself and sums over
the batch (binary 4). Contractions are chosen by the sizes that they meet (binary 5, 6). Three functions overwrite their
operand (4, 11, 27).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .program import ProgramError

Unary = Callable[[Tensor], Tensor]
Binary = Callable[[Tensor, Tensor], Tensor]


def abslog(x: Tensor) -> Tensor:
    return x.masked_fill_(x == 0, 1).abs().log()


def zscore(x: Tensor) -> Tensor:
    score = (x - x.mean()) / x.std()
    return score.masked_fill_(score.isnan(), 0)  # in place keeps the order in memory


def minmax(x: Tensor) -> Tensor:
    low, high = x.min(), x.max()
    return (x - low) / (high - low + 1e-9)


def root(x: Tensor) -> Tensor:
    return x.masked_fill_(x <= 0, 0).sqrt()


def scale(x: Tensor) -> Tensor:
    if x.ndim != 4:
        raise ProgramError(f"unary operator 15 takes 4 dimensions, and there are {x.ndim}")
    scaled: Tensor = x * x.shape[-1] ** -0.5
    return scaled


def tile_inverse(x: Tensor) -> Tensor:
    return 1 / (x.repeat(1, 1, 192) + 1e-8)


def share(x: Tensor) -> Tensor:
    return x.div_(x.sum(-1).unsqueeze(-1))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.reshape(a.shape[0], -1), a.reshape(b.shape[0], -1)).sum()


def contraction(tokens: str, channels: str) -> Binary:
    """Return a product that contracts the tokens where both have as many, else the channels."""

    def contract(a: Tensor, b: Tensor) -> Tensor:
        if a.ndim != 4 or b.ndim != 4:
            raise ProgramError(
                f"binary operators 5 and 6 take 4 dimensions, and there are {a.ndim} and {b.ndim}"
            )
        if a.shape[:3] == b.shape[:3]:
            return torch.einsum(tokens, a, b)
        if a.shape[:2] == b.shape[:2] and a.shape[3] == b.shape[3]:
            return torch.einsum(channels, a, b)
        raise ProgramError(
            "binary operators 5 and 6 need as many tokens or as many channels, "
            f"not {tuple(a.shape)} and {tuple(b.shape)}"
        )

    return contract


UNARY: tuple[Unary, ...] = (
    lambda x: x,
    lambda x: x.transpose(-1, -2),
    lambda x: x.softmax(-1),
    lambda x: (x + 1e-9).log(),
    abslog,
    torch.abs,
    zscore,
    F.softsign,
    lambda x: 1 / (x + 1e-6),
    torch.sigmoid,
    lambda x: x.log_softmax(-1),
    root,
    torch.neg,
    minmax,
    torch.sign,
    scale,
    lambda x: F.elu(x) + 1,
    lambda x: x.sum(2),
    lambda x: x.unsqueeze(-1),
    F.relu,
    lambda x: F.normalize(x, dim=-2),
    torch.exp,
    lambda x: x.unsqueeze(0),
    lambda x: x.sum(1),
    tile_inverse,
    lambda x: F.normalize(x, dim=-1),
    lambda x: 1 - x.sigmoid(),
    share,
)
BINARY: tuple[Binary, ...] = (
    torch.add,
    F.pairwise_distance,
    torch.mul,
    torch.matmul,
    cosine,
    contraction("bhnd,bhne->bhde", "bhnd,bhed->bhne"),
    contraction("bhnd,bhne->bhed", "bhnd,bhed->bhen"),
    lambda a, b: torch.einsum("bnsd,bnd->bns", a, b),
    lambda a, b: torch.einsum("bti,bi->bt", a, b),
    lambda a, b: torch.cat((a, b), -1),
)
