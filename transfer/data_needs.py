"""The conditions under which a setting of `data` has an effect."""

from __future__ import annotations

from .setting import Need


def of_family(*families: str) -> Need:
    """Return the condition of settings that only some kinds of data sets read."""
    *others, last = [f"{family}/..." for family in families]
    why = f"with data.dataset={{run.data.kind}}: leave it out, or set data.dataset to {', '.join(others)} or {last}"
    return Need(lambda run: run.data.family in families, why)


IN_A_FOLDER = Need(
    lambda run: run.data.family != "digits",
    "with data.dataset={run.data.dataset}, which is part of graftvit: leave it out, or set data.dataset",
)
SUBSET = Need(
    lambda run: run.data.train_samples is not None,
    "without data.train_samples, which it chooses: leave it out, or set data.train_samples",
)
EVALUATES = (
    Need(
        lambda run: run.data.val_split is not None,
        "with data.val_split=none, which turns evaluation off: leave it out",
    ),
    Need(
        lambda run: run.evaluates,
        "with mode={run.mode} and engine.metric=auto, which evaluate nothing: leave it out, or set engine.metric",
    ),
)
LARGEST_BATCH = 2**20
"""Images; the last batch of an evaluation is padded to its size, in memory."""
NO_VIEWS = "with data.views=0, which shows images without augmentation: leave it out"
AUGMENTED = Need(lambda run: run.data.views != 0, NO_VIEWS)
CROPPED = Need(
    lambda run: run.data.aa != "affine",
    "with data.aa=affine, which neither crops nor flips: leave it out, or choose another data.aa",
)
CLASSIFIES = Need(
    lambda run: run.dense.head is None,
    "with dense.head={run.dense.head}, whose images are resized and cropped as dense.* says: leave it out",
)
VIEWED = Need(
    lambda run: run.data.views is not None,
    "without data.views, so that no image is seen twice: leave it out, or set data.views to a number",
)
BYTES = Need(
    lambda run: run.data.reprob == 0,
    "data.reprob={run.data.reprob}, whose noise no bytes can hold: leave one of them out",
    finding="does not go with",
)
FRESH_VIEWS = Need(
    lambda run: run.data.views is None,
    "beside data.views={run.data.views}, which fixes the views of an image: leave one of them out",
    instead="data.views",
)
JITTERED = Need(
    lambda run: run.data.aa in (None, "", "none") or "3a" in run.data.aa,
    "with data.aa={run.data.aa}, in whose place it works: leave it out, or set data.aa=none",
)
RESIZED_AT_RANDOM = (
    Need(lambda run: run.data.interpolation != "random" or run.data.views != 0, NO_VIEWS),
    Need(
        lambda run: run.data.interpolation != "random" or run.data.aa != "affine",
        "with data.aa=affine, whose interpolation is fixed: leave it out, or choose bicubic or bilinear",
    ),
)
LABELED = Need(lambda run: run.needs_labels, "in a run that learns without labels: leave it out")
