"""Eight virtual CPU devices for every test, and the real data where it is at hand."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def pneumonia_dir() -> Path:
    """The folder that holds a prepared `pneumonia_mnist`; skips where there is none."""
    candidates = [os.environ.get("TFDS_DATA_DIR"), Path(__file__).parents[1] / ".." / "shared" / "tfds"]
    for folder in candidates:
        if folder and (Path(folder) / "pneumonia_mnist").is_dir():
            return Path(folder).resolve()
    pytest.skip("no prepared pneumonia_mnist: set TFDS_DATA_DIR")


@pytest.fixture(autouse=True)
def _quick_compiler(request):
    """Compiles in half the time what runs for milliseconds; equal programs still give equal bits.

    Not where a test is marked `optimized`: it runs for long, or asks how exactly optimized code computes.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", request.node.get_closest_marker("optimized") is None)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
