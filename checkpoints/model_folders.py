"""Read folders with a config.json and weights, on this disk or on the hub, in timm's or transformers' layout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import yaml
from timm.models import is_model, list_pretrained, split_model_name_tag
from timm.models._hub import _parse_model_cfg

from ..models.errors import CheckpointError, Json, JsonDict
from .architecture import is_ours, known_fields, published_config
from .files import read_json, read_regular
from .formats import read_weights
from .hub.download import commit_of, download, try_download
from .preprocessing import Preprocessing
from .provenance import KEY as PROVENANCE
from .provenance import NORM_EPS
from .report import shortened
from .sources import FileSource, FolderSource, HubSource, Part
from .state import BEST, read_meta
from .weight_files import INDEX_SUFFIX, Content, Weights, read_file, read_shards

CONFIG = "config.json"
STAGES_FILE = "stages.json"
"""In the folder of a run of several stages, beside the folders of the stages: what each measured."""
WEIGHTS_NAMES = (
    "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model.pth", "model.pth",
    "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
)  # fmt: skip
MAX_CARD = 1 << 20
"""The longest model card in bytes; the license of a longer one is left out."""
Find = Callable[[str], Path | None]
"""Returns the path of a file of the folder or repository by its name, None if it has none."""


def read_folder(source: FolderSource) -> Weights:
    """Return the model of a timm folder, or of a run: the export of its newest step, else its state.

    Raises CheckpointError: there is no such model, or the files are damaged.
    """
    folder, part = source.path, source.part
    if (folder / CONFIG).is_file():
        if part not in (None, "student"):
            raise CheckpointError(
                f"{folder} is one model, and #{part} is of the folder of a run; leave it out"
            )
        return _read(folder, lambda name: _existing(folder / name), str(folder))
    exported = folder / ("student_ema" if part == "ema" else "student")
    state = folder / "checkpoints" / (BEST if part == "best" else "last.safetensors")
    if part != "best" and (exported / CONFIG).is_file() and not _went_on(exported, state):
        return read_folder(FolderSource(exported))
    stage = last_stage(folder)
    if stage is not None:
        return read_folder(FolderSource(stage, part))
    if state.is_file():
        content = read_file(state)
        return read_weights(
            content, _part_of(content) if part == "best" else "ema" if part == "ema" else None
        )
    if part == "best" and ((exported / CONFIG).is_file() or (state.parent / "last.safetensors").is_file()):
        raise CheckpointError(
            f"the run {folder} has no best state, because nothing was scored in it; leave #best out"
        )
    raise CheckpointError(
        f"the folder {folder} has no {CONFIG} (a timm folder) and no {exported.name}/ or checkpoints/ (a run)"
    )


def last_stage(folder: Path) -> Path | None:
    """Return the run folder of the last started stage of a run with stages; None for any other folder."""
    if not (folder / STAGES_FILE).is_file():
        return None
    begun = {path.parent.name.partition("-")[0]: path.parent for path in folder.glob("*-*/config.yaml")}
    last = max((number for number in begun if number.isdecimal()), key=int, default="")
    return begun.get(last)


def _went_on(exported: Path, state: Path) -> bool:
    """Return whether the run has trained on since it exported its student."""
    step = _provenance(read_config(exported / CONFIG), exported).get("step")
    try:
        return step is not None and int(read_meta(state)["position"]["step"]) > step
    except (CheckpointError, KeyError, TypeError, ValueError):
        return False  # no state, or a damaged one


def _part_of(state: Content) -> Part:
    """Return the model in a run's state that its score belongs to: the average if the state has one."""
    return "ema" if any(name.startswith("ema.") for name in state.tree) else "student"


def read_hub(source: HubSource) -> Weights:
    """Return the model of a hub repository in timm's layout, at `revision` or at the newest commit.

    Raises CheckpointError as `hub.explained`, or as `read_folder`.
    """
    name, revision = source.repository, source.revision
    config = download(name, CONFIG, revision)
    # The commit of the first file, so that all files are of one commit.
    commit = commit_of(config) or revision
    weights = _read(config.parent, lambda file: try_download(name, file, commit), f"hf-hub:{name}")
    return replace(weights, revision=commit)


def read_weights_file(source: FileSource) -> Weights:
    """Return the weights in one file. Raises CheckpointError as `read_file` and `read_weights`."""
    return read_weights(read_file(source.path), source.part)


