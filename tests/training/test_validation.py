"""Held-out records between steps: what is found equals a slow count over one record at a time, and the training goes on as if
nobody had looked."""

import json
import subprocess
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from training_runs import tensors, train

from qwen35.batch import PackedBatch
from qwen35.checkpoint import load_pretrained
from qwen35.config.load import load_settings, to_yaml
from qwen35.data import MicroBatches
from qwen35.data.tokenized import silent
from qwen35.data.validation import ValidationSet
from qwen35.errors import SettingError
from qwen35.inference.evaluate import answers
from qwen35.training.metrics import read_metrics
from qwen35.training.validation import Validation

SAME = ("step", "loss", "aux_loss", "grad_norm", "lr", "tokens", "label_tokens", "image_tokens")
FOUND = ("val_loss", "val_tokens", "val_exact_match")
DATASET = "data.val_dataset_param.basic_parameters.dataset"
HELD_OUT = 11  # records: not even for any number of ranks


@pytest.fixture(scope="module")
def held_out(workplace) -> Path:
    records = json.loads((workplace / "records.json").read_text())
    path = workplace / "held_out.json"
    path.write_text(json.dumps(records[:HELD_OUT]))
    return path


def validating(held_out: Path) -> list[str]:
    return [f"{DATASET}={held_out}", "training.val_interval=3", "training.val_generate=true"]


@pytest.fixture(scope="module")
def run(workplace, held_out) -> Path:
    """As `two`, and validated every third step."""
    save = workplace / "validated"
    done = train(workplace, save, 2, "training.save_interval=5", *validating(held_out))
    assert done.returncode == 0, done.stderr
    (save / "console").write_text(done.stdout)
    return save


def lines_of(save: Path) -> list[dict]:
    return read_metrics(save / "metrics.jsonl")


def test_the_training_is_as_without(two, run):
    """Bit for bit: the curve, the weights, the optimizer's state."""
    lines, wanted = lines_of(run), lines_of(two)
    assert [[line[k] for k in SAME] for line in lines] == [[line[k] for k in SAME] for line in wanted]
    assert [line["step"] for line in lines if all(key in line for key in FOUND)] == [3, 6, 9, 10]
    assert not any("val" in key for line in lines if line["step"] in (1, 2, 4, 5, 7, 8) for key in line)
    for prefix in ("model.", "optimizer."):
        a, b = tensors(run, prefix), tensors(two, prefix)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (run / "loss.png").read_bytes() != (two / "loss.png").read_bytes()


