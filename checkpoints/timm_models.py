"""Build a timm model for weights, and find what timm publishes under a name."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
from timm.models import (
    PretrainedCfg,
    get_pretrained_cfg,
    is_model,
    list_pretrained,
    model_entrypoint,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from torch import Tensor, nn

from ..models.errors import CheckpointError, GraftError, Json, JsonDict
from ..models.families import create_timm_model, image_size, is_pyramid, vit
from ..models.small import without_memory
from .hub.download import commit_of, download, try_download
from .report import shortened
from .safety.budget import bounded
from .sources import TimmSource, parse_source
from .weights import Weights

SAFE_NAMES = {
    "pytorch_model.bin": "model.safetensors",
    "open_clip_pytorch_model.bin": "open_clip_model.safetensors",
}
"""Return the safetensors file that the hub may have in place of a pickle of the usual name."""


def build(
    architecture: str,
    arguments: Json,
    *,
    on_meta: bool = False,
    within: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Return a fresh timm model; keep the global random state. On the meta device it has no memory.

    Args:
        within: the weights that it is built for, if their description of the model cannot be trusted.

    Raises CheckpointError in the constructor's words where it refuses the arguments, for one that names a file to
    load, and for a model that is far larger than `within`.
    """
    if "checkpoint_path" in arguments:
        raise CheckpointError(
            f"model_args of {architecture!r} name a checkpoint_path, which is not opened: leave it out"
        )
    limit = nullcontext() if within is None else bounded(within.values())
    device = without_memory() if on_meta else torch.device("cpu")
    try:
        with torch.random.fork_rng(devices=[]), device, limit:
            return create_timm_model(architecture, **arguments)
    except GraftError:
        raise
    except Exception as error:  # constructors check little, and raise anything for a wrong argument
        shown = {key: value for key, value in arguments.items() if key != "pretrained_cfg"}
        reason = f"{type(error).__name__} {one_line(error)}".strip()
        raise CheckpointError(
            f"timm cannot build {architecture!r} with {shortened(shown)}: {reason}"
        ) from error


def check_name(name: str) -> None:
    """Raise CheckpointError where timm has no such architecture, or no such tag of it."""
    architecture, tag = split_model_name_tag(name)
    if not is_model(architecture):
        parse_source(name)  # says what is near
        raise CheckpointError(f"{name!r} is not a timm architecture")
    if tag and name not in list_pretrained(f"{architecture}.*"):
        tags = ", ".join(list_pretrained(f"{architecture}.*")) or "none"
        raise CheckpointError(f"timm has no tag {tag!r} of {architecture}; valid: {tags}")


def is_ours(architecture: str) -> bool:
    """Return whether timm has an architecture only if this package is installed."""
    name = split_model_name_tag(architecture)[0]
    return (
        is_model(name)
        and model_entrypoint(name).__module__.partition(".")[0] == __package__.partition(".")[0]
    )


def published_config(name: str) -> JsonDict:
    """timm's description of the weights under `name`; empty where it has none."""
    config = get_pretrained_cfg(name)
    return {} if config is None else config.to_dict()


def read_timm(source: TimmSource, arguments: Json, *, download: bool = True) -> Weights:
    """Return the published weights under a timm name, as timm itself converts them; those of the hub at `revision`.

    Without `download` their shapes alone, on the meta device.

    Raises CheckpointError: as `check_published`, they cannot be downloaded, or they are damaged.
    """
    check_name(source.name)
    keywords = {
        key: value
        for key, value in arguments.items()
        if key not in ("img_size", "num_classes", "global_pool")
    }
    outline = build(source.name, keywords, on_meta=True)  # refuses arguments before anything is downloaded
    path = _from_hub(_published(source, keywords), source.revision) if download else None
    if path is not None:
        # custom_load is of the format behind the address; the hub has the model's own names.
        here = {"file": str(path), "custom_load": False}
        keywords["pretrained_cfg_overlay"] = {**keywords.get("pretrained_cfg_overlay", {}), **here}
    model = _create_pretrained(source.name, keywords) if download else outline
    size = image_size(model)
    described = {
        key: value for key, value in vit(model).default_cfg.items() if key not in ("state_dict", "file")
    }
    return Weights(
        dict(model.state_dict()),
        source.name,
        "timm's published weights",
        architecture=source.name,
        model_args={} if size is None else {"img_size": size},
        pretrained_cfg=described,
        revision=None if path is None else commit_of(path),
    )


