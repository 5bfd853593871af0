"""What doctor finds, the device, and the environment variables that influence how it computes."""

import json
import os

import torch

from accept.report import Status
from accept.task import Task
from qwen35.device import device_type, model_name
from qwen35.tools.doctor.__main__ import examine
from qwen35.tools.doctor.host import Machine

RECIPE = "configs/tiny.yaml"
STATUS: dict[str, Status] = {"ok": "held", "wrong": "off", "note": "info"}
VARIABLES = (  # of env.sh, those whose values identify nobody
    *("TASK_QUEUE_ENABLE", "COMBINED_ENABLE", "CPU_AFFINITY_CONF", "PYTORCH_NPU_ALLOC_CONF", "ACLNN_CACHE_LIMIT"),
    *("MULTI_STREAM_MEMORY_REUSE", "ASCEND_LAUNCH_BLOCKING", "CLOSE_MATMUL_K_SHIFT", "HCCL_DETERMINISTIC"),
    *("HCCL_BUFFSIZE", "HCCL_OP_EXPANSION_MODE", "NPUS_PER_NODE", "ASCEND_RT_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
)


def check_machine(task: Task) -> None:
    kind = device_type()
    about = {"kind": kind, "device": model_name(torch.device(kind)), "is_apart": task.is_apart}
    (task.folder / "device.json").write_text(json.dumps(about))
    for finding in examine(Machine(kind if task.is_apart else None), [], RECIPE):
        task.add(finding.subject, STATUS[finding.status], finding.fact, finding.todo)
    task.add("device", "info", f"{about['device']}; {task.ranks} ranks, {os.cpu_count()} cores")
    task.add("variables", "info", ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ))
