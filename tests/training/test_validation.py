"""Validation equals a slow count over single records, and leaves the training unchanged."""

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
from qwen35.inference.evaluate import is_right
from qwen35.inference.predict import Asking
from qwen35.training.metrics import read_metrics
from qwen35.training.plots import Curves, draw_loss
from qwen35.training.validation import Validation

SAME = ("step", "loss", "aux_loss", "grad_norm", "lr", "tokens", "label_tokens", "image_tokens")
FOUND = ("val_loss", "val_tokens", "val_exact_match")
DATASET = "data.val_dataset_param.basic_parameters.dataset"
RECORDS = 11  # records: not even for any number of ranks


@pytest.fixture(scope="module")
def val_file(workplace) -> Path:
    records = json.loads((workplace / "records.json").read_text())
    path = workplace / "val_file.json"
    path.write_text(json.dumps(records[:RECORDS]))
    return path


def validating(val_file: Path) -> list[str]:
    return [f"{DATASET}={val_file}", "training.val_interval=3", "training.val_generate=true"]


@pytest.fixture(scope="module")
def run(workplace, val_file) -> Path:
    """The run `two` with a validation every third step."""
    save = workplace / "validated"
    done = train(workplace, save, 2, "training.save_interval=5", *validating(val_file))
    assert done.returncode == 0, done.stderr
    (save / "console").write_text(done.stdout)
    return save


def lines_of(save: Path) -> list[dict]:
    return read_metrics(save / "metrics.jsonl")


def test_validation_does_not_change_the_training(two, run, tmp_path):
    """Curve, weights and optimizer state are the same bit for bit."""
    lines, wanted = lines_of(run), lines_of(two)
    assert [[line[k] for k in SAME] for line in lines] == [[line[k] for k in SAME] for line in wanted]
    assert [line["step"] for line in lines if all(key in line for key in FOUND)] == [3, 6, 9, 10]
    assert not any("val" in key for line in lines if line["step"] in (1, 2, 4, 5, 7, 8) for key in line)
    for prefix in ("model.", "optimizer."):
        a, b = tensors(run, prefix), tensors(two, prefix)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    pictures = [tmp_path / save.name for save in (run, two)]
    for save, folder in zip((run, two), pictures, strict=True):
        folder.mkdir()
        draw_loss(Curves.read(save), folder)
    assert len({(folder / "loss.png").read_bytes() for folder in pictures}) == 2


def test_loss_and_exact_match_equal_a_slow_count(workplace, val_file, run):
    """The loss of each record alone, over all logits, and the answers of the saved model."""
    settings = load_settings(workplace / "recipe.yaml", validating(val_file)).validation
    model = load_pretrained(workplace / "weights", dtype=torch.float32)
    model.load_state_dict(tensors(run))
    dataset = ValidationSet(settings, 0, 1).dataset
    losses = []
    for i in range(RECORDS):
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
    given = list(chain.from_iterable(Asking(workplace / "weights", dataset.preparation).answers(model, records, 1)))
    assert len(given) == RECORDS
    assert 0 < last["val_exact_match"] < 1
    assert last["val_exact_match"] == pytest.approx(sum(map(is_right, given)) / RECORDS)


def test_the_console_shows_each_validation_with_its_time(run):
    lines = [line for line in lines_of(run) if "val_loss" in line]
    assert [line["step"] for line in lines] == [3, 6, 9, 10]
    text = (run / "console").read_text().splitlines()
    for line in lines:
        assert 0 < line["val_time"] < 600
        match = f"val_exact_match {line['val_exact_match']:.6g}  {line['val_time']:.2f} s"
        assert [x for x in text if x.startswith(f"step {line['step']:6}  val_loss ") and x.endswith(match)]


def test_resume_is_bit_exact(workplace, val_file, run, tmp_path):
    """Validations after the checkpoint are removed, and made again."""
    save = tmp_path / "again"
    subprocess.run(["cp", "-r", run, save], check=True)
    subprocess.run(["rm", "-r", save / "iter_0000010"], check=True)
    done = train(workplace, save, 2, "training.save_interval=5", *validating(val_file))
    assert done.returncode == 0, done.stderr
    keys = (*SAME, *FOUND)
    assert [[line.get(k) for k in keys] for line in lines_of(save)] == [
        [line.get(k) for k in keys] for line in lines_of(run)
    ]


