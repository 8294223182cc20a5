"""Find the architecture of weights that do not name it: vision transformers of published widths and depths."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, SupportsIndex

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
from torch.nn.modules import module as hooks

from ..models.conversion import ARCHITECTURE as CONVERTED
from ..models.copied import ARCHITECTURE as COPIED
from ..models.copied import Copying
from ..models.errors import CheckpointError, GraftError, Json, JsonDict
from ..models.families import create_timm_model, find_family, image_size, vit
from ..models.small import without_memory, without_parameters
from .hub import commit_of, download, try_download
from .preprocessing import Preprocessing
from .report import BIAS_TABLE, shortened, some
from .sources import TimmSource, parse_source
from .weight_files import Weights

Named = tuple[str, JsonDict]
SIZES = {
    192: ("tiny", 12),
    384: ("small", 12),
    512: ("medium", 12),
    768: ("base", 12),
    1024: ("large", 24),
    1152: ("so400m", 27),
    1280: ("huge", 32),
    1408: ("giant", 40),
    1536: ("giant", 40),
    1664: ("gigantic", 48),
    4096: ("7b", 40),
}
"""By width: timm's name and the depth. No weight shows the number of heads: timm's name does."""

LAYERS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
PLAIN = frozenset(f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias"))
"""The tensors of a block of a plain vision transformer, exactly."""
SCALED = PLAIN | {"ls1.gamma", "ls2.gamma"}
WITHOUT_KEY_BIAS = PLAIN - {"attn.qkv.bias"} | {"gamma_1", "gamma_2"}
BIASES = frozenset({"attn.q_bias", "attn.v_bias"})
TABLE = frozenset({"attn.relative_position_bias_table"})
GATED = frozenset(f"mlp.fc1_{gate}.{kind}" for gate in "gx" for kind in ("weight", "bias"))
FIRST = frozenset({"mlp.fc1.weight", "mlp.fc1.bias"})
FAMILIES = (
    "MAE, DeiT and DeiT III, DINO, DINOv2, DINOv3, MoCo-v3, iBOT, BEiT, Google's flax ViTs, attention transfer, "
    "EcoFormer, PVT, LIT, LITv2, CSwin, AttnZero's PVT and Swin in their published sizes, Hugging Face's ViTs, "
    "timm's own"
)


def infer_architecture(weights: Weights) -> Named:
    """timm's name and arguments of a ViT by its parts and widths, at any patch size.

    Raises CheckpointError: it lacks blocks, is no vision transformer, or could be of several architectures, and
    then asks for it.
    """
    tensors = weights.tensors
    if "stage1_conv_embed.0.weight" in tensors:
        other = "AttnZero's CSwin does not say its program, such as attnzero_cswin_t or attnzero_cswin_t_140"
        raise CheckpointError(
            _question(weights, f"its width and depths are of no published CSwin, and {other}")
        )
    numbers = {int(key.split(".")[1]) for key in tensors if key.startswith("blocks.") and _number(key)}
    if not numbers:
        reason = f"its tensors ({some(tensors, 3)}) are of none that is known by them, which are {FAMILIES}"
        raise CheckpointError(_question(weights, reason))
    depth = 1 + max(numbers)
    absent = [f"blocks.{number}" for number in range(depth) if number not in numbers]
    if absent:
        raise CheckpointError(f"{weights.origin} is not whole: of {depth} blocks it lacks {some(absent)}")
    patch = tensors.get("patch_embed.proj.weight")
    block = frozenset(key.removeprefix("blocks.0.") for key in tensors if key.startswith("blocks.0."))
    namer = _namer(block, tensors)
    if patch is None or patch.ndim != 4 or namer is None:
        raise CheckpointError(_question(weights, "its keys are not those of a plain ViT"))
    width, channels, *size = patch.shape
    named = namer(weights, width, size[0]) if size[0] == size[1] else None
    if named is None or depth != SIZES[width][1]:
        raise CheckpointError(_question(weights, f"width {width} and depth {depth} are of no published ViT"))
    architecture, arguments = named
    return architecture, arguments | ({"in_chans": channels} if channels != 3 else {})


def _number(key: str) -> bool:
    return key.split(".")[1].isdecimal()


def _namer(
    block: frozenset[str], tensors: Mapping[str, Tensor]
) -> Callable[[Weights, int, int], Named | None] | None:
    """Return timm's name of a model by width and patch size, by the tensors of a block and by the tokens."""
    if "norm_pre.weight" in tensors:
        return None
    if block == SCALED:
        return _scaled if {"cls_token", "pos_embed"} <= tensors.keys() else None
    if block in (WITHOUT_KEY_BIAS | BIASES, WITHOUT_KEY_BIAS | BIASES | TABLE):
        return _rotary if "reg_token" in tensors else _beit
    if block in (
        WITHOUT_KEY_BIAS,
        WITHOUT_KEY_BIAS - FIRST | GATED,
        WITHOUT_KEY_BIAS - FIRST | GATED | BIASES,
    ):
        return _rotary if "reg_token" in tensors else None
    return _plain if block == PLAIN and "reg_token" not in tensors and "pos_embed" in tensors else None


