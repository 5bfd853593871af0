"""The model, tokenizer and processors that `make generate`, `predict` and `evaluate` need."""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen35.checkpoint.dcp import check_fit
from qwen35.checkpoint.dcp_folder import load_notes, resolve_load
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.hf import empty_model, export_notes, load_pretrained, stored_dtypes
from qwen35.checkpoint.hf_names import published_dtype, shapes_of
from qwen35.checkpoint.hf_read import has_weights, refuse_unsupported
from qwen35.checkpoint.hf_write import EXPORT_MANIFEST
from qwen35.checkpoint.merged import open_weights
from qwen35.checkpoint.slices import FiniteSource, fill
from qwen35.config.load import SettingError, load_settings
from qwen35.config.schema import BasicParameters, DatasetParam
from qwen35.data import Record
from qwen35.data.collator import check_agreement, vision_spec
from qwen35.data.dataloader import size_warnings
from qwen35.data.image_processor import ImageProcessor
from qwen35.data.preparation import Preparation, reference_template
from qwen35.data.style import CHOICES, style_of
from qwen35.data.tokenizer import ChatTokenizer
from qwen35.data.video_processor import VideoProcessor
from qwen35.device import has_own_memory, set_up_device
from qwen35.errors import Parser, whole_number
from qwen35.model import Qwen35

positive = whole_number(1)
BYTES_A_THREAD = 64 << 20  # of weights, that a thread needs to have enough to do
SIZES = "those of the options or the defaults are used; a run's recipe (--recipe) has those that it trained with"


@dataclass(frozen=True)
class ModelSource:
    """The folders of a model: all the same one, unless the weights are a DCP checkpoint."""

    weights: Path  # Hugging Face folder, or a complete DCP checkpoint
    config: Path  # Hugging Face folder with the config.json of these weights
    tokenizer: Path  # Hugging Face folder with tokenizer, image processor and chat template
    train_set: DatasetParam | None = None  # the data settings of the run that wrote the checkpoint
    messages: tuple[str, ...] = ()  # which of the folder's checkpoints was chosen


