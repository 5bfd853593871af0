"""The accepted layouts are those that split everything evenly, found here by splitting it."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch

from qwen35.config.layout import Layout, check_layout, layout_of
from qwen35.config.load import from_flat
from qwen35.config.schema import LoraSettings, ParallelSettings, Settings
from qwen35.errors import SettingError

TEXT = {
    "num_experts": 6,
    "moe_intermediate_size": 6,
    "hidden_size": 24,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 12,
    "linear_num_value_heads": 24,
}


TAKEN = 106  # of the 840 that are tried


def settings(folder, **parallel: int) -> Settings:
    basic = "data.dataset_param.basic_parameters"
    required = {f"{basic}.dataset": "a.json", "training.train_iters": 1, "training.save": "run"}
    sizes = {f"parallel.{name}": size for name, size in parallel.items()}
    more = {
        f"{basic}.cutoff_len": 72,
        "data.dataloader_param.patch_bucket": 48,
        "model.model_name_or_path": str(folder),
    }
    return from_flat(required | sizes | more)


def cuts(total: int, parts: int) -> bool:
    return len({len(part) for part in torch.arange(total).tensor_split(parts)}) == 1


def fits(world: int, shard: int, ep: int, ulysses: int) -> bool:
    """Whether every rank gets equally much of everything that the layout splits."""
    if not (cuts(world, shard) and cuts(shard, ep) and cuts(world, ulysses)):
        return False
    of_experts = [(TEXT["num_experts"], ep), (2 * TEXT["moe_intermediate_size"], shard // ep), (24, shard // ep)]
    heads = [(n, ulysses) for name, n in TEXT.items() if "heads" in name and name != "num_key_value_heads"]
    bins = [(12, ulysses), (72, ulysses), (48 // 4, ulysses)]
    kv = TEXT["num_key_value_heads"]
    repeated = max(kv, ulysses)  # each rank needs one at least
    fits_ulysses = all(cuts(*n) for n in heads + bins) and cuts(repeated, ulysses) and repeated % kv == 0
    return (ep == 1 or all(cuts(*n) for n in of_experts)) and (ulysses == 1 or fits_ulysses)


NESTED = {"text_config": TEXT, "vision_config": {"num_heads": 12, "spatial_merge_size": 2}}


@pytest.mark.parametrize("config", [NESTED, TEXT | {"model_type": "qwen3_5_moe_text"}], ids=["nested", "text-only"])
def test_layouts_that_divide_are_accepted_and_no_others(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    taken = 0
    for world, shard, ep, ulysses in product(
        (1, 2, 3, 4, 8, 12, 24), (1, 2, 3, 4, 12, 24), (1, 2, 3, 4), (1, 2, 3, 4, 5)
    ):
        s = settings(tmp_path, fully_shard_parallel_size=shard, expert_parallel_size=ep, ulysses_parallel_size=ulysses)
        if fits(world, shard, ep, ulysses):
            layout = check_layout(s, world)
            assert layout == Layout(world, shard, ep, ulysses)
            assert layout.copies * layout.fsdp * layout.ep == layout.data * layout.ulysses == world
            taken += 1
        else:
            with pytest.raises(SettingError, match=r"does not divide|nor is a multiple"):
                check_layout(s, world)
    assert taken == TAKEN


def test_all_processes_share_the_weights_by_default():
    assert layout_of(ParallelSettings(), 6) == Layout(6, 6, 1, 1)
    assert str(layout_of(ParallelSettings(), 6)) == "weights 1 x 6 (copies x ranks per copy)"


def test_a_layout_prints_how_ranks_share(tmp_path):
    of = layout_of(ParallelSettings(fully_shard_parallel_size=8, expert_parallel_size=4, ulysses_parallel_size=2), 16)
    assert str(of) == (
        "weights 2 x 8 (copies x ranks per copy), experts 2 x 2 x 4 (copies x ranks per expert x expert parallel),"
        " packed sequences 8 x 2 (at a time x ranks per sequence)"
    )


def test_a_damaged_config_is_left_to_load_config(tmp_path):
    """The ranks read all of it, and report what is wrong."""
    s = settings(tmp_path, ulysses_parallel_size=2)
    check_layout(s, 2)
    for config in ({}, {"text_config": 3}, {"text_config": {"num_attention_heads": "four"}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        check_layout(s, 2)


def test_adapters_of_experts_need_their_columns_divided(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": TEXT, "vision_config": {}}))
    plain = settings(tmp_path, expert_parallel_size=2)
    lora = LoraSettings(r=8, target_parameters=("mlp.experts.down_proj",))
    adapted = replace(plain, training=replace(plain.training, lora=lora))
    check_layout(plain, 8)  # 4 processes share an expert's 12 rows, but not its 6 columns
    with pytest.raises(
        SettingError, match="expert_parallel_size 2 = 4 does not divide the 6 columns of an expert's down"
    ):
        check_layout(adapted, 8)
