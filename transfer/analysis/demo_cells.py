"""The cells of the demo: two teachers, and the `digits_*` recipes once a seed for each student of each.

Another data set changes these recipes by its row of `DATA_SETS`.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Literal

import torch

from ...checkpoints.atomic import write_bytes
from ...checkpoints.files import digest, open_regular, read_records
from ...models.errors import ConfigError, DataError, Json, JsonDict, did_you_mean
from ...models.plain_yaml import parse_yaml
from ..cells import Ending, State, cell_state, save_record
from ..config import DataConfig, RunConfig
from ..data.archives import FAILURES
from ..data.datasets import open_dataset
from ..engine.train import train
from ..setting import dump_decisive, find_unread, without

TeacherName = Literal["supervised", "mae"]
TEACHERS: dict[TeacherName, str] = {"supervised": "digits_teacher", "mae": "digits_pretrain"}
"""Each teacher's recipe: all labels, or none and half of each image."""
POOLING: dict[TeacherName, JsonDict] = {"supervised": {"student": {"global_pool": "avg"}}, "mae": {}}
"""The recipe's class token reads the image; the students' patches do, so their teacher's must."""
STUDENTS: tuple[tuple[str, TeacherName | None], ...] = (
    ("scratch", None),
    ("copy", "supervised"),
    ("distill", "supervised"),
    ("finetune", "mae"),
    ("copy", "mae"),
    ("distill", "mae"),
)


