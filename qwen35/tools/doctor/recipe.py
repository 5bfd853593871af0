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
from qwen35.checkpoint.dcp import CheckpointInfo, read_info
from qwen35.checkpoint.dcp_folder import find_newest, load_notes
from qwen35.checkpoint.hf import check_export, not_read
from qwen35.checkpoint.hf_names import saved_parameters
from qwen35.checkpoint.lock import LOCK, holding
from qwen35.config.layout import check_layout
from qwen35.config.load import load_settings
from qwen35.config.schema import Settings
from qwen35.data import MicroBatches
from qwen35.data.chat_template import describe
from qwen35.data.other_tokenizers import other_tokenizers
from qwen35.data.style import style_of
from qwen35.data.tokenized import Progress
from qwen35.device import HOST, enable_determinism
from qwen35.errors import USER_ERRORS, SettingError, one_line
from qwen35.model import Qwen35, load_config
from qwen35.network import interface_of
from qwen35.tools.address import DEFAULT_PORT, check_address
from qwen35.tools.doctor.host import Finding, Machine, note, ok, wrong
from qwen35.training.adapters import choose_trained, serving_warnings
from qwen35.training.best import Best
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
    """Reading takes too long; what was read until then is in order."""


@contextmanager
def checking(found: list[Finding], subject: str, todo: str = "") -> Iterator[None]:
    """Add the error of the block to the findings, and go on; one of a setting is the recipe's."""
    try:
        yield
    except (*USER_ERRORS, kernels.KernelError) as error:
        if isinstance(error, SettingError) and not todo:
            subject = "recipe"
        found.append(wrong(subject, one_line(error), todo or TODO[subject]))


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
    if missing and named <= set(TINY_MAKES) and is_tiny:
        return [*found, note("recipe", f"not made yet: {', '.join(missing)}", "make finetune makes them first")]
    with checking(found, "model"):
        whole, loaded = model(m, s, found, world)
        found += records(s, whole, loaded, world)
    return found


def model(m: Machine, s: Settings, found: list[Finding], world: int) -> tuple[Qwen35, CheckpointInfo | None]:
    """The model, the weights it starts from, and the space that batches and checkpoints need.

    Returns the model without values, and the checkpoint of a run that goes on.
    """
    folder, save, t = s.model.model_name_or_path, Path(s.training.save), s.training
    unread, config, loaded = not_read(folder), load_config(folder), None
    with torch.device("meta"):
        whole = Qwen35(config, mtp=bool(s.model.mtp_num_layers))
    choose_trained(whole, s)
    check_export(whole, folder)
    trained, frozen = (count(whole.parameters(), kind) for kind in (True, False))
    found.append(ok("model", f"{folder}: {trained + frozen:,} parameters, {trained:,} trained"))
    with checking(found, "template"):
        style = style_of(s.tokenizer_dir, s.data.dataset_param.basic_parameters)
        found.append(ok("template", describe(s.tokenizer_dir, style)))
    with checking(found, "weights"):
        find_newest(save)
        start = Start(choose_weights(s), whole, s)
        unread += not_read(start.base) if start.is_hf and start.base != Path(folder) else []
        unread += other_tokenizers(s, start.base)
        if start.goes_on and (info := read_info(start.path)).step:
            check_info(info, s, world)
            loaded = info
        is_named = start.path == Path(t.load or "")  # and not its folder
        notes = [] if is_named else load_notes(start.path.parent, start.path)
        facts = [*start.notes, *start.warnings, *notes]
        found.append(ok("weights", "; ".join(facts).removeprefix("weights ")))
    found += [note("model", line, "ignore this if training does not need it") for line in unread]
    found += [note("model", line) for line in serving_warnings(whole)]
    with checking(found, "disk"):
        if (save / LOCK).exists():
            with holding(save):  # no other job does
                pass
        step = (loaded and loaded.step) or 0
        found.append(ok("disk", f"{save}: {check_disk(t, saved_parameters(whole).values(), step, t.train_iters)}"))
    vision, loader = config.vision, s.data.dataloader_param
    if vision is None:  # tokens alone take next to nothing
        return whole, loaded
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * 4  # bytes in fp32
    patches = s.data.dataset_param.basic_parameters.cutoff_len * t.micro_batch_size * vision.spatial_merge_size**2
    if batches := m.processes() * loader.num_workers * BATCHES:
        with checking(found, "/dev/shm", "mount it, as containers do by default"):
            found.append(shared_memory(m, batches * loader.patch_bucket * patch, batches * patches * patch))
    return whole, loaded


