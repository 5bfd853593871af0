"""Fine-tune a model, one process per device: `python -m qwen35.train CONFIG [a.b=c …]`.

train() calls setup() and loop(), which calls train_step(). Only this file ties the rooms together.
It does not know the launcher: whatever sets RANK, WORLD_SIZE and MASTER_ADDR can start it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import kernels
from kernels.host import to_device
from qwen35.batch import PackedBatch
from qwen35.checkpoint.async_save import Saver
from qwen35.checkpoint.dcp_folder import load_notes
from qwen35.checkpoint.dcp_write import run_sharing_errors
from qwen35.checkpoint.folders import write_atomic
from qwen35.checkpoint.hf import check_export, not_read
from qwen35.checkpoint.lock import holding
from qwen35.config.layout import check_layout
from qwen35.config.load import to_yaml
from qwen35.config.schema import Settings
from qwen35.console import outlive_readers
from qwen35.device import enable_determinism, end_process_group, init_process
from qwen35.heartbeat import Heartbeat
from qwen35.log import log_to, log_warnings, logger
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
from qwen35.training.adapters import build_model, serving_warnings
from qwen35.training.best import Best
from qwen35.training.dpo import METRICS, preference_loss
from qwen35.training.expert_balance import ExpertBalance, kept
from qwen35.training.flops import Flops, token_counts
from qwen35.training.history import begin_history, note_answers
from qwen35.training.length import count_steps, end_step
from qwen35.training.loss import divisors, make_mtp_targets, token_loss, token_weights
from qwen35.training.metrics import Metrics, RunError, StepRecord
from qwen35.training.neftune import embedding_noise
from qwen35.training.optimizer import GradientNorm, group_table, learning_rate, make_optimizer, prepare_step
from qwen35.training.parameter_groups import check_new_tokens, check_visuals, parameter_table
from qwen35.training.profiler import Profile
from qwen35.training.read_data import read_data
from qwen35.training.reference import Forward
from qwen35.training.report import write_report
from qwen35.training.resume import (
    changes,
    check_extra,
    check_place,
    check_room,
    check_same_data,
    is_finished,
    make_extra,
    repair_save_folder,
    restore_rng,
    rng_states,
    save_steps,
    seed_all,
)
from qwen35.training.start import REFERENCE, Start, find_weights
from qwen35.training.summary import end_message, start_message, steps_message
from qwen35.training.trackers import Tracker, check_installed
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
    changed: list[str] = field(default_factory=list)  # settings that differ from those of the run it resumes
    steps: int = 0  # those of the whole run
    best: Best = field(default_factory=lambda: Best("loss"))
    steps_per_epoch: float = float("inf")
    history: Callable[[], list[Tracker]] = list  # notes the start, opens the trackers

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
    model = build_model(settings, config, implementations, "meta" if t.init_model_with_meta_device else device)
    start = Start(find_weights(settings), model, settings)
    weights = start.path
    check_export(model, m.model_name_or_path)
    ignored += start.unread
    checkpoint, step = start.info, start.step
    if checkpoint and step:
        check_place(checkpoint, settings, device)
    check_room(settings, model, step, t.train_iters)
    micro_batches, validation = read_data(settings, meshes, device, DTYPES[t.dtype], heartbeat)
    heartbeat.at("comparing the data with the other ranks'")
    fingerprint = f"{micro_batches.fingerprint} {micro_batches.normalization}"
    check_same_data(fingerprint + (validation.set.fingerprint if validation else ""))
    best = Best.of(t, checkpoint, validation.set.fingerprint if validation else "")
    steps, steps_per_epoch = count_steps(settings, micro_batches)
    steps = end_step(best, step, steps, t.early_stopping_patience)
    room = check_room(settings, model, step, steps)
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
    extra = make_extra(settings, config, micro_batches) | start.extra | kept(t, checkpoint)
    if checkpoint and step:
        check_extra(checkpoint, extra, settings)
        if checkpoint.rank_extra:
            restore_rng(checkpoint.rank_extra, device)
    if t.stage == "dpo" and not t.lora:
        forward = Forward(settings, model, meshes, device, heartbeat.at)
        for data in (micro_batches.dataset, *([validation.set.dataset] if validation else [])):
            forward.add_reference(data, start.extra[REFERENCE], is_trained=step > 0)
    about = start_message(settings, device, layout, model, f"{table}\n{group_table(optimizer, t.lr)}")
    notes = [*serving_warnings(model), *micro_batches.notes, *start.notes]
    logger.info("\n".join([about, *notes, micro_batches.summary()]))
    log_warnings([*ignored, *load_notes(t.load or "", weights), *start.warnings, *micro_batches.warnings()])
    if validation:
        validation.log_report(micro_batches.dataset)
    if step < steps:
        logger.info(f"{steps_message(settings, step, steps, steps_per_epoch)}\n{room}")
    gradients, batches = GradientNorm(model, meshes.weights["shard"].get_group()), iter(micro_batches)
    run = Run(settings, device, meshes, model, optimizer, gradients, batches, step, extra, heartbeat, validation)
    run.changed = changes(weights.parent, settings) if step else []
    run.steps, run.steps_per_epoch, run.best = steps, steps_per_epoch, best
    run.history = partial(begin_history, settings, step, steps, about, micro_batches)
    return run


def distribute(settings: Settings, model: Qwen35, meshes: Meshes, device: torch.device) -> AdamW:
    """Shard a plain model in place, before its weights are loaded; make the optimizer."""
    apply_context_parallel(model, meshes)
    shard(model, meshes, DTYPES[settings.training.dtype], settings.training.expert_balance is not None)
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
    mtp, mtp_factor = run.settings.model.mtp_num_layers, run.settings.model.mtp_loss_scaling_factor
    all_mtp_targets = [make_mtp_targets(batch, loss_cfg.loss_type) if mtp else None for batch in batches]
    counts = [token_counts(batch) for batch in batches]
    tokens, labels, images = (sum(values) for values in zip(*counts, strict=True))
    is_counting = int(meshes.ulysses_rank == 0)  # only one of the ranks that share packed sequences counts them
    counters = [*divisors(batches, all_mtp_targets, loss_cfg.loss_type), tokens, labels, images]
    rank_counters = to_device(is_counting * torch.tensor(counters, dtype=torch.float32), device)
    step_counters = rank_counters.clone()
    dist.all_reduce(step_counters)
    scale = 1 / step_counters[:3].clamp(min=1)  # for the losses: next-token, multi-token, load-balancing

    also = METRICS if t.stage == "dpo" else ("mtp_loss",) * mtp
    losses = torch.zeros(2 + len(also), device=device)  # the stage's loss, load balancing, what else it measures
    text, flops = run.model.config.text, 0.0
    load = torch.zeros(len(text.layer_types) + mtp, text.num_experts, device=device) if text.num_experts else None
    for i, (batch, weight, mtp_targets, count) in enumerate(
        zip(batches, weights, all_mtp_targets, counts, strict=True), 1
    ):
        run.beat(f"micro-batch {i} of {len(batches)}, forward")
        flops += is_counting * run.flops.of_batch(batch, count, mtp_targets)
        batch, weight, mtp_targets = shard_batch(batch, weight, mtp_targets, meshes.ulysses_rank, meshes.ulysses_size)
        batch, weight = batch.to(device), to_device(weight, device) * scale[0]
        if t.neftune_noise_alpha:
            noise = embedding_noise(batch, text.hidden_size, t, meshes, run.step * len(batches) + i - 1, device)
            batch = replace(batch, embedding_noise=noise)
        if mtp_targets is not None:
            mtp_targets = mtp_targets.to(device)
            mtp_targets = replace(mtp_targets, weights=mtp_targets.weights * scale[1])
        if t.stage == "dpo":
            loss, aux, found = preference_loss(run.model, batch, t.dpo, meshes, scale[0], load)
        else:
            loss, aux, found = token_loss(run.model, batch, weight, mtp_targets, mtp_factor, load)
        run.beat(f"micro-batch {i} of {len(batches)}, backward")
        aux = scale[2] * aux
        (loss + loss_cfg.router_aux_loss_coef * aux).backward()
        losses += torch.stack([found[0], is_counting * aux.detach(), *found[1:]])

    run.beat("gradient norm and optimizer")
    reduce_replicated(run.model)
    squares = run.gradients.squares()
    if t.clip_grad:
        run.gradients.clip(squares.sum().sqrt(), t.clip_grad)
    prepare_step(run.optimizer, lr, tokens, images, step_counters)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.step += 1
    sums = torch.cat([losses[:2], rank_counters[3:], losses[2:]])
    bad_records = tuple(message for batch in batches[: is_counting * len(batches)] for message in batch.bad_records)
    return StepRecord(run.step, lr, data_time, flops, sums, squares, bad_records, load, also)


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
        return 0 if is_finished(settings, run.step, run.steps, run.changed) else loop(run, folder)


def loop(run: Run, folder: Path) -> int:
    """Train to the end, or until a stop signal: then save at the next log step. The exit code."""
    t, groups = run.settings.training, list(run.gradients.groups)
    first, began, is_stopping = run.step + 1, time.perf_counter(), False
    in_background = t.async_save and len(save_steps(t, run.step, run.steps)) > 1
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
        balance = ExpertBalance(run.model, run.optimizer, t.expert_balance, run.extra)
        metrics = Metrics(folder, groups, run.steps, run.step, run.device, t.peak_tflops, run.steps_per_epoch)
        if dist.get_rank() == 0:
            metrics.trackers = run.history()
        while run.step < run.steps and not is_stopping:
            start = time.perf_counter()
            profile.before(run.step + 1)
            run.beat("waiting for its data")
            batches = list(islice(run.micro_batches, t.gradient_accumulation_steps))
            metrics.record(train_step(run, batches, learning_rate(run.step, t, run.steps), time.perf_counter() - start))
            saver.check()
            profile.after(run.step)
            is_save_due = bool(t.save_interval and run.step % t.save_interval == 0)
            validation = run.validation if run.validation and run.validation.is_due(run.step, run.steps) else None
            if is_save_due or validation or run.step == run.steps or run.step % t.log_interval == 0:
                run.heartbeat.at(f"step {run.step}: waiting for the device and the other ranks' metrics")
                is_stopping = metrics.flush(t.zero_grad_patience, stop.number is not None)
            if validation and (not is_stopping or run.step == run.steps):
                found, messages = validation.run(run.model, run.heartbeat, run.step)
                metrics.log_validation(found, messages)
                note_answers(folder, run.step, validation.answers, metrics.trackers)
                run.best.add(run.step, found)
                run.steps = end_step(run.best, run.step, run.steps, t.early_stopping_patience)
            is_best = t.save_best is not None and run.best.step == run.step
            is_last = is_stopping or run.step == run.steps
            if is_save_due or is_best or is_last:
                if is_last:
                    run.stop_loading()
                run.heartbeat.at(f"step {run.step}: saving the checkpoint")
                with balance.saving(metrics, run.extra | run.best.extra(), is_save_due or is_best, is_last) as extra:
                    waited = saver.save(run.step, extra, rng_states(run.device), is_last, is_best)
                if waited and not is_last:
                    logger.info(f"step {run.step} waited {waited:.1f} s for the previous checkpoint to be written")
                if dist.get_rank() == 0:
                    saver.run_after(partial(write_report, folder))
                metrics.restart_clock()  # the time of a save belongs to no step
        metrics.close()
    steps = range(first, run.step + 1)
    seconds, best = time.perf_counter() - began, run.best.message(t.save) if t.save_best else ""
    logger.info(end_message(run.settings, steps, run.steps, seconds, saver.saves, saver.stalled, best))
    return stop_code(stop.number) if run.step < run.steps else 0


def main(argv: list[str] | None = None) -> int:
    code = run_rank(train, "qwen35.train", (__doc__ or "").split("\n")[0], argv, kernels.KernelError)
    end_process_group()
    return code


if __name__ == "__main__":
    outlive_readers()
    leave(main())
