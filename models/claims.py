"""Which operators claim to be faster than fused softmax attention, and from how many tokens on."""

from __future__ import annotations

FASTER_FROM: dict[str, int] = {
    "kernel": 196,
    "linear": 196,
    "performer": 4096,
    "hedgehog": 576,
    "t2r": 196,
    "focused": 576,
    "cosformer": 4096,
    "inline": 576,
    "mala": 576,
    "linformer": 576,
    "nystrom": 1024,
    "agent": 576,
    "window": 196,
    "neighbourhood": 2304,
    "dilated": 196,
    "hybrid": 1024,
    "ttt": 2304,
    "monarch": 576,
    "uniform": 64,
}
"""The number of patch tokens from which an operator with default options claims to be faster than
`scaled_dot_product_attention` on a CPU (forward, float32, heads of width 64). An operator that is not listed makes no
claim. docs/efficiency.md has the measurements; a test measures the claims at 4,096 tokens."""
