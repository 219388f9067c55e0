"""Eight virtual CPU devices for every test, nothing compiled twice, and the real data where it is at hand."""

import os
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # of this run alone, for all its workers and what they start
    _COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

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


def _choose_older_emitters(monkeypatch):
    """XLA's older code for CPUs compiles faster; a private name, because no public one says so for a single test."""
    from jax._src import compiler

    options = compiler.get_compile_options

    def older(*args, env_options_overrides, **settings):
        overrides = {"xla_cpu_use_fusion_emitters": False, **(env_options_overrides or {})}
        return options(*args, env_options_overrides=overrides, **settings)

    monkeypatch.setattr(compiler, "get_compile_options", older)


@pytest.fixture(autouse=True)
def _quick_compiler(request, monkeypatch):
    """Compiles in less than half the time what runs for milliseconds; equal programs still give equal bits.

    Not where a test is marked `optimized`: it runs for long, or asks how exactly optimized code computes.
    """
    quick = request.node.get_closest_marker("optimized") is None
    if quick and version("jaxlib").startswith("0.10."):  # others may not know the option
        _choose_older_emitters(monkeypatch)
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
