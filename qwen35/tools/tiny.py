"""The tiny recipe's model and data, made without a download: `python -m qwen35.tools.tiny`.

A random Qwen3.5-MoE vision-language checkpoint of 1.3 M parameters in the published layout, with
tokenizer and processors, and the handwritten digits of assets/digits as LLaVA records, every fifth
of them for validation.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.hf_read import HFFolder
from qwen35.checkpoint.hf_write import write_hf
from qwen35.console import outlive_readers
from qwen35.errors import USER_ERRORS, Parser, complain
from qwen35.model import Qwen35

ASSETS = Path(__file__).parents[2] / "assets"
MODEL_DIR, DIGITS_DIR = Path("ckpt/hf_path/tiny"), Path("data/digits")
TILE, COLUMNS = 8, 64  # a digit's width and height in pixels, digits in a row of assets/digits/digits.png
VALIDATION_STRIDE = 5  # every fifth record is for validation
QUESTION = "<image>\nWhich digit is this?"

# the published control tokens, in the order of their ids
CONTROL_TOKENS = """
    <|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|>
    <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> <tool_call> </tool_call>
    <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> </tool_response>
    <think> </think> <|audio_start|> <|audio_end|> <tts_pad> <tts_text_bos> <tts_text_eod> <tts_text_bos_single> <|audio_pad|>
""".split()
NOT_SPECIAL = {
    name for name in CONTROL_TOKENS if name.strip("</>").startswith(("tool_", "think", "|fim", "|repo", "|file"))
}
# The published vocabulary has 248,044 entries. This one has the 256 bytes and the prefixes of these
# words, where Ġ is a space and Ċ a newline, as in every byte-level vocabulary.
WORDS = ("user", "assistant", "system", "Which", "Ġdigit", "Ġis", "Ġthis", "ĊĊ")
SPLIT = (  # pretokenize_regex of the published tokenizer_config.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def make_tokenizer() -> Tokenizer:
    """Byte-level, with the published split and control tokens, whose ids follow the vocabulary."""
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        merges += [(word[:i], word[i]) for i in range(1, len(word)) if (word[:i], word[i]) not in merges]
    entries = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    tokenizer = Tokenizer(BPE({entry: i for i, entry in enumerate(entries)}, merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(n, normalized=False, special=n not in NOT_SPECIAL) for n in CONTROL_TOKENS])
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {tokenizer.token_to_id(n): {"content": n, **plain, "special": n not in NOT_SPECIAL} for n in CONTROL_TOKENS}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": CONTROL_TOKENS[1:14],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "extra_special_tokens": {
            "audio_bos_token": "<|audio_start|>",
            "audio_eos_token": "<|audio_end|>",
            "audio_token": "<|audio_pad|>",
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        },
        "model_max_length": 262144,
        "pad_token": "<|endoftext|>",
        "pretokenize_regex": SPLIT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def model_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json with every field of the published 35B-A3B, for a tiny model."""
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "full_attention_interval": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 96,
        "initializer_range": 0.05,  # with the published 0.02 so small a model starts to learn only after hundreds of steps
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_value_head_dim": 32,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": 64,
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 64,
        "use_cache": True,
        "vocab_size": 352,  # a few more than there are tokens, as published
        "mamba_ssm_dtype": "float32",
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
            "rope_type": "default",
            "rope_theta": 10000,
            "partial_rotary_factor": 0.25,
        },
    }
    vision = {
        "deepstack_visual_indexes": [],
        "depth": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 96,
        "in_channels": 3,
        "initializer_range": 0.05,
        "intermediate_size": 192,
        "model_type": "qwen3_5_moe",
        "num_heads": 4,
        "num_position_embeddings": 16,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "model_type": "qwen3_5_moe",
        "text_config": text,
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "vision_config": vision,
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
    }


