"""Fine-tune a model, one process per device: `python -m qwen35.train CONFIG [a.b=c …]`.

train() calls setup() and loop(), which calls train_step(). Only this file ties the rooms together.
It does not know the launcher: whatever sets RANK, WORLD_SIZE and MASTER_ADDR can start it.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

import kernels
from kernels.host import to_device
from qwen35.batch import PackedBatch
from qwen35.checkpoint.async_save import Saver
from qwen35.checkpoint.dcp_folder import load_notes
from qwen35.checkpoint.dcp_write import run_sharing_errors
from qwen35.checkpoint.folders import write_atomic
from qwen35.checkpoint.hf import check_export, not_read
from qwen35.checkpoint.hf_names import saved_parameters
from qwen35.checkpoint.lock import holding
from qwen35.config.layout import check_layout
from qwen35.config.load import to_yaml
from qwen35.config.schema import Settings
from qwen35.console import outlive_readers
from qwen35.data import MicroBatches
from qwen35.data.other_tokenizers import other_tokenizers
from qwen35.device import enable_determinism, end_process_group, has_own_memory, init_process
from qwen35.heartbeat import Heartbeat
from qwen35.log import log_to, logger
from qwen35.model import Qwen35, load_config
from qwen35.parallel.activation_offload import Offload
from qwen35.parallel.context_parallel import apply_context_parallel, shard_batch
from qwen35.parallel.fsdp import reduce_replicated, shard
from qwen35.parallel.mesh import Meshes, make_meshes
from qwen35.preflight import check_nodes
from qwen35.processes import stop_code, stop_request
from qwen35.rank import leave, run_rank
from qwen35.tools.compilation import DTYPES, compiled
from qwen35.training.adamw import AdamW
from qwen35.training.adapters import choose_trained, serving_warnings
from qwen35.training.flops import Flops, token_counts
from qwen35.training.history import begin_history, note_answers
from qwen35.training.loss import divisors, make_mtp_targets, token_weights
from qwen35.training.metrics import Metrics, RunError, StepRecord
from qwen35.training.optimizer import GradientNorm, learning_rate, make_optimizer
from qwen35.training.parameter_groups import check_new_tokens, check_visuals, parameter_table
from qwen35.training.profiler import Profile
from qwen35.training.report import write_report
from qwen35.training.resume import (
    changes,
    check_disk,
    check_extra,
    check_same_data,
    finish,
    make_extra,
    read_checked_info,
    repair_save_folder,
    restore_rng,
    rng_states,
    seed_all,
    sequences_per_step,
)
from qwen35.training.start import Start, find_weights
from qwen35.training.summary import end_message, start_message, steps_message
from qwen35.training.trackers import check_installed
from qwen35.training.validation import Validation

# Collective timeouts exceed the watchdog's by this many seconds, so the watchdog reports first.
TIMEOUT_MARGIN = 30.0


@dataclass
class Run:
    settings: Settings
    device: torch.device
    meshes: Meshes
    model: Qwen35
    optimizer: AdamW
    gradients: GradientNorm
    micro_batches: Iterator[PackedBatch]
    step: int  # optimizer steps done so far
    extra: dict[str, Any]  # contents of extra.json; a run that resumes must have the same
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    validation: Validation | None = None
    steps_per_epoch: float = float("inf")
    data: MicroBatches | None = None
    about: str = ""  # what the log says of devices, arithmetic and parameters

    def __post_init__(self) -> None:
        self.flops = Flops(self.model)

    def beat(self, activity: str) -> None:
        """Report the phase that begins now to the launcher's watchdog."""
        self.heartbeat.at(f"step {self.step + 1}: {activity}")

    def stop_loading(self) -> None:
        """End the loader's workers: one that dies later would still fail the run."""
        self.micro_batches = iter(())
        if self.validation:
            self.validation.set.close()


