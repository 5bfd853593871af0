"""Turns records into packed batches; knows no model.

`for batch in MicroBatches(settings, rank, world_size, start_step)` is all that training needs.
"""

from qwen35.data.dataloader import MicroBatches
from qwen35.data.record import Record, RecordError

__all__ = ["MicroBatches", "Record", "RecordError"]
