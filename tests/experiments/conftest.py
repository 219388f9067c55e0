"""What runs here runs for milliseconds: compiling is all that takes time."""

import pytest


@pytest.fixture(autouse=True)
def _quick(quick_compiler):
    pass
