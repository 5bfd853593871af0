"""Preference runs and log-probabilities with real processes: from a recipe to its files."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import Forked, launched
from peer import peer_inputs
from PIL import Image
from training_runs import assert_same_run, make_workplace, tensors, train, train_command

from qwen35.checkpoint import load_pretrained
from qwen35.checkpoint.convert import dcp_to_hf
from qwen35.checkpoint.tensor_file import checksum
from qwen35.config.load import load_settings
from qwen35.data.dataloader import DecodedBatches, open_dataset
from qwen35.data.tokenized import silent
from qwen35.data.validation import each_once
from qwen35.errors import SettingError
from qwen35.logprobs import log_probs
from qwen35.training.dpo import METRICS
from qwen35.training.metrics import read_metrics
from qwen35.training.reference import reference_file
from qwen35.training.start import choose_weights

BASIC = "data.dataset_param.basic_parameters"
STEPS = ("training.train_iters=8", "training.save_interval=4", "training.log_interval=1")
DPO = ("training.stage=dpo", *STEPS, "training.lr_decay_style=constant", "training.lr=1e-3")

HOLDING = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, 2); print(flush=True); sys.stdin.read()"


def pairs(folder: Path, numbers: range) -> list[dict]:
    """The records of make_workplace, with a wrong answer beside the right one."""
    records = json.loads((folder / "records.json").read_text())
    found = []
    for record in (records[n] for n in numbers):
        question, right = record["conversations"]
        wrong = right | {"value": f"It is surely {(record['id'] + 3) % 7}."}
        found.append(record | {"conversations": [question], "chosen": right, "rejected": wrong})
    return found


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = make_workplace(tmp_path_factory.mktemp("workplace"))
    (folder / "pairs.json").write_text(json.dumps(pairs(folder, range(44))))
    (folder / "heldout.json").write_text(json.dumps(pairs(folder, range(44, 60))))
    return folder


def dpo(workplace: Path, *more: str) -> list[str]:
    return [*DPO, f"{BASIC}.dataset={workplace / 'pairs.json'}", *more]


def logprobs(workplace: Path, save: Path, processes: int, out: str, *overrides: str) -> str:
    command = train_command(workplace, save, processes, *overrides)
    command[3:3] = ["--logprobs", out]
    process = Forked(launched, command, {})
    out, err = process.communicate(300)
    assert process.returncode == 0, err
    return out


def refused(workplace: Path, folder: Path, out: str, *overrides: str) -> str:
    command = train_command(workplace, folder / "unused", 2, *overrides)
    command[3:3] = ["--logprobs", out]
    process = Forked(launched, command, {})
    err = process.communicate(300)[1]
    assert process.returncode == 1, err
    return err


def rows(path: Path) -> list:
    """Of a reference's file, without the micro-batches that hold padding alone."""
    lines = [json.loads(json.loads(line)[1]) for line in path.read_text().splitlines()]
    return [line for line in lines[1:] if line]


@pytest.fixture(scope="module")
def whole(workplace, tmp_path_factory) -> Path:
    """A run of all weights on two ranks that nothing interrupted, with validation."""
    save = tmp_path_factory.mktemp("whole") / "run"
    val = f"data.val_dataset_param.basic_parameters.dataset={workplace / 'heldout.json'}"
    done = train(workplace, save, 2, *dpo(workplace, val, "training.val_interval=4"))
    assert done.returncode == 0, done.stderr
    assert "computing log-probabilities, which " in done.stdout
    return save


def test_a_run_learns_the_pairs_and_says_so(whole):
    lines = read_metrics(whole / "metrics.jsonl")
    assert [line["step"] for line in lines] == [*range(1, 9)]
    first, last = lines[0], lines[-1]
    assert all(set(METRICS) <= line.keys() for line in lines)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5) and abs(first["rewards/margins"]) < 1e-5
    assert last["loss"] < 0.6 and last["rewards/accuracies"] == 1
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], abs=1e-6)
    validations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in validations] == [4, 8]
    assert validations[1]["val_rewards/margins"] > validations[0]["val_rewards/margins"] > 0
    assert validations[1]["val_rewards/accuracies"] == 1 and validations[1]["val_loss"] < 0.6
    log = (whole / "train.log").read_text()
    assert f"margin {last['rewards/margins']:.4f}  accuracy 1.0000" in log
    page = (whole / "report.html").read_text()
    assert "margin of the rewards" in page and "pairs whose chosen answer gains more" in page


