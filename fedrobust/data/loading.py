"""Data sets by name: every source ends as float32 images in [0, 1] and int32 labels, in three splits."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedrobust import check
from fedrobust.data import npz, tfds
from fedrobust.data.errors import DataError
from fedrobust.types import Dataset

VAL_SHARE = 0.1
TEST_SHARE = 0.2

_SPLITS = 100  # a purpose of its own: NumPy takes [s, 0] and [s, 0, 0], the first draw of clients, for one seed


class Splits(NamedTuple):
    """The three disjoint parts of a data set.

    Attributes:
        train: what the clients share out among themselves.
        val: for choosing epochs, thresholds and settings.
        test: looked at once.
    """

    train: Dataset
    val: Dataset
    test: Dataset


def load(name: str, *, data_dir: str | os.PathLike | None = None, seed: int = 0) -> Splits:
    """Loads an image classification data set into memory.

    Args:
        name: "digits" (bundled with scikit-learn, 8x8), a path that ends in ".npz" in MedMNIST's layout, or the name
            of a TFDS set such as "pneumonia_mnist", "mnist", "cifar10".
        data_dir: the folder that holds prepared TFDS sets; without it TFDS_DATA_DIR, else ~/tensorflow_datasets.
        seed: >= 0; decides only the splits that the source does not make itself: 20 % of everything for a missing test
            split, then 10 % of everything (of train, where the test split is given) for a missing val split, both per
            class.

    Returns:
        The splits, with image [N,H,W,C] float32 in [0, 1] and label [N] int32 in [0, num_classes).

    Raises:
        DataError: one line, within 10 seconds: the set is unknown, absent, damaged, or not 8-bit labelled images.

    Guarantees:
        Nothing is written unless the set has to be prepared; a read-only folder will do.

    >>> load("digits").train.image.shape
    (1259, 8, 8, 1)
    """
    check.at_least("seed", seed, 0)
    if name == "digits":
        raw, num_classes, peak = _digits(), 10, 16
    elif name.endswith(".npz"):
        (raw, num_classes), peak = npz.read(Path(name)), 255
    else:
        (raw, num_classes), peak = tfds.read(name, data_dir), 255
    parts = {split: _dataset(f"{name}, split {split}", *pair, num_classes, peak) for split, pair in raw.items()}
    shapes = {part.image.shape[1:] for part in parts.values()}
    if len(shapes) > 1:
        raise DataError(f"{name}: the splits hold images of shapes {sorted(shapes)}, must all be of one")
    return _complete(name, parts, seed)


def _digits() -> dict[str, tuple[Any, Any]]:
    """The 1 797 digits of scikit-learn, grey levels 0 to 16."""
    from sklearn.datasets import load_digits  # importing it takes a second: only whoever asks pays

    digits = load_digits()
    return {"train": (digits.images.astype(np.uint8), digits.target)}


def _dataset(where: str, image: Any, label: Any, num_classes: int, peak: int) -> Dataset:
    """Checks one split and brings it to the library's form; `peak` is the level that becomes 1."""
    image, label = np.asarray(image), np.asarray(label)
    if image.ndim == 3:
        image = image[..., None]
    if label.ndim == 2 and label.shape[1] == 1:
        label = label[:, 0]
    if image.ndim != 4:
        raise DataError(f"{where}: images have shape {image.shape}, must be [N,H,W] or [N,H,W,C]")
    if label.shape != image.shape[:1] or not len(label):
        raise DataError(f"{where}: labels have shape {label.shape}, must be one for each of {len(image)} > 0 images")
    if image.dtype != np.uint8:
        raise DataError(f"{where}: images are {image.dtype}, must be uint8")
    if not np.issubdtype(label.dtype, np.integer):
        raise DataError(f"{where}: labels are {label.dtype}, must be whole numbers")
    beyond = min(num_classes, 2**31)  # or int32 would make another label of it
    if num_classes < 2 or label.min() < 0 or label.max() >= beyond:
        raise DataError(f"{where}: labels {label.min()} to {label.max()} are out of range: must be in [0, {beyond})")
    return Dataset(image.astype(np.float32) / np.float32(peak), label.astype(np.int32), num_classes)


def _complete(name: str, parts: dict[str, Dataset], seed: int) -> Splits:
    """Cuts the splits that the source lacks from train."""
    rng = np.random.default_rng([seed, _SPLITS])
    train, val, test = parts["train"], parts.get("val"), parts.get("test")
    val_share = VAL_SHARE
    if test is None:
        train, test = _split_off(name, rng, train, TEST_SHARE)
        val_share = VAL_SHARE / (1 - TEST_SHARE)
    if val is None:
        train, val = _split_off(name, rng, train, val_share)
    return Splits(train, val, test)


def _split_off(name: str, rng: np.random.Generator, data: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """The rest and the share taken, of each class alike; the order of the source is kept."""
    taken = np.zeros(len(data.label), bool)
    for label in range(data.num_classes):
        members = rng.permutation(np.flatnonzero(data.label == label))
        taken[members[: round(share * len(members))]] = True
    if not taken.any() or taken.all():
        raise DataError(f"{name}: {len(taken)} examples are too few to cut a split of {share:.1%} per class from")
    rest = data._replace(image=data.image[~taken], label=data.label[~taken])
    return rest, data._replace(image=data.image[taken], label=data.label[taken])
