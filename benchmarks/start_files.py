"""Count the system calls on files from the start of a run to its first step: `python -m benchmarks.start_files`.

One rank, then two gloo ranks, train on a generated folder of tiny images, each new and then resumed, under strace
(Debian's package of that name). The table has what each rank asks of the file systems.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from graftvit.transfer.analysis.report.tables import Table

TORCH, STEP = "/graftvit-has-torch", "/graftvit-first-step"
"""Names of no file, which a rank asks for after `import torch` and after its first step: they cut the trace."""
RANK = f"""
import os, sys
import torch
os.path.exists("{TORCH}")
from torch.optim.optimizer import register_optimizer_step_post_hook as after_step
after_step(lambda *_: os.path.exists("{STEP}") and None)
from graftvit.launch.__main__ import main
sys.exit(main())
"""
PLAIN = f"""
import os, torch
os.path.exists("{TORCH}")
import timm
model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=64, depth=2, num_heads=2)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.randn(2, 3, 16, 16)).sum().backward()
optimizer.step()
os.path.exists("{STEP}")
"""
"""A step that has nothing of ours: no run can ask for less."""
TEACHER = """
import sys, timm
from pathlib import Path
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
sized = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 0}
model = timm.create_model("vit_tiny_patch16_224", **sized)
write_student(model, Path(sys.argv[1]), architecture="vit_tiny_patch16_224", model_args=sized,
              preprocessing=Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3))
"""
CALL = re.compile(r'^\d+ +(?:\S+ +)?(\w+)\((?:\w+, )?(?:"((?:[^"\\]|\\.)*)")?(.*)$')
STATE = r"/run-\d/checkpoints/.*\.(safetensors|json)$"
CHANGES = {"mkdir", "mkdirat", "rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat"}


@dataclass(frozen=True)
class Call:
    """One line of a trace."""

    name: str
    path: str
    rest: str

    @property
    def done(self) -> bool:
        return "= -1 " not in self.rest

    @property
    def opens(self) -> bool:
        return self.name in ("open", "openat") and self.done

    @property
    def writes(self) -> bool:
        """Whether it creates or changes a file, devices and the system's own folders apart."""
        opened = self.opens and ("O_CREAT" in self.rest or "O_WRONLY" in self.rest or "O_RDWR" in self.rest)
        own = self.path.startswith(("/dev/", "/proc/", "/sys/"))
        return self.done and not own and (opened or self.name in CHANGES)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.start_files", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=200)
    arguments = parser.parse_args()
    if shutil.which("strace") is None:
        print("nothing is counted: strace is not installed (apt-get install strace)")
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("KEEP")) as folder:
        print(table(measure(Path(folder), arguments.images, arguments.classes)).to_markdown())


def measure(folder: Path, images: int, classes: int) -> dict[str, list[Call]]:
    """Return the calls of each rank up to its first step, by the column of the table."""
    make_images(folder / "images" / "train", images, classes)
    make_images(folder / "images" / "val", classes, classes)
    subprocess.run([sys.executable, "-c", TEACHER, str(folder / "teacher")], check=True)
    traced(folder, 0, PLAIN, [], {}).wait()
    found = {"plain timm": list(to_first_step(trace_of(folder, 0)))}
    for ranks in (1, 2):
        for steps, name in enumerate(("new", "resumed"), 1):
            start(folder, ranks, steps)
            for rank in range(ranks):
                who = "alone" if ranks == 1 else f"rank {rank}"
                found[f"{who}, {name}"] = list(to_first_step(trace_of(folder, rank)))
    return found


def make_images(folder: Path, images: int, classes: int) -> None:
    """Write gray images, the same number in each class."""
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (16, 16), (90, 120, 150)).save(data, "JPEG")
    for index in range(images):
        path = folder / f"class_{index % classes:03d}" / f"image_{index // classes:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.getvalue())


def start(folder: Path, ranks: int, steps: int) -> None:
    """Run the ranks to the end of `steps` steps. Raises RuntimeError: one failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = [
        "train", "--teacher", f"local-dir:{folder / 'teacher'}", "--model", "vit_tiny_patch16_224",
        "--method", "distill", "--device", "cpu",
        "student.model_args={img_size: 16, patch_size: 4, embed_dim: 64, depth: 2, num_heads: 2}",
        "--data_path", str(folder / "images"), "--output_dir", str(folder / f"run-{ranks}"), "--batch_size", "32",
        "data.workers=0", f"optim.max_steps={steps}", "engine.progress=false",
    ]  # fmt: skip
    started = []
    for rank in range(ranks):
        own = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        started.append(traced(folder, rank, RANK, settings, own if ranks > 1 else {}))
    for rank, process in enumerate(started):
        if process.wait():
            raise RuntimeError((folder / f"output-{rank}").read_text())


def traced(
    folder: Path, rank: int, script: str, words: Sequence[str], variables: Mapping[str, object]
) -> subprocess.Popen[bytes]:
    """Start a script under strace."""
    command = ["strace", "-f", "-qq", "-e", "trace=%file", "-o", str(trace_of(folder, rank))]
    given = {key: str(value) for key, value in variables.items()}
    with (folder / f"output-{rank}").open("wb") as output:
        return subprocess.Popen(
            [*command, sys.executable, "-c", script, *words],
            env={**os.environ, **given},
            stdout=output,
            stderr=output,
        )


def trace_of(folder: Path, rank: int) -> Path:
    return folder / f"trace-{rank}"


def to_first_step(trace: Path) -> Iterator[Call]:
    """Yield the calls before the mark of the first step. Raises RuntimeError: there is no such mark."""
    with trace.open(errors="replace") as lines:
        for line in lines:
            match = CALL.match(line)
            if match is None:
                continue
            call = Call(match[1], match[2] or "", match[3])
            if call.path == STEP:
                return
            yield call
    raise RuntimeError(f"{trace} has no first step")


def after_torch(calls: Sequence[Call]) -> Iterable[Call]:
    return calls[next(place for place, call in enumerate(calls) if call.path == TORCH) + 1 :]


def count(calls: Iterable[Call], wanted: Callable[[Call], bool]) -> str:
    return f"{sum(map(wanted, calls)):,}"


def table(found: dict[str, list[Call]]) -> Table:
    """Return a line for each figure and a column for each rank."""

    def row(what: str, wanted: Callable[[Call], bool]) -> list[str]:
        return [what, *(count(after_torch(calls), wanted) for calls in found.values())]

    def walk(split: str) -> Callable[[Call], bool]:
        return lambda call: (
            call.opens and call.path.endswith(f"/images/{split}") and "O_DIRECTORY" in call.rest
        )

    whole = [count(calls, lambda call: True) for calls in found.values()]
    rows = [
        ["system calls on files", *whole],
        row("beyond `import torch`", lambda call: True),
        row("of them for modules", lambda call: "-packages" in call.path or call.path.endswith((".py", ".pyc"))),
        row("below the data", lambda call: "/images/" in call.path),
        row("walks of the training images", walk("train")),
        row("walks of the test images", walk("val")),
        row("images opened", lambda call: call.opens and call.path.endswith(".jpg")),
        row("opens of the teacher's weights", lambda call: call.opens and "/teacher/model" in call.path),
        row("opens of files of the state", lambda call: call.opens and re.search(STATE, call.path) is not None),
        row("files written", lambda call: call.writes),
        row("`.pyc` files written", lambda call: call.writes and ".pyc" in call.path),
    ]  # fmt: skip
    return Table(["to the first step", *found], rows)


if __name__ == "__main__":
    main()
