"""Record how a student was made: the `graftvit` entry of its config.json and of a run's states."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ..models.errors import CheckpointError, Json, JsonDict
from ..models.families import pooling_of
from .identity import collect_identity
from .licenses import carried

if TYPE_CHECKING:
    from .pretrained import Pretrained
    from .report import LoadReport

KEY = "graftvit"
"""The entry of config.json; timm ignores it."""
NORM_EPS = "norm_eps"
"""In that entry: the norms' epsilon where it is not the architecture's, for which timm has no setting in JSON."""
BARE = "bare"
"""In that entry: true of a student that was written without the teacher's attention that it was trained with."""
PICKED = "picked"
"""In that entry: the number (`test_…` in the log) by which this state was picked from those of its run."""
COST = "cost"
"""In that entry, of a student with a part of its teacher: parameters and multiply-adds of an image, of both."""
NOT_RECIPE = ("output_dir", "engine")
"""Settings that say where a run ran, and not what it learned."""


def of_teacher(teacher: Pretrained | None) -> JsonDict | None:
    """Return a teacher as provenance, in JSON: its source, its license and its identity."""
    if teacher is None:
        return None
    origin = {"source": teacher.source, "revision": teacher.revision, "licence": teacher.license}
    return origin | {"pooling": pooling_of(teacher.model)} | collect_identity(teacher)


def of_weights(source: str, report: LoadReport) -> JsonDict:
    """Return weights that a student started from, as provenance."""
    return {"source": source, "revision": report.revision, "licence": report.license}


def licenses(provenance: Json) -> list[str | None]:
    """Return the licenses of all weights that a student learned from or started from; None is an unknown one."""
    further = provenance.get("teachers")
    named = list(further.values()) if isinstance(further, Mapping) else []
    origins = [provenance.get("teacher"), *named, provenance.get("init")]
    return [origin.get("licence") for origin in origins if origin and isinstance(origin, Mapping)]


def carried_license(provenance: Json) -> str | None:
    """Return the license that a student carries from these weights; None if it is unknown or no single one holds."""
    try:
        return carried(*licenses(provenance))
    except CheckpointError:
        return None  # two that contradict each other: publishing asks, saving does not


def of_state(meta: Json, part: str) -> JsonDict:
    """Return the record of one part of a run, from the meta of its state: teacher, start, recipe, results."""
    config = dict(meta.get("config") or {})
    metrics = (meta.get("position") or {}).get("metrics") or {}
    data = config.get("data") or {}
    dataset = data.get("dataset") or Path(data.get("data_path") or "").name
    return {
        "version": version("graftvit"),
        "part": part,
        "step": (meta.get("position") or {}).get("step"),
        **(meta.get("origins") or {}),
        "recipe": {key: value for key, value in config.items() if key not in NOT_RECIPE},
        "results": _results(metrics, part, dataset),
    }


def _results(metrics: Mapping[str, float], part: str, dataset: str) -> JsonDict | None:
    prefix = "test_ema_" if part == "ema" else "test_"
    measured = {key: metrics[prefix + key] for key in ("top1", "top5", "loss") if prefix + key in metrics}
    return {"dataset": dataset, **measured} if measured else None