def test_what_is_found_is_so(workplace, held_out, run):
    """The loss of each record by itself, over all its logits; the answers of the model that was saved."""
    settings = load_settings(workplace / "recipe.yaml", validating(held_out)).validation
    model = load_pretrained(workplace / "weights", dtype=torch.float32)
    model.load_state_dict(tensors(run))
    dataset = ValidationSet(settings, 0, 1).dataset
    losses = []
    for i in range(HELD_OUT):
        sample = dataset[i]
        ends = torch.tensor([0, len(sample.input_ids)], dtype=torch.int32)
        fields = ("input_ids", "labels", "position_ids", "pixel_values", "grid_thw")
        logits = model.logits(PackedBatch(cu_seqlens=ends, **{name: getattr(sample, name) for name in fields})).detach()
        losses.append(F.cross_entropy(logits, sample.labels, ignore_index=-100, reduction="none")[sample.labels >= 0])
    last = lines_of(run)[-1]
    assert last["val_tokens"] == sum(map(len, losses))
    assert last["val_loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert lines_of(run)[2]["val_loss"] > last["val_loss"]
    records = [record for group in ValidationSet(settings, 0, 1).records_for_generation() for record in group]
    given = list(answers(model, workplace / "weights", dataset.preparation, records, batch=1))
    assert len(given) == HELD_OUT
    assert 0 < last["val_exact_match"] < 1
    assert last["val_exact_match"] == pytest.approx(sum(answer.is_right for answer in given) / HELD_OUT)


def test_the_console_tells_of_each_with_its_seconds(run):
    lines = [line for line in lines_of(run) if "val_loss" in line]
    assert [line["step"] for line in lines] == [3, 6, 9, 10]
    told = (run / "console").read_text().splitlines()
    for line in lines:
        assert 0 < line["val_time"] < 600
        match = f"val_exact_match {line['val_exact_match']:.6g}  {line['val_time']:.2f} s"
        assert [x for x in told if x.startswith(f"step {line['step']:6}  val_loss ") and x.endswith(match)]


def test_resumed_equals_uninterrupted(workplace, held_out, run, tmp_path):
    """What was found after the checkpoint is cut off, and found again."""
    save = tmp_path / "again"
    subprocess.run(["cp", "-r", run, save], check=True)
    subprocess.run(["rm", "-r", save / "iter_0000010"], check=True)
    done = train(workplace, save, 2, "training.save_interval=5", *validating(held_out))
    assert done.returncode == 0, done.stderr
    keys = (*SAME, *FOUND)
    assert [[line.get(k) for k in keys] for line in lines_of(save)] == [
        [line.get(k) for k in keys] for line in lines_of(run)
    ]


def test_shared_in_every_way(workplace, held_out, run, tmp_path):
    """Four processes with experts of their own and parts of bins: of the same weights, the same."""
    sizes = ["parallel.expert_parallel_size=2", "parallel.ulysses_parallel_size=2", "parallel.recompute=selective"]
    start = [f"training.load={run}", "training.init_from_hf_path=null", "training.train_iters=11", "training.lr=1e-20"]
    accumulate = ["training.micro_batch_size=1", "training.val_interval=11", "training.weight_decay=0"]
    done = train(workplace, tmp_path / "run", 4, *validating(held_out), *sizes, *start, *accumulate)
    assert done.returncode == 0, done.stderr
    (line,) = lines_of(tmp_path / "run")
    last = lines_of(run)[-1]
    assert line["val_tokens"] == last["val_tokens"] and line["val_exact_match"] == last["val_exact_match"]
    assert line["val_loss"] == pytest.approx(last["val_loss"], rel=1e-5)


def test_a_record_whose_image_breaks_takes_no_part(workplace, held_out, run, tmp_path):
    """Its header is whole, so that it shows only as it is decoded: for the loss, and for the answer."""
    records = json.loads(held_out.read_text())
    Image.effect_noise((64, 64), 90).save(workplace / "broken.png")
    data = (workplace / "broken.png").read_bytes()
    (workplace / "broken.png").write_bytes(data[: len(data) // 2])
    records[4]["image"] = "broken.png"
    some = tmp_path / "some.json"
    some.write_text(json.dumps(records))
    steps = ["training.train_iters=11", "training.lr=1e-20", "training.weight_decay=0", "training.val_interval=11"]
    steps += [f"training.load={run}", "training.init_from_hf_path=null"]
    skip = "data.val_dataset_param.basic_parameters.on_bad_record=skip"
    done = train(workplace, tmp_path / "broken", 2, *validating(some), *steps, skip)
    assert done.returncode == 0, done.stderr
    assert (
        "not trained" not in done.stdout
        and f"{some}, record 5 (id 4): {workplace}/broken.png: cannot be" in done.stdout
    )
    some.write_text(json.dumps(records[:4] + records[5:]))
    done = train(workplace, tmp_path / "whole", 2, *validating(some), *steps, skip)
    assert done.returncode == 0, done.stderr
    (line,), (wanted,) = lines_of(tmp_path / "broken"), lines_of(tmp_path / "whole")
    assert line["val_bad_records"] == 1 and 0 < line["val_exact_match"] < 1
    assert [line[key] for key in FOUND] == [pytest.approx(wanted[key], rel=1e-6) for key in FOUND]


@pytest.mark.parametrize(("ranks", "bins", "workers"), [(1, 1, 0), (2, 2, 1), (5, 2, 0)])
def test_each_record_once(workplace, held_out, ranks, bins, workers):
    """Whatever the number of ranks, all of them have as many batches, of one shape; and the second time the same."""
    more = [f"training.micro_batch_size={bins}", f"data.dataloader_param.num_workers={workers}"]
    settings = load_settings(workplace / "recipe.yaml", [*validating(held_out), *more]).validation
    sets = [ValidationSet(settings, rank, ranks) for rank in range(ranks)]
    first = [list(one) for one in sets]
    again = [list(one) for one in sets]
    assert {len(batches) for batches in first} == {len(sets[0])}
    seen = []
    for a, b in zip(chain.from_iterable(first), chain.from_iterable(again), strict=True):
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.pixel_values, b.pixel_values)
        assert a.input_ids.shape == (bins * 160,) and len(a.pixel_values) % 16 == 0
        for start, end in pairwise(a.cu_seqlens.tolist()):
            if not a.is_pad[start]:
                seen.append(a.input_ids[start:end].tolist())
    dataset = sets[0].dataset
    assert sorted(seen) == sorted(dataset[i].input_ids.tolist() for i in range(HELD_OUT))


def test_what_is_cut_and_not_answered_is_said(workplace, held_out):
    settings = load_settings(workplace / "recipe.yaml", validating(held_out)).validation
    whole = ValidationSet(settings, 0, 1).dataset
    limit = int(whole.lengths.max()) - 1
    basic = "data.val_dataset_param.basic_parameters"
    words = [*validating(held_out), f"{basic}.cutoff_len={limit}", f"{basic}.truncation=truncate"]
    settings = load_settings(workplace / "recipe.yaml", words).validation
    told = report(settings)
    long = int((whole.lengths > limit).sum())
    answered = f"{HELD_OUT - long} of them answered (none that is longer than cutoff_len)"
    assert f"{HELD_OUT} samples, {answered}" in told and f"; cut {long} to cutoff_len" in told
    told = report(load_settings(workplace / "recipe.yaml", validating(held_out)).validation)
    assert f"{HELD_OUT} samples, {HELD_OUT} of them answered, " in told and "cut" not in told


def report(settings, trained=None) -> str:
    """Of a validation on one rank."""
    meshes = SimpleNamespace(data_rank=0, data_size=1)
    return Validation(settings, meshes, torch.device("cpu"), torch.float32, silent, trained).report()


def test_what_is_trained_on_too_is_said(workplace, held_out, tmp_path):
    """By whatever name."""
    link = tmp_path / "link.json"
    link.symlink_to(workplace / "records.json")
    settings = load_settings(workplace / "recipe.yaml", [*validating(held_out), f"{DATASET}={held_out},{link}"])
    told = report(settings.validation, settings.data.dataset_param)
    assert told.endswith(f" a rank; {link} is also trained on")
    settings = load_settings(workplace / "recipe.yaml", validating(held_out))
    assert "trained on" not in report(settings.validation, settings.data.dataset_param)


def test_what_is_odd_about_it_is_said(workplace, tmp_path):
    """And a name in attr that no record has is one of the validation's own settings."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]
    (tmp_path / "odd.json").write_text(json.dumps([{"messages": turns}]))
    settings = load_settings(workplace / "recipe.yaml", validating(tmp_path / "odd.json"))
    told = report(settings.validation, settings.data.dataset_param)
    assert told.startswith(
        "validation every 3 steps: 1 sample, 1 of them answered, 1 micro-batch a rank; 1 answer is empty; "
    )
    attr = "data.val_dataset_param.attr.images"
    settings = load_settings(workplace / "recipe.yaml", [*validating(tmp_path / "odd.json"), f"{attr}=photo"])
    with pytest.raises(
        SettingError, match=rf"^{attr}: no record of .*odd\.json has a field 'photo'; they have 'messages'$"
    ):
        report(settings.validation, settings.data.dataset_param)


def test_what_is_not_given_is_as_in_training(workplace, held_out):
    basic = "data.val_dataset_param.basic_parameters"
    settings = load_settings(workplace / "recipe.yaml", [*validating(held_out), f"{basic}.cutoff_len=200"])
    trained, other = settings.data.dataset_param, settings.data.val_dataset_param
    assert other.preprocess_parameters == trained.preprocess_parameters and other.attr == trained.attr
    assert other.basic_parameters.dataset == str(held_out) and other.basic_parameters.cutoff_len == 200
    assert other.basic_parameters.dataset_dir == trained.basic_parameters.dataset_dir
    assert settings.validation.data.dataset_param == other
    without = ["data.val_dataset_param=null", "training.val_interval=null", "training.val_generate=false"]
    assert load_settings(workplace / "recipe.yaml", [*validating(held_out), *without]).validation is None
    (workplace / "resolved.yaml").write_text(to_yaml(settings))
    assert load_settings(workplace / "resolved.yaml") == settings
    fingerprints = [MicroBatches(s, 0, 1).fingerprint for s in (settings, load_settings(workplace / "recipe.yaml"))]
    assert fingerprints[0] == fingerprints[1]
