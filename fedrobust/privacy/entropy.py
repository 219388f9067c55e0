"""Randomness from the operating system: for deployment, where a key is a secret that somebody has to keep."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from fedrobust import trees
from fedrobust.types import Key, Params


def system_words(size: int) -> np.ndarray:
    """Uniform 64-bit words from the operating system's generator.

    Args:
        size: how many, >= 0.

    Returns:
        [size] uint64, never the same twice.
    """
    return np.frombuffer(os.urandom(8 * size), np.uint64)


def add_system_gaussian(key: Key, tree: Params, stddev: float | jax.Array) -> Params:
    """`add_gaussian` with noise that nobody can draw again: a drop-in for deployment.

    Whoever knows a JAX key can subtract the noise made from it, and a seed has 32 bits only.

    Args:
        key: not used, by contract: the result is not reproducible, neither by the same key nor after a resume.
        tree: a pytree of float arrays.
        stddev: standard deviation >= 0 of each scalar's noise, in the tree's own unit.

    Returns:
        `tree + N(0, stddev^2)`, same shapes and dtypes.

    Guarantees:
        Every call draws anew: under `jit` in every run, under `scan` in every step, under `vmap` for every row of
        whatever is mapped. Normals are drawn in float64 from 52 random bits, so none is beyond 8.3 standard deviations.
        Where the clients of a federation are mapped with "vmap" JAX refuses it ("IO effect not supported in
        vmap-of-cond"); every other backend draws for each client and step.
        Not guaranteed: safety against attacks on the low bits of floats (Mironov 2012; Jin et al. 2022,
        arXiv 2112.05307); `discrete_gaussian` is the answer to those.
    """
    leaves = jax.tree.leaves(tree)
    # Nothing of these is read. They make the call depend on what `vmap` maps: a call that depends on none of it
    # would be made once for all rows.
    mapped = [jax.random.key_data(key), jnp.asarray(stddev), *(jnp.ravel(x)[:0] for x in leaves)]
    shape = jax.ShapeDtypeStruct((trees.size(tree),), jnp.float32)
    # `io_callback` and not `pure_callback`, which the compiler may cache, drop or merge with its equals.
    normals = io_callback(functools.partial(_normals, shape.size), shape, *mapped)
    return trees.add_flat(tree, stddev * normals)


def _normals(size: int, *mapped: np.ndarray) -> np.ndarray:
    """[size] float32 standard normals, by inversion."""
    from scipy.special import ndtri  # takes a tenth of a second to import

    del mapped
    # Odd multiples of 2^-53: exact in float64, symmetric about a half, never 0 or 1.
    uniform = ((system_words(size) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return ndtri(uniform).astype(np.float32)
