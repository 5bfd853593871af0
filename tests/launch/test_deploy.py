"""deploy/: what operators of clusters make of the manifests, by their schemas and sources."""

import copy
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ports import free_port
from test_stop import assert_saved, wait_for_steps
from training_runs import WORKER

from qwen35.checkpoint.dcp_folder import newest_checkpoint
from qwen35.config.load import load_settings
from qwen35.launch import launcher
from qwen35.launch.cluster import find_place

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "tests/fixtures/operators.json").read_text())
JOBS = ("pytorchjob", "volcano", "mindcluster")
each_job = pytest.mark.parametrize("name", JOBS)


@cache
def text(name: str) -> str:
    return (ROOT / f"deploy/{name}.yaml").read_text()


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all(text(name)))


def job(name: str) -> dict:
    (found,) = documents(name)
    return found


def pod_template(manifest: dict) -> dict:
    """That of all pods of a job: one anchor."""
    spec = manifest["spec"]
    parts = spec.get("tasks") or list((spec.get("replicaSpecs") or spec.get("pytorchReplicaSpecs")).values())
    first, *others = [part["template"] for part in parts]
    assert all(other == first for other in others) and len(others) == 1
    return first["spec"]


def container(manifest: dict) -> dict:
    (found,) = pod_template(manifest)["containers"]
    return found


# -- schemas ---------------------------------------------------------------------------------------


def mistakes(value: Any, schema: Any, where: str) -> Iterator[str]:
    """What an API server would refuse, or drop because it does not know it."""
    kinds = {"string": str, "integer": int, "boolean": bool}
    if isinstance(schema, list):
        if value not in schema:
            yield f"{where}: {value!r} is none of {schema}"
    elif schema == "quantity":
        if not re.fullmatch(r"\d+([kKMGTP]i?|m)?", str(value)):
            yield f"{where}: {value!r} is no quantity"
    elif isinstance(schema, str):
        if type(value) is not kinds[schema]:
            yield f"{where}: {value!r} is no {schema}"
    elif "is" in schema:
        yield from mistakes(value, SCHEMA[schema["is"]], where)
    elif "items" in schema:
        if not isinstance(value, list):
            yield f"{where}: {value!r} is no list"
        else:
            for i, item in enumerate(value):
                yield from mistakes(item, schema["items"], f"{where}[{i}]")
    elif not isinstance(value, dict):
        yield f"{where}: {value!r} is no object"
    else:
        yield from (f"{where}: {name} is missing" for name in schema.get("required", []) if name not in value)
        for name, inner in value.items():
            known = schema["values"] if "values" in schema else schema["fields"].get(name)
            if known is None:
                yield f"{where}: {name} is unknown"
            else:
                yield from mistakes(inner, known, f"{where}.{name}")


def mistakes_of(document: dict) -> list[str]:
    kind = SCHEMA["kinds"].get(str(document.get("kind")))
    if not kind:
        return ["kind is unknown"]
    labels = {"fields": kind["labels"]} if "labels" in kind else {"values": "string"}
    schema = {
        "fields": {
            "apiVersion": [kind["apiVersion"]],
            "kind": "string",
            "metadata": {"fields": {"name": "string", "labels": labels}, "required": ["name"]},
            "spec": kind["spec"],
        },
        "required": ["apiVersion", "metadata", "spec"],
    }
    return list(mistakes(document, schema, document["kind"]))


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all that is below a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from places(item, (*path, key))


def with_mistake(document: dict, path: tuple, value: Any, key: str | None = None) -> dict:
    changed = copy.deepcopy(document)
    holder = changed
    for step in path[:-1]:
        holder = holder[step]
    if key is None:
        holder[path[-1]] = value
    else:
        holder[key] = holder.pop(path[-1])
    return changed


@pytest.mark.parametrize("name", [*JOBS, "storage"])
def test_a_manifest_has_fields_of_its_operator_alone_with_values_of_their_types(name):
    quantities = ("requests", "limits", "sizeLimit")
    for document in documents(name):
        assert mistakes_of(document) == []
        free = {*quantities, "annotations", "labels"}  # whose keys are the user's, but for those of an AscendJob
        for path in places(document):
            found: Any = document
            for step in path:
                found = found[step]
            wrongs = ["x"] if not isinstance(found, str) else [[]] if {*path} & {*quantities} else [[], 7]
            for wrong in wrongs:
                assert mistakes_of(with_mistake(document, path, wrong)), path
            if isinstance(path[-1], str) and (path[:2] == ("metadata", "labels") or not {*path[-2:-1]} & free):
                assert mistakes_of(with_mistake(document, path, None, f"{path[-1]}s")), path


