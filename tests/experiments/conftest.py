"""Small studies, most of whose time goes into compiling."""

import pytest


@pytest.fixture(autouse=True)
def _quick(quick_compiler):
    pass
