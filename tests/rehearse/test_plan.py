"""Layouts that a plan compares, and its estimates beside the figures of rehearsals."""

import json
import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peer import config_dict

from qwen35.config.layout import check_layout, layout_of
from qwen35.config.load import load_settings
from qwen35.config.schema import LoraSettings, Settings
from qwen35.errors import SettingError
from qwen35.model import load_config
from rehearse.batches import Mix, make_batch
from rehearse.estimate import Figures, Sizes, estimate
from rehearse.layouts import Layout, layouts
from rehearse.operators import RehearsalError
from rehearse.plan import Plan, middle
from rehearse.rates import RateRange
from rehearse.report import peak, total_bytes
from rehearse.step import rehearse
from rehearse.step_time import Times, best_and_worst

MIX, LENGTH = Mix(sequence=256), 512
BASE = Layout(None, 1, 1, 1, 2, True, False, "adamw")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Turned off: filling new tensors would add operators and touch more memory."""


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    tmp_path = tmp_path_factory.mktemp("plan")
    kinds = ["linear_attention", "full_attention"] * 2
    config = config_dict(hidden_size=256, num_hidden_layers=4, moe_intermediate_size=128, layer_types=kinds)
    config["vision_config"] |= {"out_hidden_size": 256, "depth": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "recipe.yaml").write_text(f"""
data: {{dataset_param: {{basic_parameters: {{dataset: none.json, cutoff_len: {LENGTH}}}}}}}
model: {{model_name_or_path: {tmp_path}}}
parallel: {{recompute: true}}
training: {{train_iters: 5, save: {tmp_path}-run, gradient_accumulation_steps: 2}}
""")
    return load_settings(tmp_path / "recipe.yaml", [])


def figures(settings: Settings, layout: Layout, world: int = 8) -> Figures:
    settings = layout.applied(settings)
    config = load_config(settings.model.model_name_or_path)
    batches = [make_batch(settings, config, MIX)] * layout.accumulation
    r = rehearse(settings, config, batches, world, 4, torch.device("cpu"))
    return Figures(total_bytes(r, 0), dict(peak(r)[1].by_kind), 0, *best_and_worst(r, RateRange()))


@pytest.fixture(scope="module")
def known(settings) -> Figures:
    return figures(settings, BASE)


def test_layouts_train_as_many_tokens_and_divide_the_model(settings):
    found = list(layouts(settings, nodes=2, per_node=4, tokens=8 * 2 * LENGTH))
    assert len(found) == len(set(found)) and BASE in found
    for layout in found:
        applied = layout.applied(settings)
        check_layout(applied, 8)
        data = layout_of(applied.parallel, 8).data
        assert data * layout.micro_batch * layout.accumulation * LENGTH == 8 * 2 * LENGTH
    assert {layout.shard for layout in found} == {None, 4}  # replicas hold whole nodes
    assert {layout.expert for layout in found} == {1, 2, 4, 8} and {layout.ulysses for layout in found} >= {1, 2}
    adapted = replace(settings, training=replace(settings.training, lora=LoraSettings(r=8)))
    assert {layout.optimizer for layout in layouts(adapted, 1, 4, 4 * LENGTH)} == {"adamw"}


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        ({"micro_batch": 2}, 0.1),
        ({"expert": 2}, 0.12),  # 0.06, and 0.115 on torch 2.7
        ({"expert": 4}, 0.1),
        ({"shard": 4}, 0.1),
        ({"ulysses": 2, "micro_batch": 2}, 0.35),
    ],
    ids=str,
)
def test_estimates_are_near_the_rehearsal(settings, known, change, tolerance):
    """From one layout's figures to another's: memory, and what is sent within a fifth."""
    config = load_config(settings.model.model_name_or_path)
    sizes, layout = Sizes.of(settings, config, 8, 4), replace(BASE, **change)
    found = estimate(layout, BASE, known, sizes, RateRange())
    real = figures(settings, layout)
    assert found.bytes == pytest.approx(real.bytes, rel=tolerance)
    assert found.worst.communication == pytest.approx(real.worst.communication, rel=0.2)
    assert found.best.communication == pytest.approx(real.best.communication, rel=0.2)


def test_adamw_swap_frees_the_moments_and_copies_them(settings, known):
    config = load_config(settings.model.model_name_or_path)
    sizes = Sizes.of(settings, config, 8, 4)
    found = estimate(replace(BASE, optimizer="adamw_swap"), BASE, known, sizes, RateRange())
    assert known.bytes - found.bytes == known.kinds["optimizer"]
    moments = 16 * (sizes.experts + sizes.others + sizes.ends) / 8
    assert found.worst.copies == pytest.approx(moments / RateRange().worst.copies)


def test_lines_for_the_recipe_make_that_layout(settings):
    for layout in (BASE, Layout(4, 2, 2, 4, 1, "selective", True, "adamw_swap")):
        pasted = yaml.safe_load(layout.yaml())
        given = [f"{section}.{name}={value}" for section, part in pasted.items() for name, value in part.items()]
        assert Layout.of(load_settings(Path(settings.model.model_name_or_path, "recipe.yaml"), given)) == layout


def options(**given) -> Namespace:
    return Namespace(**{"nodes": 2, "npus_per_node": 4, "memory_gb": 64, "tokens_per_step": None} | given)


def test_a_plan_ends_with_what_was_rehearsed(settings, known):
    """The table has only layouts that fit, fastest first, and the recipe's own."""
    plan = Plan(settings, MIX, options(), RateRange())

    class Pool:
        def submit(self, measure, applied):
            layout = Layout.of(applied)
            found = estimate(layout, BASE, known, plan.sizes, RateRange())
            if layout.expert == 2:
                found = replace(found, bytes=61 << 30)
            return Namespace(result=lambda: "refused" if layout.expert == 4 else found)

    plan.search(Pool(), Namespace(update=lambda: None))  # type: ignore[arg-type]
    assert plan.figures.keys() >= {BASE} and len(plan.figures) + len(plan.failed) <= 24
    head, *rows = "\n".join(plan.lines()).split("\n\n")[0].splitlines()
    assert "seconds a step" in head and sum("<- the recipe" in row for row in rows) == 1
    assert not any("EP 2" in row or "EP 4" in row for row in rows)
    fitting = sorted(middle(f) for c, f in plan.figures.items() if f.bytes <= 60 << 30)
    shown = [math.sqrt(float(row.split()[0]) * float(row.split()[2])) for row in rows]
    assert shown[0] == pytest.approx(fitting[0], abs=0.01)