def loads_in_plain_timm(folder: Path) -> bool:
    """Return whether timm alone builds the model of a folder: its own attention and norms, all weights in one file."""
    config = read_config(folder / CONFIG)
    architecture, own = config.get("architecture"), _provenance(config, folder)
    plain = is_model(str(architecture)) and not is_ours(str(architecture))
    # Beside what a norm sees, a smaller epsilon is a matter of rounding, whatever the architecture's own.
    plain = plain and (own.get(NORM_EPS) or 0.0) <= 1e-5
    return plain and (folder / WEIGHTS_NAMES[0]).is_file()


def _existing(path: Path) -> Path | None:
    try:
        return path if path.is_file() else None
    except OSError:  # a name that no file can have
        return None


def _read(folder: Path, find: Find, origin: str) -> Weights:
    """Return the model of a folder with a config.json: timm's own, or one of transformers."""
    config = read_config(folder / CONFIG)
    if "model_type" in config and "architecture" not in config:
        weights = _weights(find, (), origin, {**config, **_preprocessor(find)}, folder)
        return replace(weights, origin=origin, pretrained_cfg=_with_license(weights.pretrained_cfg, find))
    made, own = _provenance(config, folder), config.get("pretrained_cfg")
    if isinstance(own, dict):
        Preprocessing.read(own)  # as it stands there: timm puts other settings in place of a size
    try:
        described, architecture, model_args = _parse_model_cfg(copy.deepcopy(config), {})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = "is damaged or of no known kind: it names neither timm's architecture nor a model_type"
        raise CheckpointError(f"{folder / CONFIG} {reason}") from error
    named = described.get("hf_hub_filename")
    if named is not None and not isinstance(named, str):
        raise CheckpointError(f"{folder / CONFIG} says hf_hub_filename={named!r}, which is no name of a file")
    weights = _weights(find, (named,) if named else (), origin, {}, folder)
    known = known_fields(described)
    if PROVENANCE not in config and _repeats_timm(known, architecture):
        known["license"] = None
    known = _with_license(known, find)
    words = f"a timm folder ({Path(weights.origin).name})"
    provenance = dict(made)
    epsilon = provenance.pop(NORM_EPS, None)
    if epsilon is not None and not (isinstance(epsilon, float) and 0 < epsilon < 1):
        raise CheckpointError(
            f"{folder / CONFIG} says {NORM_EPS}={epsilon!r}, which is no number from 0 to 1"
        )
    return Weights(
        weights.tensors, origin, words, architecture, model_args, known, epsilon, provenance=provenance
    )


def _provenance(config: Json, folder: Path) -> JsonDict:
    """Return the provenance that a student of this package records."""
    made = config.get(PROVENANCE) or {}
    if not isinstance(made, dict):
        raise CheckpointError(
            f"{folder / CONFIG} says {PROVENANCE}={shortened(made)}, which is no table of facts"
        )
    return made


def read_config(path: Path) -> JsonDict:
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is damaged: it holds a {type(config).__name__}, not settings by name")
    return config


def _weights(find: Find, first: tuple[str, ...], origin: str, config: Json, folder: Path) -> Weights:
    """Return the weights in the first existing file: one file, or the index of several."""
    for name in (*first, *WEIGHTS_NAMES):
        path = find(name)
        if path is None:
            continue
        content = read_shards(path, find) if name.endswith(INDEX_SUFFIX) else read_file(path, inside=folder)
        return read_weights(content, config=config)
    raise CheckpointError(f"{origin} has a {CONFIG} but no weights: none of {', '.join(WEIGHTS_NAMES)}")


def _preprocessor(find: Find) -> JsonDict:
    """Return how transformers prepares the images: image_mean, image_std and more, if the source gives them."""
    path = find("preprocessor_config.json")
    return {} if path is None else {"preprocessor": read_config(path)}


def _repeats_timm(described: Json, architecture: str) -> bool:
    """Return whether a license is that of timm's own weights, which timm writes beside any weights that it saves."""
    name = f"{split_model_name_tag(architecture)[0]}.{described.get('tag')}"
    return name in list_pretrained() and described.get("license") == published_config(name).get("license")


def _with_license(described: Json, find: Find) -> JsonDict:
    known = dict(described)
    if not known.get("license"):
        known["license"] = read_card_license(find("README.md"))
    return known


def read_card_license(card: Path | None) -> str | None:
    """Return the license in the YAML head of a model card."""
    if card is None:
        return None
    from huggingface_hub import ModelCard

    try:
        license = ModelCard(read_regular(card, limit=MAX_CARD), ignore_metadata_errors=True).data.get(
            "license"
        )
    except (CheckpointError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return None
    return license if isinstance(license, str) and license else None
