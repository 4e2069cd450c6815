"""Images: data sets by name, splits, preprocessing, batches."""

from bitswitch.data.dataset import Batches, DataSet
from bitswitch.data.decode import Shown, unseen
from bitswitch.data.images import ImageSet
from bitswitch.data.loader import FileDataSet, FileSet
from bitswitch.data.memory import MemoryDataSet
from bitswitch.data.preprocessing import Preprocessing
from bitswitch.data.sources import load_data, place_of

__all__ = [
    "Batches",
    "DataSet",
    "FileDataSet",
    "FileSet",
    "ImageSet",
    "MemoryDataSet",
    "Preprocessing",
    "Shown",
    "load_data",
    "place_of",
    "unseen",
]