def test_of_layouts_as_fast_the_smallest_comes_first(settings, known):
    """Within a hundredth, as far as rates are known; before that, where few ranks share experts."""
    plan = Plan(settings, MIX, options(), RateRange())
    others = [layout for layout in plan.layouts if layout != BASE and layout.expert == 1][:3]
    others.append(next(layout for layout in plan.layouts if layout.expert == 2))

    def slower(times: Times, factor: float) -> Times:
        return Times(**{part: seconds * factor for part, seconds in vars(times).items()})

    for layout, factor, size in zip([BASE, *others], (1, 1.005, 1.02, 1.009, 1), (50, 40, 20, 45, 30), strict=True):
        best, worst = slower(known.best, factor), slower(known.worst, factor)
        plan.figures[layout] = replace(known, bytes=size << 30, best=best, worst=worst)
    rows = "\n".join(plan.lines()).split("\n\n")[0].splitlines()[1:]
    assert [float(row.split()[3]) for row in rows] == [40, 45, 50, 30, 20]


def test_nothing_fits_and_steps_that_no_layout_takes(settings, known):
    with pytest.raises(SettingError, match=r"TOKENS_PER_STEP 1,000 .* multiple"):
        Plan(settings, MIX, options(tokens_per_step=1000), RateRange())
    plan = Plan(settings, MIX, options(), RateRange())
    plan.figures = {BASE: replace(known, bytes=61 << 30)}
    with pytest.raises(RehearsalError, match=r"none of .* layouts fits into 60.8 GB"):
        list(plan.lines())
