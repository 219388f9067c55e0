"""TensorFlow Datasets: reading needs no TensorFlow, preparing does. The only module that knows TFDS."""

import contextlib
import importlib.util
import logging
import os
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from fedrobust.data.errors import DataError

CONNECT_SECONDS = 5.0
UNKNOWN = "unknown data set: must be 'digits', a path ending in .npz, or the name of a TFDS image classification set"
SPLITS = {"train": ("train",), "val": ("validation", "val"), "test": ("test",)}


def read(name: str, data_dir: str | os.PathLike | None) -> tuple[dict[str, tuple[Any, Any]], int]:
    """Reads a prepared set, preparing it first where TensorFlow and a network allow.

    Args:
        name: a TFDS image classification set, as TFDS spells it: "mnist", "set/config", "set:1.0.0".
        data_dir: the folder of prepared sets; None for TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Returns:
        split -> (images uint8 [N,H,W,C], labels [N]), and the number of classes.

    Raises:
        DataError: one line: unknown, not prepared and not preparable here, or not an image classification set.
    """
    if not re.fullmatch(r"\w+(/[\w.-]+)?(:[\d.]+)?", name):
        raise DataError(f"{name!r}: {UNKNOWN}")
    import tensorflow_datasets  # takes a second to import: only whoever asks for a TFDS set pays

    folder = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    try:
        return _read_prepared(tensorflow_datasets, name, folder)
    except tensorflow_datasets.core.registered.DatasetNotFoundError:
        _prepare(tensorflow_datasets, name, folder)
        return _read_prepared(tensorflow_datasets, name, folder)


def _read_prepared(tensorflow_datasets: Any, name: str, folder: Path) -> tuple[dict[str, tuple[Any, Any]], int]:
    """Reads a set that lies in the folder; TFDS's DatasetNotFoundError where it does not."""
    try:
        # From the files alone: unlike `tfds.builder` it leaves no empty `downloads/` behind in the folder.
        builder = tensorflow_datasets.core.read_only_builder.builder_from_files(name, data_dir=folder)
        features, kinds = builder.info.features, tensorflow_datasets.features
        for feature, kind in (("image", kinds.Image), ("label", kinds.ClassLabel)):
            if feature not in features or not isinstance(features[feature], kind):
                raise DataError(f"{name}: not an image classification set: has no {kind.__name__} named {feature}")
        splits = {}
        for split, spellings in SPLITS.items():
            for spelling in spellings:
                if spelling in builder.info.splits:
                    splits[split] = _arrays(f"{name}, split {spelling}", builder.as_data_source(spelling))
    except (DataError, tensorflow_datasets.core.registered.DatasetNotFoundError):
        raise
    except Exception as error:  # damaged files fail in as many ways as there are readers beneath
        raise DataError(f"{name}: what lies in {folder} cannot be read ({type(error).__name__}: {error})") from error
    if "train" not in splits:
        raise DataError(f"{name}: no split named train (found: {', '.join(builder.info.splits)})")
    return splits, features["label"].num_classes


def _arrays(where: str, source: Any) -> tuple[np.ndarray, np.ndarray]:
    """Decodes every record of a split."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # TFDS advertises OpenCV in a warning; Pillow will do
    try:
        records = [source[i] for i in range(len(source))]
    finally:
        logger.setLevel(level)
    shapes = {record["image"].shape for record in records}
    if len(shapes) != 1:
        raise DataError(f"{where}: images of {len(shapes)} different shapes, must all be of one")
    return np.stack([record["image"] for record in records]), np.array([record["label"] for record in records])


def _prepare(tensorflow_datasets: Any, name: str, folder: Path) -> None:
    """Downloads and prepares a set, or says in one line why it cannot be done here."""
    base = name.split("/")[0].split(":")[0]
    if base not in tensorflow_datasets.list_builders(with_community_datasets=False):
        raise DataError(f"{name!r}: {UNKNOWN}")
    tried = f"{name}: not prepared in {folder}"
    ways_out = (
        "prepare it with `pip install -e '.[tfds]'` on a machine with network, or give a folder that has it with "
        "--data-dir (or a .npz in MedMNIST's layout)"
    )
    if importlib.util.find_spec("tensorflow") is None:
        raise DataError(f"{tried}, and preparing needs TensorFlow, which is not installed: {ways_out}")
    urls = list(tensorflow_datasets.builder_cls(base).url_infos)
    # TFDS retries a download for 204 s before it gives up: ask first.
    if urls and not _answers(urls[0]):
        raise DataError(f"{tried}, and {urls[0]} did not answer within {CONNECT_SECONDS:.0f} s: {ways_out}")
    try:
        tensorflow_datasets.builder(name, data_dir=folder, file_format="array_record").download_and_prepare()
    except Exception as error:
        raise DataError(f"{tried}, and preparing it failed ({type(error).__name__}: {error}): {ways_out}") from error


def _answers(url: str) -> bool:
    """Whether the server of `url`, or the environment's proxy, says anything at all in time."""
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):
            request = urllib.request.Request(url, method="HEAD")
            with contextlib.suppress(urllib.error.HTTPError):  # a refusal is an answer
                urllib.request.urlopen(request, timeout=CONNECT_SECONDS).close()
            answered.set()

    # A thread because the look-up of a host name obeys no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return answered.is_set()
