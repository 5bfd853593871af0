"""Converts a Hugging Face folder to a DCP checkpoint, and a DCP checkpoint back."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tqdm import tqdm

from qwen35.checkpoint.dcp import read_info, write_extra
from qwen35.checkpoint.dcp_folder import ITERATION, MANIFEST, RELEASE, load_notes, resolve_load, stamp
from qwen35.checkpoint.dcp_source import DCPSource
from qwen35.checkpoint.errors import CheckpointError, abbreviate
from qwen35.checkpoint.folders import check_disjoint, check_free_space, check_replaceable
from qwen35.checkpoint.hf import not_read, shapes_by_config
from qwen35.checkpoint.hf_names import HEAD
from qwen35.checkpoint.hf_read import HFFolder, HFSource, check_tied, same_bytes
from qwen35.checkpoint.hf_write import WriteSummary, save_hf
from qwen35.checkpoint.merged import AdapterRun, Merged, open_weights
from qwen35.checkpoint.peft_folder import write_peft
from qwen35.checkpoint.slices import FiniteSource, TensorSpec
from qwen35.config.load import load_settings
from qwen35.errors import USER_ERRORS, Parser, UserError, complain
from qwen35.model import load_config
from qwen35.model.lora import is_adapter

CONVERTERS = ("GenericDCPConverter", "Qwen35Converter")  # MindSpeed-MM's first argument, which selects nothing here
TIE_EXAMPLE = '{"lm_head.weight": "model.language_model.embed_tokens.weight"}'
progress_bar = partial(tqdm, unit="B", unit_scale=True, unit_divisor=1024, disable=None)  # only on a terminal


def hf_to_dcp(hf_dir: str | Path, dcp_dir: str | Path, tie: Mapping[str, str] | None = None) -> WriteSummary:
    """Convert a Hugging Face folder, with its `mtp.*`, to `<dcp_dir>/release`, in its own dtypes.

    The folder must fit the model that its config.json describes. `tie` maps a tensor to the one it
    is tied to: it must be absent, with tied weights in config.json, or equal to the other one.
    Raises CheckpointError.
    """
    from qwen35.checkpoint.dcp_write import write_release  # slow to import, and an export needs it not

    for line in not_read(hf_dir):
        print(line, flush=True)
    disk, folder = HFFolder(hf_dir), Path(dcp_dir)
    source = HFSource(disk, shapes_by_config(disk), f"{hf_dir} does not fit its config.json")
    if HEAD not in source.specs:
        check_tied(disk, hf_dir)
    _check_tie(disk, tie or {})
    check_disjoint(disk.folder, folder)
    check_replaceable(folder / RELEASE, MANIFEST)
    _check_same_model(folder / RELEASE, DCPSource, source.specs)
    if folder.is_dir() and any(ITERATION.fullmatch(path.name) for path in folder.iterdir()):
        raise CheckpointError(f"{folder} holds the checkpoints of a training run; convert to another folder")
    nbytes = sum(spec.nbytes for spec in source.specs.values())
    check_free_space(folder, nbytes)
    with progress_bar(total=nbytes, desc="hf_to_dcp") as bar:
        rest = partial(write_extra, extra={"model": asdict(load_config(hf_dir))})
        release = write_release(FiniteSource(source, hf_dir), folder, bar.update, rest)
    return WriteSummary(len(source.specs), nbytes, release)


def dcp_to_hf(dcp_dir: str | Path, origin_hf_dir: str | Path, save_hf_dir: str | Path) -> WriteSummary:
    """Write a checkpoint (release, iter_… or their parent) like the original, but for its run's
    own tokenizer and processors, if it had any. Adapters are merged into their base.
    """
    checkpoint, origin = resolve_load(dcp_dir), HFFolder(origin_hf_dir)
    source = open_weights(checkpoint, origin.folder)
    _check_same_model(Path(save_hf_dir), HFFolder, origin.specs)
    nbytes = sum(spec.nbytes for spec in origin.specs.values())
    with progress_bar(total=nbytes, desc="dcp_to_hf") as bar:
        if tokenizer := _tokenizer_folder(checkpoint):
            print(f"tokenizer and processors from {tokenizer}, with which the run trained", flush=True)
        values, of_run = FiniteSource(source, checkpoint), ITERATION.fullmatch(checkpoint.name)
        made_from = stamp(checkpoint) if of_run else None
        written = save_hf(values, origin_hf_dir, save_hf_dir, bar.update, tokenizer, made_from)
    if isinstance(source, Merged) and (same := sorted(source.pairs.keys() - source.changed)):
        print(
            f"{len(same)} of {len(source.pairs)} weights with an adapter are the base's still, to the last bit "
            f"({abbreviate(same)}): what it adds is zero, or lost in rounding; the adapter itself (--adapter) has it",
            flush=True,
        )
    return written


def dcp_to_peft(dcp_dir: str | Path, origin_hf_dir: str | Path, save_dir: str | Path) -> WriteSummary:
    """Write a LoRA run's adapters as PEFT's folder, which names the original as its base."""
    checkpoint, origin = resolve_load(dcp_dir), Path(origin_hf_dir)
    merged = open_weights(checkpoint, origin)
    if not isinstance(merged, Merged):
        raise CheckpointError(f"{checkpoint} holds no adapters but a whole model; leave --adapter out")
    shapes = {name: spec.shape for name, spec in merged.specs.items()}
    if tokenizer := _tokenizer_folder(checkpoint):
        print(f"serve it with the tokenizer and processors of {tokenizer}, with which the run trained", flush=True)
    spec = AdapterRun.of(read_info(checkpoint)).spec
    is_text_only = load_config(origin).vision is None
    source = FiniteSource(merged.adapters, checkpoint)
    return write_peft(source, spec, shapes, str(origin.absolute()), save_dir, is_text_only)


def _tokenizer_folder(checkpoint: Path) -> Path | None:
    """The folder of tokenizer and processors that a run names beside the model's. Raises."""
    recipe = checkpoint.parent / "config.yaml"
    param = load_settings(recipe).data.dataset_param.preprocess_parameters if recipe.is_file() else None
    if param is None or param.model_name_or_path is None:
        return None
    if not (folder := Path(param.model_name_or_path)).is_dir():
        raise CheckpointError(
            f"{recipe}: the tokenizer's folder {folder} is not there; put it back, or correct its name"
        )
    return folder


