"""transformers' names of the parts of its vision towers: those of its files and those of its modules."""

from __future__ import annotations

Rules = tuple[tuple[str, str], ...]
LAYER = r"(?:(?:model|encoder)\.)?layers?\.(\d+)\."
LINEAR = r"\.(weight|bias)"


def _layers(prefix: str, parts: Rules) -> Rules:
    """(part of a layer, timm's part of a block) as rules of whole names; \\2 is the part's first group."""
    return tuple((prefix + LAYER + part, r"blocks.\1." + name) for part, name in parts)


MASK_TOKEN = (r"(?:\w+\.)?embeddings\.mask_token", "only masked training uses it")
POOLER = (r"(?:\w+\.)?pooler\.dense\..*", "timm has no pooler with a dense layer and tanh")
SIMMIM = (r"decoder\.\d+\..*", "the decoder of masked image modelling")
INDEX = (r".*\.relative_position_index|.*embeddings\.position_ids|.*inv_freq", "it is computed")

QKV = (
    (r"attention\.attention\.([qkv])\w+" + LINEAR, r"attn.qkv.\3[\2]"),
    (r"attention\.([qkv])_proj" + LINEAR, r"attn.qkv.\3[\2]"),
)
AFTER_ATTENTION = (
    (r"attention\.(?:output\.dense|o_proj)" + LINEAR, r"attn.proj.\2"),
    (r"(?:intermediate\.dense|mlp\.fc1)" + LINEAR, r"mlp.fc1.\2"),
    (r"(?:output\.dense|mlp\.fc2)" + LINEAR, r"mlp.fc2.\2"),
    (r"layernorm_before" + LINEAR, r"norm1.\2"),
    (r"layernorm_after" + LINEAR, r"norm2.\2"),
)


def _embeddings(prefix: str) -> Rules:
    return (
        (prefix + r"embeddings\.cls_token", "cls_token"),
        (prefix + r"embeddings\.position_embeddings", "pos_embed"),
        (prefix + r"embeddings\.patch_embeddings\.(?:projection\.)?(weight|bias)", r"patch_embed.proj.\1"),
        (prefix + r"layernorm" + LINEAR, r"norm.\1"),
        (r"classifier" + LINEAR, r"head.\1"),
    )


VIT = r"(?:(?:vit|deit)\.)?"
VIT_MARKS = (VIT + r"embeddings\.cls_token", VIT + LAYER + r"layernorm_before\.weight")
VIT_NAMES = (*_embeddings(VIT), *_layers(VIT, (*QKV, *AFTER_ATTENTION)))
DISTILLATION = VIT + r"embeddings\.distillation_token"
DEIT_NAMES = (
    (r"cls_classifier" + LINEAR, r"head.\1"),
    (r"distillation_classifier" + LINEAR, r"head_dist.\1"),
    (DISTILLATION, "dist_token"),
    *VIT_NAMES,
)

BEIT = r"(?:beit\.)?"
TABLE = r"relative_position_bias_table"
BEIT_NAMES = (
    (BEIT + r"pooler\.layernorm" + LINEAR, r"fc_norm.\1"),
    (rf"{BEIT}(?:encoder\.relative_position_bias|shared_position_bias)\.{TABLE}", f"rel_pos_bias.{TABLE}"),
    (r"layernorm" + LINEAR, r"norm.\1"),
    *_embeddings(BEIT),
    *_layers(
        BEIT,
        (
            (r"attention\.(?:attention\.([qv])\w+|([qv])_proj)\.bias", r"attn.\2\3_bias"),
            *QKV,
            (rf"(?:attention\.attention\.)?relative_position_bias\.({TABLE})", r"attn.\2"),
            (r"lambda_([12])", r"gamma_\2"),
            *AFTER_ATTENTION,
        ),
    ),
)

