"""Time, peak memory and multiply-adds of a function, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Step = Callable[[], object]
TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""glibc's numbers of the options of `mallopt`."""
SHORTEST = 5e-3
"""Seconds that a timing lasts at least: shorter steps are taken several times in a row."""
QUICK = 0.1
"""Seconds below which a call before each timing fills the caches, which are those of another step by then."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median of the rounds, and the first and third quartile."""

    median: float
    low: float
    high: float
    cpu: float | None = None
    """Median seconds of processor time of all threads of this process: what others on the machine do is not in it."""


def time_steps(
    steps: Mapping[str, Step], repeats: int, device: torch.device, warmup: int = 1
) -> dict[str, Timing]:
    """Return the timing of each step over `repeats` rounds, at least two.

    Rounds take every step in turn, so that a drift of the machine touches all alike. Before its timing, a quick step
    is called once: otherwise a step that follows one of other data would be slower than one that follows its like.
    """
    first = {name: _warm(step, warmup, device) for name, step in steps.items()}
    calls = {name: max(1, round(SHORTEST / max(seconds, 1e-7))) for name, seconds in first.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    worked: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(max(2, repeats)):
        for name, step in steps.items():
            if first[name] < QUICK:
                step()
            before = time.process_time()
            times[name].append(_seconds(step, calls[name], device) / calls[name])
            worked[name].append((time.process_time() - before) / calls[name])
    return {name: replace(_timing(times[name]), cpu=statistics.median(worked[name])) for name in steps}


def step_of(run: Callable[[], Tensor], leaves: Sequence[Tensor] = (), upstream: Tensor | None = None) -> Step:
    """Return the forward pass `run` as a step; with `leaves`, and the backward pass to them from `upstream`."""

    def forward() -> None:
        with torch.no_grad():
            run()

    def learn() -> None:
        torch.autograd.grad(run(), leaves, upstream, allow_unused=True)

    return learn if leaves else forward


def keep_freed_memory() -> None:
    """Let the C library keep memory that is freed, as torch does on a GPU. Nothing happens where it is not glibc.

    glibc returns large blocks, and memory at the end of its heap, to the system, and gets them back page by page in
    the next call, which can take longer than the call's arithmetic.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(TRIM_THRESHOLD, -1)  # however large it is
        library.mallopt(MMAP_MAX, 0)


def peak_bytes(step: Step, device: torch.device) -> int:
    """Return the most bytes allocated at once during a step, above what was allocated before it.

    On a GPU those that torch's allocator counts; on a CPU the running sum of the allocations and releases that
    torch's profiler sees, which has temporary buffers within torch's own kernels, but not within oneDNN's.
    """
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def counted_macs(step: Step) -> int:
    """Count the multiply-adds of matrix products and convolutions in a step, by `torch.utils.flop_counter`."""
    # torch does not count a product that is added to a tensor in place
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: _product_flops})
    with counter, sdpa_kernel(SDPBackend.MATH):  # the products of fused attention are not counted everywhere
        step()
    return counter.get_total_flops() // 2


def _product_flops(
    _added: Sequence[int], left: Sequence[int], right: Sequence[int], **_others: object
) -> int:
    """Return the operations of a batch of products, of the shapes (Z, N, M) and (Z, M, D)."""
    return 2 * math.prod(left) * right[-1]


def _warm(step: Step, warmup: int, device: torch.device) -> float:
    """Warm up; return the seconds of a call."""
    for _ in range(max(1, warmup)):
        step()
    return _seconds(step, 1, device)


def _seconds(step: Step, calls: int, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        step()
    _synchronize(device)
    return time.perf_counter() - start


def _timing(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
