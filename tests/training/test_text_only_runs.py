"""A text-only checkpoint: trained, resumed, exported, asked; records with images are refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_cases import assert_same_bytes, tensors_in
from hf_folder import write_hf
from peer import ONE_OF_EACH, config_dict, text_only
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizer_fixture import make_model_folder
from training_runs import assert_same_run, train

from qwen35.checkpoint.hf_names import text_only_name
from qwen35.config.load import load_settings
from qwen35.convert import main as convert
from qwen35.data.preview import show
from qwen35.errors import UserError
from qwen35.inference import evaluate, generate
from qwen35.model import Qwen35
from qwen35.tools.doctor import recipe as doctor
from qwen35.tools.doctor.host import Machine
from qwen35.training.metrics import read_metrics

PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
BASIC = "data.dataset_param.basic_parameters"
FEW = ("training.train_iters=4", "training.save_interval=2", "training.log_interval=1", "training.adam_eps=1e-4")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A text-only model folder without image processors, 40 records, and a recipe for them."""
    place = tmp_path_factory.mktemp("text_only")
    config = text_only(config_dict(vocab_size=512, mtp_num_hidden_layers=1, **ONE_OF_EACH))
    make_model_folder(place / "weights")
    for name in PROCESSORS:
        (place / "weights" / name).unlink(missing_ok=True)
    write_hf(Qwen35.from_config(config, mtp=True).state_dict(), config, place / "made")
    tensors = load_file(*(place / "made").glob("*.safetensors"))
    save_file({text_only_name(n): t for n, t in tensors.items()}, place / "weights/model.safetensors")
    (place / "weights/config.json").write_text(json.dumps(config))
    records = [
        {"id": i, "conversations": [{"from": "human", "value": f"What is {i}?"}, {"from": "gpt", "value": f"{i % 7}."}]}
        for i in range(40)
    ]
    (place / "records.json").write_text(json.dumps(records))
    Image.new("L", (40, 40)).save(place / "cat.png")
    seen = [records[0], records[1] | {"image": "cat.png"}]
    seen[1]["conversations"] = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    (place / "with_image.json").write_text(json.dumps(seen))
    (place / "recipe.yaml").write_text(f"""
data:
  dataset_param:
    basic_parameters: {{dataset: {place}/records.json, dataset_dir: {place}, cutoff_len: 160}}
  dataloader_param: {{num_workers: 0}}
model: {{model_name_or_path: {place}/weights, mtp_num_layers: 1, loss_cfg: {{router_aux_loss_coef: 0.01}}}}
training: {{train_iters: 4, save: {place}/unset, init_from_hf_path: {place}/weights, lr: 1.0e-2, dtype: fp32}}
""")
    return place


@pytest.fixture(scope="module")
def run(place) -> Path:
    """Two processes, four steps, a checkpoint after two."""
    done = train(place, place / "run", 2, *FEW)
    assert done.returncode == 0, done.stderr
    (place / "run/console").write_text(done.stdout)
    return place / "run"


def export(place: Path, dcp: Path, out: Path) -> Path:
    assert (
        convert(["dcp_to_hf", "--dcp_dir", str(dcp), "--origin_hf_dir", f"{place}/weights", "--save_hf_dir", str(out)])
        == 0
    )
    return out


def test_it_learns_and_no_figure_speaks_of_a_tower(run):
    lines = read_metrics(run / "metrics.jsonl")
    assert len(lines) == 4 and lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["image_tokens"] == 0 for line in lines)
    table = (run / "console").read_text()
    assert "self_attn" in table and "visual" not in table
    assert not any("visual" in key for line in lines for key in line)


def test_a_resumed_run_is_the_run_that_never_stopped(place, run):
    save = place / "resumed"
    save.mkdir()
    shutil.copytree(run / "iter_0000002", save / "iter_0000002")
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(run / name, save)
    done = train(place, save, 2, *FEW)
    assert done.returncode == 0, done.stderr
    assert_same_run(save, run)


@pytest.mark.parametrize(
    "parallel",
    [
        ("parallel.ulysses_parallel_size=2", "training.gradient_accumulation_steps=2", "parallel.recompute=selective"),
        ("parallel.expert_parallel_size=2", "parallel.recompute=true"),
    ],
    ids=["ulysses", "experts"],
)
def test_other_layouts_compute_the_same(place, run, parallel):
    save = place / parallel[0]
    done = train(place, save, 2, *FEW, *parallel)
    assert done.returncode == 0, done.stderr
    own, wanted = (read_metrics(folder / "metrics.jsonl") for folder in (save, run))
    for a, b in zip(own, wanted, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-3
        )


def test_a_run_from_the_converted_checkpoint_and_its_export(place, run, tmp_path):
    """What was converted trains as the folder does; an export has the folder's names and config."""
    assert convert(["hf_to_dcp", "--hf_dir", f"{place}/weights", "--dcp_dir", str(tmp_path / "dcp")]) == 0
    load = ("training.init_from_hf_path=null", f"training.load={tmp_path}/dcp")
    done = train(place, tmp_path / "run", 2, *FEW, *load)
    assert done.returncode == 0, done.stderr
    one, other = export(place, tmp_path / "run", tmp_path / "hf"), export(place, run, tmp_path / "other")
    assert_same_bytes(tensors_in(one), tensors_in(other))
    assert tensors_in(one).keys() == tensors_in(place / "weights").keys()
    assert (one / "config.json").read_bytes() == (place / "weights/config.json").read_bytes()


