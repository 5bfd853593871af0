"""LoRA runs from start to export: resumes bit for bit, PEFT's folders, and no other base."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_cases import assert_same_bytes, tensors_in
from safetensors.torch import load_file, save_file
from training_runs import assert_same_run, tensors, train, with_plots

from qwen35.checkpoint.dcp_folder import newest_checkpoint
from qwen35.checkpoint.dcp_source import OPTIMIZER
from qwen35.convert import main
from qwen35.inference.load_model import find_model, load_model
from qwen35.model.lora import is_adapter

LORA = (
    "training.lora.r=8",
    "training.lora.target_modules=[q_proj,o_proj,in_proj_qkv,in_proj_z,out_proj,gate_proj,up_proj,down_proj]",
    "training.lora.target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj]",
    "training.lora.expert_r=16",
    "training.log_interval=2",
)


@pytest.fixture(scope="module")
def run(workplace) -> Path:
    """Two processes, six steps, a checkpoint after three."""
    save = workplace / "lora"
    done = train(workplace, save, 2, *LORA, "training.train_iters=6", "training.save_interval=3", how=with_plots)
    assert done.returncode == 0, done.stderr
    (save / "console").write_text(done.stdout)
    return save


def went_wrong(workplace, save: Path, *overrides: str, processes: int = 1) -> str:
    """The one line of error of a run that must not start."""
    done = train(workplace, save, processes, "training.train_iters=6", *overrides)
    (line,) = {line for line in done.stderr.splitlines() if "error: " in line or "Error" in line}
    assert done.returncode != 0
    return line


def resume_point(run: Path, save: Path, workplace: Path) -> Path:
    """A folder with the run's first checkpoint, as if it had been stopped there."""
    save.mkdir()
    shutil.copytree(run / "iter_0000003", save / "iter_0000003")
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(run / name, save)
    return save


def test_checkpoints_hold_adapters_and_their_optimizer_state_alone(run, workplace):
    weights, state = tensors(run), tensors(run, OPTIMIZER)
    assert len(weights) > 20 and all(map(is_adapter, weights))
    assert {name.partition(".")[2] for name in state} == weights.keys()
    assert {t.dtype for t in weights.values()} == {torch.float32}
    whole = sum(path.stat().st_size for path in (workplace / "weights").glob("*.safetensors"))
    assert all(t.abs().sum() > 0 for t in weights.values())
    assert sum(t.nbytes for t in weights.values()) < 4 * whole


def test_a_resumed_run_is_the_run_that_never_stopped(run, workplace):
    save = resume_point(run, workplace / "resumed", workplace)
    done = train(workplace, save, 2, *LORA, "training.train_iters=6", "training.save_interval=3")
    assert done.returncode == 0, done.stderr
    assert f"weights from {workplace}/weights\n" in done.stdout
    assert f"adapters from {save}/iter_0000003\n" in done.stdout
    assert_same_run(save, run)


def test_the_same_with_experts_split_and_the_optimizer_on_the_host(workplace):
    """And one process goes on with it too, from other random states."""
    options = (*LORA, "training.train_iters=6", "training.save_interval=3", "training.optimizer=adamw_swap")
    split = (*options, "parallel.expert_parallel_size=2", "parallel.recompute=selective")
    run, save = workplace / "lora_ep", workplace / "resumed_ep"
    assert train(workplace, run, 2, *split).returncode == 0
    done = train(workplace, resume_point(run, save, workplace), 2, *split)
    assert done.returncode == 0, done.stderr
    assert_same_run(save, run)
    alone = resume_point(run, workplace / "alone", workplace)
    done = train(workplace, alone, 1, *options, "training.gradient_accumulation_steps=2")
    assert done.returncode == 0, done.stderr
    own, wanted = tensors(alone), tensors(run)
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=1e-3)