def check_published(text: str, arguments: Json, revision: str | None) -> None:
    """Raise CheckpointError where the source is a timm name without published weights, or without such a revision."""
    source = parse_source(text)
    if isinstance(source, TimmSource):
        check_name(source.name)
        _published(dataclasses.replace(source, revision=revision), arguments)


def _published(source: TimmSource, keywords: Json) -> PretrainedCfg:
    config = _weights_config(source.name, keywords)
    if source.revision is not None and not _is_on_hub(config):
        place = config.file or config.url or "memory"
        raise CheckpointError(
            f"revision={source.revision!r} is of the hub, and timm takes {source.name!r} from {place}: leave it out"
        )
    return config


def _weights_config(name: str, keywords: Json) -> PretrainedCfg:
    """Return where timm has the weights of a name, with the caller's overrides."""
    architecture, tag = split_model_name_tag(name)
    given = {key: value for key, value in keywords.items() if key.startswith("pretrained_cfg")}
    known = get_pretrained_cfg(name)
    if known is None or not (known.has_weights or given):
        near = list_pretrained(f"{name.split('_')[0]}_{name.split('_')[1]}*")[:5]
        raise CheckpointError(
            f"timm publishes no weights for {name!r}; it has some for: {', '.join(near) or 'other names'}"
        )
    try:
        return resolve_pretrained_cfg(architecture, **{"pretrained_cfg": tag, **given})
    except TypeError as error:
        raise CheckpointError(
            f"timm does not take the pretrained_cfg of {name!r}: {one_line(error)}"
        ) from error


def _from_hub(config: PretrainedCfg, revision: str | None) -> Path | None:
    """Return the weights file of a repository of the hub, None if timm takes the weights from elsewhere."""
    if not _is_on_hub(config):
        return None
    repository, _, own = str(config.hf_hub_id).partition("@")
    name = config.hf_hub_filename or "pytorch_model.bin"
    safe = SAFE_NAMES.get(name) or re.sub(r"\.bin$", ".safetensors", name)
    revision = revision or own or None
    return try_download(repository, safe, revision) or download(repository, name, revision)


def _is_on_hub(config: PretrainedCfg) -> bool:
    return bool(config.hf_hub_id and not config.file and not config.state_dict)


def _create_pretrained(name: str, keywords: Json) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(name, pretrained=True, **keywords)
    except Exception as error:
        # What timm, torch and safetensors raise for a damaged file has no common kind.
        raise CheckpointError(f"timm cannot load the weights of {name!r}: {one_line(error)}") from error


def converted(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` under the model's names: as they are, else by the converter that timm has for the family."""
    heads = ("head.",) if is_pyramid(model) else ()
    core = {
        key
        for key in model.state_dict()
        if ".operator." not in key and (key.startswith("blocks.0.") or (heads and not key.startswith(heads)))
    }
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None or core <= tensors.keys():
        return dict(tensors)
    try:
        return dict(convert(dict(tensors), model))
    except (KeyError, AttributeError, RuntimeError, TypeError):
        return dict(tensors)  # not of the family: `fit` names the keys


def known_fields(config: Json) -> JsonDict:
    """Return the part of a description that this timm's `PretrainedCfg` takes, without places to load from."""
    fields = {field.name for field in dataclasses.fields(PretrainedCfg)} - {
        "url",
        "file",
        "source",
        "state_dict",
    }
    return {key: value for key, value in config.items() if key in fields}


def one_line(error: Exception) -> str:
    """Return an error's text as one line."""
    return " ".join(str(error).split())[:300]
