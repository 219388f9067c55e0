"""Federated state on disk: saved whole or not at all, restored to the bit."""

import hashlib
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp

from fedrobust import check


def save(folder: Path, step: int, state: Any) -> None:
    """Saves a state; the one before it is kept until the new one is whole.

    Args:
        folder: made if it is not there; belongs to checkpoints alone.
        step: rounds done, >= 0, larger than those saved before.
        state: a pytree of arrays.

    Raises:
        ValueError: a step that is not larger.
    """
    with _manager(folder) as manager:
        before = manager.latest_step()
        above = -1 if before is None else before
        check.require(step > above, "step", step, f"a whole number > {above}")
        arrays = jax.tree.map(np.asarray, state)
        manager.save(step, args=ocp.args.StandardSave(arrays), custom_metadata={"digest": _digest(arrays)})
        manager.wait_until_finished()


def latest(folder: Path, like: Any) -> tuple[int, Any] | None:
    """The last state that was saved whole.

    Args:
        folder: as given to `save`; need not exist.
        like: a pytree of arrays of the structure, shapes and dtypes to restore.

    Returns:
        `(step, state)`, or None where nothing was saved.

    Raises:
        ValueError: what was saved has another structure or other shapes, or is damaged.
    """
    if not folder.is_dir():
        return None
    with _manager(folder) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        target = jax.tree.map(np.asarray, like)
        try:
            state = manager.restore(step, args=ocp.args.StandardRestore(target))
            chex.assert_trees_all_equal_shapes_and_dtypes(state, target)
            digest = _digest(state)  # a file without one is of an earlier version
            saved = (manager.metadata(step).custom_metadata or {}).get("digest", digest)
            check.require(saved == digest, "digest", digest, saved)
        except (ValueError, KeyError, TypeError, AssertionError, FileNotFoundError) as error:
            raise ValueError(f"checkpoint {folder / str(step)} is damaged or of another training: remove it") from error
        return step, state


def _digest(state: Any) -> str:
    digest = hashlib.sha256()
    for leaf in map(np.asarray, jax.tree.leaves(state)):
        digest.update(f"{leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def _manager(folder: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.resolve(), options=options)
