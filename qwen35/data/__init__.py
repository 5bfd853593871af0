"""From records to packed batches: `for batch in MicroBatches(settings, rank, world_size, start_step)`."""

from qwen35.data.formats import Record, RecordError
from qwen35.data.loader import MicroBatches

__all__ = ["MicroBatches", "Record", "RecordError"]
