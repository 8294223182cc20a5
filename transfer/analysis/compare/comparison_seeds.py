"""Means over the cells of a student that differ in their seed alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from .cell_record import Record, Score


def mean_over_seeds(records: Sequence[Record]) -> list[Record]:
    """Return one record for each name and image size, with the means over seeds; failed cells stay by themselves."""
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record.name, record.size), []).append(record)
    found = []
    for group in groups.values():
        done = [record for record in group if record.error is None]
        if len(done) > 1:
            found.append(_mean(done))
        else:
            found += done
        found += [record for record in group if record.error is not None]
    return found


def _mean(group: Sequence[Record]) -> Record:
    """Return the mean of finished records; speeds are those of the first that has any."""
    first = group[0]
    names = [score.stage for score in first.scores]
    return replace(
        first,
        seed=None,
        seeds=len(group),
        scores=[_mean_score([each for r in group if (each := r.score(name)) is not None]) for name in names],
        speeds=next((record.speeds for record in group if record.speeds), []),
        layer_errors={
            stage: {
                layer: statistics.fmean(record.layer_errors[stage][layer] for record in group)
                for layer in layers
            }
            for stage, layers in first.layer_errors.items()
        },
    )


def _mean_score(scores: Sequence[Score]) -> Score:
    top1 = [score.top1 for score in scores]
    return replace(
        scores[0],
        top1=statistics.fmean(top1),
        top5=statistics.fmean(score.top5 for score in scores),
        loss=statistics.fmean(score.loss for score in scores),
        seconds=statistics.fmean(score.seconds for score in scores),
        deviation=statistics.stdev(top1) if len(top1) > 1 else None,
    )
