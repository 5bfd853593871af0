"""Adapters in training steps: which of them may do without a gradient, and which stop the run."""

import pytest
import torch
import torch.distributed as dist
from peer import config_dict, sample
from small_steps import collated, run_of, settings_of

from qwen35.checkpoint.hf_names import saved_parameters
from qwen35.checkpoint.slices import fill
from qwen35.config.schema import LoraSettings, Settings
from qwen35.device import HOST
from qwen35.errors import SettingError
from qwen35.model import Qwen35
from qwen35.parallel.mesh import make_meshes
from qwen35.train import Run, train_step
from qwen35.training.adapters import InitialAdapters, choose_trained, serving_warnings
from qwen35.training.metrics import Metrics, RunError
from qwen35.training.parameter_groups import parameter_table

LORA = LoraSettings(
    r=8,
    target_modules=("o_proj", "out_proj", "attn.proj", "shared_expert.down_proj"),
    target_parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
)


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def settings_for(lora: LoraSettings) -> Settings:
    return settings_of(train_iters=9, lr=1e-2, lora=lora)


def adapted(settings: Settings) -> Run:
    model = Qwen35.from_config(config_dict(), seed=1)
    choose_trained(model, settings)
    fill(saved_parameters(model), InitialAdapters(saved_parameters(model), 3))
    return run_of(model, settings, make_meshes(HOST.type, settings.parallel))


def steps(run: Run, folder, parts: list, count: int, patience: int) -> None:
    metrics = Metrics(folder, list(run.gradients.groups), 9, 0, HOST, None)
    for number in range(count):
        metrics.record(train_step(run, [collated(sample(parts, seed=number))], 1e-2, 0.0))
        metrics.flush(patience)


def test_an_adapter_that_learns_nothing_stops_the_run_by_its_name(alone, tmp_path):
    run = adapted(settings_for(LORA))
    dead = run.model.model.language_model.layers[3].self_attn.o_proj
    with torch.no_grad():
        dead.lora_A.zero_()  # B is zero as well, so that neither moves the other
    words = (
        r"step 3: the gradient of model\.language_model\.layers\.3\.self_attn\.o_proj has been exactly zero for 3 steps"
    )
    with pytest.raises(RunError, match=words):
        steps(run, tmp_path, [20, (4, 4), 9], 3, patience=3)


def test_idle_experts_and_a_tower_without_images_are_no_fault(alone, tmp_path):
    """With a patience of one step, although A has no gradient in the first."""
    run = adapted(settings_for(LORA))
    for layer in run.model.model.language_model.layers:
        layer.mlp.gate.weight.data[2:] = 0
    steps(run, tmp_path, [40], 4, patience=1)
    assert len(run.gradients.groups) == len(saved_parameters(run.model)) // 2
    experts = run.model.model.language_model.layers[0].mlp.experts
    assert any(not b.any() for b in experts.down_lora_B) and experts.down_lora_B.any()
    tower = run.model.model.visual.blocks[0].attn.proj
    assert not tower.lora_B.any() and run.optimizer.state[tower.lora_B]["step"] == 0


def test_the_optimizer_and_the_table_hold_adapters_alone(alone):
    run = adapted(settings_for(LORA))
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in saved_parameters(run.model).values()}
    row = next(line for line in parameter_table(run.model).splitlines() if line.startswith("experts"))
    base, trained = 4 * 8 * (48 * 48 + 48 * 24), 4 * 8 * 8 * (48 + 48 + 24 + 48)
    assert [int(x.replace(",", "")) for x in row.split()[1:]] == [base + trained, trained, base]


def test_what_servers_do_not_load_is_a_warning(alone):
    model = Qwen35.from_config(config_dict())
    choose_trained(
        model,
        settings_for(LoraSettings(8, target_modules=("in_proj_z",), target_parameters=LORA.target_parameters[:1])),
    )
    first, second = serving_warnings(model)
    assert "in_proj_z has an adapter and in_proj_qkv none" in first
    assert "experts.gate_up_proj has an adapter and experts.down_proj none" in second
    model = Qwen35.from_config(config_dict())
    choose_trained(model, settings_for(LoraSettings(8)))
    assert serving_warnings(model) == []


def test_a_name_that_matches_nothing_is_an_error_of_the_setting(alone):
    with pytest.raises(SettingError, match=r"training\.lora: qproj matches no linear module"):
        choose_trained(Qwen35.from_config(config_dict()), settings_for(LoraSettings(8, target_modules=("qproj",))))
