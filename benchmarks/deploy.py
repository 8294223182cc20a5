"""Deploy the demo's digits teacher and a converted student to each kind of file, into docs/deploy.md.

python -m benchmarks.deploy              what is not there yet is trained and measured, so that a stopped one resumes
python -m benchmarks.deploy --report     write the page from the results that are there

The table has what `graftvit deploy` itself measured: the file on the 500 test images, and its processor time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graftvit.launch.cli import main as graftvit
from graftvit.transfer.analysis.report.tables import Table

from .marked import put_between_marks

PAGE = Path(__file__).parent.parent / "docs" / "deploy.md"
RESULTS = Path(__file__).parent / "results" / "deploy.json"
TARGETS = ("onnx", "onnx-int8", "aoti")
MODELS = {"softmax": "softmax, the teacher", "linear": "converted to linear attention"}
HERE = ("--workers", "0", "--device", "cpu", "--no-progress")
RECOVERY = (
    *(
        "--mode",
        "transfer",
        "--method",
        "logits",
        "--model",
        "same",
        "--init",
        "teacher",
        "--plan",
        "*: linear",
    ),
    *(
        "--dataset",
        "digits",
        "--aa",
        "affine",
        "--hflip",
        "0",
        "--smoothing",
        "0",
        "--mixup",
        "0",
        "--cutmix",
        "0",
    ),
    *("--batch_size", "64", "--epochs", "20", "--warmup_epochs", "2", "--lr", "1e-3"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.deploy", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--out", type=Path, default=Path("runs/deploy"))
    parser.add_argument("--report", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for model in () if arguments.report else MODELS:
        for target in arguments.targets:
            if f"{model} {target}" not in found:
                found[f"{model} {target}"] = deployed(model, target, arguments.out)
                RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    put_between_marks(PAGE, "deployed", table(found))


def deployed(model: str, target: str, out: Path) -> Any:
    """Return the report of one file; train its model if it is not there."""
    teacher, folder = out / "softmax", out / f"{model}-{target}"
    if not (teacher / "student").is_dir():
        run(["train", "digits_teacher", "--global_pool", "avg", *HERE, "--output_dir", str(teacher)])
    if not (out / model / "student").is_dir():
        run(["train", *RECOVERY, "--teacher", str(teacher), *HERE, "--output_dir", str(out / model)])
    run(["deploy", str(out / model), "--to", target, "--force", "--output_dir", str(folder)])
    return json.loads((folder / "deploy.json").read_text())


def table(found: dict[str, Any]) -> str:
    """Return a row for each model and kind of file, below the model itself."""
    rows = []
    for model, words in MODELS.items():
        own = [each for name, each in found.items() if name.split()[0] == model]
        if own:
            rows.append([words, "torch", "", "1", f"{own[0]['model_top1']:.1f}"])
        for each in own:
            low, high = each["interval"]
            ratio = each["milliseconds"] / each["model_milliseconds"]
            accuracy = f"{each['top1']:.1f} [{low:.1f}, {high:.1f}]"
            rows.append(["", each["target"], f"{each['bytes'] / 1e6:.2f}", f"{ratio:.2f}", accuracy])
    return Table(["model", "file", "MB", "latency / torch's", "top-1 % [95 % interval]"], rows).to_markdown()


def run(words: Sequence[str]) -> None:
    code = graftvit(list(words))
    if code != 0:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
