"""The recipe and what it names: model, weights, records, kernels, and the space that they need."""

from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.tools.doctor.host import disk, shared_memory
from qwen35.tools.doctor.machine import Finding, Machine, note, ok, wrong

if TYPE_CHECKING:
    from qwen35.config.schema import Settings
    from qwen35.data.tokenized import Preparation
    from qwen35.model import ModelConfig

RECORDS = 20  # of each file are read
BATCHES = 3  # in flight for each worker of a data loader: two prefetched, one in use
TINY = "configs/tiny.yaml"
TINY_MAKES = ("ckpt/hf_path/tiny", "ckpt/mm_path/tiny", "data/digits/train.json")
WHOLE_FOLDER = "model_name_or_path is a whole Hugging Face folder of a Qwen3.5"


def recipe(m: Machine, config: str, overrides: list[str]) -> list[Finding]:
    from qwen35.config.load import SettingError, load_settings
    from qwen35.data.tokenized import Preparation

    try:
        settings = load_settings(config, overrides)
    except SettingError as error:
        return [wrong("recipe", str(error), "CONFIG is the recipe, ARGS has settings that replace its own")]
    findings = [ok("recipe", config), *_parallel(m, settings), *_kernels(m, settings)]
    basic = settings.data.dataset_param.basic_parameters
    named = {settings.model.model_name_or_path, settings.training.load, basic.dataset} - {None}
    missing = [name for name in TINY_MAKES if name in named and not (m.root / name).exists()]
    if missing and named <= set(TINY_MAKES) and Path(config).absolute() == (m.root / TINY).absolute():
        return [*findings, note("recipe", f"not made yet: {', '.join(missing)}", "make finetune makes them first")]
    try:
        preparation = Preparation.of(settings)
    except (SettingError, OSError) as error:
        return [*findings, wrong("model", str(error), WHOLE_FOLDER)]
    findings += [*_model(m, settings, preparation), *_records(preparation)]
    return [*findings, *(_validation(settings.validation) if settings.validation else []), *_weights(settings)]


def _parallel(m: Machine, settings: "Settings") -> list[Finding]:
    from qwen35.config.layout import check_layout
    from qwen35.config.load import SettingError

    try:
        check_layout(settings, m.number("NODES", 1) * m.processes())
    except SettingError as error:
        return [wrong("recipe", str(error), "change the setting, or NODES and NPUS_PER_NODE")]
    return []


def _kernels(m: Machine, settings: "Settings") -> list[Finding]:
    import kernels
    from qwen35.device import HOST

    try:
        kernels.select(m.accelerator or HOST.type, settings.model.kernels)
    except kernels.KernelError as error:
        return [wrong("kernels", str(error), "see python -m kernels")]
    return []


def _model(m: Machine, settings: "Settings", preparation: "Preparation") -> list[Finding]:
    """Config, tokenizer and images agree; frozen modules exist; disk and /dev/shm have room."""
    import torch

    from qwen35.checkpoint.errors import CheckpointError
    from qwen35.checkpoint.hf import check_export, not_read
    from qwen35.config.load import SettingError
    from qwen35.data.collator import check_agreement, check_patch_bucket
    from qwen35.model import ConfigError, Qwen35, load_config
    from qwen35.training.parameter_groups import freeze

    folder = settings.model.model_name_or_path
    try:
        unread = not_read(folder)
        config = load_config(folder)
        with torch.device("meta"):
            model = Qwen35(config, mtp=bool(settings.model.mtp_num_layers))
        freeze(model, settings.model.freeze)
        check_agreement(folder, settings.tokenizer_dir, preparation, config.vision_spec)
        check_patch_bucket(settings.data.dataloader_param.patch_bucket, config.vision_spec)
        check_export(model, folder)
    except (ConfigError, SettingError, CheckpointError, OSError) as error:
        return [wrong("model", str(error), WHOLE_FOLDER)]
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    parameters, trained = sum(n for n, _ in sizes), sum(n for n, is_trained in sizes if is_trained)
    fact = f"{folder}: {parameters:,} parameters, {trained:,} trained"
    least, most = _loader_bytes(settings, config, m.processes())
    return [
        ok("model", fact),
        *(note("model", line, "ignore this if training does not need it") for line in unread),
        *disk("disk", Path(settings.training.save), 4 * parameters + 8 * trained, "a checkpoint"),
        *(shared_memory(m, least, most) if most else []),
    ]


def _loader_bytes(settings: "Settings", config: "ModelConfig", processes: int) -> tuple[int, int]:
    """Bytes of batches in flight from data loaders: with one dummy image, and full of images."""
    v, loader = config.vision, settings.data.dataloader_param
    patch = v.in_channels * v.temporal_patch_size * v.patch_size**2 * 4  # fp32
    tokens = settings.data.dataset_param.basic_parameters.cutoff_len * settings.training.micro_batch_size
    batches = processes * loader.num_workers * BATCHES
    return batches * loader.patch_bucket * patch, batches * tokens * v.spatial_merge_size**2 * patch


def _records(preparation: "Preparation") -> list[Finding]:
    from qwen35.config.load import SettingError
    from qwen35.data import RecordError
    from qwen35.data.data_warnings import DataWarnings, Skipped
    from qwen35.data.mixture import dataset_files
    from qwen35.data.tokenized import tokenised

    basic, skipped, warnings = preparation.basic, Skipped(), DataWarnings()
    skip = skipped.add if basic.on_bad_record == "skip" else None
    try:
        files = dataset_files(basic.dataset)
        for file in files:
            for _ in tokenised(file, preparation, RECORDS, skip, warnings):
                pass
    except SettingError as error:
        return [wrong("data", str(error), "set data.dataset_param.basic_parameters.dataset to existing files")]
    except (RecordError, OSError) as error:
        return [wrong("data", str(error), "correct the record; make show prints samples as the training sees them")]
    named = ", ".join(map(str, files))
    notes = [note("data", line) for line in warnings.lines()]
    if len(skipped):
        fact = f"{named}: of the first {RECORDS} records {len(skipped)} will be skipped: {skipped}"
        return [note("data", fact, "on_bad_record: error would stop there"), *notes]
    return [ok("data", f"{named}: the first {RECORDS} records can be used"), *notes]


def _validation(settings: "Settings") -> list[Finding]:
    """As the records, of the validation set: of `Settings.validation`."""
    from qwen35.config.load import SettingError
    from qwen35.config.schema import for_validation
    from qwen35.data.tokenized import Preparation

    try:
        found = _records(Preparation.of(settings))
    except (SettingError, OSError) as error:
        found = [wrong("model", str(error), WHOLE_FOLDER)]
    return [Finding(f.status, "validation", for_validation(f.fact), for_validation(f.todo)) for f in found]


def _weights(settings: "Settings") -> list[Finding]:
    from qwen35.checkpoint.dcp_folder import load_notes, newest_checkpoint, resolve_load
    from qwen35.checkpoint.errors import CheckpointError
    from qwen35.checkpoint.hf_read import HFFolder

    t = settings.training
    try:
        if newest := newest_checkpoint(Path(t.save)):
            return [ok("weights", "; ".join([f"goes on from {newest}", *load_notes(t.save, newest)]))]
        if t.load:
            return [ok("weights", f"from {resolve_load(Path(t.load))}")]
        if t.init_from_hf_path:
            return [ok("weights", f"from {HFFolder(t.init_from_hf_path).folder}")]
    except (CheckpointError, OSError) as error:
        return [wrong("weights", str(error), "make convert makes the folder that training.load names")]
    return [wrong("weights", "nothing says where they come from", "set training.load or training.init_from_hf_path")]