@dataclass(frozen=True)
class DemoData:
    """What differs between the data sets of the demo: the settings, the time and the words."""

    name: str
    things: str
    """What the images show, as in "40 labelled digits"."""
    training_images: int
    img_size: int
    patch_size: int
    full: Mapping[TeacherName, JsonDict]
    """The schedules of the teachers."""
    quick: Mapping[TeacherName, JsonDict]
    seconds: Mapping[str, float]
    """Of an epoch of a teacher and of a student of each method; only the ratios matter."""
    images: str
    """What the images are, and how they are made larger."""
    why: str = ""
    """Why the setting is as it is."""
    student: JsonDict = field(default_factory=dict)
    """Settings of the students."""
    dataset: str | None = None
    """The setting `data.dataset` of a data set that is read from a folder."""

    @property
    def patches(self) -> int:
        return (self.img_size // self.patch_size) ** 2

    @property
    def visible(self) -> int:
        """The patches that the masked autoencoder sees."""
        return self.patches - round(self.patches / 2)

    def place(self, data_path: Path | None) -> JsonDict:
        """Return the settings that say where the images are."""
        if self.dataset is None:
            return {}
        return {"data": {"dataset": self.dataset, "data_path": str(data_path)}}

    @property
    def shape(self) -> JsonDict:
        """The settings of a fresh model."""
        return {"student": {"img_size": self.img_size, "model_args": {"patch_size": self.patch_size}}}


def _seconds(supervised: float, mae: float, scratch: float, copy: float, distill: float) -> dict[str, float]:
    students = {"scratch": scratch, "copy": copy, "distill": distill, "finetune": scratch}
    return {"supervised": supervised, "mae": mae, **students}


DATA_SETS = {
    data.name: data
    for data in (
        DemoData(
            "digits",
            "digits",
            1297,
            img_size=12,
            patch_size=2,
            full={"supervised": {}, "mae": {}},
            quick={"supervised": {"epochs": 25}, "mae": {"epochs": 40}},
            seconds=_seconds(2.0, 1.3, 16.0, 18.0, 20.0),
            images="The handwritten digits, 8 by 8 pixels, are enlarged to 12 by 12",
            why="There are 36 patches because with 16 it is easy to learn where to look, and position embeddings "
            "start with a deviation of 0.2 because students from scratch would need more steps at the usual 0.02, "
            "which would flatter attention transfer.",
        ),
        DemoData(
            "fashion_mnist",
            "product photographs",
            60_000,
            img_size=28,
            patch_size=4,
            full={name: {"epochs": 1, "warmup_epochs": 0.1} for name in TEACHERS},
            quick={name: {"epochs": 1, "max_steps": 400, "warmup_epochs": 0.05} for name in TEACHERS},
            seconds=_seconds(110.0, 90.0, 36.0, 40.0, 43.0),
            student={"engine": {"eval_every": 150}},
            images="Fashion-MNIST's photographs of clothes, shoes and bags, gray, 28 by 28 pixels, keep their size",
            why="Images, patches and the length of the teachers' training aside, each setting is that of the demo on "
            "digits.",
            dataset="torch/fashion_mnist",
        ),
    )
}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package dataset-fashion-mnist has its images, compressed."""


@dataclass(frozen=True)
class Cell:
    """One run: how it learns, from which teacher, its seed (None for a teacher) and its settings."""

    method: str
    teacher: TeacherName | None
    seed: int | None
    config: RunConfig
    steps: int
    """The steps of the whole run."""
    seconds: float
    """What the run takes, to tell how long the others will."""
    needs: Path | None = None
    """The folder of the teacher that must be there before."""
    threads: int = 1

    @property
    def folder(self) -> Path:
        return self.config.output_dir

    def __str__(self) -> str:
        if self.seed is None:
            return f"{self.teacher} teacher"
        teacher = "" if self.teacher is None else f" ({self.teacher} teacher)"
        return f"{self.method}{teacher} seed {self.seed}"

    def records(self) -> list[JsonDict]:
        """Return the epochs of the run's log so far."""
        return [record for record in read_records(self.folder / "log.jsonl") if "n_parameters" in record]

    def curve(self) -> list[tuple[int, float]]:
        """Return (step, accuracy on the test images in percent) at each evaluation so far."""
        return [(record["step"], record["test_top1"]) for record in self.records() if "test_top1" in record]

    def progress(self) -> float:
        """Return the share of the run that is done, by its log."""
        steps = (record.get("step") for record in read_records(self.folder / "log.jsonl"))
        return min(1.0, max((step for step in steps if isinstance(step, int)), default=0) / self.steps)

    @property
    def settings(self) -> str:
        """The digest of all that the cell's numbers depend on, but for its teacher's weights."""
        return digest([dump_decisive(self.config, {"teacher"}), self.threads])

    def state(self) -> State:
        """Return how far the cell is. Raises ConfigError: it was run with other settings."""
        return cell_state(self.folder, self.settings, "settings or another --threads")

    def run(self) -> int | None:
        """Run the cell to its end, and write its record; returns the signal that stopped it before."""
        torch.set_num_threads(self.threads)
        result = train(self.config)
        if result.signal is None:
            save_record(Ending(self.settings), self.folder)
        return result.signal


def demo_cells(
    output_dir: Path,
    seeds: Sequence[int],
    quick: bool,
    threads: int = 1,
    data: DemoData = DATA_SETS["digits"],
    data_path: Path | None = None,
) -> list[Cell]:
    """List the teachers, then the students seed by seed. A seed decides labels, weights and augmentation.

    The quick form trains the teachers for less time, and has run folders of its own.
    """
    runs = output_dir / ("quick" if quick else "runs")
    changes = data.place(data_path)
    teachers = {name: _teacher(name, runs, data, changes, quick) for name in TEACHERS}
    students = [
        _student(method, None if teacher is None else teachers[teacher], seed, runs, data, changes)
        for seed in seeds
        for method, teacher in STUDENTS
    ]
    return [replace(cell, threads=threads) for cell in (*teachers.values(), *students)]


def _teacher(name: TeacherName, runs: Path, data: DemoData, changes: JsonDict, quick: bool) -> Cell:
    optim = {"optim": (data.quick if quick else data.full)[name]}
    changes = _merged(_merged(_merged(changes, data.shape), POOLING[name]), optim)
    config = recipe(TEACHERS[name], runs / f"teacher_{name}", changes)
    epoch = data.training_images // config.data.batch_size
    steps = config.optim.max_steps or config.optim.epochs * epoch
    config = without(config, find_unread(config))  # steps take the place of epochs
    return Cell("teacher", name, None, config, steps, data.seconds[name] * steps / epoch)


def _student(
    method: str, teacher: Cell | None, seed: int, runs: Path, data: DemoData, changes: JsonDict
) -> Cell:
    changes = _merged(_merged(changes, data.student), {"seed": seed, "data": {"label_seed": seed}})
    if recipe(f"digits_{method}", runs, {}).student.model != "auto":  # else the shape is the teacher's
        changes = _merged(changes, data.shape)
    if teacher is None:
        name = f"{method}_{seed}"
    else:
        name = f"{method}_{teacher.teacher}_{seed}"
        changes["teacher"] = {"source": f"local-dir:{teacher.folder / 'student'}"}
    config = recipe(f"digits_{method}", runs / name, changes)
    return Cell(
        method,
        None if teacher is None else teacher.teacher,
        seed,
        config,
        steps=config.optim.max_steps or config.optim.epochs,  # an epoch of few labels is one batch
        seconds=data.seconds[method],
        needs=None if teacher is None else teacher.folder,
    )


def recipe(name: str, folder: Path, changes: Json) -> RunConfig:
    """Return the packaged recipe `name` with the run folder `folder` and `changes`; no tracker and no report."""
    text = resources.files("graftvit.cfgs").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    quiet: JsonDict = {"engine": {"trackers": [], "report": False}}
    content = _merged(_merged(parse_yaml(text), quiet), {**changes, "output_dir": folder})
    return RunConfig.model_validate(content)


def _merged(below: Json, above: Json) -> JsonDict:
    both = dict(below)
    for key, value in above.items():
        old = both.get(key)
        both[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both


def find_data(
    name: str, output_dir: Path, data_path: Path | None, download: bool
) -> tuple[DemoData, Path | None]:
    """Return the data set `name` and the folder of its images, which are downloaded or unpacked if need be.

    Without `data_path` the folder is `data` of `output_dir`, and gets the images of the Debian package if it is there.

    Raises:
        ConfigError: there is no such data set, or it is read from no folder.
        DataError: the images are not there, or damaged.
    """
    if name not in DATA_SETS:
        raise ConfigError(f"--dataset {name}: {did_you_mean(name, DATA_SETS)}")
    data = DATA_SETS[name]
    if data.dataset is None:
        if download or data_path is not None:
            flag = "--download" if download else f"--data_path {data_path}"
            raise ConfigError(f"{flag} is for --dataset fashion_mnist: {name} is part of graftvit")
        return data, None
    folder = output_dir / "data" if data_path is None else data_path.resolve()
    if data_path is None:
        _unpack_debian(folder / "FashionMNIST" / "raw")
    config = DataConfig(dataset=data.dataset, data_path=str(folder), download=download)
    try:
        for split in ("train", "validation"):
            open_dataset(config, split, 1, training=False)
    except DataError as error:
        raise DataError(
            f"--dataset {name} needs images: give --download, install the Debian package dataset-fashion-mnist, "
            f"or name by --data_path the folder that has them in FashionMNIST/raw ({error})"
        ) from error
    return data, folder


def _unpack_debian(folder: Path) -> None:
    """Unpack the files of the Debian package that `folder` lacks."""
    for packed in sorted(DEBIAN.glob("*-ubyte.gz")):
        if not (folder / packed.stem).exists():
            with open_regular(packed, refusal=DataError) as file:
                try:
                    content = gzip.decompress(file.read())
                except FAILURES as error:
                    raise DataError(f"{packed} is damaged: install the package again") from error
            write_bytes(folder / packed.stem, content)
