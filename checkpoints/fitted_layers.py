"""Keep the layers of a conversion that are fitted, each in a file of its own until the whole model is written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from ..models.attention.base import Fit
from ..models.calibration import Layer
from ..models.errors import CheckpointError
from .atomic import write_file
from .weight_files import read_file

FOLDER = "fit"
KEY, RESULT = "graftvit_fit", "result"


@dataclass(frozen=True)
class FittedLayers:
    """The files `fit/layerNN.safetensors` of the folder that a conversion writes."""

    folder: Path

    def load(self, index: int, key: str) -> Layer | None:
        """Return a layer that was fitted before with the same `key`; None without one, or from a damaged file."""
        path = self._path(index)
        if not path.is_file():
            return None
        try:
            content = read_file(path, inside=self.folder)
            if content.metadata.get(KEY) != key:
                return None
            result = json.loads(content.metadata[RESULT])
            fit = result["fit"]
            measures = (
                None
                if fit is None
                else {name: (float(before), float(after)) for name, (before, after) in fit.items()}
            )
            before, after = map(float, result["calibration"])
        except (CheckpointError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
            return None
        return Layer(content.tree, (before, after), None if measures is None else Fit(measures))

    def save(self, index: int, key: str, layer: Layer) -> None:
        """Write a finished layer. Raises WriteFailedError: the disk is full."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in layer.tensors.items()}
        fit = None if layer.fit is None else dict(layer.fit.measures)
        described = {KEY: key, RESULT: json.dumps({"fit": fit, "calibration": layer.calibration})}
        size = sum(tensor.nbytes for tensor in tensors.values())
        write_file(
            self._path(index), lambda temporary: save_file(tensors, temporary, metadata=described), size=size
        )

    def _path(self, index: int) -> Path:
        return self.folder / FOLDER / f"layer{index:02}.safetensors"


def only_fitted(folder: Path) -> bool:
    """Return whether a folder holds nothing but what a conversion left that was killed."""
    return folder.is_dir() and all(path.name == FOLDER for path in folder.iterdir())
