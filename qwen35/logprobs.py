"""Log-probabilities of given answers: `python -m qwen35.logprobs [--out FILE] CONFIG [a.b=c …]`.

Without --out those of a recipe's pairs by the reference (training.stage: dpo), which its run would
compute before the first step, and then finds. With --out those of the answers in any records, which
data.dataset_param.basic_parameters.dataset names: a line of JSON for each sample, in their order,
with the tokens that would be trained and the log-probability of each; killed, the same command
goes on. The weights are those that a run starts from (training.load, training.init_from_hf_path),
never a checkpoint in training.save.
"""

import json
from collections.abc import Sequence
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

import kernels
from qwen35.batch import IGNORE, PackedBatch
from qwen35.checkpoint.folders import write_atomic
from qwen35.config.layout import check_layout
from qwen35.config.schema import Settings
from qwen35.console import outlive_readers
from qwen35.data.dataloader import open_dataset
from qwen35.data.record import RecordError
from qwen35.device import end_process_group, init_process
from qwen35.errors import Parser, SettingError
from qwen35.heartbeat import Heartbeat
from qwen35.log import log_warnings, logger
from qwen35.model import load_config
from qwen35.parallel.collectives import Gather
from qwen35.parallel.context_parallel import apply_context_parallel
from qwen35.parallel.fsdp import shard
from qwen35.parallel.mesh import make_meshes
from qwen35.rank import leave, run_rank
from qwen35.tools.compilation import DTYPES, compiled
from qwen35.training.adapters import build_model
from qwen35.training.reference import Forward, RowsFile, made_with
from qwen35.training.start import REFERENCE, Start, find_weights
from qwen35.wording import number_of


def log_probs(settings: Settings, out: Path | None) -> None:
    """Every rank calls it. Raises SettingError, RecordError, CheckpointError."""
    t = settings.training
    if out:
        if not out.parent.is_dir():
            raise SettingError(f"{out}: there is no folder {out.parent}; make it, or name another file")
    elif t.stage != "dpo" or t.lora:
        why = "training.lora has its reference in every step" if t.lora else "training.stage: sft has no reference"
        raise SettingError(f"{why}; name a file for the log-probabilities of any answers, OUT=logprobs.jsonl")
    heartbeat = Heartbeat(t.timeout)
    device = init_process(t.timeout)
    heartbeat.at("building the model")
    config = load_config(settings.model.model_name_or_path)
    check_layout(settings, dist.get_world_size())
    meshes = make_meshes(device.type, settings.parallel, t.timeout)
    chosen = compiled(settings, config.text, device, heartbeat, logger.info)
    model = build_model(settings, config, chosen)
    start = Start(find_weights(settings, goes_on=False), model, settings)
    if not out and start.step:
        raise SettingError(
            f"training.load: {t.load} has been trained; the reference is what its run began with, name that"
        )
    weights = start.digest() if out else start.extra[REFERENCE]
    heartbeat.at("reading the data")
    sets = [settings, *([settings.validation] if settings.validation and not out else [])]
    datasets = [
        open_dataset(of_set, lambda record, count: heartbeat.at(f"reading the data: {record}")) for of_set in sets
    ]
    lines = [line for dataset in datasets for line in (*dataset.left_out(), *dataset.warnings)]
    if out and (most := settings.data.dataset_param.basic_parameters.max_samples) == datasets[0].records:
        lines.append(f"max_samples: no record after the first {most:,} is read")
    log_warnings([*(f"data: {line}" for line in lines), *start.unread, *start.warnings])
    apply_context_parallel(model, meshes)
    shard(model, meshes, DTYPES[t.dtype])
    model.to_empty(device=device)
    start.load(None, lambda nbytes: heartbeat.at("loading the weights"))
    forward = Forward(settings, model, meshes, device, heartbeat.at)
    if not out:
        for dataset in datasets:
            forward.add_reference(dataset, weights)
        return
    [dataset] = datasets

    def rows_of(units: list[list[int]], batch: PackedBatch, part: PackedBatch, found: Tensor) -> list[Any]:
        if batch.bad_records:  # whose place in the batch is padding
            raise RecordError(f"{batch.bad_records[0]}; mend or remove it: on_bad_record: skip is not for this command")
        whole = Gather.apply(meshes.tokens["ulysses"].get_group(), found) if meshes.ulysses_size > 1 else found
        values, rows = whole.tolist(), []
        indices = chain.from_iterable(dataset.samples_of(unit) for sequence in units for unit in sequence)
        for start, end in pairwise(batch.cu_seqlens.tolist()):
            if batch.is_pad is None or not batch.is_pad[start]:
                at = ((batch.labels[start:end] != IGNORE).nonzero()[:, 0] + start).tolist()
                tokens, index = batch.labels[at].tolist(), next(indices)
                line = {"record": dataset.source(index), "tokens": tokens, "log_probs": [values[i] for i in at]}
                rows.append((index, line))
        return rows

    kept = RowsFile(out.with_name(f"{out.name}.partial"), made_with(settings, dataset, weights))
    lines = [line for _, line in sorted(forward.rows(kept, dataset, rows_of), key=lambda row: row[0])]
    if dist.get_rank() == 0:
        write_atomic(out, "".join(json.dumps(line) + "\n" for line in lines))
        kept.path.unlink()
        logger.info(f"{out}: log-probabilities of {number_of(len(lines), 'sample')}")


def main(argv: Sequence[str] | None = None) -> int:
    own = Parser(prog="qwen35.logprobs", add_help=False, allow_abbrev=False)
    own.add_argument("--out", type=Path)
    args, rest = own.parse_known_args(argv)
    code = run_rank(partial(log_probs, out=args.out), "qwen35.logprobs", __doc__, rest, kernels.KernelError)
    end_process_group()
    return code


if __name__ == "__main__":
    outlive_readers()
    leave(main())
