"""MedMNIST's file layout: one .npz with {train,val,test}_images and {train,val,test}_labels."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fedrobust.data.errors import DataError


def read(path: Path) -> tuple[dict[str, tuple[Any, Any]], int]:
    """Reads the splits of one file as they lie there.

    Args:
        path: the .npz; images uint8 [N,H,W] or [N,H,W,C], labels [N,1] or [N]; val and test may be missing.

    Returns:
        split -> (images, labels), and the number of classes: the largest label of train plus one.

    Raises:
        DataError: one line: no such file, not a readable .npz, an array missing, labels that are no whole numbers.

    Source:
        Yang et al., MedMNIST v2, Scientific Data 10, 41 (2023).
    """
    try:
        # Opened here, as np.load leaves the file open where it finds the archive damaged.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (
        OSError,
        ValueError,
        EOFError,
        RuntimeError,  # a password, or a compression that Python does not know
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise DataError(f"{path}: damaged, or not a .npz ({error})") from None
    splits = {}
    for split in ("train", "val", "test"):
        names = f"{split}_images", f"{split}_labels"
        present = [name in arrays for name in names]
        if all(present):
            splits[split] = arrays[names[0]], arrays[names[1]]
        elif any(present) or split == "train":
            missing = names[present.index(False)]
            raise DataError(f"{path}: array {missing} is missing (found: {', '.join(sorted(arrays)) or 'nothing'})")
    label = splits["train"][1]
    if not np.issubdtype(label.dtype, np.integer) or not label.size:
        raise DataError(f"{path}: train_labels are {label.dtype} {label.shape}, must be whole numbers, at least one")
    return splits, int(label.max()) + 1