def test_what_other_runs_set_holds_for_pairs(workplace, tmp_path):
    """Frozen parts, factors of the learning rate, AdamW on the host, the best validation."""
    val = f"data.val_dataset_param.basic_parameters.dataset={workplace / 'heldout.json'}"
    words = dpo(workplace, val, "training.val_interval=2", "training.save_best=loss", "training.optimizer=adamw_swap")
    words += ["model.freeze=[model.visual]", "training.lr_by_module={lm_head: 0.001}", f"{BASIC}.max_samples=12"]
    words += ["training.early_stopping_patience=1", "training.lr=0.1"]
    done = train(workplace, tmp_path / "run", 2, *words)
    assert done.returncode == 0, done.stderr
    assert "data: 12 pairs of 1 file" in done.stdout
    losses = {
        line["step"]: line["val_loss"] for line in read_metrics(tmp_path / "run/metrics.jsonl") if "val_loss" in line
    }
    best = min(losses, key=losses.__getitem__)
    assert max(losses) == min(8, best + 2) and (tmp_path / f"run/iter_{best:07d}").is_dir()
    assert (tmp_path / "run/best_checkpointed_iteration.txt").read_text().strip() == str(best)
    before, after = load_pretrained(workplace / "weights", torch.float32).state_dict(), tensors(tmp_path / "run")
    moved = {name: float((after[name] - value).abs().max()) for name, value in before.items()}
    assert not any(value for name, value in moved.items() if name.startswith("model.visual"))
    assert 0 < moved["lm_head.weight"] < 0.01 < moved["model.language_model.layers.0.mlp.gate.weight"]


def test_a_resumed_run_goes_on_bit_for_bit(workplace, whole, tmp_path):
    """By then the weights are others, so the reference's file must be there, or computed anew."""
    save, words = tmp_path / "run", dpo(workplace)
    assert train(workplace, save, 2, *words, "training.train_iters=4").returncode == 0
    [file] = save.glob("reference-*.jsonl")
    before = file.read_bytes()
    file.unlink()
    done = train(workplace, save, 2, *words)
    assert done.returncode == 1
    assert "has 0 of" in done.stderr and "make logprobs" in done.stderr
    logprobs(workplace, save, 2, "-", *words)
    assert file.read_bytes() == before
    done = train(workplace, save, 2, *words)
    assert done.returncode == 0, done.stderr
    assert f"log-probabilities from {file}" in done.stdout and "computing log-probabilities" not in done.stdout
    assert_same_run(save, whole)


def test_ranks_share_the_reference_and_its_file_is_used_again(workplace, whole, tmp_path):
    """One rank with twice the accumulation trains as two, on what two have computed."""
    cache = f"{BASIC}.cache_dir={tmp_path / 'cache'}"
    logprobs(workplace, tmp_path / "unused", 2, "-", *dpo(workplace, cache))
    [file] = (tmp_path / "cache").glob("reference-*.jsonl")
    before = file.read_bytes()
    [of_run] = [path for path in whole.glob("reference-*.jsonl") if path.name == file.name]
    assert of_run.read_bytes() == before  # what the trainer computes is what the command does
    done = train(workplace, tmp_path / "run", 1, *dpo(workplace, cache, "training.gradient_accumulation_steps=2"))
    assert done.returncode == 0, done.stderr
    assert "computing log-probabilities" not in done.stdout and file.read_bytes() == before
    for a, b in zip(read_metrics(tmp_path / "run/metrics.jsonl"), read_metrics(whole / "metrics.jsonl"), strict=True):
        assert [a[k] for k in ("loss", *METRICS)] == pytest.approx(
            [b[k] for k in ("loss", *METRICS)], rel=1e-3, abs=1e-4
        )


def test_the_reference_is_the_trainers_own_forward_bit_for_bit(workplace, tmp_path):
    """On one device, with the same pairs packed together: the first rewards are exactly zero."""
    words = dpo(workplace, "data.dataloader_param.shuffle=false", "training.train_iters=1")
    done = train(workplace, tmp_path / "run", 1, *words)
    assert done.returncode == 0, done.stderr
    [first] = read_metrics(tmp_path / "run/metrics.jsonl")
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0
    [file] = (tmp_path / "run").glob("reference-*.jsonl")
    [*micro_batch], *_ = rows(file)
    assert first["logps/chosen"] == pytest.approx(sum(c for _, c, _ in micro_batch) / len(micro_batch), rel=1e-6)


