"""One function on the rows of several devices. This module alone knows meshes and their axes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from fedrobust import check

AXIS = "rows"


def local(num_devices: int | None) -> list[jax.Device]:
    """The first devices of this process; None for all.

    Raises:
        ValueError: more than there are, or fewer than 1.
    """
    available = jax.local_devices()
    count = len(available) if num_devices is None else num_devices
    check.require(1 <= count <= len(available), "num_devices", count, f"in [1, {len(available)}]")
    return available[:count]


def sharded(fn: Callable[[Any, Any], Any], on: Sequence[jax.Device]) -> Callable[[Any, Any], Any]:
    """`fn(shared, rows)` with the rows divided over devices, each of which knows its own alone.

    Args:
        fn: a pure function; `shared` is the same on all devices, as is what it closes over.
        on: the D devices.

    Returns:
        `(shared, rows[N, ...]) -> results[N, ...]`, pytrees of arrays; N must be a multiple of D.
    """
    # Auto axes: Explicit ones, the default of `make_mesh`, reject inputs that were not placed beforehand.
    mesh = Mesh(np.array(on), (AXIS,), axis_types=(AxisType.Auto,))

    # With the check on, a gradient with respect to replicated parameters is silently summed over all shards, and a
    # loop that starts from fresh zeros is rejected. Devices share nothing here, so there is nothing to check.
    return jax.shard_map(fn, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(AXIS), check_vma=False)