def _plain(weights: Weights, width: int, patch: int) -> Named | None:
    """ViT, DeiT with its distillation token, and SigLIP's tower; without a class token only if that is known."""
    size = _size(width)
    if "dist_token" in weights.tensors:
        return _at_patch(f"deit_{size}_distilled_patch{{}}_224", patch, 16)
    if "attn_pool.latent" in weights.tensors:
        sizes = (f"vit_{size}_patch{patch}_siglip_{side}" for side in (224, 256, 384, 512))
        return next(((name, {}) for name in sizes if is_model(name)), None)
    if "cls_token" not in weights.tensors and weights.model_args.get("class_token") is not False:
        return None
    return _at_patch(f"vit_{size}_patch{{}}_224", patch, 16 if width < 1280 else 14)


def _scaled(weights: Weights, width: int, patch: int) -> Named | None:
    """DeiT III where no position is the class token's, else DINOv2, with or without registers."""
    tensors = weights.tensors
    patches, registers = _tokens(tensors.get("pos_embed")), _tokens(tensors.get("reg_token"))
    if not registers and math.isqrt(patches) ** 2 == patches:
        return _at_patch(f"deit3_{_size(width)}_patch{{}}_224", patch, 16 if width < 1280 else 14)
    middle = "_reg4" if registers else ""
    named = _at_patch(f"vit_{_size(width)}_patch{{}}{middle}_dinov2", patch, 14)
    if named is not None and registers not in (0, 4):
        named[1]["reg_tokens"] = registers
    return named


def _beit(weights: Weights, width: int, patch: int) -> Named | None:
    return _at_patch(f"beit_{_size(width)}_patch{{}}_224", patch, 16)


def _rotary(weights: Weights, width: int, patch: int) -> Named | None:
    """DINOv3: `plus` are the gated ones, `qkvb` those with biases on queries and values."""
    tensors = weights.tensors
    gated, biased = "blocks.0.mlp.fc1_g.weight" in tensors, "blocks.0.attn.q_bias" in tensors
    if "pos_embed" in tensors:
        return None
    plus = "_plus" if gated and width != 4096 else ""
    biases = "_qkvb" if biased else ""
    named = _at_patch(f"vit_{_size(width)}{plus}_patch{{}}_dinov3{biases}", patch, 16)
    registers = _tokens(tensors.get("reg_token"))
    if named is not None and registers != 4:
        named[1]["num_reg_tokens"] = registers
    return named


def _tokens(token_1ND: Tensor | None) -> int:
    return token_1ND.shape[1] if token_1ND is not None and token_1ND.ndim == 3 else 0


def _size(width: int) -> str:
    return SIZES[width][0] if width in SIZES else "?"


def _at_patch(template: str, patch: int, usual: int) -> Named | None:
    """timm's name at this patch size, or that at the usual one with the size as an argument."""
    if is_model(template.format(patch)):
        return template.format(patch), {}
    return (template.format(usual), {"patch_size": patch}) if is_model(template.format(usual)) else None


def _question(weights: Weights, reason: str) -> str:
    return (
        f"{weights.origin} does not say its architecture and {reason}: give its timm name as model, and "
        "model_args where it was built with some (of a run: teacher.model, teacher.model_args)"
    )


# Bound what a constructor may make: stop it when a model outgrows the weights that it is built for.

PARTS_EACH, SPARE_PARTS, MOST_PARTS = 8, 10_000, 200_000
"""Modules, parameters and buffers for each tensor of the weights, and beside that; however many tensors there are."""
SPARE_NUMBERS, MOST_INDICES = 1 << 26, 1 << 29
"""Numbers beside twice those of the weights (positions of larger images), and whole numbers (tables of relative
positions, which lie in no file: a BEiT of 24 layers has 400 million of them at 1,024 pixels)."""