def test_what_was_interrupted_goes_on_and_what_is_damaged_is_refused(workplace, whole, tmp_path):
    words = dpo(workplace, "training.train_iters=1")
    [file] = [path for path in whole.glob("reference-*.jsonl") if len(rows(path)) > 4]
    lines = file.read_bytes().splitlines(keepends=True)
    save = tmp_path / "damaged"
    for folder in (save, tmp_path / "run"):
        folder.mkdir()
    (tmp_path / "run" / file.name).write_bytes(b"".join(lines[:3]) + lines[3][:20])
    command = [sys.executable, "-c", HOLDING, str(tmp_path / "run" / file.name)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        done = train(workplace, tmp_path / "run", 2, *words)
        assert done.returncode == 1 and f"{file.name}: another job is computing it; start this one once" in done.stderr
        holder.stdin.close()
    done = train(workplace, tmp_path / "run", 2, *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / file.name).read_bytes() == file.read_bytes()
    for damage in (lines[0] + lines[1].replace(b".", b"9", 1), lines[0] + b"[]\n" + lines[2]):
        (save / file.name).write_bytes(damage)
        done = train(workplace, save, 2, *words)
        assert done.returncode == 1
        assert f"{save / file.name}: line 2 is damaged; remove the file, and it is computed again" in done.stderr
    [other] = [path for path in whole.glob("reference-*.jsonl") if path != file]
    shutil.copy(other, save / file.name)
    assert "is of another model or data; move it away" in train(workplace, save, 2, *words).stderr


def test_the_reference_of_another_config_or_of_other_pixels_is_another(workplace, tmp_path):
    """Neither weights nor tokens show them: YaRN in config.json, say, or another image_mean."""
    folder = shutil.copytree(workplace / "weights", tmp_path / "weights")
    words = ("training.stage=dpo", f"{BASIC}.dataset={workplace / 'pairs.json'}", f"model.model_name_or_path={folder}")

    def path() -> Path:
        settings = load_settings(workplace / "recipe.yaml", words)
        return reference_file(settings, open_dataset(settings, silent), "digest of the weights").path

    found = [path(), path()]
    assert found[0] == found[1]
    for name, where, values in (
        ("config.json", ("text_config", "rope_parameters"), {"rope_theta": 500.0}),
        ("config.json", ("text_config",), {"num_experts_per_tok": 3}),
        ("preprocessor_config.json", (), {"image_mean": [0.1, 0.2, 0.3]}),
    ):
        before = (folder / name).read_text()
        section = config = json.loads(before)
        for key in where:
            section = section[key]
        section.update(values)
        (folder / name).write_text(json.dumps(config))
        found.append(path())
        (folder / name).write_text(before)
    assert len(set(found)) == 4 and path() == found[0]


@pytest.mark.parametrize("layout", [(), ("parallel.ulysses_parallel_size=2",)], ids=["data", "ulysses"])
def test_log_probabilities_of_any_answers_are_those_of_transformers(workplace, tmp_path, layout):
    out = tmp_path / "out.jsonl"
    overrides = [f"{BASIC}.dataset={workplace / 'records.json'}", *layout]
    assert f"{out}: log-probabilities of 60 samples" in logprobs(
        workplace, tmp_path / "unused", 2, str(out), *overrides
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["record"].rpartition(", ")[2] for line in lines] == [f"record {n} (id {n - 1})" for n in range(1, 61)]
    settings = load_settings(workplace / "recipe.yaml", overrides)
    dataset = open_dataset(settings, silent)
    from transformers.models.qwen3_5_moe import Qwen3_5MoeForConditionalGeneration

    theirs = Qwen3_5MoeForConditionalGeneration.from_pretrained(workplace / "weights", dtype=torch.float32)
    for index in (0, 1, 29):
        [batch] = [DecodedBatches(dataset, 16)[[[index]]]]
        length = int(batch.cu_seqlens[1])
        patches = len(dataset[index].pixel_values)
        one = dataclasses.replace(
            batch,
            input_ids=batch.input_ids[:length],
            pixel_values=batch.pixel_values[:patches],
            grid_thw=batch.grid_thw[: int(patches > 0)],
        )
        inputs = peer_inputs(one)
        ids = one.input_ids[None]
        inputs["mm_token_type_ids"] = (ids == theirs.config.image_token_id).int()
        with torch.no_grad():
            wanted = theirs(**inputs).logits[0].log_softmax(-1)
        at = (batch.labels[:length] >= 0).nonzero()[:, 0]
        assert lines[index]["tokens"] == batch.labels[at].tolist()
        found = torch.tensor(lines[index]["log_probs"])
        assert torch.allclose(found, wanted[at, batch.labels[at]], rtol=1e-5, atol=1e-5)


def test_log_probabilities_are_the_models_own_bit_for_bit(workplace, tmp_path):
    out = tmp_path / "out.jsonl"
    logprobs(workplace, tmp_path / "unused", 1, str(out))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    settings = load_settings(workplace / "recipe.yaml", [])
    dataset, model = open_dataset(settings, silent), load_pretrained(workplace / "weights", torch.float32)
    order = each_once(dataset, settings, 0, 1)
    for packed in order[:2]:
        batch = DecodedBatches(dataset, 16)[packed]
        with torch.no_grad():
            found = model.log_probs(batch)[0]
        wanted = [value for index in packed[0] for value in lines[index]["log_probs"]]
        assert found[batch.labels >= 0].tolist() == wanted


def test_records_without_log_probabilities_are_said(workplace, tmp_path):
    """As a recipe may have it: an output with fewer lines than records would be taken for whole."""
    records, out = json.loads((workplace / "records.json").read_text())[:6], tmp_path / "out.jsonl"
    records[1]["conversations"][1]["value"] = "It is long. " * 60
    (tmp_path / "records.json").write_text(json.dumps(records))
    data = (f"{BASIC}.dataset={tmp_path / 'records.json'}", f"{BASIC}.truncation=drop", f"{BASIC}.max_samples=4")
    said = logprobs(workplace, tmp_path / "unused", 1, str(out), *data)
    assert len(out.read_text().splitlines()) == 3
    assert "data: skipped 1 of 4 records: 1 longer than cutoff_len; first: " in said
    assert "data: max_samples: no record after the first 4 is read" in said


def test_what_cannot_be_written_is_said_before_anything_is_computed(workplace, tmp_path):
    with pytest.raises(SettingError, match=r"there is no folder .*none; make it, or name another file"):
        log_probs(load_settings(workplace / "recipe.yaml", []), tmp_path / "none/out.jsonl")
    with pytest.raises(SettingError, match=r"training.stage: sft has no reference; name a file"):
        log_probs(load_settings(workplace / "recipe.yaml", []), None)


def test_a_broken_image_is_said_and_what_is_computed_by_then_is_kept(workplace, tmp_path):
    """With on_bad_record: skip a run trains padding in its place. The same command goes on."""
    records, image = json.loads((workplace / "records.json").read_text())[:20], tmp_path / "19.png"
    for number in (n for n in range(19) if n % 3):
        shutil.copy(workplace / f"{number}.png", tmp_path)
    Image.effect_noise((60, 40), 90).save(image)
    (tmp_path / "records.json").write_text(json.dumps(records))
    data = [f"{BASIC}.dataset={tmp_path / 'records.json'}", f"{BASIC}.dataset_dir={tmp_path}"]
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    logprobs(workplace, tmp_path / "unused", 2, str(tmp_path / "whole.jsonl"), *data)
    wanted = (tmp_path / "whole.jsonl").read_bytes()
    good = image.read_bytes()
    image.write_bytes(good[: len(good) // 2])  # its header is right
    assert "mend or remove it" in refused(workplace, tmp_path, str(out), *data, f"{BASIC}.on_bad_record=skip")
    assert not out.exists()
    begun = part.read_bytes()
    lines = begun.splitlines(keepends=True)
    assert len(lines) == 3  # its header and two of the micro-batches
    image.write_bytes(good)
    part.write_bytes(begun[:-20])  # as one that was killed while it wrote
    logprobs(workplace, tmp_path / "unused", 2, str(out), *data)
    assert out.read_bytes() == wanted and not part.exists()
    [[index, line], *others] = json.loads(json.loads(lines[1])[1])
    text = json.dumps([[index, line | {"log_probs": [7.0]}], *others])  # what is there is taken, and not computed again
    part.write_bytes(lines[0] + (json.dumps([checksum(text.encode()), text]) + "\n").encode())
    logprobs(workplace, tmp_path / "unused", 2, str(out), *data)
    found = [json.loads(line)["log_probs"] for line in out.read_text().splitlines()]
    assert found.pop(index) == [7.0] and [7.0] not in found
    part.write_bytes(begun)
    assert "out.jsonl.partial is of another model or data; move it away" in refused(
        workplace, tmp_path, str(out), *data, "training.dtype=bf16"
    )


def test_log_probabilities_of_pairs_are_those_of_both_answers(workplace, whole, tmp_path):
    out = tmp_path / "out.jsonl"
    logprobs(workplace, tmp_path / "unused", 2, str(out), *dpo(workplace))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["record"].rpartition(", ")[2] for line in lines] == ["chosen", "rejected"] * 44
    [of_run] = [
        found
        for path in whole.glob("reference-*.jsonl")
        if len(found := [row for line in rows(path) for row in line]) == 44
    ]
    for number, *both in of_run:
        assert [sum(line["log_probs"]) for line in lines[2 * number : 2 * number + 2]] == pytest.approx(both, rel=1e-5)


def test_adapters_learn_pairs_beside_their_base(workplace, tmp_path):
    save = tmp_path / "run"
    lora = "training.lora={r: 8, target_parameters: [mlp.experts.gate_up_proj]}"
    words = dpo(workplace, lora, "training.lr=1e-2", "parallel.expert_parallel_size=2", "parallel.recompute=true")
    done = train(workplace, save, 2, *words)
    assert done.returncode == 0, done.stderr
    lines = read_metrics(save / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-6) and lines[0]["rewards/chosen"] == 0
    assert lines[-1]["rewards/margins"] > 0.1 and lines[-1]["rewards/accuracies"] > 0.9
    assert not [*save.glob("reference-*")]
    assert all("lora" in name for name in tensors(save))
    assert "training.lora has its reference in every step; name a file" in refused(workplace, tmp_path, "-", *words)
    of_it = [f"training.save={tmp_path}", f"training.load={save}", "training.init_from_hf_path=null"]
    going_on = load_settings(workplace / "recipe.yaml", [*words, *of_it])
    with pytest.raises(SettingError, match="holds adapters, and the reference of pairs is a base without any; merge"):
        choose_weights(going_on)
    out = tmp_path / "out.jsonl"  # whose log-probabilities can be had
    logprobs(workplace, tmp_path / "unused", 2, str(out), *words, *of_it)
    sums = [sum(json.loads(line)["log_probs"]) for line in out.read_text().splitlines()]
    assert sum(a > b for a, b in zip(sums[::2], sums[1::2], strict=True)) > 40


def test_log_probabilities_of_weights_with_another_tokenizer_are_refused(workplace, tmp_path):
    """They would be of tokens that mean something else to these weights."""
    weights = shutil.copytree(workplace / "weights", tmp_path / "weights")
    tokenizer = json.loads((weights / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (weights / "tokenizer.json").write_text(json.dumps(tokenizer))
    out = tmp_path / "out.jsonl"
    assert "gives 2 tokens other ids than" in refused(
        workplace, tmp_path, str(out), f"training.init_from_hf_path={weights}"
    )
    assert not out.exists()


def test_a_model_that_reads_answers_learns_to_prefer_them(workplace, tmp_path):
    """The tiny recipe in small: the margin grows, and held-out accuracy does not fall."""
    sft, save = tmp_path / "sft", tmp_path / "run"
    first = ("training.train_iters=40", "training.lr=5e-3", "training.lr_decay_style=constant")
    assert train(workplace, sft, 1, *first).returncode == 0
    dcp_to_hf(sft, workplace / "weights", tmp_path / "hf")
    val = f"data.val_dataset_param.basic_parameters.dataset={workplace / 'heldout.json'}"
    words = dpo(workplace, val, "training.val_interval=4", f"training.init_from_hf_path={tmp_path / 'hf'}")
    done = train(workplace, save, 2, *words, "training.lr=2e-4")
    assert done.returncode == 0, done.stderr
    found = [line for line in read_metrics(save / "metrics.jsonl") if "val_loss" in line]
    margins, accuracies = ([line[f"val_rewards/{name}"] for line in found] for name in ("margins", "accuracies"))
    assert 0 < margins[0] < margins[1] and 0.9 < accuracies[0] <= accuracies[1]
    assert found[1]["val_logps/chosen"] > found[1]["val_logps/rejected"]
