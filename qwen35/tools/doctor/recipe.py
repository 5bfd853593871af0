"""What is checked once all is installed: the host, the recipe, and what the recipe names.

By the run's own checks, in their order and in their words.
"""

import resource
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch

import kernels
from qwen35.checkpoint.dcp_folder import find_newest, load_notes
from qwen35.checkpoint.hf import check_export, not_read
from qwen35.checkpoint.hf_names import saved_parameters
from qwen35.checkpoint.lock import LOCK, holding
from qwen35.config.layout import check_layout
from qwen35.config.load import load_settings
from qwen35.config.schema import Settings
from qwen35.data import MicroBatches
from qwen35.data.chat_template import describe
from qwen35.data.style import style_of
from qwen35.data.tokenized import Progress
from qwen35.device import HOST, enable_determinism
from qwen35.errors import USER_ERRORS, SettingError, one_line
from qwen35.model import load_config
from qwen35.network import interface_of
from qwen35.tools.address import DEFAULT_PORT, check_address
from qwen35.tools.doctor.host import Finding, Machine, note, ok, wrong
from qwen35.training.adapters import build_model, serving_warnings
from qwen35.training.best import Best
from qwen35.training.expert_balance import kept
from qwen35.training.length import count_steps
from qwen35.training.parameter_groups import check_new_tokens, check_visuals, count
from qwen35.training.resume import changes, check_disk, check_extra, check_finished, check_info, make_extra
from qwen35.training.start import Start, choose_weights
from qwen35.training.trackers import check_installed
from qwen35.training.validation import Validation
from qwen35.wording import number_of

GIB = 2**30
MIN_MEMORY = 2 * GIB  # a process that only imports torch takes half of that
OPEN_FILES = 1024  # every tensor on its way from a data loader is an open file
SECONDS = 30.0  # for reading the records of a set
BATCHES = 3  # in flight for each worker of a data loader: two prefetched, one in use
NO_CACHE = "data.dataset_param.basic_parameters.cache_dir=null"  # nothing is written
TINY = ("configs/tiny.yaml", "configs/lora/tiny.yaml")
TINY_MAKES = ("ckpt/hf_path/tiny", "ckpt/mm_path/tiny", "runs/tiny_base/hf", "data/digits/train.json")
ALL_READ = "the run reads them all, compares the lengths of all with cutoff_len, and a resume's with its checkpoint"
TODO = {
    "recipe": "change the setting, or NODES and NPUS_PER_NODE",
    "kernels": "see python -m kernels",
    "model": "model_name_or_path is a whole Hugging Face folder of a Qwen3.5, as make download makes it",
    "template": "keep the chat_template.jinja that the checkpoint was published with",
    "weights": "make download fetches a model for init_from_hf_path, make convert makes the folder of training.load of it",
    "disk": "see training.save in docs/settings.md",
    "data": "correct the records or the settings; make show prints samples as the training sees them",
}


class _TimeIsUpError(Exception):
    """Reading takes too long; the message says how much was read until then, and is in order."""


@contextmanager
def checking(found: list[Finding], subject: str, todo: str = "") -> Iterator[None]:
    """Add the error of the block to the findings, and go on; one of a setting is the recipe's."""
    try:
        yield
    except _TimeIsUpError as end:
        found.append(note(subject, str(end), ALL_READ))
    except (*USER_ERRORS, kernels.KernelError) as error:
        if isinstance(error, SettingError) and not todo:
            subject = "recipe"
        found.append(wrong(subject, one_line(error), todo or TODO[subject]))


def for_seconds() -> Progress:
    """What a set calls for each record: it ends the reading after SECONDS."""
    count, end = 0, time.monotonic() + SECONDS

    def progress(record: str, records: int) -> None:
        nonlocal count
        count += records
        if time.monotonic() > end:
            raise _TimeIsUpError(f"no fault in the first {count:,} records, which took {SECONDS:.0f} s")

    return progress


def gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / 2**20:,.0f} MiB"


def host(m: Machine) -> list[Finding]:
    """Memory, open files, the address of node 0, and the interfaces that variables name."""
    memory = psutil.virtual_memory()
    fact = f"{gib(memory.available)} of {gib(memory.total)} available"
    found = [ok("memory", fact) if memory.available >= MIN_MEMORY else wrong("memory", fact, "end other programs")]
    if 0 <= (soft := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < OPEN_FILES:
        found.append(wrong("open files", f"at most {soft} a process", f"ulimit -n {OPEN_FILES}, before the run"))
    nodes, is_first = m.number("NODES", 1), m.number("NODE_RANK", 0) == 0
    port = m.number("MASTER_PORT", DEFAULT_PORT if nodes > 1 else 0)
    with checking(found, "node 0", "env.sh describes MASTER_ADDR and MASTER_PORT"):
        check_address(m.get("MASTER_ADDR") or "localhost", port if is_first else None, nodes == 1)
    for name in ("NODE_ADDR", "HCCL_IF_IP") if m.accelerator else ("NODE_ADDR",):
        with checking(found, name, "an address of this machine's own: ip address"):
            if m.get(name):
                interface_of(m.get(name), name)
    # gloo takes full names, all of which must exist. HCCL takes prefixes of names, full names after
    # "=", and excludes those after "^".
    names = sorted(name for _, name in socket.if_nameindex())
    todo = f"there are {', '.join(names)}"
    if missing := [n for n in m.get("GLOO_SOCKET_IFNAME").split(",") if n and n not in names]:
        found.append(wrong("GLOO_SOCKET_IFNAME", f"no interface {', '.join(missing)}", todo))
    if m.accelerator and (pattern := m.get("HCCL_SOCKET_IFNAME")):
        words = tuple(pattern.lstrip("^=").split(","))
        matching = [n for n in names if (n in words if "=" in pattern[:2] else n.startswith(words))]
        if not [n for n in names if (n in matching) != (pattern[0] == "^")]:
            found.append(wrong("HCCL_SOCKET_IFNAME", f"{pattern} matches no interface", todo))
    return found


def recipe(m: Machine, config: str, overrides: list[str]) -> list[Finding]:
    try:
        s = load_settings(config, [*overrides, NO_CACHE])
    except SettingError as error:
        return [wrong("recipe", str(error), "CONFIG is the recipe, ARGS has settings that replace its own")]
    found, world = [ok("recipe", config)], m.number("NODES", 1) * m.processes()
    with checking(found, "recipe"):
        check_layout(s, world)
        if s.training.deterministic:
            enable_determinism()
    with checking(found, "trackers", "install it, or leave it out of training.report_to"):
        check_installed(s.training.report_to)
    with checking(found, "kernels"):
        kernels.select(m.accelerator or HOST.type, s.model.kernels)
    named = {s.model.model_name_or_path, s.training.load, s.data.dataset_param.basic_parameters.dataset} - {None}
    missing = [name for name in TINY_MAKES if name in named and not (m.root / name).exists()]
    is_tiny = Path(config).absolute() in [(m.root / name).absolute() for name in TINY]
    if missing and is_tiny and named <= {*TINY_MAKES}:
        return [*found, note("recipe", f"not made yet: {', '.join(missing)}", "make finetune makes them first")]
    with checking(found, "model"):
        look(m, s, found, world)
    return found


def look(m: Machine, s: Settings, found: list[Finding], world: int) -> None:
    """At the model, its first weights, all records, and the space for batches and checkpoints.

    Raises the errors of the model.
    """
    t, data, folder, save = s.training, s.data.dataset_param, s.model.model_name_or_path, Path(s.training.save)
    unread, model = not_read(folder), build_model(s, load_config(folder))
    check_export(model, folder)
    trained, frozen = (count(model.parameters(), kind) for kind in (True, False))
    found.append(ok("model", f"{folder}: {trained + frozen:,} parameters, {trained:,} trained"))
    with checking(found, "template"):
        found.append(ok("template", describe(s.tokenizer_dir, style_of(s.tokenizer_dir, data.basic_parameters))))
    loaded, done, steps = None, 0, t.train_iters
    with checking(found, "weights"):
        find_newest(save)
        start = Start(choose_weights(s), model, s)
        unread += start.unread
        if start.info and start.step:
            check_info(start.info, s, world)
            loaded, done = start.info, start.step
        notes = [line for of in {save, Path(t.load or "")} for line in load_notes(of, start.path)]
        found.append(ok("weights", "; ".join([*start.notes, *start.warnings, *notes]).removeprefix("weights ")))
    found += [note("model", line, "ignore this if training does not need it") for line in unread]
    found += [note("model", line) for line in serving_warnings(model)]
    vision, loader = model.config.vision, s.data.dataloader_param
    if vision and loader.num_workers:  # tokens alone take next to nothing
        most = data.basic_parameters.cutoff_len * t.micro_batch_size * vision.spatial_merge_size**2  # patches
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * 4  # bytes in fp32
        all_batches = m.processes() * loader.num_workers * BATCHES * patch
        with checking(found, "/dev/shm", "mount it, as containers do by default"):
            found.append(shared_memory(m, all_batches * loader.patch_bucket, all_batches * most))
    batches: MicroBatches | None = None
    with checking(found, "data", TODO["data"]):
        batches = MicroBatches(s, 0, 1, progress=for_seconds())
        steps = count_steps(s, batches, world)[0]
        if loaded:
            over = Best.before(t, loaded).why_over(t.early_stopping_patience)
            if over and done < steps:
                found.append(note("recipe", f"{over}: the run is over after step {done} of {steps}"))
                steps = done
            check_extra(loaded, make_extra(s, model.config, batches, world), s)
            kept(t, loaded)  # raises if it is damaged
            if done >= steps:
                check_finished(save, done, changes(loaded.path.parent, s), s)
        first, *others = batches.report().splitlines()
        found.append(ok("data", first.removeprefix("data: ")))
        others += [*batches.notes, *check_visuals(model, batches.dataset.images + batches.dataset.videos)]
        others += check_new_tokens(model, batches.dataset.new_tokens())
        found += [note("data", line.removeprefix("data: ")) for line in others]
    with checking(found, "disk"):  # now that the number of steps is known
        if (save / LOCK).exists():
            with holding(save):  # no other job does
                pass
        length = f"over {number_of(steps, 'step')}, " if steps and t.train_epochs else ""
        needed = check_disk(t, saved_parameters(model).values(), done, t.train_iters or steps)
        found.append(ok("disk", f"{save}: {length}{needed}"))
    with checking(found, "validation", TODO["data"]):
        if s.validation:
            alone: Any = SimpleNamespace(data_rank=0, data_size=1)  # all that is read of the meshes here
            validation = Validation(s.validation, alone, HOST, torch.float32, for_seconds(), data)
            report = validation.report(batches.dataset if batches else None)
            found.append(ok("validation", report.partition(": ")[2]))


def shared_memory(m: Machine, least: int, most: int) -> Finding:
    """Loaders pass batches through /dev/shm: `least` bytes, `most` if full of images."""
    todo = "start the container with a larger --shm-size, or set data.dataloader_param.num_workers=0"
    free = shutil.disk_usage(m.files / "dev/shm").free
    if free >= most:
        return ok("/dev/shm", f"{gib(free)} free, the data loaders need {gib(most)} at most")
    if free >= least:
        return note("/dev/shm", f"{gib(free)} free, enough unless batches are full of images ({gib(most)})", todo)
    return wrong("/dev/shm", f"{gib(free)} free, the data loaders need {gib(least)}", todo)