def setup(settings: Settings, device: torch.device, heartbeat: Heartbeat) -> Run:
    """Build, freeze and shard the model, read the data, load the weights, find the first step.

    Errors that the settings and file headers reveal are raised before any expensive work.
    """
    t, m = settings.training, settings.model
    check_installed(t.report_to)
    heartbeat.at("building the model")
    seed_all(t.seed)
    ignored = not_read(m.model_name_or_path)  # messages about unused contents of the model folder
    config = load_config(m.model_name_or_path)
    layout = check_layout(settings, dist.get_world_size())
    meshes = make_meshes(device.type, settings.parallel, t.timeout + TIMEOUT_MARGIN)
    dist.barrier()  # rank 0 hosts the store that new groups need; only after this may an error end rank 0
    implementations = compiled(settings, config.text, device, heartbeat, logger.info)
    heartbeat.at("building the model")
    with torch.device("meta" if t.init_model_with_meta_device else device):
        model = Qwen35(config, kernels=implementations, mtp=bool(m.mtp_num_layers))
    choose_trained(model, settings)
    start = Start(find_weights(settings), model, settings)
    weights = start.path
    check_export(model, m.model_name_or_path)
    ignored += not_read(start.base) if start.is_hf and start.base != Path(m.model_name_or_path) else []
    ignored += other_tokenizers(settings, start.base)
    checkpoint = read_checked_info(weights, settings, device) if start.goes_on else None
    step = (checkpoint.step or 0) if checkpoint else 0  # converted weights have no step
    run_sharing_errors(lambda: dist.get_rank() or check_disk(t, saved_parameters(model).values(), step), None, t.save)
    heartbeat.at("reading the data")
    is_hidden = dist.get_rank() > 0 or None  # None: hidden unless standard error is a terminal
    with tqdm(desc="reading the data", unit=" records", disable=is_hidden, leave=False) as bar:

        def on_records(record: str, count: int) -> None:  # the timeout starts anew with each record
            heartbeat.at(f"reading the data: {record}")
            bar.update(count)

        micro_batches = MicroBatches(
            settings, meshes.data_rank, meshes.data_size, progress=on_records, pin=has_own_memory(device)
        )
        val, train_set = settings.validation, settings.data.dataset_param
        validation = Validation(val, meshes, device, DTYPES[t.dtype], on_records, train_set) if val else None
    heartbeat.at("comparing the data with the other ranks'")
    fingerprint = f"{micro_batches.fingerprint} {micro_batches.normalization}"
    check_same_data(fingerprint + (validation.set.fingerprint if validation else ""))
    ignored += check_visuals(model, micro_batches.dataset.images + micro_batches.dataset.videos)
    ignored += check_new_tokens(model, micro_batches.dataset.new_tokens())
    heartbeat.at("sharding the model")
    before = parameter_table(model)
    optimizer = distribute(settings, model, meshes, device)
    if (table := parameter_table(model)) != before:
        raise RunError(f"sharding changed which parameters are trained:\n{before}\n{table}")
    loading = partial(heartbeat.at, f"loading {weights}")  # the timeout starts anew with each part
    loading()
    start.load(optimizer, lambda nbytes: loading())
    micro_batches.start_at(step)
    extra = make_extra(settings, config, micro_batches.fingerprint, micro_batches.normalization) | start.extra
    if checkpoint and step:
        check_extra(checkpoint, extra, settings)
        if checkpoint.rank_extra:
            restore_rng(checkpoint.rank_extra, device)
    about = start_message(settings, device, layout, model, table)
    logger.info(about)
    ignored += [*serving_warnings(model), *micro_batches.notes, *load_notes(t.load or "", weights)]
    logger.info("\n".join([*ignored, *start.notes, micro_batches.report()]))
    if validation:
        logger.info(validation.report(micro_batches.dataset))
    steps_per_epoch = micro_batches.sequences_per_epoch / sequences_per_step(settings)
    if step < t.train_iters:
        logger.info(steps_message(settings, step, steps_per_epoch))
    gradients, batches = GradientNorm(model, meshes.weights["shard"].get_group()), iter(micro_batches)
    run = Run(settings, device, meshes, model, optimizer, gradients, batches, step, extra, heartbeat, validation)
    run.steps_per_epoch, run.data, run.about = steps_per_epoch, micro_batches, about
    if step < t.train_iters and step and (changed := changes(weights.parent, settings)):
        logger.info(f"settings changed since the checkpoint: {'; '.join(changed)}")
    return run


