"""One function over K clients: in a loop, a scan, vectorised, or spread over devices, with the same result."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fedrobust import check, devices

Backend = Literal["loop", "scan", "vmap", "pmap", "shard_map"]
BACKENDS: tuple[Backend, ...] = ("loop", "scan", "vmap", "pmap", "shard_map")

ClientFn = Callable[[Any, Any], Any]
"""`(shared, client) -> result`, pytrees of arrays."""


def default_backend() -> Backend:
    """The backend for the machine at hand.

    "shard_map" where there are several accelerators, "vmap" on one; "scan" on a CPU, where clients one after the
    other keep their batches in cache: 154 ms against 207 ms for 4 clients x 16 images of a ResNet-9 (2 cores,
    jax 0.10.2, 2026-11).
    """
    if jax.default_backend() == "cpu":
        return "scan"
    return "shard_map" if jax.device_count() > 1 else "vmap"


def map_clients(fn: ClientFn, *, backend: Backend | None = None, num_devices: int | None = None) -> ClientFn:
    """Applies `fn(shared, client)` to every client of `clients[K, ...]`.

    Args:
        fn: a pure function of one client; `shared` is the same for all.
        backend: "loop" unrolls K copies into the program (an oracle for few clients); "scan" takes one after the
            other; "vmap" all at once; "pmap" and "shard_map" spread them over devices and scan on each. None chooses
            by platform, see `default_backend`.
        num_devices: for "pmap" and "shard_map": how many of the local devices to use; None uses all.

    Returns:
        `(shared, clients[K, ...]) -> results[K, ...]`. K need not divide by the number of devices: the first client
        is repeated as padding and the padding's results are dropped.

    Raises:
        ValueError: unknown backend; more devices than there are, or fewer than 1.
    """
    backend = default_backend() if backend is None else backend
    check.one_of("backend", backend, BACKENDS)
    if backend in ("pmap", "shard_map"):
        on = devices.local(num_devices)
        spread = _pmapped if backend == "pmap" else devices.sharded
        return _padded(spread(_scanned(fn), on), len(on))
    return {"loop": _looped, "scan": _scanned, "vmap": _vmapped}[backend](fn)


def _looped(fn: ClientFn) -> ClientFn:
    def mapped(shared: Any, clients: Any) -> Any:
        num_clients = len(jax.tree.leaves(clients)[0])
        results = [fn(shared, jax.tree.map(lambda x, k=k: x[k], clients)) for k in range(num_clients)]
        return jax.tree.map(lambda *rows: jnp.stack(rows), *results)

    return mapped


def _scanned(fn: ClientFn) -> ClientFn:
    return lambda shared, clients: jax.lax.map(lambda client: fn(shared, client), clients)


def _vmapped(fn: ClientFn) -> ClientFn:
    return jax.vmap(fn, in_axes=(None, 0))


def _pmapped(fn: ClientFn, on: list[jax.Device]) -> ClientFn:
    spread = jax.pmap(fn, axis_name=devices.AXIS, in_axes=(None, 0), devices=on)

    def mapped(shared: Any, clients: Any) -> Any:
        rows = jax.tree.map(lambda x: x.reshape(len(on), -1, *x.shape[1:]), clients)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), spread(shared, rows))

    return mapped


def _padded(mapped: ClientFn, multiple: int) -> ClientFn:
    """Repeats the first client until K divides by `multiple`, and drops the extra results."""

    def padded(shared: Any, clients: Any) -> Any:
        num_clients = len(jax.tree.leaves(clients)[0])
        extra = -num_clients % multiple
        fill = jax.tree.map(lambda x: jnp.concatenate([x, jnp.repeat(x[:1], extra, axis=0)]), clients)
        return jax.tree.map(lambda x: x[:num_clients], mapped(shared, fill))

    return padded