def test_an_export_answers_as_the_checkpoint_does(run, workplace, capsys):
    """All that has no adapter has the base's bytes."""
    out = workplace / "lora_hf"
    words = ["dcp_to_hf", "--dcp_dir", str(run), "--origin_hf_dir", str(workplace / "weights"), "--save_hf_dir"]
    assert main([*words, str(out)]) == 0
    asked, exported = load_model(find_model(run)), load_model(find_model(out))
    assert_same_bytes(dict(asked.named_parameters()), dict(exported.named_parameters()))
    before, after = tensors_in(workplace / "weights"), tensors_in(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == len(tensors(run)) / 2
    capsys.readouterr()
    assert main([*words, str(workplace / "adapter"), "--adapter"]) == 0
    assert json.loads((workplace / "adapter/adapter_config.json").read_text())["target_modules"] == sorted(
        ["q_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_a_run_goes_on_from_a_folder_of_peft_s(run, workplace):
    """What its first step trains is, bit for bit, what the folder holds."""
    folder, save = workplace / "goes_on", workplace / "from_peft"
    words = ["dcp_to_hf", "--dcp_dir", str(run), "--origin_hf_dir", str(workplace / "weights")]
    assert main([*words, "--save_hf_dir", str(folder), "--adapter"]) == 0
    options = (
        *LORA,
        f"training.lora.adapter={folder}",
        "training.train_iters=1",
        "training.lr=1e-30",
    )
    done = train(workplace, save, 1, *options)
    assert done.returncode == 0, done.stderr
    assert f"adapters from {folder}, whose base is {workplace}/weights\n" in done.stdout
    assert "every lora_B is zero" not in done.stdout
    assert_same_bytes(tensors(save), tensors(run))
    line = went_wrong(
        workplace, workplace / "no", *LORA, f"training.lora.adapter={folder}", "training.lora.lora_alpha=8"
    )
    assert "are scaled by 4, and training.lora by 1; set lora_alpha and use_rslora as" in line
    line = went_wrong(workplace, workplace / "no", *LORA, f"training.lora.adapter={folder}", "training.lora.expert_r=8")
    assert f"training.lora.adapter: {folder} has other adapters than training.lora asks for: " in line
    assert "tensors misshapen" in line
    file = folder / "adapter_model.safetensors"  # as trainers save it that gather no shards, or before a step
    save_file({name: tensor * ("lora_B" not in name) for name, tensor in load_file(file).items()}, file)
    done = train(workplace, workplace / "from_zeros", 1, *options)
    assert f"{folder}: every lora_B is zero, so these adapters have learnt nothing" in done.stdout


def test_what_cannot_go_on_is_one_line(run, workplace):
    save = resume_point(run, workplace / "wrong", workplace)
    line = went_wrong(workplace, save, *LORA, "training.lora.lora_alpha=8", processes=2)
    assert f"{save}/iter_0000003 holds adapters of other training.lora (alpha: 32.0 -> 8.0); set it as it was" in line
    other = workplace / "other_weights"
    shutil.copytree(workplace / "weights", other)
    (file,) = other.glob("*.safetensors")
    changed = load_file(file)
    changed["model.language_model.norm.weight"] += 1
    save_file(changed, file)
    line = went_wrong(workplace, save, *LORA, f"training.init_from_hf_path={other}", processes=2)
    assert f"holds adapters of {workplace}/weights, and the weights in {other} are others; name the base that" in line
    line = went_wrong(workplace, save, processes=2)
    assert (
        f"{save}/iter_0000003 holds the adapters of a LoRA run, not a model: set training.lora as that run had it"
        in line
    )


def test_adapters_of_two_places_are_one_line(run, workplace):
    """Before, those of training.load were taken, and the folder was not even opened."""
    load = f"training.load={run}", "training.init_from_hf_path=null", "training.lora.adapter=/no/such/folder"
    line = went_wrong(workplace, workplace / "both", *LORA, *load)
    assert f"training.load: {run} and training.lora.adapter: /no/such/folder both hold adapters to go on from" in line


def test_adapters_of_the_tower_need_images(workplace):
    """Their gradient is zero in every step without, which the run allows."""
    records = json.loads((workplace / "records.json").read_text())
    (workplace / "text.json").write_text(json.dumps([record for record in records if "image" not in record]))
    data = f"data.dataset_param.basic_parameters.dataset={workplace}/text.json"
    tower = "training.lora.r=8", "training.lora.target_modules=[attn.qkv,linear_fc1]"
    line = went_wrong(workplace, workplace / "tower", data, *tower)
    assert "the data has no images or videos, and only the vision tower is trained" in line


def test_a_run_of_all_weights_is_a_base_but_is_not_gone_on_with(two, workplace):
    line = went_wrong(workplace, two, *LORA, processes=2)
    assert f"training.save: {two} holds a run without adapters; name another folder for training.lora" in line
    save = workplace / "on_a_run"
    for steps in (2, 4):  # the base is the same after a resume, though `load` has a newer checkpoint by then
        source = f"training.load={two}", "training.init_from_hf_path=null"
        done = train(workplace, save, 1, *LORA, *source, f"training.train_iters={steps}")
        assert done.returncode == 0, done.stderr
        assert f"weights from {newest_checkpoint(two)}\n" in done.stdout
    assert "adapters from" in done.stdout
    assert all(map(is_adapter, tensors(save)))
