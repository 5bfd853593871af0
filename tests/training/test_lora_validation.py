"""Validation of a LoRA run answers with its adapters, and changes nothing."""

import json

import pytest
import torch
from training_runs import tensors, train

from qwen35.checkpoint import load_pretrained
from qwen35.config.load import load_settings
from qwen35.data.validation import ValidationSet
from qwen35.inference.evaluate import is_right
from qwen35.inference.predict import Asking
from qwen35.model.lora import adapters_off
from qwen35.training.adapters import choose_trained
from qwen35.training.metrics import read_metrics

LORA = (
    "training.lora={r: 8, target_parameters: [mlp.experts.gate_up_proj, mlp.experts.down_proj]}",
    "training.train_iters=4",
    "training.lr=0.5",
    "training.init_from_hf_path=null",
)
LAYOUT = ("parallel.expert_parallel_size=2", "parallel.ulysses_parallel_size=2", "parallel.recompute=selective")


def test_validation_answers_with_the_adapters(workplace, two, tmp_path):
    """The exact matches of one process with the saved adapters, in a layout of four.

    The base is right at times; at this learning rate the adapters unlearn that.
    """
    records = json.loads((workplace / "records.json").read_text())[:12]
    (tmp_path / "val.json").write_text(json.dumps(records))
    file = f"data.val_dataset_param.basic_parameters.dataset={tmp_path / 'val.json'}"
    validating = (f"training.load={two}", file, "training.val_interval=2", "training.val_generate=true")
    done = train(workplace, tmp_path / "run", 4, *LORA, *LAYOUT, *validating)
    assert done.returncode == 0, done.stderr
    first, last = (line for line in read_metrics(tmp_path / "run/metrics.jsonl") if "val_loss" in line)
    assert first["step"] == 2 and last["val_loss"] != first["val_loss"]
    settings = load_settings(workplace / "recipe.yaml", [*LORA, *validating])
    model = load_pretrained(workplace / "weights", dtype=torch.float32)
    choose_trained(model, settings)
    model.load_state_dict(tensors(two) | tensors(tmp_path / "run"))
    dataset = ValidationSet(settings.validation, 0, 1)
    asked = [record for group in dataset.records_for_generation() for record in group]

    def matches() -> list[bool]:
        asking = Asking(workplace / "weights", dataset.dataset.preparation)
        return [is_right(answer) for found in asking.answers(model, asked, 3) for answer in found]

    adapted = matches()
    assert last["val_exact_match"] == pytest.approx(sum(adapted) / 12)
    with adapters_off(model):
        assert sum(matches()) > sum(adapted)
