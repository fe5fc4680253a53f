"""A tiny model with random weights of every architecture that transformers lists as a causal language model."""

import inspect

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

V = 60  # tokens that prompts and responses have; those of images and padding come after them
SIZE = 64
NAMES = sorted(CLASSES)

# What configs call their sizes. Windows, chunks and blocks are shorter than the rows of the test.
HEADS = dict.fromkeys(
    "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads mamba_n_heads mamba_num_heads linear_num_heads "
    "linear_num_value_heads".split(),
    4,
)
WIDTHS = dict.fromkeys(
    "hidden_size n_embd d_model dim dim_model emb_dim embed_dim embedding_size word_embed_proj_dim lru_width "
    "attention_hidden_size moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size image_size".split(),
    32,
)
INNER = dict.fromkeys("intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dff d_inner dim_ff".split(), 64)
LAYERS = dict.fromkeys(
    "num_hidden_layers num_layers n_layer n_layers depth decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers".split(),
    2,
)
EXPERTS = dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts".split(), 4)
POSITIONS = dict.fromkeys("max_position_embeddings n_positions n_ctx max_seq_len context_length".split(), 128)
TWO = dict.fromkeys(
    "num_key_value_heads num_experts_per_tok top_k_experts moe_top_k moe_topk moe_k num_experts_per_token zero_expert_num "
    "linear_num_key_heads index_n_heads index_topk_blocks".split(),
    2,
)
ONE = dict.fromkeys(
    "first_k_dense_replace n_group topk_group num_expert_group o_groups n_groups mamba_n_groups mamba_ngroups "
    "num_random_blocks".split(),
    1,
)
EIGHT = dict.fromkeys(
    "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim "
    "index_head_dim state_size mamba_d_state ssm_state_size mamba_chunk_size chunk_size block_size sliding_window "
    "attention_window_size attention_window window_size hidden_size_per_layer_input".split(),
    8,
)
SIXTEEN = dict.fromkeys(
    "q_lora_rank kv_lora_rank o_lora_rank qk_head_dim mamba_d_head mamba_head_dim attention_chunk_size patch_size".split(), 16
)
SMALL = {
    **HEADS,
    **WIDTHS,
    **INNER,
    **LAYERS,
    **EXPERTS,
    **POSITIONS,
    **TWO,
    **ONE,
    **EIGHT,
    **SIXTEEN,
    "ffn_hidden_size": 64,
    "vocab_size": SIZE,
    "vocab_size_per_layer_input": SIZE,
    "mamba_dt_rank": 4,
    "time_step_rank": 4,
    "rotary_dim": 4,
    "index_block_size": 4,
    "index_topk": 128,  # beyond it tokens of equal scores are taken by their place, which another length of row changes
    "eos_token_id": 0,
}
SPECIAL = "pad_token_id bos_token_id decoder_start_token_id image_token_id video_token_id audio_token_id".split()