DINO = r"(?:dinov2(?:_with_registers)?\.)?"
DINO_MARKS = (DINO + r"embeddings\.cls_token", DINO + LAYER + r"layer_scale1\.lambda1")
NORMS: Rules = ((r"norm([12])" + LINEAR, r"norm\2.\3"),)
DINOV2_NAMES = (
    (DINO + r"embeddings\.register_tokens", "reg_token"),
    *_embeddings(DINO),
    *_layers(
        DINO,
        (
            *QKV,
            *AFTER_ATTENTION,
            *NORMS,
            (r"layer_scale([12])\.lambda1", r"ls\2.gamma"),
            (r"mlp\.weights_in" + LINEAR, r"mlp.fc1.\2"),
            (r"mlp\.(gate|up)_proj" + LINEAR, r"mlp.fc1.\3[\2]"),
            (r"mlp\.(?:weights_out|down_proj)" + LINEAR, r"mlp.fc2.\2"),
        ),
    ),
)
DINOV2_CLASSIFIER = (
    r"classifier\..*",
    "it reads the class token beside the patches' mean, timm's head one token",
)

DINOV3_MARKS = (r"embeddings\.patch_embeddings\.weight", LAYER + r"layer_scale1\.lambda1")
GATE = LAYER + r"mlp\.gate_proj\.weight"
GATED: Rules = ((r"mlp\.gate_proj" + LINEAR, r"mlp.fc1_g.\2"), (r"mlp\.up_proj" + LINEAR, r"mlp.fc1_x.\2"))
NOT_GATED: Rules = ((r"mlp\.up_proj" + LINEAR, r"mlp.fc1.\2"),)


def dinov3_names(first: Rules) -> Rules:
    parts = (
        (r"attention\.([qv])_proj\.bias", r"attn.\2_bias"),
        *QKV,
        *AFTER_ATTENTION,
        *NORMS,
        (r"layer_scale([12])\.lambda1", r"gamma_\2"),
        *first,
        (r"mlp\.down_proj" + LINEAR, r"mlp.fc2.\2"),
    )
    return ((r"embeddings\.register_tokens", "reg_token"), *_embeddings(""), *_layers("", parts))


TOWER = r"(?:vision_model\.)?"
TOWER_MARKS = (TOWER + r"embeddings\.patch_embedding\.weight", TOWER + r"post_layernorm\.weight")
CLASS_EMBEDDING = TOWER + r"embeddings\.class_embedding"
TEXT: Rules = (
    (r"text_model\..*|text_projection\..*|logit_scale|logit_bias", "the text tower and what joins the two"),
    (r"visual_projection\..*", "the projection to the space of texts, no classifier"),
    INDEX,
)
TOWER_NAMES = (
    (TOWER + r"embeddings\.class_embedding", "cls_token"),
    (TOWER + r"embeddings\.position_embedding\.weight", "pos_embed"),
    (TOWER + r"embeddings\.patch_embedding" + LINEAR, r"patch_embed.proj.\1"),
    (TOWER + r"pre_layrnorm" + LINEAR, r"norm_pre.\1"),
    (TOWER + r"post_layernorm" + LINEAR, r"norm.\1"),
    (TOWER + r"head\.probe", "attn_pool.latent"),
    (TOWER + r"head\.attention\.(q|kv)" + LINEAR, r"attn_pool.\1.\2"),
    (TOWER + r"head\.attention\.out_proj" + LINEAR, r"attn_pool.proj.\1"),
    (TOWER + r"head\.layernorm" + LINEAR, r"attn_pool.norm.\1"),
    (TOWER + r"head\.mlp\.(fc[12])" + LINEAR, r"attn_pool.mlp.\1.\2"),
    (r"classifier" + LINEAR, r"head.\1"),
    *_layers(
        TOWER,
        (
            (r"self_attn\.([qkv])_proj" + LINEAR, r"attn.qkv.\3[\2]"),
            (r"self_attn\.out_proj" + LINEAR, r"attn.proj.\2"),
            (r"layer_norm([12])" + LINEAR, r"norm\2.\3"),
            (r"mlp\.(fc[12])" + LINEAR, r"mlp.\2.\3"),
        ),
    ),
)