@contextmanager
def bounded(weights: Collection[Tensor]) -> Iterator[None]:
    """Raise ValueError out of a constructor in this thread as soon as what it makes is far more than `weights`."""
    builder, held = threading.get_ident(), sum(tensor.numel() for tensor in weights)
    parts = min(PARTS_EACH * len(weights) + SPARE_PARTS, MOST_PARTS)
    left = {"parts": parts, "numbers": 2 * held + SPARE_NUMBERS, "indices": MOST_INDICES}

    def count(module: nn.Module, name: str, part: nn.Module | Tensor | None) -> None:
        if threading.get_ident() != builder:
            return
        left["parts"] -= 1
        if isinstance(part, Tensor):
            left["numbers" if part.is_floating_point() else "indices"] -= part.numel()
        if min(left.values()) < 0:
            raise ValueError(
                "the model would be far larger than its weights: "
                f"its weights hold {len(weights):,} tensors with {held:,} numbers"
            )

    with ExitStack() as stack:
        for kind in ("parameter", "buffer", "module"):
            stack.callback(getattr(hooks, f"register_module_{kind}_registration_hook")(count).remove)
        yield


# Build a timm model for weights, and find what timm publishes under a name.

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
    mapped: bool = False,
    within: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Return a fresh timm model; keep the global random state. On the meta device it has no memory.

    Args:
        mapped: only the parameters have no memory.
        within: the weights that it is built for, if their description of the model cannot be trusted.

    Raises CheckpointError in the constructor's words where it refuses the arguments, for one that names a file to
    load, and for a model that is far larger than `within`.
    """
    if "checkpoint_path" in arguments:
        raise CheckpointError(
            f"model_args of {architecture!r} name a checkpoint_path, which is not opened: leave it out"
        )
    limit = nullcontext() if within is None else bounded(within.values())
    place = without_memory() if on_meta else without_parameters() if mapped else torch.device("cpu")
    try:
        with torch.random.fork_rng(devices=[]), place, limit:
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


def check_published(source: object, arguments: Json) -> None:
    """Raise CheckpointError where the source is a timm name without published weights, or without such a revision."""
    if isinstance(source, TimmSource):
        check_name(source.name)
        _published(source, arguments)


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
    family = find_family(model)
    told_by = "blocks.0." if family is None else family.told_by
    core = {
        key
        for key in model.state_dict()
        if ".operator." not in key and key.startswith(told_by) and not key.startswith("head.")
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


# What a description may hold: a file may contain anything, so it is checked as soon as it is read.

INNER = {CONVERTED: "architecture", COPIED: "student"}
"""The argument of each architecture of ours that names the one of timm which it changes."""
MAX_WHOLE, MAX_LAYERS = 10_000_000, 1000
"""No model has more classes, pixels a side or features, or more layers."""
MAX_ENTRIES, MAX_LEVELS, MAX_TEXT = 100_000, 16, 100_000
WHOLE = {"num_classes", "in_chans", "num_heads", "embed_dim", "depth", "patch_size", "img_size", "plan_size"}
"""Arguments of timm's plain vision transformers that are whole numbers, or lists of them."""
DEPTHS = ("depth", "depths", "layers", "num_layers")
"""Arguments of timm's constructors that say how often something is built."""


def check_description(weights: Weights) -> Weights:
    """Return the weights themselves, once their description of the model has been checked.

    Raises CheckpointError: the architecture, its arguments, the description of the images or the provenance have the
    wrong type; a number is out of bounds; the base of a converted model is not one of timm's architectures; or the
    description of what a student copies cannot be read.
    """
    described = {"model_args": weights.model_args, "pretrained_cfg": weights.pretrained_cfg}
    for name, table in described.items():
        _require(isinstance(table, Mapping), weights, name, table, "no table of settings")
        check_settings(f"{weights.origin}: {name}", table, len(weights.tensors))
    names = {name: weights.pretrained_cfg.get(name) for name in ("license", "classifier")}
    for name, value in {"architecture": weights.architecture, **names}.items():
        texts: Any = [value]
        if name == "classifier" and isinstance(value, (list, tuple)) and value:
            texts = value
        _require(all(one is None or isinstance(one, str) for one in texts), weights, name, value, "no name")
    Preprocessing.read(weights.pretrained_cfg)
    if weights.architecture in INNER:
        _check_inner(weights, weights.architecture)
    return weights


def _require(holds: bool, weights: Weights, name: str, value: Any, words: str) -> None:
    if not holds:
        raise CheckpointError(f"{weights.origin} says {name}={shortened(value)}, which is {words}")


