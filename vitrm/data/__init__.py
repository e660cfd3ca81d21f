"""Images by class, as arrays: digits (built in), CIFAR-10, CIFAR-100, or any folder of class folders.

sources     where a data set comes from: `load`
folders     folders of images, as they are in the wild
decoding    an image file as a model's input
splits      train, validation and test
images      a part, in memory or mapped into it
cache       pictures decoded once

Free of torch at import; torchvision is loaded for CIFAR only.
"""

from vitrm.data.cache import decoding_once
from vitrm.data.folders import read_all
from vitrm.data.images import Images, Normalization, affordable, memory, normalization
from vitrm.data.mapped_rows import MappedRows
from vitrm.data.sources import DATA_DIR_VARIABLE, DATASETS, load, load_of_run, photo_crops
from vitrm.data.splits import SPLITS, Splits, limited, part

__all__ = [
    "DATASETS",
    "DATA_DIR_VARIABLE",
    "SPLITS",
    "Images",
    "MappedRows",
    "Normalization",
    "Splits",
    "affordable",
    "decoding_once",
    "limited",
    "load",
    "load_of_run",
    "memory",
    "normalization",
    "part",
    "photo_crops",
    "read_all",
]