def distribute(settings: Settings, model: Qwen35, meshes: Meshes, device: torch.device) -> AdamW:
    """Shard a plain model in place, before its weights are loaded; make the optimizer."""
    apply_context_parallel(model, meshes)
    shard(model, meshes, DTYPES[settings.training.dtype])
    if settings.training.init_model_with_meta_device:
        model.to_empty(device=device)
    model.recompute(settings.parallel.recompute)
    if settings.parallel.activation_offload:
        model.model.language_model.offload = Offload(device).stash
    return make_optimizer(model, settings.training)


def train_step(run: Run, batches: list[PackedBatch], lr: float, data_time: float) -> StepRecord:
    """One optimizer step over this rank's micro-batches. The record's values stay on the device."""
    t, loss_cfg, device, meshes = run.settings.training, run.settings.model.loss_cfg, run.device, run.meshes
    weights = [token_weights(batch, loss_cfg.loss_type) for batch in batches]
    mtp = run.settings.model.mtp_num_layers
    all_mtp_targets = [make_mtp_targets(batch, loss_cfg.loss_type) if mtp else None for batch in batches]
    counts = [token_counts(batch) for batch in batches]
    tokens, labels, images = (sum(values) for values in zip(*counts, strict=True))
    is_counting = int(meshes.ulysses_rank == 0)  # only one of the ranks that share packed sequences counts them
    counters = [*divisors(batches, all_mtp_targets, loss_cfg.loss_type), tokens, labels, images]
    rank_counters = to_device(is_counting * torch.tensor(counters, dtype=torch.float32), device)
    step_counters = rank_counters.clone()
    dist.all_reduce(step_counters)
    scale = 1 / step_counters[:3].clamp(min=1)  # for the losses: next-token, multi-token, load-balancing

    losses = torch.zeros(2 + mtp, device=device)  # cross entropy, load balancing, multi-token prediction
    text = run.model.config.text
    load = torch.zeros(len(text.layer_types) + mtp, text.num_experts, device=device) if text.num_experts else None
    flops = 0.0
    for i, (batch, weight, mtp_targets, count) in enumerate(
        zip(batches, weights, all_mtp_targets, counts, strict=True), 1
    ):
        run.beat(f"micro-batch {i} of {len(batches)}, forward")
        flops += is_counting * run.flops.of_batch(batch, count, mtp_targets)
        batch, weight, mtp_targets = shard_batch(batch, weight, mtp_targets, meshes.ulysses_rank, meshes.ulysses_size)
        batch, weight = batch.to(device), to_device(weight, device) * scale[0]
        if mtp_targets is not None:
            mtp_targets = mtp_targets.to(device)
            mtp_targets = replace(mtp_targets, weights=mtp_targets.weights * scale[1])
        loss, aux, token_loss = run.model.loss(
            batch, weight, mtp_targets, run.settings.model.mtp_loss_scaling_factor, load
        )
        run.beat(f"micro-batch {i} of {len(batches)}, backward")
        aux = scale[2] * aux
        (loss + loss_cfg.router_aux_loss_coef * aux).backward()
        losses[0] += (weight * token_loss[: len(weight)]).sum()
        losses[1] += is_counting * aux.detach()
        if mtp_targets is not None:
            losses[2] += (mtp_targets.weights * token_loss[len(weight) :]).sum()

    run.beat("gradient norm and optimizer")
    reduce_replicated(run.model)
    squares = run.gradients.squares()
    if t.clip_grad:
        run.gradients.clip(squares.sum().sqrt(), t.clip_grad)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
        # True on the device: no rank has tokens for this part, so it skips the step. None: no skip.
        place, own = (5, images) if group["visual"] else (3, tokens)
        group["skip"] = None if own else step_counters[place] == 0
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.step += 1
    sums = torch.cat([losses[:2], rank_counters[3:], losses[2:]])
    bad_records = tuple(message for batch in batches[: is_counting * len(batches)] for message in batch.bad_records)
    return StepRecord(run.step, lr, data_time, flops, sums, squares, bad_records, load)


