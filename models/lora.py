"""LoRA on attention projections (arXiv 2106.09685): train low-rank updates instead of the weights, then merge them.

W becomes W + 2 B A with A (rank, in) and B (out, rank), B = 0 at the start. The factor is alpha / rank with
alpha = 2 rank, as in LoLCATs (arXiv 2410.10254: rank 8, alpha 16).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from .converted import new_parameters
from .errors import ConfigError, UnsupportedModelError, install_command
from .families import check_supported, classifier_of, sites

SCALE = 2
PROJECTIONS = ("qkv", "q", "kv", "q_proj", "k_proj", "v_proj", "proj")
BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def add_lora(model: nn.Module, rank: int) -> None:
    """Add adapters to every attention projection of `model`, in place, and freeze all parameters but the adapters, the
    head and what a conversion added: the operators of converted layers, and deformable merges.

    Raises ConfigError: peft is not installed. UnsupportedModelError: the model is of no supported family, or a layer
    stores its biases apart from its weight.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(f"optim.lora needs peft, not installed: {install_command('lora')}") from error
    try:
        check_supported(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"optim.lora: {error}") from error
    places = sites(model)
    widest = max(site.width for site in places)
    if rank > widest:
        raise ConfigError(f"optim.lora={rank} is more than the width of the model: give at most {widest}")
    for site in places:
        layer = site.layer(model)
        if any(getattr(layer, f"{part}_bias", None) is not None for part in ("q", "v")):
            raise UnsupportedModelError(
                f"optim.lora: layer {site.index} stores the biases of q and v apart from their weight (BEiT, EVA, "
                "Swin V2), so adapters would have no effect; remove optim.lora, or choose parameters with "
                "optim.trainable"
            )
    added = {id(parameter) for parameter in new_parameters(model)}
    learned = [name for name, each in model.named_parameters() if id(each) in added or _is_head(model, name)]
    paths, names = (
        "|".join(words) for words in ([re.escape(site.layer_path(model)) for site in places], PROJECTIONS)
    )
    config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=rf"({paths})\.({names})")
    inject_adapter_in_model(config, model)
    for name in learned:
        model.get_parameter(name).requires_grad_(True)


def merged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge the adapters of a state dict: W + 2 B A under the plain names. Other tensors stay as they are."""
    plain = {}
    for name, tensor in tensors.items():
        if name.endswith((DOWN, UP)):
            continue
        if BASE in name and name.endswith(".weight"):
            module = name.partition(BASE)[0]
            down, up = tensors[module + DOWN], tensors[module + UP]
            update = up.to(tensor.dtype).flatten(1) @ down.to(tensor.dtype).flatten(1)
            tensor = tensor + SCALE * update.reshape(tensor.shape)
        plain[name.replace(BASE, ".")] = tensor
    return plain


def _is_head(model: nn.Module, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return owner is classifier_of(model)
