"""A small model folder: a byte-level BPE tokenizer, the published template and processor."""

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PUBLISHED = Path(__file__).parent / "fixtures" / "templates"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "user assistant system\n\n\n What is in the picture? The answer is a cat and a dog.\n",
    "Hello, how are you? I think that <|im_end|> is not <image> text. <think> because </think>\n\n",
    "描述这张图片。这是一只猫。 12345 67890 \n \n\n",
] * 4


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    added = json.loads((PUBLISHED / "special_tokens.json").read_text())["added_tokens"]
    for _, token in sorted(added.items(), key=lambda item: int(item[0])):
        tokenizer.add_tokens([AddedToken(token["content"], special=token["special"], normalized=False)])
    return tokenizer


def make_model_folder(folder: Path, thinks: bool = True) -> Path:
    """config.json, tokenizer and processor of a tiny model; thinks: the template of 4B and up."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "model_type": "qwen3_5_moe",
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_config": {"num_position_embeddings": 2304, "spatial_merge_size": 2},
    }
    (folder / "config.json").write_text(json.dumps(config))
    names = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    shutil.copy(PUBLISHED / "preprocessor_config.json", folder)
    template = "chat_template.jinja" if thinks else "chat_template_nothink.jinja"
    shutil.copy(PUBLISHED / template, folder / "chat_template.jinja")
    return folder
