"""Images: small sets held in memory, splits, batches."""

from bitswitch.data.batches import MemoryBatches, evaluation_batches
from bitswitch.data.images import DataSet, ImageSet
from bitswitch.data.sources import load_data

__all__ = ["DataSet", "ImageSet", "MemoryBatches", "evaluation_batches", "load_data"]