@each_job
def test_containers_are_called_as_the_operator_expects(name):
    manifest = job(name)
    expected = SCHEMA["kinds"][manifest["kind"]]["container"]
    assert container(manifest)["name"] == (expected or "qwen35")
    # an extended resource is requested and limited alike; its count is that of a node's processes
    resources = container(manifest)["resources"]
    assert resources["requests"] == resources["limits"] == {"huawei.com/Ascend910": 8}


# -- the place of a pod ----------------------------------------------------------------------------


def environments(manifest: dict) -> list[dict[str, str]]:
    """What the operator adds to the environment of each pod, node 0 first."""
    npus = container(manifest)["resources"]["requests"]["huawei.com/Ascend910"]
    return {"PyTorchJob": of_kubeflow, "Job": of_volcano, "AscendJob": of_mindcluster}[manifest["kind"]](manifest, npus)


def of_kubeflow(manifest: dict, npus: int) -> list[dict[str, str]]:
    """pkg/controller.v1/pytorch/envvar.go and master.go; the service has the default port."""
    spec = manifest["spec"]
    replicas = [spec["pytorchReplicaSpecs"][kind]["replicas"] for kind in ("Master", "Worker")]
    assert replicas[0] == 1
    master = {"MASTER_ADDR": f"{manifest['metadata']['name']}-master-0", "MASTER_PORT": "23456"}
    common = master | {f"PET_{key}": value for key, value in master.items()}
    return [
        common
        | {
            "PYTHONUNBUFFERED": "1",
            "WORLD_SIZE": str(sum(replicas) * int(spec["nprocPerNode"])),
            "RANK": str(rank),
            "PET_NODE_RANK": str(rank),
            "PET_NPROC_PER_NODE": spec["nprocPerNode"],
            "PET_NNODES": str(sum(replicas)),
        }
        for rank in range(sum(replicas))
    ]


def of_volcano(manifest: dict, npus: int) -> list[dict[str, str]]:
    """pkg/controllers/job/plugins/distributed-framework/pytorch/pytorch.go and svc/svc.go."""
    spec, name = manifest["spec"], manifest["metadata"]["name"]
    options = dict(option.removeprefix("--").split("=") for option in spec["plugins"]["pytorch"])
    assert "svc" in spec["plugins"] and {task["name"] for task in spec["tasks"]} == {
        options["master"],
        options["worker"],
    }
    hosts = {
        task["name"]: [f"{name}-{task['name']}-{i}.{name}" for i in range(task["replicas"])] for task in spec["tasks"]
    }
    assert next(iter(hosts)) == options["master"] and len(hosts[options["master"]]) == 1
    total = sum(map(len, hosts.values()))
    assert spec["minAvailable"] == total
    common = {"MASTER_ADDR": hosts[options["master"]][0], "MASTER_PORT": options["port"], "WORLD_SIZE": str(total)}
    for task, names in hosts.items():
        common |= {f"VC_{task.upper()}_HOSTS": ",".join(names), f"VC_{task.upper()}_NUM": str(len(names))}
    return [{**common, "RANK": str(rank)} for rank in range(total)]


def of_mindcluster(manifest: dict, npus: int) -> list[dict[str, str]]:
    """component/ascend-operator/pkg/controllers/v1/env.go, where Master has NPUs too."""
    spec = manifest["spec"]
    total = sum(spec["replicaSpecs"][kind]["replicas"] for kind in ("Master", "Worker"))
    assert spec["runPolicy"]["schedulingPolicy"]["minAvailable"] == total
    return [
        {
            "ASCEND_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
            "MINDX_TASK_ID": "58b0f3a1-0a5c-4a80-9d3d-3f64b8a8a001",
            "MINDX_SERVER_IP": "10.103.1.2",
            "HCCL_LOGIC_SUPERPOD_ID": "0",
            "LOCAL_WORLD_SIZE": str(npus),
            "WORLD_SIZE": str(npus * total),
            "LOCAL_RANK": ",".join(map(str, range(npus))),
            "MASTER_ADDR": "10.103.7.9",
            "MASTER_PORT": "2222",
            "RANK": str(rank),
        }
        for rank in range(total)
    ]


def with_nodes(manifest: dict, count: int) -> dict:
    """As the first lines of the manifest say."""
    spec = copy.deepcopy(manifest)["spec"]
    workers = (
        spec["tasks"][1] if "tasks" in spec else (spec.get("replicaSpecs") or spec["pytorchReplicaSpecs"])["Worker"]
    )
    workers["replicas"] = count - 1
    if "tasks" in spec:
        spec["minAvailable"] = count
    elif "replicaSpecs" in spec:
        spec["runPolicy"]["schedulingPolicy"]["minAvailable"] = count
    return {**manifest, "spec": spec}


