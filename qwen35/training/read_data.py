"""The data of a run: the packed batches and the validation set, read with a progress bar."""

import torch
import torch.distributed as dist
from tqdm import tqdm

from qwen35.config.schema import Settings
from qwen35.data import MicroBatches
from qwen35.device import has_own_memory
from qwen35.heartbeat import Heartbeat
from qwen35.parallel.mesh import Meshes
from qwen35.training.validation import Validation


def read_data(
    settings: Settings, meshes: Meshes, device: torch.device, dtype: torch.dtype, heartbeat: Heartbeat
) -> tuple[MicroBatches, Validation | None]:
    """Every rank reads all records. dtype: of the arithmetic. Raises SettingError, RecordError."""
    heartbeat.at("reading the data")
    is_hidden = dist.get_rank() > 0 or None  # None: hidden unless standard error is a terminal
    with tqdm(desc="reading the data", unit=" records", disable=is_hidden, leave=False) as bar:

        def on_records(record: str, count: int) -> None:  # the timeout starts anew with each record
            heartbeat.at(f"reading the data: {record}")
            bar.update(count)

        micro_batches = MicroBatches(
            settings, meshes.data_rank, meshes.data_size, progress=on_records, pin=has_own_memory(device)
        )
        val, train_set = settings.validation, settings.data.dataset_param
        validation = Validation(val, meshes, device, dtype, on_records, train_set) if val else None
    return micro_batches, validation