HYBRID = dict(
    num_hidden_layers=4,
    layers_block_type=["linear_attention", "hybrid"] * 2,
    attention_hidden_size=64,
    attention_head_dim=16,
    num_key_value_heads=4,
)
GEMMA_3N = dict(
    num_hidden_layers=4,
    num_kv_shared_layers=2,
    layer_types=["sliding_attention", "full_attention"] * 2,
    activation_sparsity_pattern=[0.0] * 4,
    intermediate_size=[64] * 4,
    laurel_rank=8,
    altup_num_inputs=2,
)
GEMMA_4 = dict(num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, global_head_dim=16)
INKLING = dict(
    swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, sliding_window_size=8, d_rel=4, rel_extent=64
)
DOTS_3 = dict(
    num_key_value_heads=4,
    n_shared_experts=1,
    shared_experts_intermediate_size=32,
    head_dim=16,
    per_layer_config={},
    num_hidden_layers=3,
    layer_types=["indexed_attention", "sliding_attention", "indexed_attention"],
    mlp_layer_types=["dense", "sparse", "sparse"],
)
QWEN_4 = dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=128, indexer_compress_ratio=2)
DECODERS = (
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta roberta-prelayernorm "
    "roc_bert roformer xlm-roberta xlm-roberta-xl xmod"
).split()
LATENT = (
    "axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa kimi_linear longcat_flash "
    "minicpm3 youtu"
).split()
OTHERWISE = {
    "bamba": dict(attn_layer_indices=[1]),
    "blt": dict(
        encoder_hash_byte_group_vocab=50,
        encoder_hash_byte_group_size=[3, 4],
        patch_size=4,
        **{f"{part}_config": dict(hidden_size=32, head_dim=8) for part in ("patcher", "global")},
        **{f"{part}_config": dict(hidden_size=32, head_dim=8, hidden_size_global=32) for part in ("encoder", "decoder")},
    ),
    "cohere_compass_text": dict(
        rope_parameters={kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")},
        layer_types=["full_attention", "sliding_attention"],
    ),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=1e4),
        ffn_config=dict(ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2),
    ),
    "deepseek_v4": dict(
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}, num_key_value_heads=1
    ),
    "dots3_note": dict(
        text_config=DOTS_3,
        vision_config=dict(adapter_in_dim=32, adapter_out_dim=32),
        audio_config=dict(adapter_input_size=32, adapter_out_dim=32),
    ),
    "dots3_note_text": DOTS_3,
    "dots1": dict(n_shared_experts=1),
    "falcon_h1": dict(mamba_d_ssm=64),
    "gemma3n_text": GEMMA_3N,
    "gemma4": dict(text_config=GEMMA_4, vision_config=dict(hidden_size=32, position_embedding_size=16)),
    "gemma4_text": GEMMA_4,
    "gemma4_unified": dict(text_config=GEMMA_4),
    "gemma4_unified_text": GEMMA_4,
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "inkling2_text": INKLING,
    "inkling_text": INKLING,
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    "lfm2_moe": dict(num_dense_layers=1, num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"]),
    "mamba2": dict(num_heads=8, head_dim=8),
    "opt": dict(word_embed_proj_dim=16, do_layer_norm_before=False),
    "qwen4_exp": dict(text_config=QWEN_4),
    "qwen4_exp_text": QWEN_4,
    "recurrent_gemma": dict(block_types=["recurrent", "attention"]),
    "reformer": dict(
        is_decoder=True,
        axial_pos_embds=False,
        attn_layers=["local", "lsh"],
        lsh_attn_chunk_length=4,
        local_attn_chunk_length=4,
        attention_head_size=8,
        feed_forward_size=64,
        num_buckets=2,
        hash_seed=0,
        num_hidden_layers=None,
    ),
    "roc_bert": dict(pronunciation_embed_dim=8, shape_embed_dim=8, pronunciation_vocab_size=SIZE, shape_vocab_size=SIZE),
    "xlm": dict(causal=True),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(attn_layer_period=2, attn_layer_offset=1, **HYBRID),
    "zamba2": dict(kv_channels=8, mamba_headdim=16, n_mamba_heads=4, hybrid_layer_ids=[1, 3], adapter_rank=4, **HYBRID),
    "zaya": dict(num_experts_per_tok=1, router_hidden_size=16),
}
for _name in DECODERS:
    OTHERWISE[_name] = {**OTHERWISE.get(_name, {}), "is_decoder": True}
for _name in LATENT:
    OTHERWISE[_name] = {**OTHERWISE.get(_name, {}), "num_key_value_heads": 4}


def small(config_class):
    """Arguments that make a config small, with each kind of layer that its default has once, and its parts' likewise."""
    default = config_class()
    known = set(vars(default)) | set(inspect.signature(config_class.__init__).parameters)
    values = {name: size for name, size in SMALL.items() if name in known}
    for name in SPECIAL:
        token = getattr(default, name, None)
        if name in known and isinstance(token, int) and not 0 <= token < SIZE:
            values[name] = SIZE - 1
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or []))
    if "layer_types" in known and len(kinds) > 1:
        values["layer_types"] = kinds
        values["num_hidden_layers" if "num_hidden_layers" in known else "num_layers"] = len(kinds)
    if "mlp_layer_types" in known and getattr(default, "mlp_layer_types", None):
        values["mlp_layer_types"] = (list(dict.fromkeys(default.mlp_layer_types)) * 4)[: max(2, len(kinds))]
    for name, part in (getattr(config_class, "sub_configs", None) or {}).items():
        if part.__name__ != "AutoConfig":
            values[name] = small(part)
        elif getattr(default, name, None) is not None:
            part = type(getattr(default, name))
            values[name] = {**small(part), "model_type": part.model_type}
    return values


def merged(values, others):
    """With other values, part by part; None leaves one out."""
    result = dict(values)
    for name, value in others.items():
        result[name] = merged(values[name], value) if isinstance(value, dict) and isinstance(values.get(name), dict) else value
    return {name: value for name, value in result.items() if value is not None}


def config_of(name, **others):
    config_class, model_class = CONFIG_MAPPING[name], getattr(transformers, CLASSES[name])
    config = config_class(**merged(small(config_class), {**OTHERWISE.get(name, {}), **others}))
    if isinstance(config, model_class.config_class):
        return config
    parts = (getattr(config, part) for part in config.sub_configs)
    return next((part for part in parts if isinstance(part, model_class.config_class)), config)


def build(name, seed=0, noise=True, **others):
    """A model whose distributions are far from uniform, with no weight at a value, 0 or 1, that could hide a fault.

    Without `noise` as transformers makes it; `others` are arguments of its config.
    """
    torch.manual_seed(seed)
    model = getattr(transformers, CLASSES[name])(config_of(name, **others)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.isfinite().all():
                parameter.zero_()  # left empty by transformers
            if noise and parameter.is_floating_point():
                parameter.mul_(2 if parameter.ndim > 1 else 1).add_(0.3 * torch.randn_like(parameter))
    return model
