"""Classifies every key of a config.json: used, harmless, fixed to one value, refused, or unknown.

Keys mean what transformers 5.23 reads of them (configuration_qwen3_5.py,
configuration_qwen3_5_moe.py and their modeling files). A null value counts as absent. An unknown
key is an error if it looks like an instruction about the computation: its value is an object, or
its name contains a part or an operation of a model (COMPUTATION). Other unknown keys are reported.
"""

import re
import reprlib
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from qwen35.config.layout import TEXT_ONLY, text_section
from qwen35.errors import UserError

TEXT, VISION = "text_config.", "vision_config."
ROPE_KEYS = ("rope_parameters", "rope_scaling")
FAMILY = ("qwen3_5", "qwen3_5_moe")  # with a vision tower; TEXT_ONLY names those without
YARN = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")

USED = {
    "": "model_type text_config vision_config tie_word_embeddings image_token_id video_token_id",
    TEXT: """vocab_size hidden_size layer_types num_hidden_layers full_attention_interval num_attention_heads
        num_key_value_heads head_dim linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim
        linear_conv_kernel_dim rms_norm_eps rope_parameters rope_scaling rope_theta partial_rotary_factor
        original_max_position_embeddings initializer_range intermediate_size num_experts num_experts_per_tok
        moe_intermediate_size shared_expert_intermediate_size mtp_num_hidden_layers tie_word_embeddings""",
    VISION: """depth hidden_size intermediate_size num_heads in_channels patch_size temporal_patch_size spatial_merge_size
        num_position_embeddings out_hidden_size rope_parameters rope_scaling""",
    f"{TEXT}rope": "rope_theta partial_rotary_factor mrope_section",
    f"{TEXT}yarn": f"rope_theta partial_rotary_factor mrope_section original_max_position_embeddings {' '.join(YARN)}",
    f"{VISION}rope": "",
}
ROPE_TYPES = ("default", "yarn")
OF_ROPE: dict[str, tuple[Any, ...]] = {"rope_type": ROPE_TYPES, "type": ROPE_TYPES, "mrope_interleaved": (True,)}
# keys that may only have these values, because the model supports no others
ONLY_VALUE: dict[str, dict[str, tuple[Any, ...]]] = {
    "": {"language_model_only": (False,), "is_encoder_decoder": (False,), "pruned_heads": ({},)},
    TEXT: {
        "model_type": (*(f"{name}_text" for name in FAMILY), *FAMILY), "hidden_act": ("silu",), "attention_bias": (False,),
        "attention_dropout": (0.0,), "attn_output_gate": (True,), "output_gate_type": ("swish", "silu"),
        "norm_topk_prob": (True,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],),
        "mtp_use_dedicated_embeddings": (False,), "use_sliding_window": (False,), "is_encoder_decoder": (False,),
        "pruned_heads": ({},),
    },
    VISION: {
        "model_type": (*(f"{name}_vision" for name in FAMILY), *FAMILY), "hidden_act": ("gelu_pytorch_tanh",),
        "deepstack_visual_indexes": ([],), "rope_theta": (10000,), "is_encoder_decoder": (False,), "pruned_heads": ({},),
    },
    f"{TEXT}rope": OF_ROPE,
    f"{TEXT}yarn": OF_ROPE,
    # transformers 5.2 always uses 10000 in the vision tower, 5.23 what the config says
    f"{VISION}rope": {"rope_type": ("axial", "default"), "type": ("axial", "default"), "rope_theta": (10000,)},
}  # fmt: skip
ADVICE = {  # key of ONLY_VALUE -> what to do about another value, if not to bring another checkpoint
    "language_model_only": f"a model without a vision tower is of model_type {' or '.join(TEXT_ONLY)}, in a flat config.json",
    "attention_dropout": "set it to 0.0",
}
# reason -> keys that do not affect training, at any level
HARMLESS = {
    "they say where the file comes from": """architectures transformers_version name_or_path _name_or_path _commit_hash
        unsloth_fixed unsloth_version""",
    "weights keep the dtype that they are stored in, and training.dtype says what is computed in": "dtype torch_dtype",
    "training keeps no recurrent state from call to call": "mamba_ssm_dtype",
    "they say how transformers runs a model": """use_cache return_dict use_return_dict output_attentions output_hidden_states
        output_router_logits chunk_size_feed_forward attn_implementation _attn_implementation _attn_implementation_autoset
        experts_implementation _experts_implementation torchscript use_bfloat16 tf_legacy_loss gradient_checkpointing
        keys_to_ignore_at_inference""",
    "the tower's weights are loaded, or begin as text_config says": "initializer_range",
    "the recipe's loss_cfg says it": "router_aux_loss_coef",
    "no rope depends on it but YaRN, which takes it where the trained length is not given": "max_position_embeddings",
    "it means nothing without sliding windows": "max_window_layers",
    "the tokenizer and generation_config.json say it": """bos_token_id eos_token_id pad_token_id sep_token_id
        decoder_start_token_id vision_start_token_id vision_end_token_id vision_token_id tokenizer_class prefix""",
    "they are for other tasks and kinds of models": """is_decoder add_cross_attention cross_attention_hidden_size
        tie_encoder_decoder id2label label2id num_labels problem_type finetuning_task task_specific_params""",
    "they are for generation, as releases before 5 saved them": """assistant_confidence_threshold assistant_lookbehind
        bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
        encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty forced_bos_token_id
        forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_assistant_tokens
        num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
        repetition_penalty return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p typical_p""",
}
HARMLESS_KEYS = frozenset(" ".join(HARMLESS.values()).split())
QUANTIZATION = ("quantization_config", "compression_config")
REFUSED = {  # key -> the reason, and what to do
    "auto_map": "it names code of its own, which is never run here; bring the checkpoint in transformers' own form",
    "transformers_weights": "it names another file of weights; name the weights model.safetensors, and take it out",
    "per_layer_config": "layers that differ in more than their type are not supported",
}
COMPUTATION = re.compile(
    r"norm|scal|bias|quant|lora|rope|rotary|attn|attention|window|"
    r"(^|_)(factor|multipl|eps|cap|soft|logit|clip|bit|adapter|peft|slid|chunk|yarn|theta|pos|alibi|mask|sink|att|gate|gating|act|"
    r"expert|moe|mlp|ffn|dense|rout|group|topk|scor|func|head|num|n_|dim|size|length|layer|depth|block|mtp|nextn|dropout|residual|"
    r"skip|embed|hidden|conv|linear|ssm|mamba|delta|kernel|tie|prun|weight|index)"
)


