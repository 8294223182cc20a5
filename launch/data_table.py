"""The output of `graftvit data`: the survey of a data set as text and as JSON."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence

from ..models.errors import JsonDict
from ..transfer.analysis.report.tables import aligned
from ..transfer.config import DataConfig
from ..transfer.data.coco import CocoImages
from ..transfer.data.dense_sets import check_dense, open_dense
from ..transfer.data.survey import Split, Survey, differences

SHOWN_LABELS = 20
"""With more classes than these, the text shows the first and the last ones; the JSON has all."""


def to_text(found: Survey) -> str:
    """Return tables of the splits, their files and labels, and the warnings."""
    rows = [["split", "images", "classes", "a class: min", "median", "max", "unlabeled", "unreadable"]]
    rows += [_format_row(split) for split in found.splits]
    blocks = [aligned(rows, right=tuple(range(1, len(rows[0]))))]
    blocks += [_format_files(split) for split in found.splits]
    blocks.append(_format_labels(found.splits[0]))
    remarks = [f"WARNING  {line}" for line in differences(found)]
    remarks += [f"no split {name}: {reason}" for name, reason in found.missing.items()]
    remarks += [line for split in found.splits for line in _list_unreadable(split)]
    return "\n".join([*blocks, *remarks]).rstrip() + "\n"


def to_json(found: Survey) -> str:
    """Return all numbers and the label of each class as JSON."""
    splits = {split.name: _collect_numbers(split) for split in found.splits}
    whole = {"splits": splits, "missing": found.missing, "warnings": differences(found)}
    return json.dumps(whole, indent=2)


def survey_dense(data: DataConfig) -> JsonDict:
    """Return the images of each split of a data set of detection or segmentation, its objects by class, and crowds.

    Raises DataError: a split is not there or damaged.
    """
    splits: JsonDict = {}
    for split in (data.train_split, data.val_split):
        if split is not None:
            source = open_dense(data, split, training=False)
            labels = {"classes": list(source.class_names)}
            splits[split] = {"images": len(source)}
            splits[split] |= source.counts() if isinstance(source, CocoImages) else labels
    return {"task": check_dense(data, ()), "splits": splits}


def dense_to_text(found: JsonDict) -> str:
    """Return a table of the splits, and one of the objects by class where there are objects."""
    splits: JsonDict = found["splits"]
    rows = [["split", "images", "classes", "objects", "crowds"]]
    objects = {name: split["objects"] for name, split in splits.items() if "objects" in split}
    for name, split in splits.items():
        many = (f"{sum(objects[name].values()):,}", f"{split['crowds']:,}") if name in objects else ("-", "-")
        rows.append([name, f"{split['images']:,}", f"{len(objects.get(name) or split['classes']):,}", *many])
    blocks = [aligned(rows, right=(1, 2, 3, 4))]
    for name, counts in objects.items():
        lines = [["class", "objects"], *([each, f"{count:,}"] for each, count in counts.items())]
        blocks.append(f"objects of {name}\n" + aligned(lines, right=(1,)))
    return "\n".join(blocks).rstrip() + "\n"


def _format_row(split: Split) -> list[str]:
    counts = split.counts()
    spread = _format_spread(counts) if counts else ("-", "-", "-")
    images = f"{split.images:,}" + (f" ({split.looked_at:,} looked at)" if split.streamed else "")
    numbers = (f"{split.unlabeled:,}", f"{split.unreadable:,}")
    return [split.name, images, f"{len(counts):,}" if counts else "none", *spread, *numbers]


def _format_files(split: Split) -> str:
    if not split.widths:
        return f"{split.name}: no image can be read\n"
    width, height = (" / ".join(_format_spread(sides)) for sides in (split.widths, split.heights))
    lines = [
        f"{split.name}: width {width}, height {height} (min / median / max)",
        f"  formats {_format_counts(split.kinds)}; modes {_format_counts(split.modes)}",
    ]
    if split.turned:
        lines.append(f"  {split.turned:,} with an EXIF orientation, which is ignored")
    if split.looked_at < split.images and not split.streamed:
        lines[0] += f", of {split.looked_at:,} images"
    return "\n".join([*lines, ""])


def _format_labels(split: Split) -> str:
    counts = split.counts()
    if not counts:
        return f"labels of {split.name}: no classes\n"
    names = [*(split.class_names or ()), *[""] * len(counts)]
    rows = [[str(label), names[label], f"{count:,}"] for label, count in enumerate(counts)]
    if len(rows) > SHOWN_LABELS:
        half = SHOWN_LABELS // 2
        rows = [*rows[:half], ["...", "", ""], *rows[-half:]]
    return f"labels of {split.name}\n" + aligned([["label", "class", "images"], *rows], right=(0, 2))


def _list_unreadable(split: Split) -> list[str]:
    lines = [f"unreadable in {split.name}: {each.path} ({each.reason})" for each in split.named]
    more = split.unreadable - len(split.named)
    return [*lines, f"unreadable in {split.name}: and {more:,} more"] if more > 0 else lines


def _collect_numbers(split: Split) -> JsonDict:
    names = split.class_names
    return {
        "images": split.images,
        "looked_at": split.looked_at,
        "streamed": split.streamed,
        "classes": None if names is None else {name: label for label, name in enumerate(names)},
        "images_by_label": split.counts(),
        "unlabeled": split.unlabeled,
        "width": _summarize(split.widths),
        "height": _summarize(split.heights),
        "formats": dict(split.kinds.most_common()),
        "modes": dict(split.modes.most_common()),
        "turned": split.turned,
        "unreadable": split.unreadable,
        "unreadable_files": [{"path": each.path, "reason": each.reason} for each in split.named],
    }


def _summarize(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _format_spread(values: Sequence[int]) -> tuple[str, str, str]:
    return f"{min(values):,}", f"{statistics.median(values):,.10g}", f"{max(values):,}"


def _format_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common())
