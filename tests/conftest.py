"""Eight virtual CPU devices for every test, nothing computed twice, and the real data where it is at hand."""

import functools
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # of this run alone, for all its workers and what they start
    _COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax
import pytest
from dp_accounting import pld
from hypothesis import settings
from jax._src import compiler

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


class _Remembering(pld.PLDAccountant):
    """Composes only what no test has asked before: of the same events dp-accounting says the same."""

    said: ClassVar[dict[str, float]] = {}
    get_delta = None

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self._asked, self._waiting = [repr((args, settings))], []

    def compose(self, event, count=1):
        if not self.supports(event):
            return super().compose(event, count)  # which raises
        self._asked.append(repr((event, count)))
        self._waiting.append((event, count))
        return self

    def get_epsilon(self, target_delta):
        question = repr((self._asked, target_delta))
        if question not in self.said:
            while self._waiting:
                super().compose(*self._waiting.pop(0))
            self.said[question] = super().get_epsilon(target_delta)
        return self.said[question]


pld.PLDAccountant = _Remembering
_losses = pld.privacy_loss_distribution  # half the time of an accountant, whatever the number of steps
_losses.from_gaussian_mechanism = functools.lru_cache(maxsize=8)(_losses.from_gaussian_mechanism)


@pytest.fixture(scope="session")
def pneumonia_dir() -> Path:
    """The folder that holds a prepared `pneumonia_mnist`; skips where there is none."""
    candidates = [os.environ.get("TFDS_DATA_DIR"), Path(__file__).parents[1] / ".." / "shared" / "tfds"]
    for folder in candidates:
        if folder and (Path(folder) / "pneumonia_mnist").is_dir():
            return Path(folder).resolve()
    pytest.skip("no prepared pneumonia_mnist: set TFDS_DATA_DIR")


def _with_older_emitters(*args, env_options_overrides, **settings):
    """XLA's older code for CPUs compiles in a third of the time."""
    overrides = {"xla_cpu_use_fusion_emitters": False, **(env_options_overrides or {})}
    return _get_compile_options(*args, env_options_overrides=overrides, **settings)


_get_compile_options = compiler.get_compile_options


@pytest.fixture(autouse=True)
def _quick_compiler(request, monkeypatch):
    """Compiles in a quarter of the time what runs for milliseconds; equal programs still give equal bits.

    Not where a test is marked `optimized`: it runs for long, or asks how exactly optimized code computes.
    """
    quick = request.node.get_closest_marker("optimized") is None
    if quick and version("jaxlib").startswith("0.10."):  # others may not know the option
        monkeypatch.setattr(compiler, "get_compile_options", _with_older_emitters)
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
