"""From records to packed batches: `for batch in MicroBatches(settings, rank, world_size, start_step)`."""

from qwen35.data.dataloader import MicroBatches
from qwen35.data.record import Record, RecordError

__all__ = ["MicroBatches", "Record", "RecordError"]
