"""LoRA on attention projections (arXiv 2106.09685): low-rank updates learn in place of the weights, then join them.

W is replaced by W + 2 B A with A (rank, in) and B (out, rank), B = 0 at the start; the factor is alpha / rank with
alpha = 2 rank, as LoLCATs has it (arXiv 2410.10254: rank 8, alpha 16).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from .errors import ConfigError, UnsupportedModelError
from .families import attention_blocks, classifier_of

SCALE = 2
PROJECTIONS = ("qkv", "q_proj", "k_proj", "v_proj", "proj")
BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def add_lora(model: nn.Module, rank: int) -> None:
    """Put adapters on every attention projection of `model`, in place. Adapters, head and what a conversion brought
    learn; all else is frozen.

    Raises ConfigError: peft is not installed; UnsupportedModelError: a layer keeps its biases apart from its weight.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("optim.lora needs peft, not installed: pip install 'graftvit[lora]'") from error
    for index, block in enumerate(attention_blocks(model)):
        if getattr(block.attn, "q_bias", None) is not None:
            raise UnsupportedModelError(
                f"optim.lora: layer {index} keeps the biases of q and v apart from their weight (BEiT, EVA), so "
                "adapters would be passed by; leave it out, or choose what learns by optim.trainable"
            )
    learned = [name for name, _ in model.named_parameters() if ".operator." in name or _is_head(model, name)]
    names = "|".join(PROJECTIONS)
    config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=rf"blocks\.\d+\.attn\.({names})")
    inject_adapter_in_model(config, model)
    for name in learned:
        model.get_parameter(name).requires_grad_(True)


def merged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with adapters as one without: W + 2 B A under the plain names. Others come back as they are."""
    plain = {}
    for name, tensor in tensors.items():
        if name.endswith((DOWN, UP)):
            continue
        if BASE in name and name.endswith(".weight"):
            module = name.partition(BASE)[0]
            down, up = tensors[module + DOWN], tensors[module + UP]
            tensor = tensor + SCALE * (up.to(tensor.dtype) @ down.to(tensor.dtype))
        plain[name.replace(BASE, ".")] = tensor
    return plain


def _is_head(model: nn.Module, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return owner is classifier_of(model)
