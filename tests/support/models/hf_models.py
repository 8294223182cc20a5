"""Tiny random models of Hugging Face transformers, and what they compute where timm computes the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import torch
import transformers
from torch import Tensor, nn

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "vocab_size": 20, "max_position_embeddings": 8,
}  # fmt: skip
DECODER = {
    "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 24,
}  # fmt: skip
Outputs = tuple[Tensor | None, Tensor | None]
"""Normalised tokens as timm's `forward_features` gives them, and what its `forward` gives; None: not compared."""


@dataclass(frozen=True)
class Case:
    """One model: its class in transformers, its settings, and how to run it."""

    name: str
    kind: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    run: Callable[[Any, Tensor], Outputs] = field(default=lambda model, images: _tokens(model, images))
    image: tuple[int, int] = (32, 32)
    channels: int = 3

    def build(self) -> nn.Module:
        """The model with every parameter drawn at random, so that a forgotten one shows."""
        values = {**SIZES, **self.settings}
        config = getattr(transformers, self.config)
        if self.config in ("CLIPConfig", "SiglipConfig"):
            built = config(text_config=TEXT, vision_config=values, projection_dim=24)
        else:
            built = config(**values)
        model: nn.Module = getattr(transformers, self.kind)(built).eval()
        generator = torch.Generator().manual_seed(len(self.name))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_(-0.5, 0.5, generator=generator)
        return model

    def images(self, count: int = 2) -> Tensor:
        return torch.randn(count, self.channels, *self.image, generator=torch.Generator().manual_seed(3))

    def outputs(self, model: nn.Module, images: Tensor) -> Outputs:
        with torch.no_grad():
            return self.run(model, images)


def save(model: Any, folder: Path, **how: Any) -> str:
    """A folder as transformers writes it, under the names of its published files."""
    model.save_pretrained(folder, **how)
    return f"local-dir:{folder}"


def save_modules(model: Any, folder: Path) -> str:
    """A folder with a pickle under the names that the modules have in the installed version."""
    folder.mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    model.config.save_pretrained(folder)
    return f"local-dir:{folder}"


def _tokens(model: Any, images: Tensor) -> Outputs:
    return model(images).last_hidden_state, None


def _pooled(model: Any, images: Tensor) -> Outputs:
    outputs = model(images)
    return outputs.last_hidden_state, outputs.pooler_output


def _logits(model: Any, images: Tensor) -> Outputs:
    return None, model(images).logits


