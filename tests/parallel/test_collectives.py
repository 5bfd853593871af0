"""The collectives, their order and their ranks never depend on the data."""

import argparse
import json
import shutil
import sys

from forked import ROOT, run_code
from PIL import Image

from qwen35.training.metrics import read_metrics

DRIVER = """
import argparse, json, sys
from qwen35.launch.launcher import run
sys.exit(run(json.loads(sys.argv[1]), argparse.Namespace(**json.loads(sys.argv[2]))))
"""


LAYOUT = ("parallel.fully_shard_parallel_size=2", "parallel.expert_parallel_size=2", "parallel.recompute=selective")


def test_ranks_without_images_or_trained_tokens_call_what_the_others_call(workplace, tmp_path):
    """Images, text only, no labels, a broken image: alternating over four ranks."""
    from ports import free_port

    for file in workplace.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    Image.effect_noise((64, 64), 90).save(tmp_path / "5.png")
    (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:2000])  # its header is right
    basic = "data.dataset_param.basic_parameters"
    settings = [
        f"{basic}.dataset={tmp_path / 'records.json'}",
        f"{basic}.dataset_dir={tmp_path}",
        f"{basic}.on_bad_record=skip",
        f"training.save={tmp_path / 'run'}",
        *("training.train_iters=2", "training.gradient_accumulation_steps=2", "training.log_interval=2"),
        *LAYOUT,
    ]
    command = [sys.executable, str(ROOT / "tests/collectives.py"), str(workplace / "recipe.yaml"), *settings]
    args = argparse.Namespace(nnodes=1, node_rank=0, nproc_per_node=4, master_addr="localhost", master_port=free_port())
    done = run_code(DRIVER, json.dumps(command), json.dumps(vars(args)), LOG=str(tmp_path))
    assert done.returncode == 0, done.stderr
    calls = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert len(calls[0]) > 50 and len({name for name, _, _ in calls[0]}) >= 3, calls[0][:3]
    assert {tuple(groups) for _, groups, _ in calls[0]} >= {(2,), (4,)}
    for rank in (1, 2, 3):
        for mine, theirs in zip(calls[rank], calls[0], strict=True):
            assert mine == theirs, rank
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert sum(line["bad_records"] for line in lines) == 4
    assert all(line["loss"] > 0 for line in lines)
