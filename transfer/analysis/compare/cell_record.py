"""What is known of a cell; `cells/<cell>/cell.json` keeps it."""

from __future__ import annotations

from dataclasses import dataclass, field

from .comparison_cells import folder_of


@dataclass(frozen=True)
class Score:
    """On the test images after a stage; `zero-shot` is before the first. Percent; seconds of training alone."""

    stage: str
    top1: float
    top5: float
    loss: float
    seconds: float = 0.0
    steps: int = 0
    deviation: float | None = None
    """Of a mean over seeds: the sample standard deviation of the top-1."""
    samples: int | None = None
    """Test images; None in records of older versions."""


@dataclass(frozen=True)
class Speed:
    """A model at an image size. Seconds are of one call; those of softmax were timed in turn with it."""

    size: int
    batch: int
    """Images in the batches of throughput and memory."""
    tokens: int
    """Of a pyramid, the tokens of its first stage."""
    latency: float
    """Of one image, the median."""
    latency_low: float
    latency_high: float
    softmax_latency: float
    throughput: float
    """Images a second in batches."""
    softmax_throughput: float
    peak_bytes: int
    """Above the weights, for a batch."""
    macs: int
    """Of one image, by the operators' own account."""
    counted_macs: int
    """Of one image, by torch's counter."""
    multiplications: int | None = None
    """Of one image, as `graftvit benchmark energy` counts; None in records of older versions."""
    additions: int | None = None


@dataclass(frozen=True)
class Record:
    """A cell that is done, or that failed with `error`."""

    name: str
    plan: str | None
    size: int
    settings: str
    """A digest of all settings that its accuracy depends on."""
    machine: str
    load: float
    error: str | None = None
    linear: bool = False
    """Every layer costs linearly in the tokens."""
    parameters: int = 0
    new_parameters: int = 0
    scores: list[Score] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    layer_errors: dict[str, dict[int, float]] = field(default_factory=dict)
    """By stage and layer: relative error of the layer's output on the teacher's inputs."""
    teacher: str = ""
    """The digest of the teachers' identities; empty in records of older versions."""
    converted: bool | None = None
    """Whether the plan changed a layer; None in records of older versions."""
    seed: int | None = None
    """Of its runs, where the comparison has several; None for the teacher, and for a mean."""
    seeds: int = 1
    """The number of cells that its numbers are means of."""

    @property
    def is_unconverted(self) -> bool:
        """Whether this is a student whose plan keeps every layer: `softmax` does so in plain vision transformers."""
        kept = self.plan is not None and self.plan.replace(" ", "") in ("*:softmax", "*:keep")
        return kept if self.converted is None else self.plan is not None and not self.converted

    @property
    def folder(self) -> str:
        """The name of the cell's folder."""
        return folder_of(self.name, self.size, self.seed)

    @property
    def speed(self) -> Speed | None:
        """The speed at the image size of the training."""
        return next((speed for speed in self.speeds if speed.size == self.size), None)

    def score(self, stage: str) -> Score | None:
        """Return the score of a stage; None where the cell has none."""
        return next((score for score in self.scores if score.stage == stage), None)

    @property
    def seconds(self) -> float:
        """Seconds of training, all stages."""
        return sum(score.seconds for score in self.scores)

    @property
    def final(self) -> Score | None:
        return self.scores[-1] if self.scores else None
