"""Masked autoencoding (He et al., arXiv:2111.06377) around a timm vision transformer.

It trains a teacher for a new domain from images without labels. Shapes: B images, N patches, V of them
visible, P prefix tokens, D encoder width, E decoder width, K pixels of a patch times channels.
"""

from __future__ import annotations

from typing import cast

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models import checkpoint_seq
from torch import Tensor, nn

from .errors import ConfigError, UnsupportedModelError, check_types
from .families import check_size
from .families.plain import VisionTransformer, plain_block
from .given import Model, as_model, check_images
from .parts import grid_positions, normalize_patches, unfold_patches


class MaskedAutoencoder(nn.Module):
    """An encoder of the visible patches, and a small decoder that predicts the hidden patches.

    The loss is the mean squared error over the pixels of hidden patches (section 3 of the paper). With `norm_pixels`,
    each target patch is normalized by its own mean and deviation. The encoder is a plain
    `timm.models.VisionTransformer`; its prefix tokens are never masked. Its head and `fc_norm` are not used.
    Sizes of the decoder that are not given are those of `decoder_sizes`.

    Raises:
        UnsupportedModelError: the encoder is not a plain timm VisionTransformer.
        ConfigError: the mask or decoder sizes are invalid.
    """

    positions: Tensor

    @check_types("encoder")
    def __init__(
        self,
        encoder: Model,
        *,
        mask_ratio: float = 0.75,
        decoder_dim: int | None = None,
        decoder_depth: int | None = None,
        decoder_heads: int | None = None,
        norm_pixels: bool = True,
        decay_tokens: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = _plain_encoder(as_model(encoder, "encoder"))
        patch_embed = cast(PatchEmbed, self.encoder.patch_embed)
        self.patch_size: tuple[int, int] = tuple(patch_embed.patch_size)
        self.grid: tuple[int, int] = tuple(patch_embed.grid_size)
        self.norm_pixels = norm_pixels
        self.decay_tokens = decay_tokens
        self.num_patches = self.grid[0] * self.grid[1]
        self.num_masked = _count_masked(self.num_patches, mask_ratio)
        sizes = decoder_dim, decoder_depth, decoder_heads
        decoder_dim, decoder_depth, decoder_heads = decoder_sizes(
            self.encoder.embed_dim, len(self.encoder.blocks), *sizes
        )
        if decoder_dim % 4 or decoder_dim % decoder_heads:
            raise ConfigError(
                f"pretrain.decoder_dim={decoder_dim} must be a multiple of 4 and of "
                f"pretrain.decoder_heads={decoder_heads}."
            )
        channels = patch_embed.proj.in_channels
        self.decoder_embed = nn.Linear(self.encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_blocks = nn.ModuleList(
            plain_block(dim=decoder_dim, num_heads=decoder_heads, qkv_bias=True) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_head = nn.Linear(decoder_dim, self.patch_size[0] * self.patch_size[1] * channels)
        self.register_buffer("positions", grid_positions(self.grid, decoder_dim), persistent=False)
        self._init_decoder()

    def forward(self, images: Tensor) -> Tensor:
        """Return the reconstruction loss of `images` (B, C, H, W), a scalar, with a new random mask for each image.

        Raises DataError or UnsupportedModelError: the images do not fit the encoder.
        """
        check_images(images, self.encoder)
        check_size(self.encoder, (images.shape[-2], images.shape[-1]))
        target_BNK = unfold_patches(images.float(), self.patch_size)
        if self.norm_pixels:
            target_BNK = normalize_patches(target_BNK)
        prediction_BNK, mask_BN = self._predict(images)
        error_BN = (prediction_BNK.float() - target_BNK).square().mean(dim=-1)
        return (error_BN * mask_BN).sum() / mask_BN.sum()

    def random_order(self, batch: int, device: torch.device) -> Tensor:
        """Return a random permutation of the patches for each image, (B, N); the first V stay visible."""
        return torch.rand(batch, self.num_patches, device=device).argsort(dim=1)

    def no_weight_decay(self) -> set[str]:
        """Return the names without weight decay: none, or without `decay_tokens` the tokens and timm's exceptions."""
        if self.decay_tokens:
            return set()
        return {"mask_token", *(f"encoder.{name}" for name in self.encoder.no_weight_decay())}

    def group_matcher(
        self, coarse: bool = False
    ) -> dict[str, str | list[tuple[str, tuple[int, ...] | None]]]:
        """Return timm's layers of the encoder, for layer decay; the decoder is in no group, which is the top layer."""
        found = self.encoder.group_matcher(coarse=coarse)
        return {
            name: _within(each) if isinstance(each, str) else [(_within(rule), order) for rule, order in each]
            for name, each in found.items()
        }

    def _predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the decoder output of all patches (B, N, K), and which patches were hidden (B, N)."""
        order_BN = self.random_order(len(images), images.device)
        visible_BV = order_BN[:, : self.num_patches - self.num_masked]
        mask_BN = torch.ones_like(order_BN, dtype=torch.bool).scatter(1, visible_BV, False)
        return self._decode(self._encode(images, visible_BV), visible_BV), mask_BN

    def _encode(self, images: Tensor, visible_BV: Tensor) -> Tensor:
        """Encode the prefix tokens and the visible patches, (B, P + V, D)."""
        encoder, prefix = self.encoder, self.encoder.num_prefix_tokens
        x_BND = encoder._pos_embed(encoder.patch_embed(images))
        index_BVD = visible_BV.unsqueeze(-1).expand(-1, -1, x_BND.shape[-1])
        x_BVD = torch.cat([x_BND[:, :prefix], x_BND[:, prefix:].gather(1, index_BVD)], dim=1)
        x_BVD = encoder.norm_pre(x_BVD)
        if encoder.grad_checkpointing and self.training:
            x_BVD = checkpoint_seq(encoder.blocks, x_BVD)
        else:
            x_BVD = encoder.blocks(x_BVD)
        return encoder.norm(x_BVD)

    def _decode(self, encoded_BVD: Tensor, visible_BV: Tensor) -> Tensor:
        """Insert mask tokens for hidden patches, add positions, run the decoder, and return pixels (B, N, K)."""
        prefix = self.encoder.num_prefix_tokens
        x_BVE = self.decoder_embed(encoded_BVD)
        index_BVE = visible_BV.unsqueeze(-1).expand(-1, -1, x_BVE.shape[-1])
        blank_BNE = self.mask_token.to(x_BVE.dtype).expand(len(x_BVE), self.num_patches, -1)
        patches_BNE = blank_BNE.scatter(1, index_BVE, x_BVE[:, prefix:]) + self.positions
        x_BNE = torch.cat([x_BVE[:, :prefix], patches_BNE], dim=1)
        for block in self.decoder_blocks:
            x_BNE = block(x_BNE)
        return self.decoder_head(self.decoder_norm(x_BNE)[:, prefix:])

    def _init_decoder(self) -> None:
        """Initialize the decoder's linear layers with Xavier, as published; the encoder keeps its initialization."""
        nn.init.normal_(self.mask_token, std=0.02)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_head):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)


def _within(rule: str) -> str:
    """Return the expression that matches `encoder.NAME` where `rule` matches NAME."""
    return rf"^encoder\.(?:{rule.removeprefix('^')})"


def _plain_encoder(encoder: nn.Module) -> VisionTransformer:
    if isinstance(encoder, VisionTransformer) and isinstance(encoder.patch_embed, PatchEmbed):
        return encoder
    raise UnsupportedModelError(
        f"Masked pre-training needs a plain timm VisionTransformer (vit_...), not {type(encoder).__name__}."
    )


def _count_masked(num_patches: int, mask_ratio: float) -> int:
    masked = round(num_patches * mask_ratio) if mask_ratio == mask_ratio else 0
    if not 0 < masked < num_patches:
        raise ConfigError(
            f"pretrain.mask_ratio={mask_ratio} hides {masked} of {num_patches} patches; "
            "at least one must be hidden and one visible."
        )
    return masked


def decoder_sizes(
    width: int, blocks: int, dim: int | None = None, depth: int | None = None, heads: int | None = None
) -> tuple[int, int, int]:
    """Return the width, the blocks and the heads of the decoder of an encoder; given ones stay.

    The paper has 512, 8 and 16 for ViT-B, L and H (appendix A.1). That is two thirds of the width and of the blocks of
    ViT-B, so a smaller encoder gets two thirds of its own: a decoder of 30 % of its parameters, as with ViT-B. The
    width is a multiple of 32, the width of a head.
    """
    dim = dim or min(512, max(32, width * 2 // 3 // 32 * 32))
    depth = depth or min(8, max(1, blocks * 2 // 3))
    return dim, depth, heads or max(count for count in range(1, max(1, dim // 32) + 1) if dim % count == 0)