def find_model(model: str | Path, hf: str | Path | None = None) -> ModelSource:
    """model: a Hugging Face folder, a DCP checkpoint (iter_…, release), or the folder above one.

    An export in its run's folder is asked as the run was trained. With a DCP checkpoint, config,
    tokenizer and processors come from `hf`, else from the folders that the run's config.yaml names.
    Raises CheckpointError, SettingError.
    """
    folder = Path(model)
    refuse_unsupported(folder)
    is_hf = (folder / "config.json").is_file() or (folder / "tokenizer.json").is_file()
    try:
        weights = folder if is_hf else resolve_load(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; nor a Hugging Face folder, for {folder}/tokenizer.json is not there") from None
    recipe = weights.parent / "config.yaml"  # written by a run
    run = load_settings(recipe) if recipe.is_file() and (not is_hf or (folder / EXPORT_MANIFEST).is_file()) else None
    train_set = run.data.dataset_param if run else None
    if is_hf:
        if run is None or folder.resolve() == Path(run.model.model_name_or_path).resolve():
            return ModelSource(folder, folder, folder)
        asked = (f"{folder}: asked as its run's {recipe} says", *export_notes(folder))
        return ModelSource(folder, folder, folder, train_set, asked)
    messages = () if weights == folder else (*load_notes(folder, weights), f"weights from {weights}")
    if hf is not None:
        return ModelSource(weights, Path(hf), Path(hf), train_set, messages)
    if run is None:
        raise SettingError(
            f"{weights}: a DCP checkpoint without a run's config.yaml beside it; name the Hugging Face folder that has "
            "its config.json and tokenizer: --hf DIR (HF=DIR with make)"
        )
    source = ModelSource(weights, Path(run.model.model_name_or_path), Path(run.tokenizer_dir), train_set, messages)
    for path in (source.config, source.tokenizer):
        if not path.is_dir():
            raise SettingError(f"{recipe} names the model folder {path}, which is not there; give --hf DIR")
    return source


def load_model(source: ModelSource) -> Qwen35:
    """The model on this process's device, in the dtypes that an export has.

    So a checkpoint of a run answers exactly as its export, adapters merged. Raises
    CheckpointError, ConfigError.
    """
    if source.weights == source.config:
        model = load_pretrained(source.weights)
    else:
        dtype_of = stored_dtypes(source.config) if has_weights(source.config) else published_dtype
        model = empty_model(source.config, dtype_of)
        try:
            weights, parameters = open_weights(source.weights, source.config), dict(model.named_parameters())
            check_fit(weights, shapes_of(parameters.items()), source.weights)
            fill(parameters, FiniteSource(weights, source.weights))
        except CheckpointError as error:
            raise CheckpointError(f"{error} (the model is that of {source.config}/config.json)") from None
    for line in source.messages:
        print(line, file=sys.stderr, flush=True)
    device = set_up_device()
    if not has_own_memory(device) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(fastest_threads(model))
    return model.to(device).eval()


def fastest_threads(model: Qwen35) -> int:
    """How many threads of a CPU are fastest: by the model's size, so that answers do not vary.

    The threads wait for each other in every operator. One that spins meanwhile, OpenMP's default,
    keeps a busy machine from running what it waits for: then one alone is fastest where operators
    are small. The scripts say OMP_WAIT_POLICY=passive, with which two were about as fast or faster.
    """
    least = 2 if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive" else 1
    size = sum(parameter.nbytes for parameter in model.parameters())
    return min(torch.get_num_threads(), max(least, size // BYTES_A_THREAD))


def add_options(parser: Parser) -> None:
    """Options for the model and its prompts."""
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder, or DCP checkpoint (iter_…, release, or the folder above)")
    add("--hf", help="for DCP: the folder with config.json and tokenizer; default: as the run's config.yaml says")
    add("--recipe", help="a run's config.yaml, whose template, field names and image sizes are used")
    templates = ["qwen3_5", "qwen3_vl_nothink", "checkpoint"]
    add("--template", choices=templates, help="default: the run's or recipe's, else qwen3_5")
    add("--image_max_pixels", type=positive, help="default: the run's or recipe's, else 262144")
    add("--image_min_pixels", type=positive, help="default: the run's or recipe's, else 1024")


def add_thinking(parser: Parser, default: str) -> None:
    thinking = parser.add_mutually_exclusive_group()
    for name, value, kind in (("--thinking", True, "open"), ("--no_thinking", False, "empty")):
        text = f"answer after an {kind} thought; default: {default}"
        thinking.add_argument(name, dest="thinking", action="store_const", const=value, help=text)


def prepare(args: argparse.Namespace, source: ModelSource, **basic_parameters: Any) -> Preparation:
    """Preprocessing by the options above, else as the model's run had it. Raises SettingError."""
    recipe = load_settings(args.recipe).data.dataset_param if args.recipe else None
    trained = recipe or source.train_set or DatasetParam(BasicParameters(""))
    smallest = args.image_min_pixels or trained.preprocess_parameters.image_min_pixels
    largest = args.image_max_pixels or trained.preprocess_parameters.image_max_pixels
    if smallest > largest:
        raise SettingError(f"image_min_pixels {smallest} is above image_max_pixels {largest}")
    template = args.template or trained.basic_parameters.template
    if args.thinking and template == "qwen3_vl_nothink":
        raise SettingError("--thinking: the template qwen3_vl_nothink has no thoughts")
    names = ("on_bad_record", *(CHOICES if template != "qwen3_vl_nothink" else ()))
    kept = {name: getattr(trained.basic_parameters, name) for name in names}
    basic = BasicParameters(**kept | {"dataset": "", "template": template} | basic_parameters)
    tokenizer = ChatTokenizer(source.tokenizer, trained.basic_parameters.special_tokens_in_prompts)
    spec = vision_spec(source.config)
    preparation = Preparation(
        tokenizer,
        ImageProcessor.from_folder(source.tokenizer, smallest, largest) if spec else None,
        basic,
        trained.attr,
        VideoProcessor.from_folder(source.tokenizer, trained.preprocess_parameters) if spec else None,
        style_of(source.tokenizer, basic),
        reference_template(source.tokenizer, basic),
    )
    check_agreement(source.config, source.tokenizer, preparation, spec)
    return preparation


def tell_sizes(args: argparse.Namespace, source: ModelSource, preparation: Preparation, records: list[Record]) -> None:
    """Say where default sizes are used instead of those in the model folder's processor configs."""
    images, videos = (sum(len(getattr(record, kind)) for record in records) for kind in ("images", "videos"))
    lines = size_warnings(str(source.tokenizer), preparation, images, videos, SIZES)
    sys.stderr.writelines(f"{line}\n" for line in lines if not (source.train_set or args.recipe))
