"""Files and keys in a model folder that this program does not read, and that might matter."""

from pathlib import Path

from qwen35.checkpoint.errors import abbreviate
from qwen35.checkpoint.hf_read import WEIGHTS_FILE, HFFolder, has_weights, weight_files
from qwen35.checkpoint.model_folder import CONFIG, config_of, refuse_unsupported
from qwen35.model.config import load_config
from qwen35.model.config_keys import unknown_keys

USED = """config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.jinja chat_template.json
    preprocessor_config.json video_preprocessor_config.json processor_config.json model.safetensors.index.json""".split()
# reason -> names or endings of files that have no effect on training
HARMLESS = {
    "they are for people": "README LICENSE NOTICE .md .txt .rst .pdf .html .png .jpg .jpeg .gif .svg .webp .ipynb",
    "tokenizer.json holds it too": "vocab.json merges.txt added_tokens.json special_tokens_map.json tokenizer.model",
    "only the hub uses it": "configuration.json",
    "transformers prefers safetensors, too": ".bin .bin.index.json .pt .pth .ckpt .gguf .h5 .msgpack .onnx .npz .pkl",
    "only the trainer that wrote it uses it": "trainer_state.json training_args.json all_results.json train_results.json",
}
_ENDINGS = tuple(word for word in " ".join(HARMLESS.values()).split() if word.startswith("."))
_NAMES = tuple(word for word in " ".join(HARMLESS.values()).split() if not word.startswith("."))


def not_read(folder: str | Path) -> list[str]:
    """Lines about files and keys of a model folder that are not read although they might matter.

    Raises what `refuse_unsupported` raises, and ConfigError if config.json is not one of this model
    family.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return []
    refuse_unsupported(folder)
    load_config(folder)
    config, lines = config_of(folder), []
    if keys := unknown_keys(config):
        lines.append(f"{folder / CONFIG}: not known, and not read: {abbreviate(keys)}")
    text = config["text_config"]
    if text.get("output_router_logits"):
        lines.append(
            f"{folder / CONFIG}: not read: text_config.output_router_logits, by which transformers would train load balancing; "
            "only the recipe's model.loss_cfg.router_aux_loss_coef does that here"
        )
    if text.get("tie_word_embeddings") is True and not config.get("tie_word_embeddings"):
        lines.append(
            f"{folder / CONFIG}: tie_word_embeddings is true in text_config alone, but only the top level counts: the head is "
            "trained apart from the embedding"
        )
    weights = weight_files(folder)[0] if has_weights(folder) else []
    if weights and text.get("mtp_num_hidden_layers") and not any(n.startswith("mtp.") for n in HFFolder(folder).specs):
        lines.append(
            f"{folder / CONFIG}: mtp_num_hidden_layers is {text['mtp_num_hidden_layers']}, but the weights hold no mtp.*; an "
            "export will lack them too, and a server cannot use them for speculative decoding"
        )
    others = [p.name for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith((".", *_NAMES))]
    others = [name for name in others if name not in (*USED, *weights) and not name.endswith(_ENDINGS)]
    if others:
        first = f" beside {WEIGHTS_FILE}" * (weights == [WEIGHTS_FILE])
        lines.append(f"{folder}: not read{first}: {abbreviate(others)}")
    return lines
