"""Who may import whom, read from the imports of every module."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path.relative_to(ROOT) for room in ("fedrobust", "experiments") for path in (ROOT / room).rglob("*.py")
)
FOUNDATION = {"types", "keys", "trees", "losses", "check", "intervals", "threads", "jsonl", "devices", "ops"}
LAYERS = [
    FOUNDATION,
    {"trace"},
    {"data", "models", "privacy", "attacks", "defenses", "compression"},
    {"federated", "evaluation"},
    {"reporting"},
]
NUMERIC = {"jax", "numpy", "optax", "chex"}
MAX_LINES = 350


def room(module):
    """`fedrobust/ops/pooling.py` -> ops, `fedrobust/keys.py` -> keys."""
    return module.parts[1].removesuffix(".py")


def imports(module):
    """Every dotted name that a module imports, wherever in it: `from a.b import c` gives a.b.c."""
    tree = ast.parse((ROOT / module).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(module):
    """The packages outside the standard library."""
    return {name.split(".")[0] for name in imports(module)} - set(sys.stdlib_module_names)


def rooms(module):
    """The rooms of the library that a module reaches."""
    names = [name.split(".") for name in imports(module)]
    return {name[1] for name in names if name[0] == "fedrobust" and len(name) > 1}


def layer(name):
    return next(i for i, names in enumerate(LAYERS) if name in names)


LIBRARY = [module for module in MODULES if module.parts[0] == "fedrobust" and len(module.parts) > 1]
ROOMED = [module for module in LIBRARY if module.name != "__init__.py" or len(module.parts) > 2]


def test_every_room_has_a_layer():
    assert {room(module) for module in ROOMED} <= set().union(*LAYERS)


@pytest.mark.parametrize("module", ROOMED, ids=str)
def test_a_room_reaches_only_the_layers_below_it(module):
    own = room(module)
    allowed = {own} | FOUNDATION | ({"trace"} if layer(own) in (2, 3) else set())
    if own == "reporting":
        allowed = {"reporting", "check", "intervals", "jsonl"}
    assert rooms(module) <= allowed
    assert "experiments" not in packages(module)


@pytest.mark.parametrize("module", ROOMED, ids=str)
def test_a_room_uses_only_the_packages_it_may(module):
    outside, own = packages(module) - {"fedrobust"}, room(module)
    if own in FOUNDATION | {"trace"}:
        assert outside <= NUMERIC | ({"scipy"} if own in ("intervals", "trace") else set())
    if own == "reporting":
        assert not outside & {"jax", "jaxlib", "optax", "chex", "flax", "haiku", "orbax"}


def test_the_package_itself_imports_nothing():
    assert list(imports(Path("fedrobust/__init__.py"))) == []


@pytest.mark.parametrize(
    ("names", "home"),
    [
        (("jax.extend", "jax.core", "jax.interpreters"), ("fedrobust/trace/", "fedrobust/ops/_contractions.py")),
        (("tensorflow_datasets", "tensorflow"), "fedrobust/data/"),
        (("jax.sharding",), "fedrobust/devices.py"),
        (("jax.experimental",), "fedrobust/privacy/entropy.py"),  # noise from the host needs a call with side effects
        (("dp_accounting",), "fedrobust/privacy/"),
        (("safetensors",), "fedrobust/compression/"),
        (("onnx", "onnxruntime"), "fedrobust/compression/export/"),
        (("orbax",), "fedrobust/federated/checkpoint.py"),
        (("matplotlib",), "fedrobust/reporting/"),
        (("jax._src",), "nowhere"),
        (("torch",), "experiments/bench/"),
    ],
)
def test_one_place_knows_it(names, home):
    def knows(module):
        return any(found == name or found.startswith(f"{name}.") for found in imports(module) for name in names)

    assert [str(m) for m in MODULES if knows(m) and not str(m).startswith(home)] == []


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_fits_on_a_few_screens(module):
    assert len((ROOT / module).read_text().splitlines()) < MAX_LINES


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_function_fits_on_one_screen(module):
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.FunctionDef):
            inside = node.body[1:] if ast.get_docstring(node) else node.body
            lines = inside[-1].end_lineno - inside[0].lineno + 1 if inside else 0
            assert lines < 50, f"{node.name} has {lines} lines"


def test_importing_does_no_work():
    """With a platform that does not exist, whoever makes an array or asks for a device at import fails."""
    names = [".".join(module.with_suffix("").parts).removesuffix(".__init__") for module in LIBRARY]
    script = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
import jax
for name in {names!r}:
    for key, value in vars(sys.modules[name]).items():
        assert not isinstance(value, jax.Array), (name, key)
try:
    jax.devices()
except RuntimeError:
    print("no device was there")
"""
    environment = os.environ | {"JAX_PLATFORMS": "nowhere", "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout == "no device was there\n"
