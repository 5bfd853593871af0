"""The files of a model folder beside its weights: used, harmless, refused, or unknown and therefore reported."""

import re
from pathlib import Path
from typing import Any

from qwen35.checkpoint.errors import CheckpointError, few
from qwen35.errors import read_object

CONFIG = "config.json"
USED = """config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.jinja chat_template.json
    preprocessor_config.json video_preprocessor_config.json processor_config.json model.safetensors.index.json""".split()
# why -> names, or how they end, of files that change nothing of what is trained
HARMLESS = {
    "they are for people": "README LICENSE NOTICE .md .txt .rst .pdf .html .png .jpg .jpeg .gif .svg .webp .ipynb",
    "tokenizer.json holds it too": "vocab.json merges.txt added_tokens.json special_tokens_map.json tokenizer.model",
    "a hub keeps it for itself": "configuration.json",
    "transformers takes the safetensors where there are any": """.bin .bin.index.json .pt .pth .ckpt .gguf .h5 .msgpack .onnx
        .npz .pkl""",
    "a trainer keeps it to go on with": "trainer_state.json training_args.json all_results.json train_results.json",
}
_ENDINGS = tuple(word for word in " ".join(HARMLESS.values()).split() if word.startswith("."))
_NAMES = tuple(word for word in " ".join(HARMLESS.values()).split() if not word.startswith("."))
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
QUANTIZED = re.compile(r"(hf_quant_config|quant(ize)?_config|quant_model_description.*)\.json")
MERGE = "merge it first (peft: merge_and_unload, then save_pretrained) and bring what that saves"


def refuse(folder: Path) -> None:
    """Raises CheckpointError, ConfigError if a folder holds an adapter, or says that its weights are quantized."""
    from qwen35.model.config_keys import ConfigError, refuse_quantized  # the model's package imports this one's in turn

    for name in ADAPTERS:
        if (folder / name).is_file():
            what = "an adapter beside the model" if (folder / CONFIG).is_file() else "an adapter, not a model"
            raise CheckpointError(f"{folder}: {name} is {what}; {MERGE}, or move it away")
    for path in sorted(folder.glob("*.json")):
        if QUANTIZED.fullmatch(path.name):
            raise CheckpointError(
                f"{folder}: {path.name} says that the weights are quantized, and those cannot be trained; bring the bf16 "
                "checkpoint, or move the file away if the weights are bf16 all the same"
            )
    if (folder / CONFIG).is_file():
        try:
            refuse_quantized(config_of(folder))
        except ConfigError as error:
            raise ConfigError(f"{folder / CONFIG}: {error}") from None


def config_of(folder: Path) -> dict[str, Any]:
    return read_object(folder / CONFIG, CheckpointError, "not there; a Qwen3.5 checkpoint folder holds config.json")


def not_read(folder: str | Path) -> list[str]:
    """What of a model folder is not read though it might mean something, a line for each kind.

    Raises as `refuse`, and ConfigError if its config.json is not one of this model's.
    """
    from qwen35.checkpoint.hf_read import WEIGHTS, HFFolder, has_weights, weight_files
    from qwen35.model.config import load_config
    from qwen35.model.config_keys import unknown_keys

    folder = Path(folder)
    if not folder.is_dir():
        return []
    refuse(folder)
    load_config(folder)
    config, lines = config_of(folder), []
    if keys := unknown_keys(config):
        lines.append(f"{folder / CONFIG}: not known, and not read: {few(keys)}")
    text = config["text_config"]
    if text.get("output_router_logits"):
        lines.append(
            f"{folder / CONFIG}: not read: text_config.output_router_logits, by which transformers would train load balancing; "
            "here the recipe's model.loss_cfg.router_aux_loss_coef alone does"
        )
    if text.get("tie_word_embeddings") is True and not config.get("tie_word_embeddings"):
        lines.append(
            f"{folder / CONFIG}: tie_word_embeddings is true in text_config alone, and counts at the top level: the head is "
            "trained apart from the embedding"
        )
    weights = weight_files(folder)[0] if has_weights(folder) else []
    if weights and text.get("mtp_num_hidden_layers") and not any(n.startswith("mtp.") for n in HFFolder(folder).specs):
        lines.append(
            f"{folder / CONFIG}: mtp_num_hidden_layers is {text['mtp_num_hidden_layers']}, but the weights hold no mtp.*; an "
            "export is alike, and a server that is asked to look several tokens ahead will not find them"
        )
    others = [p.name for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith((".", *_NAMES))]
    others = [name for name in others if name not in (*USED, *weights) and not name.endswith(_ENDINGS)]
    if others:
        first = f" beside {WEIGHTS}" * (weights == [WEIGHTS])
        lines.append(f"{folder}: not read{first}: {few(others)}")
    return lines