def _unmasked(model: Any, images: Tensor) -> Outputs:
    encoder = getattr(model, "vit", model)
    encoder.config.mask_ratio = 0.0
    order = torch.arange((images.shape[2] // 8) * (images.shape[3] // 8)).float()
    return encoder(images, noise=order.expand(len(images), -1)).last_hidden_state, None


def _base(model: Any, images: Tensor) -> Outputs:
    return _tokens(model.base_model, images)


def _clip(model: Any, images: Tensor) -> Outputs:
    tower = getattr(model, "vision_model", model)
    outputs = tower(images)
    return tower.post_layernorm(outputs.last_hidden_state), outputs.pooler_output


def _siglip(model: Any, images: Tensor) -> Outputs:
    return _pooled(model.vision_model, images)


def _token_head(model: Any, images: Tensor) -> Outputs:
    tokens = model(images).last_hidden_state
    return tokens, tokens[:, 0]


def _masked_beit(model: Any, images: Tensor) -> Outputs:
    return model.layernorm(model.beit(images).last_hidden_state), None


WIDE = {"image_size": [16, 32]}
CASES = (
    Case("vit", "ViTModel", "ViTConfig", run=_token_head),
    Case("vit-wide", "ViTModel", "ViTConfig", WIDE, image=(16, 32)),
    Case("vit-gray", "ViTModel", "ViTConfig", {"num_channels": 1, "qkv_bias": False}, channels=1),
    Case("vit-relu", "ViTModel", "ViTConfig", {"hidden_act": "relu", "layer_norm_eps": 0.01}),
    Case("vit-classifier", "ViTForImageClassification", "ViTConfig", {"num_labels": 5}, _logits),
    Case("vit-masked", "ViTForMaskedImageModeling", "ViTConfig", {"encoder_stride": 8}, _base),
    Case("vit-msn", "ViTMSNModel", "ViTMSNConfig"),
    Case("deit", "DeiTModel", "DeiTConfig"),
    Case("deit-wide", "DeiTModel", "DeiTConfig", WIDE, image=(16, 32)),
    Case("deit-classifier", "DeiTForImageClassification", "DeiTConfig", {"num_labels": 5}, _logits),
    Case(
        "deit-distilled", "DeiTForImageClassificationWithTeacher", "DeiTConfig", {"num_labels": 5}, _logits
    ),
    Case("mae", "ViTMAEForPreTraining", "ViTMAEConfig", DECODER, _unmasked),
    Case("mae-encoder", "ViTMAEModel", "ViTMAEConfig", DECODER, _unmasked),
    Case("dinov2", "Dinov2Model", "Dinov2Config", {"mlp_ratio": 3}, _pooled),
    Case("dinov2-swiglu", "Dinov2Model", "Dinov2Config", {"use_swiglu_ffn": True}),
    Case("dinov2-classifier", "Dinov2ForImageClassification", "Dinov2Config", {}, _base),
    Case("dinov2-registers", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", run=_pooled),
    Case(
        "dinov2-registers-swiglu", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig",
        {"num_register_tokens": 2, "use_swiglu_ffn": True},
    ),
    Case("dinov3", "DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 4}, _pooled),
    Case(
        "dinov3-swiglu", "DINOv3ViTModel", "DINOv3ViTConfig",
        {"use_gated_mlp": True, "hidden_act": "silu", "intermediate_size": 44, "num_register_tokens": 2},
    ),
    Case(
        "dinov3-wide", "DINOv3ViTModel", "DINOv3ViTConfig",
        {**WIDE, "query_bias": False, "value_bias": False, "rope_theta": 50.0}, image=(16, 32),
    ),
    Case("clip", "CLIPVisionModel", "CLIPVisionConfig", run=_clip),
    Case("clip-gelu", "CLIPVisionModel", "CLIPVisionConfig", {"hidden_act": "gelu"}, _clip),
    Case("clip-projection", "CLIPVisionModelWithProjection", "CLIPVisionConfig", run=_clip),
    Case("clip-whole", "CLIPModel", "CLIPConfig", run=_clip),
    Case("clip-classifier", "CLIPForImageClassification", "CLIPConfig", run=_logits),
    Case("siglip", "SiglipVisionModel", "SiglipVisionConfig", run=_pooled),
    Case("siglip-without-head", "SiglipVisionModel", "SiglipVisionConfig", {"vision_use_head": False}),
    Case("siglip-whole", "SiglipModel", "SiglipConfig", run=_siglip),
    Case("siglip-classifier", "SiglipForImageClassification", "SiglipConfig", run=_logits),
    Case("beit", "BeitModel", "BeitConfig", run=_pooled),
    Case("beit-token", "BeitModel", "BeitConfig", {"use_mean_pooling": False}, _pooled),
    Case("beit-unscaled", "BeitModel", "BeitConfig", {"layer_scale_init_value": 0.0}, _pooled),
    Case("beit-relative", "BeitModel", "BeitConfig", {"use_relative_position_bias": True}, _pooled),
    Case(
        "beit-classifier", "BeitForImageClassification", "BeitConfig",
        {"use_relative_position_bias": True, "num_labels": 5}, _logits,
    ),
    Case(
        "beit-masked", "BeitForMaskedImageModeling", "BeitConfig",
        {"use_shared_relative_position_bias": True, "use_absolute_position_embeddings": True, "use_mask_token": True},
        _masked_beit,
    ),
)  # fmt: skip
