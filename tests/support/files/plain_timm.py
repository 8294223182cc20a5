"""A process that has timm and not this project: what somebody else gets from what we hand out.

    with PlainTimm(environment) as timm:
        timm.measure('model = timm.create_model("local-dir:student", pretrained=True)', photos / "validation")

Its first words are those of a model card: Python that makes `model` and, if it likes, `transform`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any


class PlainTimm:
    """The process, started at the first question, which asks one at a time."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = dict(os.environ if environment is None else environment)
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> PlainTimm:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate()  # the end of its input is its end
            self._process = None

    def measure(self, code: str, folder: Path, mode: str = "RGB") -> dict[str, Any]:
        """`measure.measure` of what `code` makes; AssertionError with the traceback where the code fails."""
        if self._process is None:
            command = [sys.executable, str(Path(__file__))]
            self._process = subprocess.Popen(
                command, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"code": code, "folder": str(folder), "mode": mode}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the process ended with {self._process.wait()}"
        answer: dict[str, Any] = json.loads(line)
        assert "failed" not in answer, f"{code}\n{answer['failed']}"
        return answer


class _Absent:
    """In front of the importers: this project is not installed here."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "graftvit":
            raise ModuleNotFoundError(name)


def _serve(questions: IO[str], answers: IO[str]) -> None:
    import traceback

    import timm
    import torch
    from support.runs.measure import measure

    torch.set_num_threads(1)
    for line in questions:
        asked = json.loads(line)
        try:
            found: dict[str, Any] = {}
            exec("import timm\n" + asked["code"], found)
            if "transform" not in found:
                described = timm.data.resolve_model_data_config(found["model"])
                found["transform"] = timm.data.create_transform(**described, is_training=False)
            answer = measure(found["model"].eval(), found["transform"], asked["folder"], asked["mode"])
        except Exception:
            answer = {"failed": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    sys.meta_path.insert(0, _Absent())  # type: ignore[arg-type]
    stdout, sys.stdout = sys.stdout, sys.stderr
    _serve(sys.stdin, stdout)