def test_parallel_layouts_validate_the_same(workplace, val_file, run, tmp_path):
    """Four processes with expert parallelism and shared sequences find the same."""
    sizes = ["parallel.expert_parallel_size=2", "parallel.ulysses_parallel_size=2", "parallel.recompute=selective"]
    start = [f"training.load={run}", "training.init_from_hf_path=null", "training.train_iters=11", "training.lr=1e-20"]
    accumulate = ["training.micro_batch_size=1", "training.val_interval=11", "training.weight_decay=0"]
    done = train(workplace, tmp_path / "run", 4, *validating(val_file), *sizes, *start, *accumulate)
    assert done.returncode == 0, done.stderr
    (line,) = lines_of(tmp_path / "run")
    last = lines_of(run)[-1]
    assert line["val_tokens"] == last["val_tokens"] and line["val_exact_match"] == last["val_exact_match"]
    assert line["val_loss"] == pytest.approx(last["val_loss"], rel=1e-5)


def test_a_record_with_a_broken_image_is_left_out(workplace, val_file, run, tmp_path):
    """Its header is intact, so it fails only when decoded: for the loss, and for the answer."""
    records = json.loads(val_file.read_text())
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
def test_each_record_is_validated_once(workplace, val_file, ranks, bins, workers):
    """All ranks have equally many batches of one shape, and the same ones the second time."""
    more = [f"training.micro_batch_size={bins}", f"data.dataloader_param.num_workers={workers}"]
    settings = load_settings(workplace / "recipe.yaml", [*validating(val_file), *more]).validation
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
    assert sorted(seen) == sorted(dataset[i].input_ids.tolist() for i in range(RECORDS))


def test_truncated_and_unanswered_records_are_counted(workplace, val_file):
    settings = load_settings(workplace / "recipe.yaml", validating(val_file)).validation
    whole = ValidationSet(settings, 0, 1).dataset
    limit = int(whole.lengths.max()) - 1
    basic = "data.val_dataset_param.basic_parameters"
    words = [*validating(val_file), f"{basic}.cutoff_len={limit}", f"{basic}.truncation=truncate"]
    settings = load_settings(workplace / "recipe.yaml", words).validation
    text = report(settings)
    long = int((whole.lengths > limit).sum())
    answered = f"{RECORDS - long} of them answered (not those longer than cutoff_len)"
    assert f"{RECORDS} samples, {answered}" in text and f"; cut {long} to cutoff_len" in text
    text = report(load_settings(workplace / "recipe.yaml", validating(val_file)).validation)
    assert f"{RECORDS} samples, {RECORDS} of them answered, " in text and "cut" not in text


