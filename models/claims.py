"""Which operators claim to be faster than fused softmax attention, and from how many tokens on."""

from __future__ import annotations

FASTER_FROM: dict[str, int] = {
    "kernel": 576,
    "linear": 576,
    "performer": 2304,
    "hedgehog": 1024,
    "t2r": 576,
    "focused": 576,
    "cosformer": 1024,
    "inline": 576,
    "mala": 1024,
    "linformer": 196,
    "nystrom": 1024,
    "agent": 576,
    "window": 196,
    "neighbourhood": 576,
    "dilated": 576,
    "hybrid": 2304,
    "ttt": 2304,
    "monarch": 2304,
    "uniform": 64,
}
"""The number of patch tokens from which an operator with default options claims to be faster than
`scaled_dot_product_attention` on a CPU (forward, float32, heads of width 64). An operator that is not listed makes no
claim. docs/efficiency.md has the measurements; a test measures the claims at 4,096 tokens."""
