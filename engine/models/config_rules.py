"""What of a configuration is read, what may be ignored, and what is neither: that is named in a warning.

A field that changes sizes, positions, tokens or precision is read, or refused where it is read, or it appears here by
its name. The list of harmless fields is explicit, so a field that nobody has thought of is never one of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from engine.models.config_fields import bad_field, shown
from engine.models.families import Family


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_READ = _names(
    "architectures model_type num_hidden_layers hidden_size num_attention_heads num_key_value_heads head_dim "
    "intermediate_size vocab_size max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters "
    "rope_scaling rope_theta partial_rotary_factor original_max_position_embeddings quantization_config layer_types "
    "attn_logit_softcapping final_logit_softcapping use_bidirectional_attention eos_token_id bos_token_id"
)
#: Names, training, and how transformers itself runs; the dtype is a knob of the engine.
_HARMLESS = _names(
    "_name_or_path name transformers_version torch_dtype dtype use_cache cache_implementation auto_map "
    "custom_pipelines "
    "initializer_range initializer_factor pretraining_tp gradient_checkpointing finetuning_task tokenizer_class "
    "attention_dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob resid_pdrop "
    "embd_pdrop attn_pdrop "
    "resid_dropout embed_dropout dropout classifier_dropout router_aux_loss_coef router_jitter_noise "
    "output_router_logits output_attentions output_hidden_states return_dict use_return_dict torchscript "
    "id2label label2id num_labels problem_type task_specific_params chunk_size_feed_forward is_decoder prefix "
    "pad_token_id sep_token_id unk_token_id decoder_start_token_id attn_implementation _attn_implementation "
    "_attn_implementation_autoset _attn_implementation_internal use_flash_attn unsloth_version unsloth_fixed "
    "transformers.js_config _commit_hash _from_model_config model_max_length "
    # settings of generation in old files, which a request states
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p "
    "typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
    "num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens"
)
#: Switches of parts that are not computed: off, they say what is done anyway.
_SWITCHES = _names(
    "is_encoder_decoder add_cross_attention tie_encoder_decoder pruned_heads cross_attention_hidden_size "
    "tf_legacy_loss "
    "use_bfloat16 attention_bias mlp_bias use_sliding_window use_mrope use_qk_norm qk_layernorm use_parallel_residual "
    "rope_interleaved"
)
_ROPE_READ = _names("rope_type type rope_theta partial_rotary_factor original_max_position_embeddings")
_ROPE_OF_KIND: Mapping[str, frozenset[str]] = {
    "linear": _names("factor"),
    "dynamic": _names("factor"),
    "llama3": _names("factor low_freq_factor high_freq_factor"),
    "yarn": _names("factor attention_factor beta_fast beta_slow truncate mscale mscale_all_dim"),
    "longrope": _names("factor attention_factor short_factor long_factor"),
}
_ROPE_OF_KIND = {**_ROPE_OF_KIND, "su": _ROPE_OF_KIND["longrope"]}
_LAYER_KINDS = ("full_attention", "sliding_attention")
_NAMED = 5  # tensors or fields of a warning
_HARMLESS_TENSORS = (".rotary_emb.inv_freq", ".attn_rot_embd", ".attn.bias", ".attn.masked_bias")


def config_warnings(stated: Mapping[str, Any], family: Family) -> tuple[str, ...]:
    """A sentence for every field of a ``config.json`` that is set and not followed.

    Raises:
        ModelLoadError: if the layers are of a kind that is not computed.
    """
    _refuse_other_layers(stated, family)
    read = fields_read(family)
    activation = stated.get(family.activation)
    ignored = [
        field
        for field, value in stated.items()
        if value is not None
        and field not in read
        and field not in _HARMLESS
        and not (field in _SWITCHES and not value)
        and not (field == "hidden_act" and value == activation)
    ]
    rope = _rope_fields_ignored(stated)
    return tuple(
        f"config.json: {field} = {shown(value)} is not followed: {family.name} is computed without it."
        for field, value in [*((field, stated[field]) for field in ignored), *rope]
    )


def fields_read(family: Family) -> frozenset[str]:
    """The fields that decide how a model of the family is computed."""
    fields = set(_READ) | {family.activation}
    if family.biases in ("config", "attention"):
        fields.add("attention_bias")
    if family.biases == "config":
        fields.add("mlp_bias")
    if family.windows is not None:
        fields.add("sliding_window")
        fields |= {"use_sliding_window"} if family.windows.switched else set()
        # transformers writes it into files of families that read it under the switch alone
        fields |= {"max_window_layers"} if family.windows.after_full_layers or family.windows.switched else set()
        fields |= {"sliding_window_pattern", "_sliding_window_pattern"} if family.windows.patterned else set()
    if family.attention_scalar is not None:
        fields.add(family.attention_scalar)
    if family.local_rope:
        fields.add("rope_local_base_freq")
    if family.mixture is not None:
        fields |= {*family.mixture.num_experts, family.mixture.expert_width, "num_experts_per_tok"}
        fields |= {family.mixture.normalizes} if family.mixture.normalizes else set()
        fields |= {"decoder_sparse_step", "mlp_only_layers"} if family.mixture.placed else set()
    return frozenset(fields)


def tensor_warning(unused: Iterable[str]) -> tuple[str, ...]:
    """A sentence that names tensors which the decoder has no use for; none if there are none of weight."""
    names = sorted(name for name in unused if not name.removesuffix(".weight").endswith(_HARMLESS_TENSORS))
    if not names:
        return ()
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    listed = ", ".join(name[:100] for name in names[:_NAMED])
    verb = "tensor of the checkpoint is" if len(names) == 1 else "tensors of the checkpoint are"
    return (f"{len(names):,} {verb} not used: {listed}{more}.",)


def unknown_to(stated: Mapping[str, Any], known: Collection[str], name: str) -> tuple[str, ...]:
    """A sentence for every field that transformers' own class for the model does not know either."""
    return tuple(
        f"config.json: {field} = {shown(value)} is not followed: transformers' {name} does not know it."
        for field, value in stated.items()
        if value is not None and field not in known and field not in _READ and field not in _HARMLESS
        if not (field in _SWITCHES and not value)
    )


def _refuse_other_layers(stated: Mapping[str, Any], family: Family) -> None:
    kinds = stated.get("layer_types")
    if not isinstance(kinds, list):
        return  # what is no list is refused where it is read
    known = _LAYER_KINDS if family.windows is not None else _LAYER_KINDS[:1]
    for kind in kinds:
        if kind not in known:
            raise bad_field("layer_types", f"layers of kind {shown(kind)} are not part of {family.name}")


def _rope_fields_ignored(stated: Mapping[str, Any]) -> list[tuple[str, Any]]:
    ignored = []
    for outer in ("rope_parameters", "rope_scaling"):
        fields = stated.get(outer)
        if not isinstance(fields, Mapping):
            continue
        nested = [part for part in fields.values() if isinstance(part, Mapping)]
        for part in nested or [fields]:
            kind = str(part.get("rope_type") or part.get("type") or "default")
            read = _ROPE_READ | _ROPE_OF_KIND.get(kind, frozenset())
            ignored += [
                (f"{outer}.{key}", value) for key, value in part.items() if key not in read and value is not None
            ]
    return ignored
