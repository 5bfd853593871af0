"""Loading a Hugging Face folder: whether it fits the model, and what in it is not read."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen35.checkpoint.dcp_folder import MANIFEST, RELEASE, latest, stamp
from qwen35.checkpoint.errors import CheckpointError, abbreviate
from qwen35.checkpoint.hf_names import HEAD, base_parameters, first_on_disk, shapes_of
from qwen35.checkpoint.hf_read import (
    CONFIG,
    WEIGHTS_FILE,
    HFFolder,
    HFSource,
    check_tied,
    config_of,
    has_weights,
    refuse_unsupported,
    weight_files,
)
from qwen35.checkpoint.hf_write import EXPORT_MANIFEST, OF_TOKENIZER, check_exportable
from qwen35.checkpoint.slices import FiniteSource, TensorSpec, fill
from qwen35.config.layout import text_section
from qwen35.device import HOST, WithoutInit
from qwen35.errors import read_object
from qwen35.model import Qwen35, load_config
from qwen35.model.config import check_same
from qwen35.model.config_keys import unknown_keys

USED = {*OF_TOKENIZER, "config.json", "generation_config.json", "model.safetensors.index.json"}
# reason -> beginnings of the names, or endings, of files that have no effect on training
HARMLESS = {
    "they are for people": "README LICENSE NOTICE .md .txt .rst .pdf .html .png .jpg .jpeg .gif .svg .webp .ipynb",
    "tokenizer.json holds it too": "tokenizer.model",
    "only the hub uses it": "configuration.json",
    "transformers prefers safetensors, too": "pytorch_model tf_model flax_model .gguf .onnx",
    "only the trainer that wrote it uses it": """trainer_state.json training_args. all_results.json train_results.json
        optimizer. scheduler. scaler. rng_state""",
}
_ENDINGS = tuple(word for word in " ".join(HARMLESS.values()).split() if word.startswith("."))
_NAMES = tuple(word for word in " ".join(HARMLESS.values()).split() if not word.startswith("."))


def load_hf(model: nn.Module, folder: str | Path, progress: Callable[[int], object] | None = None) -> None:
    """Load a Hugging Face folder into a model, plain or sharded, that has left the meta device.

    Values are cast to the parameters' dtypes. Every rank reads the byte ranges of its own slices,
    without communication. `progress` is called with the bytes read. One CheckpointError lists all
    tensors that are missing, surplus or of another shape. `mtp.*` is skipped for a model without
    that layer, and `lm_head.weight` for tied weights, if it equals the embedding. Adapters are left
    as they are.
    """
    source, parameters = open_matching_folder(model, folder), base_parameters(model)
    if HEAD not in parameters:
        check_tied(source.folder, folder)
    fill(parameters, FiniteSource(source, folder), progress)


def open_matching_folder(model: nn.Module, folder: str | Path) -> HFSource:
    """A folder whose config, index and headers must fit the model. Raises CheckpointError."""
    source = HFSource(HFFolder(folder), shapes_of(base_parameters(model).items()), f"{folder} does not fit the model")
    if isinstance(model, Qwen35):
        check_same(folder, asdict(load_config(folder)), model.config)
    return source


def check_export(model: nn.Module, folder: str | Path) -> None:
    """Raises CheckpointError if the model could not be exported like a folder with weights."""
    if has_weights(Path(folder)):
        shapes = shapes_of(base_parameters(model).items())
        check_exportable(shapes, HFFolder(folder), f"what is trained could not be exported like {folder}")


def load_pretrained(hf_dir: str | Path, dtype: torch.dtype | None = None, **kwargs: Any) -> Qwen35:
    """A new model, `Qwen35(config, **kwargs)`, with a folder's weights as plain CPU tensors.

    dtype: of all parameters; None keeps the stored dtypes.
    """
    model = empty_model(hf_dir, stored_dtypes(hf_dir) if dtype is None else lambda _: dtype, **kwargs)
    load_hf(model, hf_dir)
    return model


def empty_model(hf_dir: str | Path, dtype_of: Callable[[str], torch.dtype], **kwargs: Any) -> Qwen35:
    """A new model on the CPU from a folder's config.json; its parameters are left uninitialized."""
    with torch.device("meta"), WithoutInit():
        model = Qwen35(load_config(hf_dir), **kwargs)
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}" if module_name else name
            empty = torch.empty(parameter.shape, dtype=dtype_of(full_name), device=HOST)
            setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    return model


def shapes_by_config(disk: HFFolder) -> dict[str, tuple[int, ...]]:
    """The parameters of the model that a folder's config.json describes, with `mtp.*` if stored."""
    with torch.device("meta"), WithoutInit():
        model = Qwen35(load_config(disk.folder), mtp=any(name.startswith("mtp.") for name in disk.specs))
    return shapes_of(model.named_parameters())


def stored_dtypes(hf_dir: str | Path) -> Callable[[str], torch.dtype]:
    """A function from parameter name to its dtype in a folder, or to fp32 if it is not there."""
    specs, absent = HFFolder(hf_dir).specs, TensorSpec((), torch.float32)
    return lambda name: specs.get(first_on_disk(name, specs), absent).dtype


def export_notes(folder: Path) -> list[str]:
    """A line if an export in its run's folder is not of the run's newest checkpoint."""
    manifest = folder / EXPORT_MANIFEST
    made_from = read_object(manifest, CheckpointError).get("checkpoint") if manifest.is_file() else None
    newest = folder.parent / (latest(folder.parent) or RELEASE)
    if not isinstance(made_from, dict) or not (newest / MANIFEST).is_file() or stamp(newest) == made_from:
        return []
    return [
        f"{folder} was exported from {made_from.get('name')}, and {newest} is newer: make export writes it anew, or name that"
    ]


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
    text = text_section(config)
    at = "text_config." if text is not config else ""
    if text.get("output_router_logits"):
        lines.append(
            f"{folder / CONFIG}: not read: {at}output_router_logits, by which transformers would train load balancing; "
            "only the recipe's model.loss_cfg.router_aux_loss_coef does that here"
        )
    if text.get("tie_word_embeddings") is True and not config.get("tie_word_embeddings"):
        lines.append(
            f"{folder / CONFIG}: tie_word_embeddings is true in text_config alone, but only the top level counts: the head is "
            "trained apart from the embedding"
        )
    theta, scaling = (text.get("rope_parameters") or {}).get("rope_theta"), text.get("rope_scaling")
    if theta and scaling and not scaling.get("rope_theta", text.get("rope_theta")):
        lines.append(
            f"{folder / CONFIG}: not read: {at}rope_parameters, in whose place {at}rope_scaling stands, as in transformers; "
            f"that has no rope_theta, which is therefore 10000, not {theta}"
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
    return lines + export_notes(folder)