def _check_inner(weights: Weights, outer: str) -> None:
    """Check a model that one of our architectures makes out of a model of timm."""
    named, plan = weights.model_args.get(INNER[outer]), weights.model_args.get("plan")
    known = isinstance(named, str) and is_model(split_model_name_tag(named)[0]) and named != outer
    _require(known, weights, INNER[outer], named, "no architecture of timm")
    _require(outer != CONVERTED or isinstance(plan, str), weights, "plan", plan, "no text")
    if outer == COPIED:
        try:
            Copying.from_json(weights.model_args["copied"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{weights.origin} says of what it copies: {error}") from error
    if named in INNER:
        _check_inner(weights, named)


def check_settings(where: str, settings: Any, num_tensors: int = 0) -> None:
    """Refuse settings that no model has; what is no JSON (a caller's function or class) is left to timm.

    Args:
        where: file and setting, as the error names them.
        num_tensors: of the weights that the settings came with; a model has no more layers than its weights tensors.

    Raises CheckpointError: a number that is not finite, is negative or beyond `MAX_WHOLE`, more layers than there are
    tensors, or more entries, levels or text than any model needs.
    """
    for number, (path, key, value, level) in enumerate(_entries(where, settings)):
        if number > MAX_ENTRIES or level > MAX_LEVELS:
            many = (
                f"it has more than {MAX_ENTRIES:,} entries, or is nested more than {MAX_LEVELS} levels deep"
            )
            raise CheckpointError(f"{path[:200]} is refused: {many}")
        problem = _problem(key, value, num_tensors)
        if problem is not None:
            raise CheckpointError(f"{path}={shortened(value)} is refused: {problem}")


def _entries(where: str, settings: Any) -> Iterator[tuple[str, str, Any, int]]:
    """Yield path, last name, value and level of all in `settings`; an entry of a list has the name of the list."""
    waiting = [(where, "", settings, 0)]
    while waiting:
        path, key, value, level = waiting.pop()
        yield path, key, value, level
        if isinstance(value, Mapping):
            named = ((str(name)[:80], inner) for name, inner in value.items())
            waiting += [(f"{path}.{name}", name, inner, level + 1) for name, inner in named]
        elif isinstance(value, (list, tuple)):
            waiting += [(path, key, inner, level + 1) for inner in value]


def _problem(key: str, value: Any, num_tensors: int) -> str | None:
    is_number, is_whole = isinstance(value, (int, float)), isinstance(value, (list, tuple, SupportsIndex))
    if key in WHOLE and value is not None and (isinstance(value, bool) or not is_whole):
        return "it is a whole number, or a list of them"
    if key.endswith("_rate") and is_number and not 0 <= value <= 1:
        return "a rate is from 0 to 1"
    if isinstance(value, float) and not math.isfinite(value):
        return "a number must be finite"
    if isinstance(value, int) and not 0 <= value <= MAX_WHOLE:
        return f"a whole number is from 0 to {MAX_WHOLE:,}"
    if key in DEPTHS and isinstance(value, int) and value > max(num_tensors, MAX_LAYERS):
        return f"more layers than any model has, and its weights have {num_tensors:,} tensors"
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return f"no text has more than {MAX_TEXT:,} characters"
    return None


# Hold the windows that a source gives a Swin against its tables of relative position biases, a row for each offset.
#
# Swin V2 computes its biases and has no tables, so nothing in its weights shows the windows.


def check_windows(weights: Weights) -> Weights:
    """Return the weights themselves, once the windows in their description have been checked.

    Raises CheckpointError: `window_size` makes tables of other lengths than those of the weights, or no model.
    """
    tables = {key: tensor for key, tensor in weights.tensors.items() if key.endswith(BIAS_TABLE)}
    if not tables or weights.architecture is None or weights.model_args.get("window_size") is None:
        return weights
    described = build(weights.architecture, weights.model_args, on_meta=True, within=weights.tensors)
    wanted = described.state_dict()
    for key, table in tables.items():
        rows = len(wanted[key]) if key in wanted else None
        if table.ndim and rows is not None and len(table) != rows:
            given = shortened(weights.model_args["window_size"])
            raise CheckpointError(
                f"{weights.origin} says window_size={given}, but {key} has {len(table)} rows and not {rows}"
                f"{_side(len(table))}; give config.json the window_size that the model was trained with"
            )
    return weights


def _side(rows: int) -> str:
    """Return the windows that a table belongs to, in words, if they are square."""
    root = math.isqrt(rows)
    side = (root + 1) // 2
    return f": its windows are {side}x{side}" if root * root == rows and root % 2 else ""
