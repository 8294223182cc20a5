"""Open a source of weights and read it: a file, or a folder or repository in timm's or transformers' layout."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from timm.models import is_model, list_pretrained, split_model_name_tag
from timm.models._hub import _parse_model_cfg

from ..models.errors import CheckpointError, Json, JsonDict
from .architecture import is_ours, known_fields, published_config
from .files import read_json, read_regular
from .formats import read_weights
from .hub import commit_of, download, try_download
from .preprocessing import Preprocessing
from .provenance import KEY as PROVENANCE
from .provenance import NORM_EPS
from .report import shortened
from .sources import CONFIG, FileSource, FolderSource, HubSource, TimmSource, parse_source
from .state import BEST, LAST, find_state, read_meta
from .weight_files import INDEX_SUFFIX, Weights, is_sharded, outline, read_file, read_shards

STAGES_FILE = "stages.json"
"""In the folder of a run of several stages, beside the folders of the stages: what each measured."""
RUN_FILES = ("config.yaml", "log.jsonl")
"""In the folder of a run from its first step on."""
WEIGHTS_NAMES = (
    "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model.pth", "model.pth",
    "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
)  # fmt: skip
MAX_CARD = 1 << 20
"""The longest model card in bytes; the license of a longer one is left out."""
Find = Callable[[str], Path | None]
"""Returns the path of a file of the folder or repository by its name, None if it has none."""


@dataclass(frozen=True)
class ModelFolder:
    """A folder or repository with a config.json."""

    origin: str
    """As errors name it."""
    path: Path
    config: JsonDict
    find: Find
    revision: str | None = None
    """Commit on the hub."""

    @property
    def preprocessor(self) -> JsonDict:
        """The settings of the image processor of transformers; empty without a file of them."""
        path = self.find("preprocessor_config.json")
        return {} if path is None else read_config(path)

    @property
    def license(self) -> str | None:
        """The license in the YAML head of its model card."""
        card = self.find("README.md")
        if card is None:
            return None
        from huggingface_hub import ModelCard

        try:
            text = read_regular(card, limit=MAX_CARD)
            license = ModelCard(text, ignore_metadata_errors=True).data.get("license")
        except (CheckpointError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
            return None
        return license if isinstance(license, str) and license else None

    @property
    def provenance(self) -> JsonDict:
        """What a student of this package records of how it was made."""
        made = self.config.get(PROVENANCE) or {}
        if not isinstance(made, dict):
            raise CheckpointError(
                f"{self.path / CONFIG} says {PROVENANCE}={shortened(made)}, which is no table of facts"
            )
        return made

    def read(self, names: Sequence[str]) -> Weights | None:
        """Return the content of the first file of these names that is there, or of the index of several files."""
        for name in names:
            path = self.find(name)
            if path is not None:
                is_index = name.endswith(INDEX_SUFFIX)
                return read_shards(path, self.find) if is_index else read_file(path, inside=self.path)
        return None


@dataclass(frozen=True)
class Opened:
    """A source of weights, found and judged."""

    text: str
    """As the user wrote it."""
    found: TimmSource | FileSource | ModelFolder
    """A run is the folder or file of the model that was asked for."""


def open_source(text: str, revision: str | None = None) -> Opened:
    """Find what a source is, at a branch, tag or commit of the hub, and read its config.json if it has one.

    Raises CheckpointError: there is no such source, or it holds no model.
    """
    source = parse_source(text)
    if revision is not None:
        if not isinstance(source, HubSource | TimmSource):
            raise CheckpointError(
                f"revision={revision!r} is of the hub, and {text!r} is on this disk: leave it out"
            )
        source = replace(source, revision=revision)
    if isinstance(source, FolderSource):
        return Opened(text, _open_folder(source))
    return Opened(text, _open_repository(source) if isinstance(source, HubSource) else source)


def open_model(folder: Path) -> ModelFolder:
    """Open a folder with a config.json. Raises CheckpointError: that is damaged."""
    return ModelFolder(
        str(folder), folder, read_config(folder / CONFIG), lambda name: _existing(folder / name)
    )


def _open_repository(source: HubSource) -> ModelFolder:
    """Open a hub repository at its revision or newest commit. Raises CheckpointError as `hub.explained`."""
    name = source.repository
    config = download(name, CONFIG, source.revision)
    # The commit of the first file, so that all files are of one commit.
    commit = commit_of(config) or source.revision
    origin = f"hf-hub:{name}"
    return ModelFolder(
        origin, config.parent, read_config(config), lambda file: try_download(name, file, commit), commit
    )


def _open_folder(source: FolderSource) -> ModelFolder | FileSource:
    """Return the model of a timm folder, or of a run: the export of its newest step, else its state.

    Raises CheckpointError: there is no such model, or config.json is damaged.
    """
    folder, part = source.path, source.part
    if is_sharded(folder):
        return FileSource(folder, part)
    single = (folder / CONFIG).is_file()
    if single and _is_run(folder):
        if part is None:
            raise CheckpointError(
                f"{folder} holds a saved model ({CONFIG}) and a run: write {folder}#last for the run, or move the "
                "model away"
            )
    elif single:
        if part not in (None, "student"):
            raise CheckpointError(
                f"{folder} is one model, and #{part} is of the folder of a run; leave it out"
            )
        return open_model(folder)
    exported = folder / ("student_ema" if part == "ema" else "student")
    states = folder / "checkpoints"
    state = find_state(states, BEST if part == "best" else LAST)
    if part != "best" and (exported / CONFIG).is_file():
        model = open_model(exported)
        if not _went_on(model, state):
            return model
    stage = last_stage(folder)
    if stage is not None:
        return _open_folder(FolderSource(stage, part))
    if state.exists():
        averaged = part == "ema" or (
            part == "best" and any(key.startswith("ema.") for key in outline(state).tree)
        )
        return FileSource(state, "ema" if averaged else None)
    if part == "best" and ((exported / CONFIG).is_file() or find_state(states).exists()):
        raise CheckpointError(
            f"the run {folder} has no best state, because nothing was scored in it; leave #best out"
        )
    raise CheckpointError(
        f"the folder {folder} has no {CONFIG} (a timm folder) and no {exported.name}/ or checkpoints/ (a run)"
    )


def _is_run(folder: Path) -> bool:
    return all((folder / name).is_file() for name in RUN_FILES) or (folder / STAGES_FILE).is_file()


def last_stage(folder: Path) -> Path | None:
    """Return the run folder of the last started stage of a run with stages; None for any other folder."""
    if not (folder / STAGES_FILE).is_file():
        return None
    begun = {path.parent.name.partition("-")[0]: path.parent for path in folder.glob("*-*/config.yaml")}
    last = max((number for number in begun if number.isdecimal()), key=int, default="")
    return begun.get(last)


def _went_on(exported: ModelFolder, state: Path) -> bool:
    """Return whether the run has trained on since it exported its student."""
    step = exported.provenance.get("step")
    try:
        return step is not None and int(read_meta(state)["position"]["step"]) > step
    except (CheckpointError, KeyError, TypeError, ValueError):
        return False  # no state, or a damaged one


def read_weights_file(source: FileSource) -> Weights:
    """Return the weights in one file. Raises CheckpointError as `read_file` and `read_weights`."""
    return read_weights(read_file(source.path), source.part)


def loads_in_plain_timm(folder: Path) -> bool:
    """Return whether timm alone builds the model of a folder: its own attention and norms, all weights in one file."""
    model = open_model(folder)
    architecture = model.config.get("architecture")
    plain = is_model(str(architecture)) and not is_ours(str(architecture))
    # Beside what a norm sees, a smaller epsilon is a matter of rounding, whatever the architecture's own.
    plain = plain and (model.provenance.get(NORM_EPS) or 0.0) <= 1e-5
    return plain and (folder / WEIGHTS_NAMES[0]).is_file()


def _existing(path: Path) -> Path | None:
    try:
        return path if path.is_file() else None
    except OSError:  # a name that no file can have
        return None


def read_folder(folder: ModelFolder) -> Weights:
    """Return the model of a folder with a config.json: timm's own, or one of transformers that timm has.

    Raises CheckpointError: it names no model or no weights, or a file is damaged.
    """
    config = folder.config
    if "model_type" in config and "architecture" not in config:
        weights = _read_weights(folder, (), {**config, "preprocessor": folder.preprocessor})
    else:
        weights = _read_timm_folder(folder)
    described = dict(weights.pretrained_cfg)
    described["license"] = described.get("license") or folder.license
    return replace(weights, origin=folder.origin, pretrained_cfg=described, revision=folder.revision)


def _read_timm_folder(folder: ModelFolder) -> Weights:
    config, own, provenance = folder.config, folder.config.get("pretrained_cfg"), dict(folder.provenance)
    if isinstance(own, dict):
        Preprocessing.read(own)  # as it stands there: timm puts other settings in place of a size
    try:
        described, architecture, model_args = _parse_model_cfg(copy.deepcopy(config), {})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = "is damaged or of no known kind: it names neither timm's architecture nor a model_type"
        raise CheckpointError(f"{folder.path / CONFIG} {reason}") from error
    named = described.get("hf_hub_filename")
    if named is not None and not isinstance(named, str):
        raise CheckpointError(
            f"{folder.path / CONFIG} says hf_hub_filename={named!r}, which is no name of a file"
        )
    weights = _read_weights(folder, (named,) if named else (), {})
    known = known_fields(described)
    if PROVENANCE not in config and isinstance(architecture, str) and _repeats_timm(known, architecture):
        known["license"] = None
    epsilon = provenance.pop(NORM_EPS, None)
    if epsilon is not None and not (isinstance(epsilon, float) and 0 < epsilon < 1):
        raise CheckpointError(
            f"{folder.path / CONFIG} says {NORM_EPS}={epsilon!r}, which is no number from 0 to 1"
        )
    words = f"a timm folder ({Path(weights.origin).name})"
    return Weights(
        weights.tensors, folder.origin, words, architecture, model_args, known, epsilon, provenance=provenance
    )


def read_config(path: Path) -> JsonDict:
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is damaged: it holds a {type(config).__name__}, not settings by name")
    return config


def _read_weights(folder: ModelFolder, first: tuple[str, ...], config: Json) -> Weights:
    """Return the weights in the first existing file: one file, or the index of several."""
    content = folder.read((*first, *WEIGHTS_NAMES))
    if content is None:
        raise CheckpointError(
            f"{folder.origin} has a {CONFIG} but no weights: none of {', '.join(WEIGHTS_NAMES)}"
        )
    return read_weights(content, config=config)


def _repeats_timm(described: Json, architecture: str) -> bool:
    """Return whether a license is that of timm's own weights, which timm writes beside any weights that it saves."""
    name = f"{split_model_name_tag(architecture)[0]}.{described.get('tag')}"
    return name in list_pretrained() and described.get("license") == published_config(name).get("license")
