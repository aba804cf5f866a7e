"""Fields of a ``config.json`` that change neither parameters nor memory, whatever they say: named one by one, so that
anything else that is not read can be warned of."""

from __future__ import annotations

#: What a checkpoint is called, made with and classified as.
_NAMES = (
    "architectures", "auto_map", "custom_pipelines", "finetuning_task", "library_name", "model_name", "model_type",
    "name", "name_or_path", "problem_type", "task_specific_params", "tokenizer_class", "transformers_version",
    "torchscript", "unsloth_fixed", "unsloth_version", "id2label", "label2id", "num_labels", "prefix", "language",
    "languages", "license", "base_model_name_or_path",
)  # fmt: skip

#: Numbers of tokens.
_TOKENS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id",
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens",
    "suppress_tokens", "bad_words_ids", "add_cross_attention", "image_token_id", "image_token_index",
    "boi_token_index", "eoi_token_index", "boi_token_id", "eoi_token_id", "video_token_id", "vision_start_token_id",
    "vision_end_token_id", "vision_token_id", "audio_token_id", "audio_start_token_id", "audio_end_token_id",
    "boa_token_id", "eoa_token_id", "eoa_token_index", "image_end_token_id", "image_start_token_id",
    "mm_tokens_per_image", "vision_soft_tokens_per_image", "media_placeholder_token_id", "spatial_merge_token_id",
)  # fmt: skip

#: Of training alone.
_TRAINING = (
    "attention_dropout", "attn_dropout", "attn_pdrop", "classifier_dropout", "embd_pdrop", "embd_layer", "dropout",
    "hidden_dropout", "resid_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob", "residual_dropout",
    "embedding_dropout", "ffn_dropout", "moe_dropout", "layerdrop", "initializer_range", "initializer_factor",
    "initializer_cutoff_factor", "init_std", "init_method", "rescale_prenorm_residual", "aux_loss_alpha",
    "router_aux_loss_coef", "router_z_loss_coef", "output_router_logits", "seq_aux", "router_jitter_noise",
    "input_jitter_noise", "pretraining_tp", "gradient_checkpointing", "use_flash_attn", "use_flash_attention",
    "flash_attn", "attn_implementation", "fused_ops", "use_mamba_kernels", "is_training", "finetune",
    "train_from_scratch", "pretraining_length", "z_loss_weight", "zloss", "load_balance_coeff", "use_bfloat16",
    "bf16", "fp16", "fp32", "fp8_training", "freeze_vision", "mtp_loss_scaling_factor", "use_deterministic_attn",
    "ep_size", "moe_router_dtype", "router_dtype",
)  # fmt: skip

#: What is computed, with the same tensors: activations, scales, thresholds, routing, angles, generation.
_COMPUTING = (
    "activation", "activation_function", "hidden_act", "hidden_activation", "mlp_hidden_act", "mamba_hidden_act",
    "act_fn", "activation_fn", "layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "norm_eps", "norm_epsilon",
    "epsilon", "layernorm_epsilon", "rmsnorm_eps", "mup_enabled", "attention_multiplier", "embedding_multiplier",
    "residual_multiplier", "logits_scaling", "logit_scale", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping", "attention_softmax_in_fp32", "router_logit_softcapping", "rope_theta",
    "rope_local_base_freq", "global_rope_theta", "local_rope_theta", "rotary_emb_base", "rope_interleave",
    "rope_interleaved", "rope_type", "position_embedding_type", "order_of_interleaved_layers", "rotary_pct",
    "rope_pct", "rope_ratio", "original_max_position_embeddings", "normalization_function", "norm_type",
    "scale_embedding", "norm_topk_prob", "n_group", "topk_group", "routed_scaling_factor", "scoring_func",
    "topk_method", "moe_router_topk_scaling_factor", "moe_shared_expert_overlap", "router_scale", "sparsemixer",
    "scaling_factor", "moe_routed_scaling_factor", "use_grouped_topk", "num_expert_group", "num_expert_groups",
    "num_logits_to_keep", "logits_to_keep", "residual_in_fp32", "residual_dtype", "attn_scale", "floor_scale",
    "attn_temperature_tuning", "swiglu_limit", "swiglu_alpha", "chunk_size", "mamba_chunk_size", "time_step_floor",
    "time_step_max", "time_step_min", "time_step_limit", "time_step_rank", "mamba_dt_limit", "mamba_dt_min",
    "mamba_dt_max", "mamba_dt_init_floor", "output_gate_type", "cache_implementation", "use_cache", "is_decoder",
    "is_encoder_decoder", "cross_attention_hidden_size", "encoder_no_repeat_ngram_size", "output_attentions",
    "output_hidden_states", "output_scores", "output_past", "return_dict", "return_dict_in_generate",
    "chunk_size_feed_forward", "pruned_heads", "tie_encoder_decoder", "use_return_dict", "remove_invalid_values",
    "exponential_decay_length_penalty", "repetition_penalty", "no_repeat_ngram_size", "num_beams", "num_beam_groups",
    "num_return_sequences", "diversity_penalty", "length_penalty", "do_sample", "early_stopping", "max_length",
    "min_length", "max_new_tokens", "temperature", "top_k", "top_p", "typical_p", "tf_legacy_loss",
    "model_max_length", "max_sequence_length", "seq_length", "max_seq_len", "sliding_window_size_training",
    "use_gated_activation", "use_gemm_moe", "hybrid_chunk", "indexer_rope_interleave", "use_mm_token_type_ids",
)  # fmt: skip

#: Names of such fields.
HARMLESS = frozenset((*_NAMES, *_TOKENS, *_TRAINING, *_COMPUTING))
#: And what such fields' names may end with.
HARMLESS_ENDINGS = ("_token_id", "_token_ids", "_token_index", "_dropout", "_pdrop", "_loss_coef", "_loss_weight")
