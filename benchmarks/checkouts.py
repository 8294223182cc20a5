"""Compare the time of two checkouts of this repository: forward and step of hosted and converted models.

python -m benchmarks.checkouts OLD NEW                two folders, each with its own .venv
python -m benchmarks.checkouts OLD NEW --models vit swin --rounds 21

Each checkout is a process that times a case in its thread's CPU time when it is asked. Both are asked in turn, in
changing order, and each round gives one ratio: so what else the machine does affects both alike. Prints the median
ratio new / old and its quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
from pathlib import Path

MODELS = {
    "vit": "vit_tiny_patch16_224",
    "swin": "swin_tiny_patch4_window7_224",
    "pvt": "pvt_v2_b0",
    "twins": "twins_svt_small",
}
KINDS = ("hosted forward", "hosted step", "linear forward", "linear step")
WORKER = """
import sys, time
import timm, torch
from graftvit.models.conversion import convert
from graftvit.models.hosting import host_attention

torch.set_num_threads(1)
models, images = {}, torch.randn(2, 3, 224, 224)

def model(name, kind):
    if (name, kind) not in models:
        torch.manual_seed(0)
        made = timm.create_model(name)
        if kind == "hosted":
            host_attention(made)
        else:
            made = convert(made, "*: linear", without=["bias"] if "swin" in name else [])
        models[name, kind] = made
    return models[name, kind]

print("ready", flush=True)
for line in sys.stdin:
    name, kind, what = line.split()
    found = model(name, kind).train(what == "step")
    found.zero_grad()
    begun = time.thread_time()
    if what == "forward":
        with torch.no_grad():
            found(images)
    else:
        found(images).square().mean().backward()
    print(time.thread_time() - begun, flush=True)
"""


class Checkout:
    """The process of one checkout."""

    def __init__(self, folder: Path) -> None:
        python = folder.absolute() / ".venv" / "bin" / "python"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([python, "-c", WORKER], text=True, cwd=folder, **pipes)
        if not self._answer().startswith("ready"):
            raise SystemExit(f"{python} does not start: see above")

    def seconds(self, case: str) -> float:
        """CPU seconds of one pass of this process's thread."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{case}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.checkouts", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    old, new = Checkout(arguments.old), Checkout(arguments.new)
    print(f"{'model':8}{'case':16}{'new / old':>10}   quartiles")
    for name in arguments.models:
        for kind in KINDS:
            low, middle, high = ratios(old, new, f"{MODELS[name]} {kind}", arguments.rounds)
            print(f"{name:8}{kind:16}{middle:10.3f}   {low:.3f} {high:.3f}", flush=True)


def ratios(old: Checkout, new: Checkout, case: str, rounds: int) -> tuple[float, ...]:
    """Return the quartiles of the ratio new / old over rounds, after a warm-up."""
    found = []
    for place in range(-1, rounds):
        pair = [new, old] if place % 2 else [old, new]
        seconds = {one: one.seconds(case) for one in pair}
        if place >= 0:
            found.append(seconds[new] / seconds[old])
    low, middle, high = statistics.quantiles(found, n=4)
    return low, middle, high


if __name__ == "__main__":
    main()