def train(settings: Settings) -> int:
    """Train a recipe, or resume it, to the end. Every rank calls it. Returns the exit code."""
    t, folder = settings.training, Path(settings.training.save)
    if t.deterministic:
        enable_determinism()
    heartbeat = Heartbeat(t.timeout)
    with ExitStack() as exit_stack:
        exit_stack.callback(heartbeat.close)
        heartbeat.at("joining the process group", t.timeout + 2 * TIMEOUT_MARGIN)
        device = init_process(t.timeout + TIMEOUT_MARGIN)
        heartbeat.at("comparing the nodes and measuring an all-reduce")
        check_nodes(settings, device)

        def lock_save_folder() -> None:
            if dist.get_rank() == 0:
                warning = exit_stack.enter_context(holding(folder))
                for line in [*([warning] if warning else []), *repair_save_folder(folder)]:
                    logger.warning(line)

        heartbeat.at(f"locking {folder}")
        run_sharing_errors(lock_save_folder, None, f"{folder} cannot be used")
        run = setup(settings, device, heartbeat)
        if run.step < t.train_iters:
            return loop(run, folder)
        return finish(settings, folder, run.step)


def loop(run: Run, folder: Path) -> int:
    """Train to the end, or until a stop signal: then save at the next log step. The exit code."""
    t, groups = run.settings.training, list(run.gradients.groups)
    first, began = run.step + 1, time.perf_counter()
    first_due = run.step - run.step % t.save_interval + t.save_interval if t.save_interval else t.train_iters
    in_background = t.async_save and first_due < t.train_iters
    if run.validation:
        run.validation.set.start()
    with (
        stop_request() as stop,
        Saver(folder, run.model, run.optimizer, in_background, t.save_total_limit, t.timeout + TIMEOUT_MARGIN) as saver,
        Profile(t.profile, folder, run.device) as profile,
    ):
        if dist.get_rank() == 0:
            write_atomic(folder / "config.yaml", to_yaml(run.settings))
            log_to(folder / "train.log")
        dist.barrier()
        if t.profile.steps:
            logger.info(profile.plan(run.step))
        metrics = Metrics(folder, groups, t.train_iters, run.step, run.device, t.peak_tflops, run.steps_per_epoch)
        if dist.get_rank() == 0 and run.data:
            metrics.trackers = begin_history(run.settings, run.step, run.about, run.data)
        is_stopping = False
        while run.step < t.train_iters and not is_stopping:
            start = time.perf_counter()
            profile.before(run.step + 1)
            run.beat("waiting for its data")
            batches = list(islice(run.micro_batches, t.gradient_accumulation_steps))
            metrics.record(train_step(run, batches, learning_rate(run.step, t), time.perf_counter() - start))
            saver.check()
            profile.after(run.step)
            is_save_due = run.step == t.train_iters or bool(t.save_interval and run.step % t.save_interval == 0)
            validation = run.validation if run.validation and run.validation.is_due(run.step) else None
            if is_save_due or validation or run.step % t.log_interval == 0:
                run.heartbeat.at(f"step {run.step}: waiting for the device and the other ranks' metrics")
                is_stopping = metrics.flush(t.zero_grad_patience, stop.number is not None)
            if validation and (not is_stopping or run.step == t.train_iters):
                metrics.log_validation(*validation.run(run.model, run.heartbeat, run.step))
                if validation.answers and dist.get_rank() == 0:
                    note_answers(folder, run.step, validation.answers, metrics.trackers)
            if is_save_due or is_stopping:
                is_last = is_stopping or run.step == t.train_iters
                if is_last:
                    run.stop_loading()
                run.heartbeat.at(f"step {run.step}: saving the checkpoint")
                waited = saver.save(run.step, run.extra, rng_states(run.device), is_last)
                if waited and not is_last:
                    logger.info(f"step {run.step} waited {waited:.1f} s for the previous checkpoint to be written")
                if dist.get_rank() == 0:
                    saver.run_after(partial(write_report, folder))
                metrics.restart_clock()  # the time of a save belongs to no step
        metrics.close()
    steps = range(first, run.step + 1)
    logger.info(end_message(run.settings, steps, time.perf_counter() - began, saver.saves, saver.stalled))
    return stop_code(stop.number) if run.step < t.train_iters else 0


def main(argv: list[str] | None = None) -> int:
    code = run_rank(train, "qwen35.train", (__doc__ or "").split("\n")[0], argv, kernels.KernelError)
    end_process_group()
    return code


if __name__ == "__main__":
    outlive_readers()
    leave(main())
