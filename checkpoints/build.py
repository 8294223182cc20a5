"""Building a timm model for weights, and what timm publishes under a name."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.models import PretrainedCfg, get_pretrained_cfg, is_model, list_pretrained, split_model_name_tag
from torch import Tensor, nn

from ..models import conversion  # noqa: F401  timm knows converted models from here on
from ..models.errors import CheckpointError
from .hub.download import commit_of, explained
from .sources import TimmSource, parse_source
from .weights import Weights

SPACE = re.compile(r"\s+")


def build(architecture: str, arguments: Mapping[str, Any], *, on_meta: bool = False) -> nn.Module:
    """A fresh timm model; the global random state stays as it was. On the meta device it has no memory.

    Raises CheckpointError in timm's words where it refuses the arguments.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta" if on_meta else "cpu"):
            return timm.create_model(architecture, pretrained=False, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        shown = {key: value for key, value in arguments.items() if key != "pretrained_cfg"}
        reason = one_line(error) or "timm refuses them"
        raise CheckpointError(f"timm cannot build {architecture!r} with {shown}: {reason}") from error


def check_name(name: str) -> None:
    """Raises CheckpointError where timm has no such architecture, or no such tag of it."""
    architecture, tag = split_model_name_tag(name)
    if not is_model(architecture):
        parse_source(name)  # says what is near
        raise CheckpointError(f"{name!r} is not a timm architecture")
    if tag and name not in list_pretrained(f"{architecture}.*"):
        tags = ", ".join(list_pretrained(f"{architecture}.*")) or "none"
        raise CheckpointError(f"timm has no tag {tag!r} of {architecture}; valid: {tags}")


def published_config(name: str) -> dict[str, Any]:
    """timm's description of the weights under `name`; empty where it has none."""
    config = get_pretrained_cfg(name)
    return {} if config is None else config.to_dict()


def read_timm(source: TimmSource, arguments: Mapping[str, Any]) -> Weights:
    """The published weights under a timm name, as timm itself loads and converts them.

    Raises CheckpointError: timm publishes none, they cannot be downloaded, or they are damaged.
    """
    check_name(source.name)
    overlay = {key: value for key, value in arguments.items() if key.startswith("pretrained_cfg")}
    config = get_pretrained_cfg(source.name)
    if config is None or not (config.has_weights or overlay):
        near = list_pretrained(f"{source.name.split('_')[0]}_{source.name.split('_')[1]}*")[:5]
        raise CheckpointError(
            f"timm publishes no weights for {source.name!r}; "
            f"it has some for: {', '.join(near) or 'other names'}"
        )
    keywords = {
        key: value
        for key, value in arguments.items()
        if key not in ("img_size", "num_classes", "global_pool")
    }
    model = _create_pretrained(source.name, keywords, config)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    described = {key: value for key, value in model.default_cfg.items() if key not in ("state_dict", "file")}
    return Weights(
        dict(model.state_dict()),
        source.name,
        "timm's published weights",
        architecture=source.name,
        model_args={} if size is None else {"img_size": tuple(size)},
        pretrained_cfg=described,
        revision=_cached_commit(described),
    )


def _create_pretrained(name: str, keywords: Mapping[str, Any], config: PretrainedCfg) -> Any:
    def create() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(name, pretrained=True, **keywords)

    try:
        return explained(create, config.hf_hub_id or name)
    except CheckpointError:
        raise
    except (
        Exception
    ) as error:  # what timm, torch and safetensors raise for a damaged download has no common kind
        raise CheckpointError(f"timm cannot load the weights of {name!r}: {one_line(error)}") from error


def _cached_commit(config: Mapping[str, Any]) -> str | None:
    """The hub commit behind weights that timm has just taken from the cache."""
    repository = config.get("hf_hub_id")
    if not repository or config.get("source") == "file":
        return None
    name = config.get("hf_hub_filename") or "model.safetensors"
    found = try_to_load_from_cache(repository, name)
    return commit_of(Path(found)) if isinstance(found, str) else None


def converted(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` under the model's names: as they are, else by the converter that timm has for the family."""
    core = {key for key in model.state_dict() if key.startswith("blocks.0.")}
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None or core <= tensors.keys():
        return dict(tensors)
    try:
        return dict(convert(dict(tensors), model))
    except (KeyError, AttributeError, RuntimeError, TypeError):
        return dict(tensors)  # not of the family: `fit` names the keys


def known_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a description that this timm's `PretrainedCfg` takes, without places to load from."""
    fields = {field.name for field in dataclasses.fields(PretrainedCfg)} - {
        "url",
        "file",
        "source",
        "state_dict",
    }
    return {key: value for key, value in config.items() if key in fields}


def one_line(error: Exception, limit: int = 300) -> str:
    """An error's text as one line."""
    return SPACE.sub(" ", str(error)).strip()[:limit]
