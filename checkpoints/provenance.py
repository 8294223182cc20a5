"""Describe a loaded model, identify it by all that decides what it computes, and record how a student was made."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.errors import CheckpointError, Json, JsonDict
from ..models.families import pooling_of
from .files import read_if_there
from .licenses import carried
from .preprocessing import Preprocessing
from .report import LoadReport
from .weight_files import Weights


@dataclass(frozen=True)
class Pretrained:
    """A frozen model in eval mode with its description."""

    model: nn.Module
    source: str
    """The source as the user wrote it."""
    architecture: str
    """timm name, without a tag."""
    preprocessing: Preprocessing
    """How its images are prepared."""
    license: str | None
    revision: str | None
    """Commit on the hub."""
    has_head: bool
    """Whether it has the head of the weights."""
    report: LoadReport
    model_args: Json = field(default_factory=dict)
    """The arguments of timm's constructor beside the architecture."""
    config: Json = field(default_factory=dict)
    """The settings that decide what a model of transformers computes; empty for one of timm."""
    provenance: Json = field(default_factory=dict)
    """What a student of this package learned from, and how."""
    label_names: tuple[str, ...] | None = None
    """The classes of its head in their order, where the weights say them."""
    digest: str | None = None
    """The digest of the weights in the source, if `load_pretrained` was asked for it."""
    weights: Weights | None = None
    """What the source holds, for a student that starts from it."""

    def to_model(self) -> nn.Module:
        """Return the model."""
        return self.model

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel, of images in 0..1."""
        return self.preprocessing.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Deviation of each channel, of images in 0..1."""
        return self.preprocessing.std


TERMS = "_graftvit_terms"


class Terms(NamedTuple):
    """The license and classes that a model carries, so that copies and conversions of it do."""

    license: str | None = None
    label_names: tuple[str, ...] | None = None
    provenance: Json | None = None
    """Of weights under no single known license: that their origin is not known."""


def architecture_of(config: Json) -> str:
    """Return what a `config.json` says of the model without its weights: the timm name and arguments, as JSON."""
    return json.dumps([config.get("architecture"), config.get("model_args")], sort_keys=True)


def carry(
    model: nn.Module, license: str | None, label_names: tuple[str, ...] | None, provenance: Json
) -> None:
    """Let a model say its license and the names of its classes."""
    made = {"init": UNRECORDED} if license is None and licenses(provenance) else None
    setattr(model, TERMS, Terms(license, label_names, made))


def terms_of(model: nn.Module) -> Terms:
    """Return the license and classes that a model carries."""
    return getattr(model, TERMS, Terms())


UNRECORDED: Json = {"source": "not recorded"}
"""The provenance of weights whose origin is not known."""


# Identify weights by a digest of their tensors, and teachers by all that decides what they compute, in any place.

OWN = "graftvit"
LIBRARIES = (OWN, "torch", "torchvision", "timm", "transformers")
"""Packages whose code of layers is known by a version."""


def collect_identity(teacher: Pretrained) -> JsonDict:
    """Return all that decides what a teacher computes, as JSON: tensors, configuration, preprocessing and code.

    The same teacher has the same identity in any file, folder or repository.
    """
    known = {
        "digest": teacher.digest,
        "architecture": teacher.architecture,
        "model_args": dict(teacher.model_args),
        "config": dict(teacher.config),
        "preprocessing": teacher.preprocessing.described(),
        "library": _collect_code(teacher),
    }
    return json.loads(json.dumps(known, default=repr))


def _collect_code(teacher: Pretrained) -> str:
    """Return the code that computes a teacher: the libraries' versions, and digests of other files of its layers."""
    packages = {"transformers" if teacher.config else "timm"}
    files = set[str]()
    for kind in {type(module) for module in teacher.model.modules()}:
        if kind.__module__.startswith(f"{OWN}.models."):
            packages.add(OWN)
        elif kind.__module__.partition(".")[0] not in LIBRARIES:
            with suppress(TypeError):  # of a notebook, which has no file
                files.add(inspect.getsourcefile(kind) or "")
    code = [f"{name} {version(name)}" for name in sorted(packages, key=lambda name: name == OWN)]
    for file in map(Path, sorted(files - {""})):
        code.append(f"{file.name} {hashlib.sha256((read_if_there(file) or '').encode()).hexdigest()[:12]}")
    return ", ".join(code)


def identify(teacher: Pretrained) -> str:
    """Return the digest of a teacher's identity; another version of its code is the same teacher."""
    known = collect_identity(teacher)
    del known["library"]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def digest_weights(weights: Weights) -> str:
    """Return the digest of weights: their tensors under timm's names, and the norms' epsilon if the source gives one.

    The same tensors have the same digest in any file and any container, and in any order.
    """
    return digest_tensors(weights.tensors, "" if weights.norm_eps is None else repr(weights.norm_eps))


def digest_tensors(tensors: Mapping[str, Tensor], said: str = "") -> str:
    """SHA-256 over the tensors, as hexadecimal digits; `said` is what else is part of what they are."""
    whole = hashlib.sha256(said.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        whole.update(f"\n{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode("utf-8", "surrogatepass"))
        numbers = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        whole.update(numbers.numpy().data)
    return whole.hexdigest()


# The `graftvit` entry of a student's config.json and of a run's states.

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
    origin = {"source": teacher.source, "revision": teacher.revision, "license": teacher.license}
    return origin | {"pooling": pooling_of(teacher.model)} | collect_identity(teacher)


def of_weights(source: str, report: LoadReport) -> JsonDict:
    """Return weights that a student started from, as provenance."""
    return {"source": source, "revision": report.revision, "license": report.license}


def licenses(provenance: Json) -> list[str | None]:
    """Return the licenses of all weights that a student learned from or started from; None is an unknown one."""
    further = provenance.get("teachers")
    named = list(further.values()) if isinstance(further, Mapping) else []
    origins = [provenance.get("teacher"), *named, provenance.get("init")]
    return [origin.get("license") for origin in origins if origin and isinstance(origin, Mapping)]


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
        "version": meta.get("version"),
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
