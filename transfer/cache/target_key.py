"""All that teacher targets depend on: another teacher, other images or another precision have another folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from ...checkpoints.identity import collect_identity
from ...checkpoints.preprocessing import Preprocessing
from ...checkpoints.pretrained import Pretrained
from ...models.errors import ConfigError, JsonDict
from ..config import RunConfig
from ..data.loaders import EvalLoader, TrainLoader
from ..methods.dual import DualViT
from ..methods.loss_terms import DEFAULT_TEACHER, TeacherSide
from .target_shards import TargetShards

FORMAT = 1
AUGMENTATION = ("crop_scale", "hflip", "aa", "color_jitter", "interpolation", "reprob")


def find_shards(
    config: RunConfig,
    dual: DualViT,
    teachers: Mapping[str, Pretrained],
    spec: Preprocessing,
    loader: TrainLoader,
) -> TargetShards:
    """Return the files of the targets of a run. Raises ConfigError: its images are a stream."""
    if loader.streamed:
        raise ConfigError(
            f"transfer.cache needs samples by index; data.dataset={config.data.dataset} is a stream: leave it out"
        )
    described: JsonDict = {
        "format": FORMAT,
        "teachers": {
            side.name: _describe_teacher(config, dual, side, teachers[side.name], spec) for side in dual.sides
        },
        "precision": config.engine.precision,
        "tf32": config.engine.tf32,
        "images": _describe_images(config, spec, loader),
    }
    return TargetShards(Path(str(config.transfer.cache)), described, loader.num_samples)


def has_weights(shards: TargetShards) -> bool:
    """Return whether the teachers' weights were read, so that the name of the folder is known."""
    return all(each["digest"] is not None for each in shards.described["teachers"].values())


def describe_test_images(config: RunConfig, spec: Preprocessing, loader: EvalLoader) -> JsonDict:
    """Return what the teacher's accuracy on the test images depends on, beside the teacher."""
    samples = digest_of_samples(loader.batches.name, loader.num_samples, config.data.data_path)
    names = None if loader.class_names is None else list(loader.class_names)
    files = digest_of_files(loader.batches.name, loader.num_samples)
    return {
        "samples": samples,
        "files": files,
        "count": loader.num_samples,
        "classes": names,
        **spec.described(),
    }


def digest_of_files(name: Callable[[int], str], count: int) -> str:
    """Return a digest of the sizes of the files of samples, for samples that are files. A copy has the same."""
    found = hashlib.sha256()
    for index in range(count):
        with suppress(OSError, ValueError):
            found.update(f"{index} {os.stat(name(index)).st_size}\0".encode())  # noqa: PTH116 - a text, not a place
    return found.hexdigest()


def digest_of_samples(name: Callable[[int], str], count: int, root: str | None) -> str:
    """Return a digest of the names of samples in their order, without the folder of the data set."""
    found = hashlib.sha256()
    prefix = "" if root is None else os.path.join(root, "")  # noqa: PTH118 - a text, not a place
    for index in range(count):
        found.update(name(index).removeprefix(prefix).encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()


def _describe_teacher(
    config: RunConfig, dual: DualViT, side: TeacherSide, teacher: Pretrained, spec: Preprocessing
) -> JsonDict:
    how = config.teacher if side.name == DEFAULT_TEACHER else config.teachers[side.name]
    height, width = spec.input_size[1:]
    return {
        **collect_identity(teacher),
        "position_embedding": how.position_embedding,
        "dtype": how.dtype,
        "size": list(side.input.teacher_size((height, width))),
        "targets": sorted(dual.wanted(side).whole),
    }


def _describe_images(config: RunConfig, spec: Preprocessing, loader: TrainLoader) -> JsonDict:
    data = config.data
    described: JsonDict = {
        "dataset": data.dataset,
        "split": data.train_split,
        "samples": digest_of_samples(loader.batches.name, loader.num_samples, data.data_path),
        **spec.described(),
    }
    if data.views == 0:
        return described
    drawn = {key: getattr(data, key) for key in AUGMENTATION}
    return {**described, "augmentation": {**drawn, "crop_scale": list(data.crop_scale), "seed": config.seed}}
