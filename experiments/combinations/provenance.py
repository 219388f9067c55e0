"""What a row was made with."""

import os
import platform
from importlib.metadata import version
from typing import Any

import jax

PACKAGES = ("fedrobust", "jax", "jaxlib", "flax", "dm-haiku", "optax", "dp-accounting", "numpy")


def provenance() -> dict[str, Any]:
    """`versions` of the packages that numbers come from, and the `device`."""
    return {
        "versions": {package: version(package) for package in PACKAGES} | {"python": platform.python_version()},
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()}, {os.cpu_count()} cores)",
    }
