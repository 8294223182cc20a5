"""The gradient of the log-sum-exp, folded into what a fused backward kernel reads.

The gradient of lse with respect to the logits is P. An upstream gradient g of lse therefore turns

    dS = P * (dP - D)   into   dS = P * (dP - (D - g)),   D = rowsum(dO * O).

Backward kernels read the saved output O for D alone, so another O' with rowsum(dO * O') = D - g in its place makes
them compute this, at the head width of a plain backward pass and at its cost:

    O' = O - g dO / |dO|².

**Rows with little dO.** O' grows as |g| / |dO|, and has no value for dO = 0 (a dropped path, a token that nothing
reads). With r, t as in `_LIMITS`, e = max(r |g| / W, t) and W the head width, rows with |dO| < W e get the constant row
e in place of dO. The result is then the exact gradient for an upstream gradient that differs by at most 2 W e in norm:
2 r |g| if g is not extremely small. Rows with g = 0 stay as they are.

**Error.** Let u be the unit roundoff of the type of O, and w that of g (float32, or float64). Every element of O' is
rounded once, and |dO|² to W + 4 roundings, so

    |rowsum(dO * O') - (D - g)| ≤ u (rowsum|dO * O| + |g|) + (W + 4) w |g|.

The first term is what the rounding of O has already done to D, plus one rounding of g. So O' needs no other type than
O's. In float16, |g| / |dO| ≤ 1 / r = 2¹⁴ keeps O' finite (the largest float16 is nearly 2¹⁶) for outputs below 2¹⁵.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIMITS = {
    torch.float64: (2.0**-200, 2.0**-400),
    torch.float32: (2.0**-60, 2.0**-60),
    torch.bfloat16: (2.0**-60, 2.0**-60),
    torch.float16: (2.0**-14, 2.0**-24),
}
"""By type: the least |dO| as a share of |g|, and the least element of a row in place of dO.

The squares of both stay normal numbers of the type of g; the second is a number of the type itself.
"""


def fold_lse_gradient(grad_out_BHMW: Tensor, grad_lse_BHM: Tensor, out_BHMW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upstream gradient and the output to hand to a backward kernel, which then adds P * g to dS."""
    dtype, width = grad_out_BHMW.dtype, grad_out_BHMW.shape[-1]
    ratio, least = _LIMITS[dtype]
    grad_BHM1 = grad_lse_BHM[..., None]
    norm_BHM1 = torch.linalg.vector_norm(grad_out_BHMW, dim=-1, keepdim=True, dtype=grad_BHM1.dtype)
    filler_BHM1 = (grad_BHM1.abs() * (ratio / width)).clamp_min(least).to(dtype)
    exact_BHM1 = filler_BHM1.to(grad_BHM1.dtype)  # |dO|² must be that of the rounded elements
    little_BHM1 = (norm_BHM1 < width * exact_BHM1) & (grad_BHM1 != 0)
    square_BHM1 = torch.where(little_BHM1, width * exact_BHM1.square(), norm_BHM1.square())
    factor_BHM1 = -grad_BHM1 / square_BHM1.clamp_min(torch.finfo(grad_BHM1.dtype).tiny)  # 0 for g = 0
    # Both keep the layout of their argument, which the kernels would copy otherwise.
    given_BHMW, folded_BHMW = torch.empty_like(grad_out_BHMW), torch.empty_like(out_BHMW)
    torch.where(little_BHM1, filler_BHM1, grad_out_BHMW, out=given_BHMW)
    torch.addcmul(out_BHMW, given_BHMW, factor_BHM1, out=folded_BHMW)  # rounds the sum once
    return given_BHMW, folded_BHMW
