"""What is known of each train mode before anything is built; `engine/modes.py` adds what it computes. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

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