class ConfigError(UserError):
    """A config.json that is not of a Qwen3.5, or needs something the model does not support."""


def shown(value: object) -> str:
    """A value of a file, short enough for a message."""
    text = reprlib.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def refuse_quantized(config: Mapping[str, Any]) -> None:
    """Raises ConfigError if a config declares its weights quantized, whether they are or not."""
    for where, values in _levels(config):
        for key in QUANTIZATION:
            if (found := values.get(key)) is not None:
                names = found if isinstance(found, dict) else {}
                method = names.get("quant_method") or names.get("quant_algo") or names.get("format") or "method unknown"
                raise ConfigError(
                    f"{where}{key} says that the weights are quantized ({shown(method)}), and those cannot be trained; bring "
                    "the bf16 checkpoint, or take the entry out if the weights are bf16 all the same"
                )


def unknown_keys(config: Mapping[str, Any]) -> list[str]:
    """The unknown keys of a config.json. Raises ConfigError on one that the model cannot ignore."""
    unknown, text = [], text_section(config) or {}
    of_text = {*USED[TEXT].split(), *ONLY_VALUE[TEXT]} - {*USED[""].split(), *ONLY_VALUE[""], *HARMLESS_KEYS}
    for where, kind, values in _sections(config):
        only, known = ONLY_VALUE[kind], {*USED[kind].split(), *HARMLESS_KEYS}
        # keys with a fixed value first: their messages are the clearest
        for key, value in sorted(values.items(), key=lambda entry: entry[0] not in only):
            name = f"{where}{key if key.isidentifier() and len(key) <= 80 else shown(key)}"
            if value is None:
                continue
            if key in REFUSED:
                raise ConfigError(f"{name} is {shown(value)}: {REFUSED[key]}")
            if key in only:
                if value not in only[key]:
                    built = " or ".join(map(repr, only[key] if only[key] is ROPE_TYPES else only[key][:1]))
                    advice = ADVICE.get(key, "bring a checkpoint that has it so")
                    raise ConfigError(f"{name} is {shown(value)}; this model does {built} only; {advice}")
            elif not kind and key in of_text:  # may only repeat what text_config says
                if value != text.get(key):
                    raise ConfigError(
                        f"{key} is {shown(value)} at the top level, where it is not read, but {shown(text.get(key))} in "
                        "text_config; set the two alike"
                    )
            elif key not in known:
                if isinstance(value, dict) or COMPUTATION.search(key):
                    raise ConfigError(
                        f"{name} is {shown(value)}, a key that is not known and may change what is computed; take it out if it "
                        "does not"
                    )
                unknown.append(name)
    return unknown


def _levels(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, values in (("", config), (TEXT, config.get("text_config")), (VISION, config.get("vision_config"))):
        if isinstance(values, dict):
            yield where, values


def _sections(config: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(prefix for messages, table of allowed keys, values); rope first, for clear messages."""
    is_flat = config.get("model_type") in TEXT_ONLY
    for where, values in islice(_levels(config), 1 if is_flat else None):
        for name in ROPE_KEYS:
            rope = values.get(name)
            if rope is not None and not isinstance(rope, dict):
                raise ConfigError(f"{where}{name} is {shown(rope)}, not an object")
            if rope:
                is_yarn = where != VISION and rope_type(rope) == "yarn"
                yield f"{where}{name}.", f"{where or TEXT}{'yarn' if is_yarn else 'rope'}", rope
        yield where, TEXT if is_flat else where, values


def rope_type(rope: Mapping[str, Any]) -> object:
    """`type` is the older name."""
    return rope.get("rope_type") or rope.get("type") or "default"