def test_it_is_asked_and_evaluated_as_transformers_answers(place, run, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = export(place, run, tmp_path / "hf")
    capsys.readouterr()
    answers = []
    for model in (hf, run):
        assert (
            generate.main(["--model", str(model), "--prompt", "What is 3?", "--max_new_tokens", "9", "--greedy"]) == 0
        )
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    tokenizer = AutoTokenizer.from_pretrained(hf)
    theirs = AutoModelForCausalLM.from_pretrained(hf)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 3?"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    out = theirs.generate(input_ids=ids, max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=ends)[0]
    wanted = tokenizer.decode(out[ids.shape[1] :].tolist(), skip_special_tokens=True)
    assert answers[0].removeprefix("<think>\n").strip() == wanted.strip()
    assert evaluate.main(["--model", str(run), "--data", f"{place}/records.json", "--max_new_tokens", "4"]) == 0
    assert re.search(r"held-out accuracy [\d.]+ \(\d+/40\)", capsys.readouterr().out)


IMAGE = (
    r"with_image\.json, record 2 \(id 1\): image 1 of 1, \S*cat\.png: the model is text-only, it sees none; train the "
    r"vision-language one, or leave the record out"
)


def test_a_record_with_an_image_is_refused_by_name(place, run, capsys):
    data = f"{BASIC}.dataset={place}/with_image.json"
    done = train(place, place / "refused", 1, *FEW, data)
    (line,) = {line for line in done.stderr.splitlines() if "error: " in line}
    assert done.returncode != 0 and re.search(IMAGE, line)
    settings = load_settings(place / "recipe.yaml", [data])
    with pytest.raises(UserError, match=IMAGE):
        list(show(settings, 5, colour=False))
    assert evaluate.main(["--model", str(run), "--data", f"{place}/with_image.json"]) == 1
    assert re.search(IMAGE, capsys.readouterr().err)
    asked = ["--model", str(run), "--prompt", "What is it?", "--image", str(place / "cat.png")]
    assert generate.main(asked) == 1
    assert re.search(r"the prompt: image 1 of 1, .*the model is text-only", capsys.readouterr().err)


def test_such_records_are_left_out_if_asked_for(place):
    settings = load_settings(
        place / "recipe.yaml", [f"{BASIC}.dataset={place}/with_image.json", f"{BASIC}.on_bad_record=skip"]
    )
    shown = "\n".join(show(settings, 5, colour=False))
    assert "0 images" in shown.replace("no images", "0 images") or "What is 0?" in shown
    assert re.search(f"left out: .*{IMAGE}", shown)


def test_lora_trains_merges_and_is_written_for_the_text_only_class(place, tmp_path):
    lora = ("training.lora.r=8", "training.lora.target_parameters=[mlp.experts.gate_up_proj]", "model.mtp_num_layers=0")
    done = train(place, tmp_path / "lora", 2, *FEW, *lora)
    assert done.returncode == 0, done.stderr
    merged = tensors_in(export(place, tmp_path / "lora", tmp_path / "merged"))
    before = tensors_in(place / "weights")
    assert merged.keys() == before.keys()
    assert not torch.equal(merged[(q := "model.layers.1.self_attn.q_proj.weight")], before[q])
    arguments = [
        "--dcp_dir",
        f"{tmp_path}/lora",
        "--origin_hf_dir",
        f"{place}/weights",
        "--save_hf_dir",
        f"{tmp_path}/peft",
    ]
    assert convert(["dcp_to_hf", *arguments, "--adapter"]) == 0
    assert all(
        n.startswith("base_model.model.model.layers.") for n in load_file(tmp_path / "peft/adapter_model.safetensors")
    )
    goes_on = (*lora, f"training.lora.adapter={tmp_path}/peft")
    done = train(place, tmp_path / "more", 1, *FEW, *goes_on)
    assert done.returncode == 0, done.stderr


def test_modules_of_a_tower_are_refused_by_the_names_that_there_are(place):
    done = train(place, place / "frozen", 1, *FEW, "model.freeze=[model.visual]")
    assert "model.freeze: model.visual matches no module; there are model, model.language_model, " in done.stderr
    lora = ("model.mtp_num_layers=0", "training.lora.r=8", "training.lora.target_modules=[attn.qkv]")
    done = train(place, place / "towers", 1, *FEW, *lora)
    assert "training.lora: attn.qkv matches no linear module of this model; there are " in done.stderr


def test_doctor_looks_at_it(place, tmp_path):
    settings = load_settings(place / "recipe.yaml", [f"training.save={tmp_path}/run"])
    found: list = []
    doctor.look(Machine(), settings, found, 1)
    told = [f for f in found if f.status != "ok"]  # of the folder: how a server of it would prompt and stop
    assert [f.status for f in told] == ["note", "note"], found
    assert "enable_thinking" in told[0].fact and "eos_token_id" in told[1].fact