def _check_same_model(
    folder: Path, read: Callable[[Path], DCPSource | HFFolder], specs: Mapping[str, TensorSpec]
) -> None:
    """Raise CheckpointError if `folder` holds another model, one with other tensors."""
    try:
        old = {name: spec.shape for name, spec in read(folder).specs.items()}
    except UserError:  # no folder, or nothing in it that could be used
        return
    new = {name: spec.shape for name, spec in specs.items()}
    differ = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if differ:
        raise CheckpointError(
            f"{folder} holds another model: {len(differ)} tensors differ in name or shape ({abbreviate(differ)}); "
            "choose another folder, or move this one away"
        )


def _check_tie(disk: HFFolder, tie: Mapping[str, str]) -> None:
    for name, target in tie.items():
        if target not in disk.specs:
            raise CheckpointError(f"--tie_weight_mapping: {disk.folder} has no {target}")
        if name not in disk.specs:
            if name != HEAD or not disk.is_tied:
                raise CheckpointError(
                    f"--tie_weight_mapping: {disk.folder} has no {name}, and its config.json does not tie it to {target}"
                )
        elif not same_bytes(disk, name, target):
            raise CheckpointError(
                f"--tie_weight_mapping: {name} and {target} differ in {disk.folder}: its weights are not tied, "
                "leave the option out"
            )


def _tie_argument(text: str) -> dict[str, str]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object of names, e.g. '{TIE_EXAMPLE}'")
    return value


def _folder_argument(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("names no folder")
    return text


def _parser() -> Parser:
    parser = Parser(prog="mm-convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    to_dcp = commands.add_parser("hf_to_dcp", help="Hugging Face folder -> DCP")
    to_hf = commands.add_parser("dcp_to_hf", help="DCP -> Hugging Face folder like the original")
    for command, option, text in (
        (to_dcp, "--hf_dir", "folder with config.json and safetensors"),
        (to_dcp, "--dcp_dir", "folder to write release/ and latest_checkpointed_iteration.txt into"),
        (to_hf, "--dcp_dir", "release/, iter_…/, or the folder that holds them"),
        (to_hf, "--origin_hf_dir", "original model folder: gives names, dtypes, config, tokenizer and other files"),
        (to_hf, "--save_hf_dir", "folder to write"),
    ):
        command.add_argument(option, required=True, type=_folder_argument, metavar="FOLDER", help=text)
    adapter_help = "write a LoRA run's adapters as PEFT's folder instead of merging them into the model"
    to_hf.add_argument("--adapter", action="store_true", help=adapter_help)
    tie_help = f"tensors that are tied to others, e.g. '{TIE_EXAMPLE}'"
    to_dcp.add_argument("--tie_weight_mapping", type=_tie_argument, metavar="JSON", help=tie_help)
    return parser


def _why_more_tensors(checkpoint: Path, origin_hf_dir: str) -> list[str]:
    """A line on why an export has more tensors than its checkpoint, if it has."""
    held, exported = DCPSource(checkpoint).specs, HFFolder(origin_hf_dir).specs
    if any(map(is_adapter, held)):
        return [f"the checkpoint's {len(held):,} adapters are merged into the weights that they were trained on"]
    mtp = 0 if any(name.startswith("mtp.") for name in held) else sum(name.startswith("mtp.") for name in exported)
    tied = int(HEAD in exported and HEAD not in held)
    experts = len(exported) - len(held) - mtp - tied
    told = [f"{mtp} of multi-token prediction, which was not trained, are copied from {origin_hf_dir}"] * bool(mtp)
    told += [f"{HEAD} is stored although it is tied to the embedding"] * tied
    told += [f"{experts:+,} since {origin_hf_dir} stores experts in another layout"] * bool(experts)
    return [f"the checkpoint has {len(held):,} tensors: {'; '.join(told)}"] if told else []


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in CONVERTERS:
        arguments = arguments[1:]
    args = _parser().parse_args(arguments)
    try:
        if args.command == "hf_to_dcp":
            written = hf_to_dcp(args.hf_dir, args.dcp_dir, args.tie_weight_mapping)
        else:
            checkpoint = resolve_load(args.dcp_dir)
            for line in [*load_notes(args.dcp_dir, checkpoint), f"weights from {checkpoint}"]:
                print(line, flush=True)
            convert = dcp_to_peft if args.adapter else dcp_to_hf
            written = convert(checkpoint, args.origin_hf_dir, args.save_hf_dir)
            for line in [] if args.adapter else _why_more_tensors(checkpoint, args.origin_hf_dir):
                print(line)
    except USER_ERRORS as error:
        return complain(error, "mm-convert: ")
    print(written)
    return 0
