"""A model folder's generation_config.json: how tokens are sampled, which tokens end an answer."""

import argparse
from pathlib import Path
from typing import Any

import torch

from qwen35.config.load import SettingError
from qwen35.data.files import read_config
from qwen35.data.serving import GENERATION_CONFIG, MODEL_CONFIG, stop_tokens
from qwen35.data.tokenizer import ChatTokenizer
from qwen35.errors import Parser, whole_number
from qwen35.inference.sampling import Sampling

FILE = GENERATION_CONFIG
NUMBERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")
SAMPLING_ONLY = NUMBERS[:4]  # without effect in greedy decoding; the penalties apply there too
TYPES = dict.fromkeys(NUMBERS, ((int, float), "a number")) | {
    "top_k": ((int,), "a whole number"),
    "max_new_tokens": ((int,), "a whole number from 1"),
    "do_sample": ((bool,), "true or false"),
}
USED = {"eos_token_id", *TYPES}
HARMLESS = set(
    "bos_token_id pad_token_id decoder_start_token_id "  # the template writes whole prompts; no padding
    "transformers_version _from_model_config _commit_hash "  # origin of the file
    "use_cache cache_implementation cache_config max_cache_len low_memory prefill_chunk_size "  # memory
    "compile_config disable_compile continuous_batching_config use_mtp "  # speed
    "is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold "  # speed
    "assistant_lookbehind target_lookbehind "
    "output_attentions output_hidden_states output_scores output_logits return_dict_in_generate "  # return values
    "early_stopping length_penalty num_beam_groups diversity_penalty "  # beam search, which num_beams refuses
    "max_length".split()  # superseded by max_new_tokens
)
# not implemented; accepted at the value that has no effect
NEUTRAL = {
    **dict.fromkeys(("num_beams", "num_return_sequences", "typical_p"), 1),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale"), 1),
    **dict.fromkeys(("min_length", "min_new_tokens", "epsilon_cutoff", "eta_cutoff", "frequency_penalty"), 0),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("remove_invalid_values", "renormalize_logits", "token_healing"), False),
}


def read_generation_config(folder: str | Path) -> dict[str, Any]:
    """The file's values without nulls, {} without a file.

    Raises SettingError, also for a value that may change the answers and is not implemented.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return {}
    config = {name: value for name, value in read_config(folder, FILE).items() if value is not None}
    for name, value in config.items():
        shown = f"{path}: {name}: {str(value)[:80]}"
        if name not in USED | HARMLESS and (name not in NEUTRAL or value != NEUTRAL[name]):
            raise SettingError(f"{shown} may change the answers, and is not implemented; remove it from the file")
        types, what = TYPES.get(name, ((type(value),), ""))
        if type(value) not in types or (name == "max_new_tokens" and value < 1):
            raise SettingError(f"{shown} is not {what}")
    if config.get("top_k", 1) in (0, -1):  # no limit: 0 in transformers, -1 in vLLM
        del config["top_k"]
    try:
        Sampling(**{name: config[name] for name in NUMBERS if name in config})
    except SettingError as error:
        raise SettingError(f"{path}: {error}") from None
    return config


def greedy_sampling(config: dict[str, Any]) -> Sampling:
    """Greedy decoding with the file's penalties, which transformers and vLLM apply to it too."""
    return Sampling(**{name: config[name] for name in NUMBERS if name in config and name not in SAMPLING_ONLY})


def add_sampling(parser: Parser, drawn: str) -> None:
    """drawn: the condition under which tokens are sampled without --temperature."""
    add, default = parser.add_argument, f"default: the model's {FILE}, else"
    temperature = f"0: take the likeliest token; default: that of the model's {FILE}, or 1, {drawn}; else 0"
    add("--temperature", type=float, help=temperature)
    add("--top_k", type=whole_number(0), help=f"sample from the k likeliest tokens, 0: from all; {default} all")
    add("--top_p", type=float, help=f"sample from the likeliest tokens with this total probability; {default} 1")
    min_p = f"sample from tokens with at least this share of the likeliest token's probability; {default} 0"
    add("--min_p", type=float, help=min_p)
    add("--repetition_penalty", type=float, help=f"divides the logits of tokens in prompt and answer; {default} 1")
    add("--presence_penalty", type=float, help=f"is subtracted from the logits of tokens in the answer; {default} 0")
    add("--seed", type=int, help="seed of the sampling; default: a new one each time, which is printed")


def sampling_of(args: argparse.Namespace, config: dict[str, Any], drawn: bool) -> Sampling:
    """Options, else the file's values; drawn: whether its do_sample counts. Raises SettingError."""
    given = {name: getattr(args, name) for name in NUMBERS if getattr(args, name) is not None}
    values = {name: config[name] for name in NUMBERS if name in config} | given
    if "temperature" not in given:
        values["temperature"] = values.get("temperature", 1.0) if drawn and config.get("do_sample") else 0.0
    if values["temperature"] == 0:
        for name in SAMPLING_ONLY[1:]:
            if name in given:
                raise SettingError(f"--{name} means nothing where the likeliest token is taken; give a --temperature")
            values.pop(name, None)
    values["top_k"] = values.get("top_k") or None
    seed = torch.Generator().seed() % 2**32 if args.seed is None else args.seed
    return Sampling(**values, seed=seed)


def stop_ids(folder: str | Path, tokenizer: ChatTokenizer) -> set[int]:
    """The tokens that end an answer: `<|im_end|>`, the pad token, the eos tokens of both configs.

    The published config.json names `<|endoftext|>` alone, which ends no chat turn, and some sizes
    have no generation_config.json. Raises SettingError.
    """
    ends = {tokenizer.im_end_id, tokenizer.pad_id}
    return ends | stop_tokens(folder, MODEL_CONFIG) | stop_tokens(folder, GENERATION_CONFIG)
