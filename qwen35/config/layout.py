"""How processes share weights, experts and sequences: arithmetic, checked before a run starts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qwen35.config.schema import ParallelSettings, Settings
from qwen35.errors import SettingError, read_object

EXPERT, ULYSSES = "parallel.expert_parallel_size", "parallel.ulysses_parallel_size"
TEXT_ONLY = ("qwen3_5_text", "qwen3_5_moe_text")  # model_type where config.json is flat, without a vision tower
DENSE = ("qwen3_5", "qwen3_5_text")


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism. world = copies * shard = copies * fsdp * ep = data * ulysses."""

    world: int  # all processes
    shard: int  # ranks that share a copy of the weights
    ep: int  # expert parallel ranks in a copy, each with different experts
    ulysses: int  # ranks that share a packed sequence

    @property
    def copies(self) -> int:
        """Copies of the weights."""
        return self.world // self.shard

    @property
    def fsdp(self) -> int:
        """Ranks that share an expert."""
        return self.shard // self.ep

    @property
    def data(self) -> int:
        """Micro-batches at a time."""
        return self.world // self.ulysses

    def __str__(self) -> str:
        text = f"weights {self.copies} x {self.shard} (copies x ranks per copy)"
        if self.ep > 1:
            text += f", experts {self.copies} x {self.fsdp} x {self.ep} (copies x ranks per expert x expert parallel)"
        if self.ulysses > 1:
            text += f", packed sequences {self.data} x {self.ulysses} (at a time x ranks per sequence)"
        return text


def layout_of(p: ParallelSettings, world: int) -> Layout:
    """The layout of so many processes. Raises SettingError if a size does not divide them."""
    shard, ep, ulysses = p.fully_shard_parallel_size or world, p.expert_parallel_size, p.ulysses_parallel_size
    for name, size, total, what in (
        ("parallel.fully_shard_parallel_size", shard, world, f"the {world} processes"),
        (EXPERT, ep, shard, f"the {shard} processes that share a copy of the weights"),
        (ULYSSES, ulysses, world, f"the {world} processes"),
    ):
        if total % size:
            raise SettingError(f"{name} {size} does not divide {what}")
    return Layout(world, shard, ep, ulysses)


def check_layout(s: Settings, world: int) -> Layout:
    """The layout. Raises SettingError for the first size of model or batch that it cannot divide.

    Reads config.json if the layout splits experts or sequences. A number that is missing there
    passes, for load_config reports that.
    """
    layout, ranks = layout_of(s.parallel, world), s.training.profile.ranks
    if s.training.profile.steps and max(ranks) >= world:
        raise SettingError(f"training.profile.ranks: there is no rank {max(ranks)} of {world}")
    folder = Path(s.model.model_name_or_path)
    path = folder if folder.suffix == ".json" else folder / "config.json"
    if (layout.ep > 1 or layout.ulysses > 1) and path.is_file():
        config = read_object(path, SettingError)
        for violation in (*_expert_rules(layout, s, config), *_ulysses_rules(layout, s, config)):
            raise SettingError(f"{violation} ({folder} on {world} processes)")
    return layout


def text_section(config: Mapping[str, Any]) -> Any:
    """What config.json says of the language model: all of it, if the model is text-only."""
    return config if config.get("model_type") in TEXT_ONLY else config.get("text_config")


def _expert_rules(layout: Layout, s: Settings, config: dict[str, Any]) -> Iterator[str]:
    text = partial(_size, text_section(config))
    if layout.ep == 1:
        return
    if config.get("model_type") in DENSE:
        yield f"{EXPERT} {layout.ep} means nothing to a dense model, which has no experts; leave it out"
    yield from _indivisible(EXPERT, layout.ep, text("num_experts"), "experts")
    shared_by = f"{layout.shard} processes that share a copy of the weights / {EXPERT} {layout.ep} ="
    for rows, what in (
        (2 * text("moe_intermediate_size"), "gate_up_proj, 2 x moe_intermediate_size"),
        (text("hidden_size"), "down_proj, hidden_size"),
    ):
        yield from _indivisible(shared_by, layout.fsdp, rows, f"rows of an expert's {what}")
    if s.training.lora and s.training.lora.target_parameters:
        columns = "columns of an expert's down_proj, moe_intermediate_size, whose adapter is shared by these"
        yield from _indivisible(shared_by, layout.fsdp, text("moe_intermediate_size"), columns)


def _ulysses_rules(layout: Layout, s: Settings, config: dict[str, Any]) -> Iterator[str]:
    size, vision = layout.ulysses, partial(_size, config.get("vision_config"))
    text = partial(_size, text_section(config))
    if size == 1:
        return
    kv_heads, sequences = text("num_key_value_heads"), s.training.micro_batch_size
    cutoff_len, bucket = s.data.dataset_param.basic_parameters.cutoff_len, s.data.dataloader_param.patch_bucket
    val_len = s.data.val_dataset_param.basic_parameters.cutoff_len if s.data.val_dataset_param else 0
    for total, what in (
        (text("num_attention_heads"), "attention heads, num_attention_heads"),
        (text("linear_num_key_heads"), "key heads of the delta net, linear_num_key_heads"),
        (text("linear_num_value_heads"), "value heads of the delta net, linear_num_value_heads"),
        (vision("num_heads"), "heads of the vision tower, vision_config.num_heads"),
        (sequences * cutoff_len, f"tokens of a micro-batch, {sequences} x cutoff_len {cutoff_len}"),
        (sequences * val_len, f"tokens of a micro-batch of val_dataset_param, {sequences} x cutoff_len {val_len}"),
    ):
        yield from _indivisible(ULYSSES, size, total, what)
    if kv_heads and kv_heads % size and size % kv_heads:
        yield f"{ULYSSES} {size} neither divides the {kv_heads} key-value heads, num_key_value_heads, nor is a multiple of them"
    block = vision("spatial_merge_size") ** 2
    if block and bucket % (size * block):
        yield f"data.dataloader_param.patch_bucket {bucket} is no multiple of {ULYSSES} {size} x the {block} patches per token"


def _indivisible(name: str, size: int, total: int, what: str) -> Iterator[str]:
    if total % size:
        yield f"{name} {size} does not divide the {total} {what}"


def _size(values: Any, name: str) -> int:
    """The number if it is one above 0, else 0, which everything divides."""
    value = values.get(name) if isinstance(values, dict) else None
    return value if type(value) is int and value > 0 else 0
