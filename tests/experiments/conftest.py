"""Studies small enough for a test."""

import jax
import pytest


@pytest.fixture
def quick_compiler():
    """Compiles in half the time what runs for milliseconds; equal programs still give equal bits."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