def shared_memory(m: Machine, least: int, most: int) -> Finding:
    """Loaders pass batches through /dev/shm: `least` bytes, `most` if full of images."""
    todo = "start the container with a larger --shm-size, or set data.dataloader_param.num_workers=0"
    free = shutil.disk_usage(m.files / "dev/shm").free
    if free >= most:
        return ok("/dev/shm", f"{gib(free)} free, the data loaders need {gib(most)} at most")
    if free >= least:
        return note("/dev/shm", f"{gib(free)} free, enough unless batches are full of images ({gib(most)})", todo)
    return wrong("/dev/shm", f"{gib(free)} free, the data loaders need {gib(least)}", todo)


def records(s: Settings, whole: Qwen35, loaded: CheckpointInfo | None, world: int) -> list[Finding]:
    """All records of both sets, read as the run does, each set for at most SECONDS.

    whole: the model. loaded: the checkpoint of a run that goes on, which must have been trained on
    the same data.
    """
    found: list[Finding] = []
    trained = None
    with reading(found, "data") as progress:
        batches = MicroBatches(s, 0, 1, progress=progress)
        trained, steps = batches.dataset, count_steps(s, batches, world)[0]
        if loaded and loaded.step:
            over = Best.before(s.training, loaded).why_over(s.training.early_stopping_patience)
            if over and loaded.step < steps:
                found.append(note("recipe", f"{over}: the run is over after step {loaded.step} of {steps}"))
                steps = loaded.step
            config = load_config(s.model.model_name_or_path)
            check_extra(loaded, make_extra(s, config, batches, world), s)
            if loaded.step >= steps:
                check_finished(Path(s.training.save), loaded.step, changes(loaded.path.parent, s), s)
        if not s.training.train_iters:  # only now is the number of checkpoints known
            with checking(found, "disk"):
                done = (loaded and loaded.step) or 0
                room = check_disk(s.training, saved_parameters(whole).values(), done, steps)
                found.append(ok("disk", f"{s.training.save}: over {number_of(steps, 'step')}, {room}"))
        first, *others = batches.report().splitlines()
        found.append(ok("data", first.removeprefix("data: ")))
        learnt = [
            *check_visuals(whole, trained.images + trained.videos),
            *check_new_tokens(whole, trained.new_tokens()),
        ]
        found += [note("data", line.removeprefix("data: ")) for line in (*others, *batches.notes, *learnt)]
    if val := s.validation:
        with reading(found, "validation") as progress:
            alone: Any = SimpleNamespace(data_rank=0, data_size=1)  # all that is read of the meshes here
            validation = Validation(val, alone, HOST, torch.float32, progress, s.data.dataset_param)
            found.append(ok("validation", validation.report(trained).partition(": ")[2]))
    return found


@contextmanager
def reading(found: list[Finding], subject: str) -> Iterator[Progress]:
    """As `checking`, with what a set calls for each record. Without more time it is a note."""
    count, end = 0, time.monotonic() + SECONDS

    def progress(record: str, records: int) -> None:
        nonlocal count
        count += records
        if time.monotonic() > end:
            raise _TimeIsUpError

    with checking(found, subject, TODO["data"]):
        try:
            yield progress
        except _TimeIsUpError:
            fact = f"no fault in the first {count:,} records, which took {SECONDS:.0f} s"
            todo = "the run reads them all, compares the lengths of all with cutoff_len, and a resume's with its checkpoint"
            found.append(note(subject, fact, todo))
