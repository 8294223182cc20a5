"""Identify weights by a digest of their tensors, and teachers by all that decides what they compute, in any place."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..models.errors import JsonDict
from .files import read_if_there
from .weight_files import Weights

if TYPE_CHECKING:
    from .pretrained import Pretrained

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
    found: JsonDict = json.loads(json.dumps(known, default=repr))
    return found


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
