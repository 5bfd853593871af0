"""Whole runs with real processes, of a small model on a few images."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from mistakes import run
from peer import continued
from PIL import Image
from plain import plain
from safetensors.torch import load_file, save_file
from training_runs import ROOT, start_training, tensors, train, with_plots

from qwen35.checkpoint import load_pretrained
from qwen35.checkpoint.convert import hf_to_dcp
from qwen35.checkpoint.dcp_folder import newest_checkpoint
from qwen35.checkpoint.dcp_source import DCPSource
from qwen35.config.load import from_flat, load_settings
from qwen35.training.metrics import Metrics, RunError, StepRecord, read_metrics
from qwen35.training.summary import end_message


def test_two_processes_give_the_losses_of_one(workplace, two):
    save = workplace / "one"
    done = train(workplace, save, 1, "training.gradient_accumulation_steps=2")
    assert done.returncode == 0, done.stderr
    one, both = read_metrics(save / "metrics.jsonl"), read_metrics(two / "metrics.jsonl")
    assert [line["step"] for line in one] == [line["step"] for line in both] == list(range(1, 11))
    for a, b in zip(one, both, strict=True):
        for key in ("loss", "aux_loss", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-5), f"{key} of step {a['step']}"
        assert all(a[key] == b[key] for key in ("lr", "tokens", "label_tokens", "image_tokens"))
    assert one[-1]["loss"] < 0.7 * one[0]["loss"]


def test_a_run_leaves_checkpoints_metrics_and_config(workplace, two):
    assert (two / "latest_checkpointed_iteration.txt").read_text().strip() == "10"
    assert newest_checkpoint(two).name == "iter_0000010" and (two / "iter_0000005").is_dir()
    expected = load_settings(workplace / "recipe.yaml", [f"training.save={two}", "training.save_interval=5"])
    assert load_settings(two / "config.yaml") == expected
    line = read_metrics(two / "metrics.jsonl")[0]
    assert {"loss", "grad_norm", "lr", "step_time", "data_time", "tokens_per_second", "memory"} <= line.keys()
    assert "mfu" not in line  # nobody told the peak of this machine
    console = (two / "console").read_text()
    assert console.count("visual.merger") == 1 and "2 processes on" in console and "60 samples" in console


def test_the_console_tells_epochs_times_and_the_next_commands(workplace, two):
    console = (two / "console").read_text()
    [sequences] = re.findall(r"in (\d+) \S+(?: \S+)? of 160 \(", console)
    epochs = 10 * 2 / int(sequences)
    assert f"steps 1 to 10: {epochs:.2f} epochs in all" in console
    assert re.search(rf"^step +10  .*  epoch {epochs:.2f}  .*  ETA 0:00:00$", console, re.MULTILINE)
    assert re.search(r"^trained steps 1 to 10 in \d:\d\d:\d\d$", console, re.MULTILINE)
    for command in (f"export DCP={two} HF={workplace}/weights OUT={two}/hf", f"evaluate MODEL={two} DATA="):
        assert f"\n  make {command}" in console


def test_the_command_that_evaluates_says_where_the_media_are():
    train_set, val_set = (f"data.{name}.basic_parameters.dataset" for name in ("dataset_param", "val_dataset_param"))
    flat = {train_set: "a/train.json", val_set: "a/val.json", "model.model_name_or_path": "hf"}
    flat |= {"training.train_iters": 2, "training.save": "runs/x", "training.val_interval": 1}
    for folder, words in (("my media", ["ARGS=--dataset_dir 'my media'"]), ("a", [])):
        message = end_message(from_flat(flat | {f"{train_set}_dir": folder}), range(1, 3), 2, 1.0, 0, 0.0)
        [command] = [line for line in message.splitlines() if line.startswith("  make evaluate")]
        assert shlex.split(command) == ["make", "evaluate", "MODEL=runs/x", "DATA=a/val.json", *words]


def test_resume_is_bit_exact(workplace, two, tmp_path):
    """The last five steps again, from the checkpoint after five: the same lines and weights."""
    save = tmp_path / "again"
    subprocess.run(["cp", "-r", two, save], check=True)
    subprocess.run(["rm", "-r", save / "iter_0000010"], check=True)
    done = train(workplace, save, 2, "training.save_interval=5")
    assert done.returncode == 0, done.stderr
    assert "steps 6 to 10" in done.stdout
    log = (save / "train.log").read_text()  # a resume appends to it
    assert log.startswith((two / "train.log").read_text()) and plain(log).endswith(done.stdout)
    first, second = read_metrics(two / "metrics.jsonl"), read_metrics(save / "metrics.jsonl")
    same = ("step", "loss", "aux_loss", "grad_norm", "lr", "tokens")
    assert [[line[k] for k in same] for line in first] == [[line[k] for k in same] for line in second]
    a, b = tensors(two), tensors(save)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_finished_run_has_nothing_left(workplace, two):
    (two / "loss.png").unlink()  # as where it was killed while it drew
    (two / "loss.png.new").touch()
    done = train(workplace, two, 2, "training.save_interval=5", how=with_plots)
    assert done.returncode == 0 and "nothing left to train" in done.stdout
    assert (two / "loss.png").read_bytes().startswith(b"\x89PNG") and not (two / "loss.png.new").exists()


def test_bf16_recompute_freeze_and_every_way_to_start(workplace, tmp_path):
    """Frozen parameters stay the same in a bf16 run with recomputation, from converted weights."""
    from qwen35.checkpoint.convert import hf_to_dcp

    hf_to_dcp(workplace / "weights", tmp_path / "dcp", None)
    start = [
        f"training.load={tmp_path / 'dcp'}",
        "training.init_from_hf_path=null",
        "training.init_model_with_meta_device=false",
    ]
    frozen = "model.freeze=[model.visual, 'model.language_model.layers.{*}.mlp.gate']"
    others = ["training.dtype=bf16", "parallel.recompute=true", "training.train_iters=3", "training.micro_batch_size=2"]
    done = train(workplace, tmp_path / "run", 2, frozen, *start, *others, "parallel.fully_shard_parallel_size=1")
    assert done.returncode == 0, done.stderr
    before, after = tensors(tmp_path / "dcp"), tensors(tmp_path / "run")
    assert before.keys() == after.keys()
    for name, value in before.items():
        is_frozen = "visual" in name or name.endswith("mlp.gate.weight")
        assert torch.equal(value.float(), after[name]) == is_frozen, name
    states = DCPSource(newest_checkpoint(tmp_path / "run"), "optimizer.").specs
    assert states and not any("visual" in name or "mlp.gate.weight" in name for name in states)


def test_per_token_loss_is_the_same_for_any_split(workplace, tmp_path):
    """Six packed sequences per step over ranks, accumulation, micro-batches: the same weights."""
    splits = {
        "ranks": (2, "training.gradient_accumulation_steps=3"),
        "accumulation": (1, "training.gradient_accumulation_steps=6"),
        "micro-batches": (1, "training.micro_batch_size=6"),
    }
    common = ["model.loss_type=per_token_loss", "training.train_iters=3", "model.loss_cfg.router_aux_loss_coef=0"]
    results = {}
    for name, (processes, split) in splits.items():
        done = train(workplace, tmp_path / name, processes, split, *common)
        assert done.returncode == 0, done.stderr
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        results[name] = [line["loss"] for line in lines], tensors(tmp_path / name)
    losses, reference = results.pop("ranks")
    assert losses[-1] < losses[0]
    for name, (others, values) in results.items():
        assert others == pytest.approx(losses, rel=1e-5), name
        for key, value in values.items():
            assert (value - reference[key]).norm() <= 1e-5 * value.norm() + 1e-6, f"{name}: {key}"


def test_the_export_of_a_run_gives_transformers_the_same_answers(workplace, two, tmp_path):
    import transformers

    from qwen35.checkpoint.convert import dcp_to_hf
    from qwen35.config.load import load_settings
    from qwen35.data.collator import prompt_batch, vision_spec
    from qwen35.data.formats import read_records
    from qwen35.data.media import ImageFolder
    from qwen35.data.preparation import Preparation
    from qwen35.inference.generate import generate as greedy

    dcp_to_hf(two, workplace / "weights", tmp_path / "hf")
    theirs, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = load_pretrained(tmp_path / "hf", dtype=torch.float32)
    settings = load_settings(workplace / "recipe.yaml")
    preparation, spec = Preparation.of(settings), vision_spec(tmp_path / "hf")
    records = list(read_records(workplace / "records.json", preparation.attr, ImageFolder(workplace), limit=6))
    prompts = [prompt_batch(record, preparation, spec, thinking=False) for record in records]
    stop = {preparation.tokenizer.im_end_id}
    given = greedy(ours, prompts, 12, stop)
    assert all(preparation.tokenizer.decode(ids).startswith("It is ") for ids in given)  # as it was trained to say
    for prompt, ids in zip(prompts, given, strict=True):
        images = int((prompt.input_ids == spec.image_token_id).sum())
        inputs = {
            "input_ids": prompt.input_ids[None],
            "mm_token_type_ids": (prompt.input_ids == spec.image_token_id).int()[None],
        }
        if images:
            patches = images * spec.merge_size**2
            inputs |= {"pixel_values": prompt.pixel_values[:patches], "image_grid_thw": prompt.grid_thw[:1]}
        new = continued(theirs, inputs, 12, eos_token_id=list(stop))
        assert [token for token in new if token not in stop] == ids


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.init_from_hf_path=null", "nothing says where the weights come from"),
        (
            "parallel.fully_shard_parallel_size=3",
            "parallel.fully_shard_parallel_size 3 does not divide the 1 processes",
        ),
        ("model.freeze=[model.vision]", "model.freeze: model.vision matches no module"),
        ("model.kernels.swiglu=fused", "model.kernels.swiglu: 'fused' is not one of auto, native"),
        ("training.trian_iters=3", "unknown setting training.trian_iters; did you mean training.train_iters?"),
        ("model.model_name_or_path=nowhere", "nowhere/config.json: not there"),
    ],
)
def test_mistakes_stop_the_run_with_one_line(workplace, tmp_path, override, words):
    save = tmp_path / "run"
    done = run(ROOT, "train", str(workplace / "recipe.yaml"), f"training.save={save}", override)
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code == 1
    assert len(errors) == 1
    assert words in errors[0]
    assert "Traceback" not in done.err
    assert not save.exists()


def test_what_is_left_out_is_told_at_the_level_of_warnings(workplace, tmp_path):
    """LOG_LEVEL is a usual name of a shell's variable. Once, by two ranks."""
    records = json.loads((workplace / "records.json").read_text())
    left_out = [dict(record, conversations=[]) for record in records[:20]]
    (tmp_path / "records.json").write_text(json.dumps([dict(r, hint="h") for r in [*left_out, *records[20:]]]))
    shutil.copytree(workplace / "weights", tmp_path / "weights")
    hf_to_dcp(tmp_path / "weights", tmp_path / "converted")
    config = json.loads((tmp_path / "weights/config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 25
    (tmp_path / "weights/config.json").write_text(json.dumps(config))
    for file in (tmp_path / "weights").glob("*.safetensors"):
        save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    basic, val = "data.dataset_param.basic_parameters", "data.val_dataset_param.basic_parameters"
    overrides = [
        *(f"model.model_name_or_path={tmp_path}/weights", f"training.load={tmp_path}/converted"),
        *(f"{basic}.dataset={tmp_path}/records.json", f"{basic}.on_bad_record=skip", "training.init_from_hf_path=null"),
        *(f"{val}.dataset={tmp_path}/records.json", "training.val_interval=1", "training.train_iters=1"),
    ]
    process = start_training(workplace, tmp_path / "run", 2, *overrides, LOG_LEVEL="WARNING")
    out = plain(process.communicate(timeout=300)[0])
    assert process.returncode == 0
    for words in (
        "data: skipped 20 of 60 records: 20 malformed",
        "data: fields that are not read: hint (40 times",
        f"samples of more than 25 tokens, which max_position_embeddings of {tmp_path}/weights/config.json allows",
        f"the weights in {tmp_path}/converted/release are not those in {tmp_path}/weights",
        "validation every 1 step: 40 samples",
    ):
        assert out.count(words) == 1, out
    assert "arithmetic" not in out
    process = start_training(workplace, tmp_path / "run", 2, *overrides, "training.train_iters=2", LOG_LEVEL="WARNING")
    assert "settings changed since the checkpoint: " in plain(process.communicate(timeout=300)[0])


def test_mistakes_under_the_launcher_are_one_line(workplace, tmp_path):
    """Whichever rank finds the mistake: before the start, on all ranks, or on one during a step."""
    for processes, overrides, words in (
        (2, ["training.trian_iters=3"], "error: unknown setting training.trian_iters"),
        (2, ["model.freeze=[model.vision]"], "error: model.freeze: model.vision matches no module"),
        (2, [f"data.dataset_param.basic_parameters.dataset={_with_a_broken_image(workplace)}"], "cannot be read"),
    ):
        done = train(workplace, tmp_path / "run", processes, *overrides)
        lines = [line for line in done.stderr.splitlines() if line.strip() and "records/s" not in line]
        assert done.returncode == 1
        assert len(lines) == 1, done.stderr
        assert words in lines[0]


LATE = """
import os
if os.environ.get("RANK") == "1":
    import socket, time
    import torch.distributed as dist
    make, until = dist.new_subgroups_by_enumeration, time.monotonic() + 4
    def late(*args, **kwargs):
        while time.monotonic() < until:
            time.sleep(0.001)
            try:
                socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))).close()
            except OSError:
                break
        return make(*args, **kwargs)
    dist.new_subgroups_by_enumeration = late
"""


def test_a_mistake_during_the_rendezvous_is_one_line(workplace, tmp_path):
    """Rank 0 serves the store, so it must not end before all ranks have made their groups."""
    (tmp_path / "sitecustomize.py").write_text(LATE)
    process = start_training(
        workplace, tmp_path / "run", 2, "model.freeze=[model.vision]", PYTHONPATH=f"{tmp_path}:{ROOT}"
    )
    _, err = process.communicate(120)
    assert process.returncode == 1
    assert err.startswith("error: model.freeze") and err.count("\n") == 1


def _with_a_broken_image(workplace: Path) -> Path:
    """The records, one with an image whose header is right and whose pixels are truncated."""
    Image.effect_noise((200, 200), 90).save(workplace / "broken.png")
    data = (workplace / "broken.png").read_bytes()
    (workplace / "broken.png").write_bytes(data[: len(data) // 2])
    records = json.loads((workplace / "records.json").read_text())
    records[1]["image"] = "broken.png"
    path = workplace / "broken.json"
    path.write_text(json.dumps(records))
    return path


def test_a_finished_run_of_other_settings_is_refused(workplace, two):
    done = train(workplace, two, 2, "training.save_interval=5", "training.lr=0.5")
    assert done.returncode == 1
    assert "holds 10 steps of other settings (training.lr: 0.01 -> 0.5); name another training.save" in done.stderr


def test_a_resume_with_another_batch_is_refused(workplace, two):
    done = train(workplace, two, 2, "training.save_interval=5", "training.micro_batch_size=2")
    assert done.returncode == 1
    assert "was trained with 2 packed sequences per step" in done.stderr
    assert "these settings make 4" in done.stderr


def test_a_group_with_zero_gradients_stops_the_run(tmp_path, monkeypatch):
    import qwen35.training.metrics as module

    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(module.dist, "all_reduce", lambda tensor: None)
    metrics = Metrics(tmp_path, ["visual", "experts"], 10, 0, torch.device("cpu"), None)

    def step(number, squares, images, loss=1.0):
        sums = torch.tensor([loss, 0.0, 10.0, 5.0, images])
        metrics.record(StepRecord(number, 1e-3, 0.0, 0.0, sums, torch.tensor(squares)))
        metrics.flush(patience=3)

    for i in range(5):  # without images the tower has nothing to learn
        step(i, [0.0, 1.0], 0.0)
    step(6, [0.0, 1.0], 4.0)
    step(7, [0.0, 1.0], 4.0)
    with pytest.raises(RunError, match="step 8: the gradient of visual has been exactly zero for 3 steps"):
        step(8, [0.0, 1.0], 4.0)
    with pytest.raises(RunError, match="step 9: loss nan"):
        step(9, [1.0, 1.0], 4.0, loss=float("nan"))
