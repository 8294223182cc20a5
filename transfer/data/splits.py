"""Names of splits: what people call the training and the validation images."""

from __future__ import annotations

from pathlib import Path

TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("val", "valid", "validation", "eval", "evaluation")


def synonyms(split: str) -> tuple[str, ...]:
    """Return the names that mean the same split, this one among them."""
    split = split.split("[")[0]
    return next((names for names in (TRAIN_NAMES, EVAL_NAMES) if split in names), (split,))


def split_folder(root: Path, split: str) -> Path | None:
    """Return the folder of a split, or of a synonym of it; None if it does not exist."""
    return next((root / name for name in (split, *synonyms(split)) if (root / name).is_dir()), None)
