"""A run of hashed attention on two processes, the second of which fits to other numbers, as another device would."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from graftvit.models.attention.hash import HashAttention
from graftvit.models.conversion import converted_layers
from graftvit.transfer.engine import train as engine
from support.runs.engine_killer import start, wait
from support.runs.engine_runs import config, make_teacher


def watched(folder: Path) -> Any:
    """Writes down the buffers of each rank once they are fitted."""

    def spoil(rank: int) -> None:
        fit, fit_operators = HashAttention.fit, engine.fit_operators

        def inaccurate(self: HashAttention, *given: Any, **named: Any) -> Any:
            found = fit(self, *given, **named)
            self.weight.mul_(1 + 1e-6 * rank)
            return found

        def written(run: Any, parts: Any, *given: Any) -> bool:
            whole = fit_operators(run, parts, *given)
            digest = hashlib.sha256()
            for layer in converted_layers(parts.task.trainable).values():
                for tensor in layer.operator.state_dict().values():
                    digest.update(tensor.cpu().numpy().tobytes())
            folder.mkdir(exist_ok=True)
            (folder / f"rank{rank}").write_text(digest.hexdigest())
            return whole

        HashAttention.fit = inaccurate  # type: ignore[method-assign]
        engine.fit_operators = written

    return spoil


def main(folder: str) -> dict[str, Any]:
    """Return the exit codes and what each process had fitted, of one process and of two."""
    root = Path(folder)
    teacher = make_teacher(root / "teacher")
    student = {"plan": "*: hash(anchors=5, bits=4)", "calibrate": 9, "init": "teacher"}
    ends, found = [], []
    for ranks in (1, 2):
        run = config(
            root / f"run{ranks}", teacher, student=student, transfer={"method": "attention_output"},
            optim={"epochs": 1, "warmup_epochs": 0.0},
        )  # fmt: skip
        ends += wait(start(run, ranks, watched(root / f"fits{ranks}")))
        found += [path.read_text() for path in sorted((root / f"fits{ranks}").iterdir())]
    return {"ends": ends, "fits": found}
