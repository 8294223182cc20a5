"""What is known of a run's mode before anything is built: facts, conditions of settings, and sections of some runs.

The sections are those of alignment, masked autoencoding, detection and segmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Literal

from pydantic import ValidationInfo, field_validator

from ..models.dense import DESIGNS, DETECTION, SEGMENTATION, Kind
from .setting import LOCAL, Need, Section, in_mode, setting

# The conditions under which a setting of `data` has an effect.


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


# What is known of each train mode before anything is built; `engine/modes.py` adds what it computes. No torch here.

Mode = Literal["transfer", "align", "finetune", "scratch", "pretrain"]
TEACHER: Final = "teacher"
"""Source of a student that starts from the weights of the run's own teacher."""


@dataclass(frozen=True)
class ModeFacts:
    """The properties of a mode that hold for each of its runs."""

    taught: bool = False
    """Presence of a teacher in every step."""
    transfers: bool = False
    """Losses, or copies, of the section `transfer`."""
    learns_labels: bool = True
    """Need of labels, unless `transfer.task_weight` is 0."""
    starts_from: str | None = None
    """Weights that the student starts from where the settings name none."""
    keeps_head: bool = True
    """A head that learns whatever `optim.trainable` says."""
    draws_head: bool = False
    """A head that is drawn after all other fresh weights, so that it depends on the number of their draws."""
    aligns: bool = False
    """Training of converted layers alone, apart from their blocks."""
    classifies: bool = True
    """A student that can have an accuracy."""
    pools: bool = True
    """A student that is pooled as `student.global_pool` says."""


MODE_FACTS: dict[Mode, ModeFacts] = {
    "transfer": ModeFacts(taught=True, transfers=True),
    "align": ModeFacts(taught=True, learns_labels=False, starts_from=TEACHER, keeps_head=False, aligns=True),
    "finetune": ModeFacts(starts_from=TEACHER, draws_head=True),
    "scratch": ModeFacts(),
    "pretrain": ModeFacts(learns_labels=False, classifies=False, pools=False),
}


MatchName = Literal["output", "map", "probes", "rows"]


class AlignConfig(Section):
    """How converted layers learn on their teacher's inputs (mode align)."""

    needs: ClassVar = (in_mode("align"),)

    match: MatchName = setting(
        "output",
        "loss between a layer and the teacher's: output error, exact map error, its estimate by random probes, or "
        "cross-entropy of sampled rows",
    )


class PretrainConfig(Section):
    """Masked autoencoding (MAE, arXiv:2111.06377), which pretrains a teacher for a new domain."""

    needs: ClassVar = (in_mode("pretrain"),)

    mask_ratio: float = setting(0.75, "fraction of patches hidden", gt=0, lt=1)
    decoder_dim: int | None = setting(
        None, "width of the decoder; by default two thirds of the encoder's, and at most MAE's 512", gt=0
    )
    decoder_depth: int | None = setting(
        None,
        "number of the decoder's blocks; by default two thirds of the encoder's, and at most MAE's 8",
        gt=0,
    )
    decoder_heads: int | None = setting(
        None, "number of the decoder's heads; by default heads of 32 channels, as MAE's", gt=0
    )
    norm_pixels: bool = setting(True, "normalization of each target patch")
    decay_tokens: bool = setting(
        True,
        "weight decay of tokens and position embeddings, as in MAE's code; off exempts them as in the other modes",
    )


DETECTORS, SEGMENTERS = (
    ", ".join(kind for kind, each in DESIGNS.items() if each.task == task)
    for task in (DETECTION, SEGMENTATION)
)
HEADED = Need(
    lambda run: run.dense.head is not None,
    "without dense.head, which makes the student a detector or a segmenter: leave it out, or set dense.head",
)
OF_DETECTORS = Need(
    lambda run: run.dense.task == DETECTION,
    "with dense.head={run.dense.head}, which finds no objects: leave it out",
)
OF_ANCHORS = Need(
    lambda run: run.dense.head is None or DESIGNS[run.dense.head].has_anchors,
    "with dense.head={run.dense.head}, which has no anchors: leave it out",
)
OF_MASKS = Need(
    lambda run: run.dense.head is None or DESIGNS[run.dense.head].has_masks,
    "with dense.head={run.dense.head}, which has no proposals: leave it out",
)


class DenseConfig(Section):
    """Detection and segmentation: the head on the student's maps, and how images are resized and cropped."""

    head: Kind | None = setting(
        None,
        f"head that makes the student a detector ({DETECTORS}) or a segmenter ({SEGMENTERS}); a "
        "classifier by default",
        see="[dense tasks](dense.md)",
    )
    source: Annotated[str | None, LOCAL] = setting(
        None, "run or folder of a detector or segmenter whose neck and head this one starts from", HEADED
    )
    frozen: bool = setting(False, "neck and head stay as they are; the backbone learns alone", HEADED)
    width: int | None = setting(None, "channels of the neck; 256, and 512 of upernet", HEADED, gt=0)
    norms: list[int] = setting(
        [], "outputs of the backbone, from 0, that go through a LayerNorm of their own", HEADED
    )
    anchor_scale: float | None = setting(
        None, "smallest anchor in strides; 4 of retinanet, 8 of mask_rcnn", HEADED, OF_ANCHORS, gt=0
    )
    samples: int | None = setting(
        None, "proposals of mask_rcnn that teach an image; 512, fewer are faster", HEADED, OF_MASKS, gt=0
    )
    short: list[int] = setting(
        [800],
        "shorter sides that training images are resized to at random; evaluation takes the largest",
        HEADED,
        drawn=True,
    )
    long: int = setting(1333, "largest longer side", HEADED, gt=0)
    cropped: list[int] = setting(
        [],
        "shorter sides of half of the images, which are cropped before they are resized; 400, 500 and 600 in the 3x "
        "recipe of Swin",
        HEADED,
        OF_DETECTORS,
        drawn=True,
    )
    scale: tuple[float, float] | None = setting(
        None, "range of a further factor of the size: 0.5 to 2 in segmentation", HEADED, drawn=True
    )
    crop: int | None = setting(None, "side of a square crop at last", HEADED, gt=0, drawn=True)
    distort: bool = setting(False, "change of brightness, contrast, saturation and hue", HEADED, drawn=True)

    @field_validator("short", "cropped", "scale")
    @classmethod
    def _check_sizes(cls, sizes: Sequence[float] | None, info: ValidationInfo) -> Sequence[float] | None:
        if sizes is not None and (min(sizes, default=info.field_name == "cropped") <= 0):
            raise ValueError("give one size at least, and each above 0")
        if sizes is not None and info.field_name == "scale" and sizes[0] > sizes[1]:
            raise ValueError("give the least factor first")
        return sizes

    @property
    def task(self) -> Literal["classification", "detection", "segmentation"]:
        """What the student is to do."""
        return "classification" if self.head is None else DESIGNS[self.head].task