def command_line(manifest: dict, added: dict[str, str]) -> list[str]:
    """What the pod's command starts where eight NPUs are visible."""
    given = {entry["name"]: entry.get("value", "x" * 32) for entry in container(manifest)["env"]}
    done = subprocess.run(
        container(manifest)["command"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "DRY_RUN": "1", "DEVICE": "npu"}
        | {"ASCEND_HOME_PATH": "/usr", "ASCEND_RT_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
        | given
        | added,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    words = shlex.split(done.stdout)
    return words[words.index("qwen35.launch") + 1 :]


class Reached(Exception):  # noqa: N818  # no error
    pass


@each_job
@pytest.mark.parametrize("nodes", [2, 5])
def test_each_pod_finds_its_place_by_what_the_operator_sets(name, nodes, monkeypatch):
    """The manifest's command as far as the meeting of the nodes, in the environment of each pod."""
    manifest = with_nodes(job(name), nodes)
    added = environments(manifest)
    assert len(added) == nodes
    addresses = set()
    for rank, environment in enumerate(added):
        argv = command_line(manifest, environment)
        for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(variable, raising=False)
        with monkeypatch.context() as patch:
            for variable, value in environment.items():
                patch.setenv(variable, value)
            found = {}

            def reach(args, found=found):
                found |= vars(args)
                raise Reached

            patch.setattr(launcher, "join_rendezvous", reach)
            patch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: [args])  # names of pods
            patch.setattr(signal, "signal", lambda *args: None)
            patch.setattr(launcher, "check_address", lambda *args: None)
            with pytest.raises(Reached):
                launcher.main(argv)
        assert (found["node_rank"], found["nnodes"], found["nproc_per_node"]) == (rank, nodes, 8)
        assert found["rendezvous_timeout"] == 1200 and found["overrides"] == ["training.max_restarts=3"]
        addresses.add((found["master_addr"], found["master_port"]))
        place = find_place(environment)
        assert (place.address, place.port) == (found["master_addr"], found["master_port"])
    assert addresses == {
        {
            "pytorchjob": ("qwen35-master-0", 23456),
            "volcano": ("qwen35-master-0.qwen35", 23456),
            "mindcluster": ("10.103.7.9", 2222),
        }[name]
    }


# -- what a manifest names -------------------------------------------------------------------------


@each_job
def test_recipe_settings_folders_and_mounts_of_a_manifest_exist(name):
    manifest = job(name)
    values = {entry["name"]: entry.get("value") for entry in container(manifest)["env"]}
    settings = load_settings(str(ROOT / values["CONFIG"]), values["ARGS"].split())
    assert settings.training.max_restarts == 3
    variables = set(re.findall(r'^: "\$\{(\w+):=', (ROOT / "env.sh").read_text(), re.MULTILINE))
    assert set(values) - variables <= {"ASCEND_VISIBLE_DEVICES"}
    steps = (ROOT / "docker/Dockerfile").read_text()
    workdir = re.search(r"^WORKDIR (.+)", steps, re.MULTILINE)[1]
    mounts = {mount["mountPath"]: mount for mount in container(manifest)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod_template(manifest)["volumes"]}
    assert all(mount["name"] in volumes for mount in mounts.values()) and len(volumes) == 7
    for path in (settings.training.save, settings.training.load, settings.model.model_name_or_path):
        assert f"{workdir}/{path.split('/')[0]}" in mounts
    assert "readOnly" not in mounts[f"{workdir}/runs"]
    hosts = {volume["hostPath"]["path"] for volume in volumes.values() if "hostPath" in volume}
    guide = (ROOT / "docs/guide.md").read_text()
    driver = set(re.findall(r"-v (/\S+):\1:ro", guide))  # as in docker run
    assert hosts == driver == {path for path, mount in mounts.items() if "hostPath" in volumes[mount["name"]]}
    size = re.search(r"--shm-size (\d+)g", guide)[1]
    assert volumes["shm"]["emptyDir"]["sizeLimit"] == f"{size}Gi" and "/dev/shm" in mounts
    claim, shell = documents("storage")
    assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert "-t qwen35 " in guide and container(manifest)["image"] == "qwen35"
    secret = next(
        e["valueFrom"]["secretKeyRef"] for e in container(manifest)["env"] if e["name"] == "RENDEZVOUS_SECRET"
    )
    assert f"create secret generic {secret['name']} --from-literal={secret['key']}=" in guide
    # the pod that fills the folders has the same ones, as the user of the image
    users = [re.search(rf"^ARG {part}=(\d+)", steps, re.MULTILINE)[1] for part in ("UID", "GID")]
    (folders,), (filler,) = shell["spec"]["initContainers"], shell["spec"]["containers"]
    assert folders["command"][2:4] == [f"--owner={users[0]}", f"--group={users[1]}"]
    shared = {path: mount["subPath"] for path, mount in mounts.items() if mount["name"] == "shared"}
    assert {m["mountPath"]: m["subPath"] for m in filler["volumeMounts"]} == shared
    assert folders["command"][4:] == [f"/shared/{folder}" for folder in shared.values()]


@each_job
def test_the_time_to_stop_is_enough_for_a_step_and_the_save(name):
    """At 1 GB/s, by what the recipe says of its checkpoints, and the slowest rehearsed step."""
    recipe = next(entry["value"] for entry in container(job(name))["env"] if entry["name"] == "CONFIG")
    gigabytes = int(re.search(r"checkpoints of (\d+) GB", (ROOT / recipe).read_text())[1])
    size = Path(recipe).stem.removeprefix("qwen3_5_")
    rows = (ROOT / "docs/npus.md").read_text().splitlines()
    row = next(line for line in rows if line.startswith((f"| {size} |", f"| {size}, ")))
    slowest = float(row.split("|")[-2].split("–")[1])
    steps = load_settings(str(ROOT / recipe)).training.log_interval
    grace = pod_template(job(name))["terminationGracePeriodSeconds"]
    assert gigabytes / 1 + steps * slowest <= grace < 900  # MindCluster's grace-over-time
    assert f"{gigabytes} GB at 1 GB/s" in text(name)


# -- in a container --------------------------------------------------------------------------------


def as_first_process(environment: dict[str, str], **kwargs) -> subprocess.Popen:
    """The manifests' command as the first process, as in a container, where that is allowed."""
    probe = ["unshare", "-rpf", "--mount-proc", "true"]
    apart = [] if subprocess.run(probe, capture_output=True, check=False).returncode else probe[:-1]
    own = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    return subprocess.Popen(
        [*apart, *container(job("volcano"))["command"]],
        cwd=ROOT,
        env=own | {"OMP_NUM_THREADS": "1", "DEVICE": "cpu", "NPUS_PER_NODE": "1"} | environment,
        **kwargs,
    )


def terminate(process: subprocess.Popen) -> None:
    """As a cluster does: SIGTERM to the first process alone."""
    inner = psutil.Process(process.pid).children() if process.args[0] == "unshare" else []
    os.kill(inner[0].pid if inner else process.pid, signal.SIGTERM)


def test_a_pod_saves_when_the_cluster_stops_it_and_the_next_one_goes_on(workplace, tmp_path):
    save = tmp_path / "run"
    pod = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    pod |= {"CONFIG": str(workplace / "recipe.yaml")}
    words = f"training.save={save} {WORKER} training.log_interval=1 training.train_iters="
    with (tmp_path / "log").open("wb") as log:
        process = as_first_process({**pod, "ARGS": f"{words}100000"}, stdout=log, stderr=log)
        wait_for_steps(save, 3, process)
        terminate(process)
        assert process.wait(timeout=300) == 143, (tmp_path / "log").read_text()
        assert_saved(save, after=3)
        step = int(newest_checkpoint(save).name[5:])
        process = as_first_process({**pod, "ARGS": f"{words}{step + 2}"}, stdout=log, stderr=log)
        assert process.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    assert_saved(save, after=step + 2)


def test_a_pod_waits_until_the_cluster_knows_the_name_of_node_0_and_can_be_stopped(workplace):
    """Names of pods are known a while after the pods run; a name that was typed fails at once."""
    pod = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "qwen35-master-0.invalid", "MASTER_PORT": "23456"}
    pod |= {"CONFIG": str(workplace / "recipe.yaml")}
    waiting = "waiting for the name qwen35-master-0.invalid, up to {} s (RENDEZVOUS_TIMEOUT)"
    process = as_first_process({**pod, "RENDEZVOUS_TIMEOUT": "2"}, stderr=subprocess.PIPE, text=True)
    start = time.monotonic()
    *_, said, error = process.communicate(timeout=300)[1].splitlines()
    assert waiting.format(2) in said and time.monotonic() - start >= 2
    assert (process.returncode, error) == (
        1,
        "error: MASTER_ADDR=qwen35-master-0.invalid: no host of that name is known here",
    )
    process = as_first_process(pod, stderr=subprocess.PIPE, text=True)
    while waiting.format(300) not in process.stderr.readline():
        assert process.poll() is None
    terminate(process)
    assert "stopped before anything was started" in process.communicate(timeout=300)[1]
    assert process.returncode == 143