def test_an_answer_that_the_loss_mask_leaves_out_is_not_what_is_right(workplace, tmp_path):
    """The validation loss leaves it out, too."""
    good = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It."}]
    bad = [*good, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Bad.", "weight": 0}]
    (tmp_path / "val.json").write_text(json.dumps([{"messages": turns} for turns in (bad, good, bad, good)]))
    settings = load_settings(workplace / "recipe.yaml", validating(tmp_path / "val.json")).validation
    [asked] = ValidationSet(settings, 0, 1).records_for_generation()
    assert [[turn.text for turn in record.turns] for record in asked] == [["What?", "It."]] * 2
    left_out = "not those whose loss mask leaves the last answer out"
    assert f"4 samples, 2 of them answered ({left_out}), " in report(settings)


def report(settings, train_set=None, trained=None) -> str:
    """The start line of a validation on one rank."""
    meshes = SimpleNamespace(data_rank=0, data_size=1)
    return Validation(settings, meshes, torch.device("cpu"), torch.float32, silent, train_set).report(trained)


def test_files_that_are_also_trained_on_are_named(workplace, val_file, tmp_path):
    """A link to the file counts too."""
    link = tmp_path / "link.json"
    link.symlink_to(workplace / "records.json")
    settings = load_settings(workplace / "recipe.yaml", [*validating(val_file), f"{DATASET}={val_file},{link}"])
    text = report(settings.validation, settings.data.dataset_param)
    assert text.endswith(f" a rank; {link} is also trained on")
    settings = load_settings(workplace / "recipe.yaml", validating(val_file))
    assert "trained on" not in report(settings.validation, settings.data.dataset_param)


def test_samples_that_are_also_trained_on_are_counted(workplace, val_file, tmp_path):
    """Whatever file they are in; the same question about another image is another sample."""
    records = json.loads((workplace / "records.json").read_text())
    image = next(record for record in records if "image" in record)
    Image.open(workplace / image["image"]).save(workplace / "same.png")
    others = [
        image | {"image": "same.png"},
        {"conversations": [*records[0]["conversations"][:1], {"from": "gpt", "value": "No."}]},
    ]
    (tmp_path / "val.json").write_text(json.dumps([*others, *records[3:6]]))
    settings = load_settings(workplace / "recipe.yaml", validating(tmp_path / "val.json"))
    trained = MicroBatches(settings, 0, 1).dataset
    text = report(settings.validation, settings.data.dataset_param, trained)
    assert text.endswith(f" a rank; 3 samples of these are also trained on, first {tmp_path}/val.json, record 3 (id 3)")
    (tmp_path / "val.json").write_text(json.dumps(others))
    assert "trained on" not in report(settings.validation, settings.data.dataset_param, trained)
    settings = load_settings(
        workplace / "recipe.yaml", [f"{DATASET}={workplace / 'records.json'}", "training.val_interval=3"]
    )
    text = report(settings.validation, settings.data.dataset_param, trained)
    assert text.endswith(f" a rank; {workplace / 'records.json'} is also trained on")  # said once


def test_data_warnings_name_the_validation_settings(workplace, tmp_path):
    """An error about attr names the validation set's own setting."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]
    (tmp_path / "odd.json").write_text(json.dumps([{"messages": turns}]))
    settings = load_settings(workplace / "recipe.yaml", validating(tmp_path / "odd.json"))
    text = report(settings.validation, settings.data.dataset_param)
    assert text.startswith(
        "validation every 3 steps: 1 sample, 1 of them answered, 1 micro-batch a rank; 1 answer is empty; "
    )
    attr = "data.val_dataset_param.attr.images"
    settings = load_settings(workplace / "recipe.yaml", [*validating(tmp_path / "odd.json"), f"{attr}=photo"])
    with pytest.raises(
        SettingError, match=rf"^{attr}: no record of .*odd\.json has a field 'photo'; they have 'messages'$"
    ):
        report(settings.validation, settings.data.dataset_param)


def test_a_validation_cut_by_the_trainings_max_samples_says_so(workplace, val_file):
    count = len(json.loads(val_file.read_text()))
    for most, told in ((count - 1, True), (count + 1, False)):
        words = [*validating(val_file), f"data.dataset_param.basic_parameters.max_samples={most}"]
        settings = load_settings(workplace / "recipe.yaml", words)
        text = report(settings.validation, settings.data.dataset_param)
        assert text.endswith(f"; max_samples: no record after the first {most} is read") == told, text


def test_settings_that_are_not_given_are_inherited(workplace, val_file):
    basic = "data.val_dataset_param.basic_parameters"
    settings = load_settings(workplace / "recipe.yaml", [*validating(val_file), f"{basic}.cutoff_len=200"])
    trained, other = settings.data.dataset_param, settings.data.val_dataset_param
    assert other.preprocess_parameters == trained.preprocess_parameters and other.attr == trained.attr
    assert other.basic_parameters.dataset == str(val_file) and other.basic_parameters.cutoff_len == 200
    assert other.basic_parameters.dataset_dir == trained.basic_parameters.dataset_dir
    assert settings.validation.data.dataset_param == other
    without = ["data.val_dataset_param=null", "training.val_interval=null", "training.val_generate=false"]
    assert load_settings(workplace / "recipe.yaml", [*validating(val_file), *without]).validation is None
    (workplace / "resolved.yaml").write_text(to_yaml(settings))
    assert load_settings(workplace / "resolved.yaml") == settings
    fingerprints = [MicroBatches(s, 0, 1).fingerprint for s in (settings, load_settings(workplace / "recipe.yaml"))]
    assert fingerprints[0] == fingerprints[1]
