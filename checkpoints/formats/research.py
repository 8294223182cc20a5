"""Key maps of files that papers published.

Those that name every part as timm does have a row too where their keys show the family, for what timm has no
place for and for the images that they were trained on.
"""

from __future__ import annotations

from .beit import BEIT_MAPS
from .dino import DINO_MAPS
from .ecoformer import ECOFORMER_MAPS
from .flax import FLAX_MAPS
from .keymap import KeyMap
from .lit_keys import LIT_MAPS
from .moco import PROJECTION, describe_moco, describe_plain
from .normalization import imagenet

MASK_TOKEN = (r"mask(?:ed)?_(?:token|embed)", "the mask token of masked image modelling")
PLAIN = ("cls_token", "pos_embed", r"blocks\.0\.attn\.qkv\.bias")
OTHER_THAN_PLAIN = (
    r"blocks\.0\.(?!norm[12]\.|attn\.qkv\.|attn\.proj\.|mlp\.fc[12]\.).+",
    r"norm_pre\..+|(?:dist|reg)_token|register_tokens|attn_pool\..+",
)

PLAIN_MAPS: tuple[KeyMap, ...] = (
    KeyMap(
        "MAE's autoencoder",
        marks=(*PLAIN, r"decoder_pred\.weight"),
        left_out=((r"mask_token|decoder_.+", "the decoder of masked autoencoding"),),
        describe=imagenet("MAE trains"),
    ),
    KeyMap(
        "an encoder of MoCo-v3",
        marks=(*PLAIN, r"head\.0\.weight", r"head\.1\.running_mean"),
        left_out=((r"head\.\d+\..+", PROJECTION),),
        describe=describe_moco,
    ),
    KeyMap(
        "iBOT's backbone",
        marks=(*PLAIN, "masked_embed"),
        left_out=(MASK_TOKEN,),
        describe=imagenet("iBOT trains"),
    ),
    KeyMap(
        "a distilled DeiT",
        marks=(*PLAIN, "dist_token"),
        describe=imagenet("DeiT trains"),
    ),
    KeyMap(
        "DeiT III",
        marks=("cls_token", "pos_embed", r"blocks\.0\.attn\.qkv\.bias", r"blocks\.0\.gamma_1"),
        unless=(r"blocks\.0\.attn\.proj_l\..+|blocks_token_only\..+",),
        names=((r"blocks\.(\d+)\.gamma_([12])", r"blocks.\1.ls\2.gamma"),),
        describe=imagenet("DeiT trains"),
    ),
    KeyMap(
        "a plain ViT",
        marks=(*PLAIN, r"(?:fc_)?norm\.weight"),
        unless=OTHER_THAN_PLAIN,
        left_out=(MASK_TOKEN,),
        describe=describe_plain,
    ),
)

RESEARCH_MAPS: tuple[KeyMap, ...] = (
    *FLAX_MAPS,
    *BEIT_MAPS,
    *DINO_MAPS,
    *ECOFORMER_MAPS,
    *LIT_MAPS,
    *PLAIN_MAPS,
)