def processor_config(kind: str, name: str, longest: int, shortest: int) -> dict[str, Any]:
    """preprocessor_config.json as published, but for the limits of an image's size, mean and std.

    The mean fits the digits, a third of which is ink. Over six seeds 352 to 358 of 360 answers were
    right; with the published mean and std of 0.5, 351 to 355.
    """
    return {
        "size": {"longest_edge": longest, "shortest_edge": shortest},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.3, 0.3, 0.3],
        "image_std": [1.0, 1.0, 1.0],
        "processor_class": "Qwen3VLProcessor",
        kind: name,
    }


def small_files() -> dict[str, str]:
    """Name -> content of every file but the weights."""
    tokenizer = make_tokenizer()
    ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    files: dict[str, Any] = {
        "config.json": model_config(tokenizer),
        "tokenizer_config.json": tokenizer_config(tokenizer),
        "preprocessor_config.json": processor_config("image_processor_type", "Qwen2VLImageProcessorFast", 262144, 1024),
        "video_preprocessor_config.json": processor_config(
            "video_processor_type", "Qwen3VLVideoProcessor", 25165824, 4096
        ),
        "generation_config.json": {"bos_token_id": ends[1], "eos_token_id": ends, "pad_token_id": ends[1]},
    }
    return {
        **{name: json.dumps(content, indent=2, ensure_ascii=False) + "\n" for name, content in files.items()},
        "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        "chat_template.jinja": (ASSETS / "chat_template.jinja").read_text(encoding="utf-8"),
    }


def make_model(folder: Path = MODEL_DIR, seed: int = 0, force: bool = False) -> bool:
    """Write the checkpoint folder, the same bytes for the same seed. False if it exists already.

    It exists if its weights are complete and every other file is as it would be written: the model
    of an older version is replaced. Raises CheckpointError if something else is in the folder.
    """
    files = small_files()
    if not force and _is_there(folder, files):
        return False
    config = json.loads(files["config.json"])
    write_hf(Qwen35.from_config(config, seed, mtp=True).state_dict(), config, folder, texts=files)
    return True


def _is_there(folder: Path, files: dict[str, str]) -> bool:
    try:
        HFFolder(folder)
        return all((folder / name).read_text(encoding="utf-8") == content for name, content in files.items())
    except (CheckpointError, OSError):
        return False


def make_digits(folder: Path = DIGITS_DIR, force: bool = False) -> bool:
    """Write images, records, source and licence of the digits. False if they exist already."""
    source = ASSETS / "digits"
    labels = (source / "labels.txt").read_text(encoding="ascii").replace("\n", "")
    names = [f"images/{i:04}.png" for i in range(len(labels))]
    records = [_record(name, label) for name, label in zip(names, labels, strict=True)]
    texts = {
        "README.md": (source / "README.md").read_text(encoding="utf-8"),
        "train.json": _json_list([r for i, r in enumerate(records) if i % VALIDATION_STRIDE]),
        "heldout.json": _json_list(records[::VALIDATION_STRIDE]),
    }
    if not force and all((folder / name).is_file() for name in names):
        found = [(folder / name).read_text(encoding="utf-8") if (folder / name).is_file() else None for name in texts]
        if found == list(texts.values()):
            return False
    shutil.rmtree(folder / "images", ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    with Image.open(source / "digits.png") as sheet:
        for i, name in enumerate(names):
            row, column = divmod(i, COLUMNS)
            left, top = column * TILE, row * TILE
            sheet.crop((left, top, left + TILE, top + TILE)).save(folder / name)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return True


def _record(image: str, label: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": label}]
    return {"id": Path(image).stem, "image": image, "conversations": turns}


def _json_list(records: list[dict[str, Any]]) -> str:
    return "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n"


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m qwen35.tools.tiny", description=__doc__)
    parser.add_argument("--force", action="store_true", help="make model and data anew even if they exist")
    force = parser.parse_args(arguments).force
    try:
        for folder, made in ((MODEL_DIR, make_model(force=force)), (DIGITS_DIR, make_digits(force=force))):
            print(f"{folder}: {'made' if made else 'exists already'}")
    except USER_ERRORS as error:
        return complain(error)
    return 0


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
