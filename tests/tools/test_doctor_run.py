"""`make doctor`: the host, the recipe, and the command as a whole."""

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from ports import free_port
from safetensors.torch import load_file, save_file
from stand_in import RECIPE, ROOT, given, npu_machine, only, program, write, wrong

import kernels
from qwen35.tools import compilation, tiny
from qwen35.tools.doctor import __main__ as command
from qwen35.tools.doctor import recipe
from qwen35.tools.doctor.__main__ import examine, lines
from qwen35.tools.doctor.host import Finding, Machine

TRAINED, HELD_OUT = 90, 40  # records


@pytest.fixture
def m(tmp_path: Path) -> Machine:
    return npu_machine(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    assert tiny.make_model(folder / "model") and tiny.make_digits(folder / "digits")
    for path, count in ((folder / "digits/train.json", TRAINED), (folder / "digits/heldout.json", HELD_OUT)):
        path.write_text(json.dumps(json.loads(path.read_text())[:count]))  # each test reads them all
    return folder


@pytest.fixture
def settings(made: Path, tmp_path: Path) -> list[str]:
    """Overrides over the tiny recipe that name what is there."""
    basic = "data.dataset_param.basic_parameters"
    return [
        f"model.model_name_or_path={made / 'model'}", f"{basic}.dataset={made / 'digits/train.json'}",
        f"{basic}.dataset_dir={made / 'digits'}", f"training.save={tmp_path / 'run'}", "training.load=null",
        f"training.init_from_hf_path={made / 'model'}", *(f"model.kernels.{op}=native" for op in kernels.OPS),
    ]  # fmt: skip


# -- nothing is wrong -----------------------------------------------------------------------------


def test_complete_npu_machine_is_ok(m: Machine, settings: list[str]) -> None:
    findings = examine(m, [], RECIPE, settings)
    assert {f.status for f in findings} == {"ok"}, "\n".join(lines(findings))
    text = "\n".join(lines(findings))
    for expected in (
        "8 of 8 visible, 8 free; 910B3 of 64 GiB", "8.5.0", "25.5.2", "sees 8 NPUs", "2.7.1.post2 fits CANN 8.5.0",
        f"{TRAINED} samples of 1 file, {TRAINED} images", "1 checkpoint of ", "every value is allowed",
    ):  # fmt: skip
        assert expected in text


def test_a_lora_run_is_looked_at_as_it_would_start(m: Machine, settings: list[str]) -> None:
    """Its checkpoints take what adapters take, and an adapter's folder is opened."""
    lora = [*settings, "training.lora.r=8"]
    findings = examine(m, [], RECIPE, lora)
    assert {f.status for f in findings} == {"ok"}, "\n".join(lines(findings))

    def size(findings: list) -> int:
        return int(re.search(r"checkpoints? of ([\d,]+) bytes", "\n".join(lines(findings)))[1].replace(",", ""))

    assert size(findings) < size(examine(m, [], RECIPE, settings)) / 4
    text = "\n".join(lines(examine(m, [], RECIPE, [*lora, "training.lora.adapter=/nowhere"])))
    assert "/nowhere/adapter_config.json: not there; the folder of an adapter holds one" in text
    text = "\n".join(lines(examine(m, [], RECIPE, [*lora, "training.lora.target_modules=[in_proj_qkv]"])))
    assert "in_proj_qkv has an adapter and in_proj_z none, which vLLM does not load" in text


def test_another_tokenizer_of_the_weights_is_found(m: Machine, settings: list[str], made: Path, tmp_path: Path) -> None:
    """As the run would: an id that means another token is wrong, other merges are noted."""
    weights = shutil.copytree(made / "model", tmp_path / "weights")
    named = [*settings, f"training.init_from_hf_path={weights}"]
    tokenizer = json.loads((weights / "tokenizer.json").read_text())
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = merges[1:]
    (weights / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "its merges differ" in "\n".join(lines(examine(m, [], RECIPE, named)))
    first, second = list(tokenizer["model"]["vocab"])[:2]
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (weights / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = wrong(examine(m, [], RECIPE, named))
    assert "weights" in line and "gives 2 tokens other ids than" in line


def test_a_tower_alone_that_sees_nothing_is_found(m: Machine, settings: list[str], tmp_path: Path) -> None:
    """A run on data without images that trains only the vision tower would be refused."""
    text = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    (tmp_path / "text.json").write_text(json.dumps(text))
    data = f"data.dataset_param.basic_parameters.dataset={tmp_path / 'text.json'}"
    frozen = "model.freeze=[model.language_model,lm_head]"
    assert "what is trained of the vision tower stays" in "\n".join(lines(examine(m, [], RECIPE, [*settings, data])))
    assert "only the vision tower is trained" in wrong(examine(m, [], RECIPE, [*settings, data, frozen]))


def test_kernels_are_compiled_if_nothing_is_wrong(
    m: Machine, settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For a run on NPUs alone; a failed compilation is wrong too."""
    compiled: list[list[str]] = []
    monkeypatch.setattr(compilation, "show", lambda config, overrides: compiled.append([config, *overrides]) or 1)
    monkeypatch.setattr(command, "Machine", lambda accelerator: replace(m, accelerator=accelerator))
    arguments = ["--accelerator=npu", "--", RECIPE, *settings]
    assert command.main(["--wrong=a value", *arguments]) == 1 and not compiled
    assert command.main(arguments[1:]) == 0 and not compiled
    assert command.main(arguments) == 1 and compiled == [[RECIPE, *settings]]
    assert capsys.readouterr().out.endswith("1 is wrong for a run on NPUs\n")


def test_this_machine_is_ok_for_a_cpu_run() -> None:
    """With the real scripts and .venv. The tiny recipe's folders need not exist."""
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env = {**clean, "DEVICE": "cpu", "MASTER_PORT": str(free_port())}
    result = subprocess.run(
        ["make", "doctor"], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    checks, still, summary = result.stdout.strip().split("\n\n")
    assert not re.search("^wrong", result.stdout, re.MULTILINE)
    for subject in ("Python", "installation", "import torch", "memory", "recipe"):
        assert re.search(f"^ok +{subject}  ", checks, re.MULTILINE), subject
    assert still.startswith("an NPU run would still need:")
    assert "torch-npu" in still and "CANN" in still and "driver" in still
    assert summary == "nothing is wrong for a run on the CPU"


# -- the host -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: [*enumerate(("eth0", "eth1", "lo"))])


def test_a_whole_host_has_no_fault(m: Machine) -> None:
    assert [f.status for f in recipe.host(m)] == ["ok"]


def test_little_memory_is_wrong(m: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=16_384_000_000, available=921_600_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert "879 MiB of 15.3 GiB available" in wrong(recipe.host(m))


def test_few_open_files_are_wrong(m: Machine) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert "at most 256" in wrong(recipe.host(m)) and "ulimit -n" in wrong(recipe.host(m))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_shared_memory_for_the_data_loaders(m: Machine) -> None:
    assert only(recipe.shared_memory(m, 1 << 20, 1 << 25), "ok")
    assert "full of images" in only(recipe.shared_memory(m, 1 << 20, 1 << 50), "note")
    assert "--shm-size" in wrong(recipe.shared_memory(m, 1 << 49, 1 << 50))
    found: list[Finding] = []
    with recipe.checking(found, "/dev/shm", "mount it"):
        recipe.shared_memory(replace(m, files=m.root), 1, 1)
    assert "dev/shm: No such file" in wrong(found)


def test_an_address_that_the_run_refuses_is_wrong(m: Machine) -> None:
    """In its words; only node 0 needs the port, and a single node without one finds a free one."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        taken = given(m, MASTER_PORT=str(port))
        assert f"MASTER_PORT={port} cannot be used on this machine (Address already in use)" in wrong(
            recipe.host(taken)
        )
        assert {f.status for f in recipe.host(given(taken, NODES="2", NODE_RANK="1"))} == {"ok"}
    nowhere = given(m, NODES="2", NODE_RANK="1", MASTER_ADDR="no.such.machine.invalid")
    assert "no host of that name is known here" in wrong(recipe.host(nowhere))


@pytest.mark.parametrize("name", ["NODE_ADDR", "HCCL_IF_IP"])
def test_addresses_of_this_node(m: Machine, name: str) -> None:
    line = wrong(recipe.host(given(m, **{name: "192.0.2.1"})))
    assert f"{name}=192.0.2.1: no network interface of this machine has that address" in line
    assert {f.status for f in recipe.host(given(m, **{name: "127.0.0.1"}))} == {"ok"}


@pytest.mark.parametrize(
    ("pattern", "exists"),
    [("eth", True), ("=eth0", True), ("^lo", True), ("^=eth1", True), ("=eth", False), ("ib", False)],
)
def test_interfaces_of_hccl(m: Machine, pattern: str, exists: bool) -> None:
    findings = recipe.host(given(m, HCCL_SOCKET_IFNAME=pattern))
    assert len(findings) == 1 if exists else "there are eth0, eth1, lo" in wrong(findings)
    assert len(recipe.host(replace(given(m, HCCL_SOCKET_IFNAME=pattern), accelerator=None))) == 1


def test_interfaces_of_gloo(m: Machine) -> None:
    quiet = given(m, HCCL_SOCKET_IFNAME="")
    assert len(recipe.host(given(quiet, GLOO_SOCKET_IFNAME="eth0,lo"))) == 1
    assert "no interface eth" in wrong(recipe.host(given(quiet, GLOO_SOCKET_IFNAME="eth0,eth")))


# -- the recipe -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.trian_iters=3", "did you mean training.train_iters?"),
        ("model.model_name_or_path=nowhere", "nowhere"),
        ("model.freeze=[model.vision]", "model.vision matches no module"),
        ("model.kernels.swiglu=fussed", "'fussed'"),
        ("parallel.fully_shard_parallel_size=3", "does not divide the 8 processes"),
        ("data.dataset_param.basic_parameters.dataset=none.json", "none.json: no such file"),
        ("data.dataset_param.basic_parameters.dataset_dir=configs", "record 1"),
        ("training.init_from_hf_path=null", "nothing says where the weights come from"),
        ("training.init_from_hf_path=nowhere", "nowhere"),
        ("data.dataloader_param.patch_bucket=3", "patch_bucket"),
        ("training.report_to=[swanlab]", "swanlab is missing; install it (.venv/bin/pip install swanlab)"),
        (
            "data.dataset_param.basic_parameters.cutoff_len=12",
            "more than data.dataset_param.basic_parameters.cutoff_len",
        ),
    ],
)
def test_faults_of_a_recipe_are_wrong(m: Machine, settings: list[str], override: str, expected: str) -> None:
    line = wrong(recipe.recipe(m, RECIPE, [*settings, override]))
    assert expected in line


@pytest.mark.parametrize("override", ["model.freeze=[model.vision]", "training.lora={r: 8, target_modules: [query]}"])
def test_a_pattern_that_matches_nothing_is_the_recipes_fault(m: Machine, settings: list[str], override: str) -> None:
    """The model's folder is in order, so nothing is advised about it."""
    findings = [f for f in recipe.recipe(m, RECIPE, [*settings, override]) if f.status != "ok"]
    assert [f.subject for f in findings] == ["recipe"] and "change the setting" in lines(findings)[0]


def test_the_template_of_a_checkpoint_is_named(m: Machine, settings: list[str], made: Path, tmp_path: Path) -> None:
    folder, basic = shutil.copytree(made / "model", tmp_path / "model"), "data.dataset_param.basic_parameters"
    template = folder / "chat_template.jinja"

    def said(*overrides: str) -> str:
        found = recipe.recipe(m, RECIPE, [*settings, f"model.model_name_or_path={folder}", *overrides])
        return "\n".join(lines(found))

    assert f"{template}, Qwen3.5's as published" in said()
    template.write_text("{#- preserve_thinking #}" + template.read_text())
    assert "Qwen3.6's, with which each record is compared" in said()
    assert f"{template} itself; its prompts say what is trained" in said(f"{basic}.template=checkpoint")
    assert "reasoning_effort means nothing to the chat template" in said(f"{basic}.reasoning_effort=low")


def test_unread_files_and_adapters_in_a_model_folder(
    m: Machine, settings: list[str], made: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(made / "model", tmp_path / "model")
    (folder / "extra.safetensors").touch()
    settings = [*settings, f"model.model_name_or_path={folder}", f"training.init_from_hf_path={folder}"]
    assert f"{folder}: not read beside model.safetensors: extra.safetensors" in only(
        recipe.recipe(m, RECIPE, settings), "note"
    )
    (folder / "adapter_config.json").write_text("{}")
    line = wrong(recipe.recipe(m, RECIPE, settings))
    assert "model  " in line and "adapter_config.json is an adapter beside the model" in line


def test_validation_set_is_checked_like_the_training_set(m: Machine, settings: list[str], made: Path) -> None:
    basic = "data.val_dataset_param.basic_parameters"
    settings = [*settings, "training.val_interval=5", f"{basic}.dataset={made / 'digits/heldout.json'}"]
    findings = recipe.recipe(m, RECIPE, settings)
    assert {f.status for f in findings} == {"ok"}, "\n".join(lines(findings))
    [line] = [f.fact for f in findings if f.subject == "validation"]
    assert line.startswith(f"{HELD_OUT} samples, ")
    for override, expected in (
        (f"{basic}.dataset=none.json", f"{basic}.dataset: none.json: no such file"),
        (f"{basic}.dataset_dir=configs", "heldout.json, record 1"),
        (f"{basic}.dataset_dir=nowhere", "nowhere: no such folder"),
        ("data.val_dataset_param.preprocess_parameters.model_name_or_path=nowhere", "nowhere"),
    ):
        line = wrong(recipe.recipe(m, RECIPE, [*settings, override]))
        assert line.split()[:2] == ["wrong", "validation"] and expected in line and "data.dataset_param" not in line


def test_records_that_will_be_skipped_are_noted(m: Machine, settings: list[str], made: Path) -> None:
    (made / "digits/images/0003.png").rename(made / "digits/images/moved.png")
    try:
        skipping = [*settings, "data.dataset_param.basic_parameters.on_bad_record=skip"]
        findings = recipe.recipe(m, RECIPE, skipping)
        assert f"skipped 1 of {TRAINED} records: 1 image missing" in only(findings, "note")
        assert any(f.fact.startswith(f"{TRAINED - 1} samples of 1 file") for f in findings)
    finally:
        (made / "digits/images/moved.png").rename(made / "digits/images/0003.png")


def test_how_many_records_were_read_in_time_is_noted(
    m: Machine, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "SECONDS", 0.0)
    line = only(recipe.recipe(m, RECIPE, settings), "note")
    assert "data  no fault in the first 0 records, which took 0 s -> the run reads them all" in line.replace("   ", " ")


def test_checkpoints_that_do_not_fit_are_wrong(
    m: Machine, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the run itself says."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage if "shm" in str(path) else usage._replace(free=30_000_000)
    )
    findings = recipe.recipe(m, RECIPE, [*settings, "training.save_interval=30"])
    assert "this run needs " in wrong(findings) and "training.save_total_limit" in wrong(findings)


def test_a_run_of_epochs_is_looked_at_with_its_steps(
    m: Machine, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many checkpoints it writes is known once the data are read, and may be too many then."""
    epochs = [
        *settings,
        "training.train_epochs=2",
        "training.save_interval=1",
        "training.gradient_accumulation_steps=8",
    ]
    broken = [*epochs, "data.dataset_param.basic_parameters.dataset=none.json"]
    text = "\n".join(lines(recipe.recipe(m, RECIPE, broken)))
    assert re.search(r"disk +\S+: at least 1 checkpoint of [\d,]+ bytes", text)
    text = "\n".join(lines(recipe.recipe(m, RECIPE, epochs)))
    found = re.search(r"disk +\S+: over (\d+) steps, (\d+) checkpoints of ([\d,]+) bytes", text)
    assert found and found[1] == found[2] and int(found[1]) % 2 == 0
    usage, size = shutil.disk_usage("/"), int(found[3].replace(",", ""))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage if "shm" in str(path) else usage._replace(free=size + 1)
    )
    line = wrong(recipe.recipe(m, RECIPE, epochs))
    assert f"this run needs {int(found[1]) * size:,} bytes for {found[1]} checkpoints" in line and "disk" in line


def test_missing_converted_weights_are_wrong(m: Machine, settings: list[str]) -> None:
    from_dcp = [*settings, "training.init_from_hf_path=null", "training.load=nowhere"]
    line = wrong(recipe.recipe(m, RECIPE, from_dcp))
    assert "weights  nowhere: no such folder -> make download" in line and "make convert makes the folder" in line
    without = wrong(recipe.recipe(m, RECIPE, [*settings, "model.model_name_or_path=nowhere"]))
    assert "make download" in without


def test_weights_that_do_not_fit_the_model_are_wrong(
    m: Machine, settings: list[str], made: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(made / "model", tmp_path / "other")
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.language_model.norm.weight"] = tensors["model.language_model.norm.weight"][:4].clone()
    save_file(tensors, file)
    line = wrong(recipe.recipe(m, RECIPE, [*settings, f"training.init_from_hf_path={folder}"]))
    assert f"weights  {folder}" in line and "norm.weight" in line


def test_folders_that_the_tiny_recipe_makes_need_not_exist(m: Machine, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    cpu, config = replace(m, accelerator=None), str(tmp_path / "configs/tiny.yaml")
    note = only(recipe.recipe(cpu, config, []), "note")
    assert "ckpt/hf_path/tiny, ckpt/mm_path/tiny, data/digits/train.json -> make finetune" in note
    note = only(recipe.recipe(cpu, str(tmp_path / "configs/lora/tiny.yaml"), []), "note")
    assert "runs/tiny_base/hf, data/digits/train.json -> make finetune" in note
    assert "nowhere" in wrong(recipe.recipe(cpu, config, ["model.model_name_or_path=nowhere"]))
    copy = shutil.copy(config, tmp_path / "configs/copy.yaml")
    assert "nowhere" in wrong(recipe.recipe(cpu, str(copy), ["model.model_name_or_path=nowhere"]))


def test_bytes_that_data_loaders_need(m: Machine, settings: list[str]) -> None:
    """8 processes x 1 worker x 3 batches x 768 tokens x 4 patches x 1536 values of 4 bytes."""
    line = next(line for line in lines(recipe.recipe(m, RECIPE, settings)) if "/dev/shm" in line)
    assert f"{8 * 3 * 768 * 4 * 1536 * 4 / 2**20:,.0f} MiB at most" in line


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project where nothing is installed."""
    for name in ("scripts", "qwen35", "kernels", "configs"):
        shutil.copytree(ROOT / name, tmp_path / "copy" / name)
    for name in ("Makefile", "env.sh"):
        shutil.copy(ROOT / name, tmp_path / "copy")
    program(tmp_path / "bin/python3", f'exec {sys.executable} "$@"')
    return tmp_path / "copy"


def doctor(project: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    env = {"PATH": f"{project.parent / 'bin'}:{os.environ['PATH']}", "MASTER_PORT": str(free_port()), **variables}
    return subprocess.run(
        ["make", "doctor"], cwd=project, env=env, capture_output=True, text=True, check=False, timeout=120
    )


def test_doctor_without_an_installation(project: Path) -> None:
    result = doctor(project, DEVICE="cpu")
    assert result.returncode != 0
    assert re.search("^wrong +installation +there is none yet -> make install$", result.stdout, re.MULTILINE)
    assert "Traceback" not in result.stdout + result.stderr
    assert result.stdout.endswith("\n1 is wrong for a run on the CPU\n")


def test_npu_installation_without_cann(project: Path) -> None:
    result = doctor(project, DEVICE="npu", CANN_PATH="/opt/none")
    assert result.returncode != 0
    assert re.search("^wrong +CANN +no set_env.sh in /opt/none", result.stdout, re.MULTILINE)
    assert "would still need" not in result.stdout
    assert result.stdout.rstrip().endswith("are wrong for a run on NPUs")


def test_cann_is_found_in_cann_path(project: Path, m: Machine) -> None:
    ascend_folder = project.parent / "Ascend"
    write(ascend_folder / "ascend-toolkit/set_env.sh", f"export ASCEND_HOME_PATH={m.get('ASCEND_HOME_PATH')}\n")
    result = doctor(project, DEVICE="npu", CANN_PATH=str(ascend_folder))
    assert re.search("^ok +CANN +8.5.0 in ", result.stdout, re.MULTILINE)


def test_every_wrong_variable_is_a_finding(project: Path) -> None:
    values = {
        "HCCL_CONNECT_TIMEOUT": "3",
        "NODES": "x",
        "TOKENIZERS_PARALLELISM": "yes",
        "NODE_RANK": "-1",
        "DEVICE": "gpu",
    }
    result = doctor(project, **values, ARGS="a='b")
    found = re.findall("^wrong +env.sh +(.*)", result.stdout, re.MULTILINE)
    assert len(found) == len(values) + 1
    for name, value in {**values, "ARGS": "a='b"}.items():
        assert any(line.startswith(f"{name}={value}: ") for line in found), name


def test_missing_address_and_rank_of_several_nodes_are_findings(project: Path) -> None:
    found = re.findall("^wrong +env.sh +(.*)", doctor(project, NODES="2").stdout, re.MULTILINE)
    assert [line.split()[0] for line in found] == ["MASTER_ADDR", "NODE_RANK"]


def test_doctor_without_python(project: Path) -> None:
    bin_folder = project.parent / "bin"
    (bin_folder / "python3").unlink()
    for name in "bash make sed awk grep dirname realpath basename cut xargs cat env".split():
        found = shutil.which(name)
        assert found
        (bin_folder / name).symlink_to(found)
    result = doctor(project, PATH=str(bin_folder))
    assert result.returncode != 0
    assert "install 3.10 to 3.12, then make install" in result.stdout
