"""AutoAttack beside torch implementations, member by member, on models of the study.

The models are files that `combinations` left: plain, at and dp+at of one seed. Each member attacks, by itself, every
image that is classified rightly; both sides predict the same class for every clean image, or the command stops.
torchattacks and pyautoattack have no targeted DLR for two classes: our set is theirs with a margin in its place.

Command, with `pip install -e ".[attacks]"`: python -m experiments.bench.agreement results/combinations-.../models --json FILE
"""

import json as json_format
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.bench import torch_sides
from experiments.combinations.federation import build_model
from experiments.combinations.presets import preset
from experiments.files import write_text
from fedrobust import attacks, check, compression, data, keys
from fedrobust.types import Dataset

COMBINATIONS = ("plain", "at", "dp+at")
NUM_STEPS = 100
NUM_QUERIES = 5000
NUM_SLOTS = 64


def main(
    models: Annotated[Path, tyro.conf.Positional],
    json: Path | None = None,
    eps: float = 8 / 255,
    seed: int = 0,
    queries: int = NUM_QUERIES,
) -> None:
    """Runs both sides on every model and prints what each member leaves.

    Args:
        models: the folder of the models' files.
        json: where to write what was found.
        eps: Linf radius, images in [0, 1].
        seed: of the models and of the attacks.
        queries: of Square.
    """
    check.require(models.is_dir(), "models", str(models), "a folder that exists")
    check.require(json is None or json.parent.is_dir(), "--json", str(json), "in a folder that exists")
    test = data.load("pneumonia_mnist").test
    found = {name: _of_model(models / f"{name}-seed{seed}.safetensors", test, eps, seed, queries) for name in COMBINATIONS}
    Console().print(_table(found, eps))
    if json is not None:
        versions = {name: version(name) for name in ("jax", "torch", "torchattacks", "pyautoattack")}
        record = {"eps": eps, "seed": seed, "steps": NUM_STEPS, "queries": queries, "versions": versions}
        write_text(json, json_format.dumps(record | {"accuracy": found}, indent=1) + "\n")


def _of_model(path: Path, test: Dataset, eps: float, seed: int, queries: int) -> dict[str, dict[str, float]]:
    """Accuracy in % by side and member, and under all members together."""
    study = preset("combinations", "pneumonia_mnist", "cpu")
    model = build_model(study, test.image.shape[1:], test.num_classes)
    image, label = np.asarray(test.image, np.float32), np.asarray(test.label)
    full = jax.eval_shape(model.init, jax.random.key(0), image[:1])
    params, apply = compression.load(path, model.apply, full, image[:1])
    clean = np.asarray(jax.jit(apply)(params, image).argmax(1)) == label
    sides = {"fedrobust": _ours(params, apply, image, label, clean, eps, seed, queries)}
    sides |= _peers(params, study.width, image, label, clean, eps, seed, queries)
    result: dict[str, dict[str, float]] = {"clean": {"fedrobust": 100 * float(clean.mean())}}
    for side, broken in sides.items():
        standing = clean.copy()
        for member, wrong in broken:
            print(path.stem, side, member, f"{100 * np.mean(clean & ~wrong):.2f}", file=sys.stderr, flush=True)
            result.setdefault(member, {})[side] = 100 * float(np.mean(clean & ~wrong))
            standing &= ~wrong
        result.setdefault("together", {})[side] = 100 * float(standing.mean())
    return result


Broken = Iterator[tuple[str, np.ndarray]]
"""Members, with which images each breaks [N] bool."""


def _ours(
    params: Any, apply: Any, image: np.ndarray, label: np.ndarray, clean: np.ndarray, eps: float, seed: int, queries: int
) -> Broken:
    suite = attacks.auto_attack(version="standard", norm="linf", eps=eps, num_classes=2, num_queries=queries)
    for member in suite.members:
        attack = attacks.run(member.search, num_slots=NUM_SLOTS)
        key = keys.stream(keys.root(seed), "evaluate")
        program = jax.jit(lambda x, y, todo, attack=attack, key=key: attack(key, lambda z: apply(params, z), x, y, todo))
        yield member.name, np.asarray(program(image, label, clean).wrong)


def _peers(
    params: Any, width: int, image: np.ndarray, label: np.ndarray, clean: np.ndarray, eps: float, seed: int, queries: int
) -> dict[str, Broken]:
    import torch

    warnings.simplefilter("ignore")
    model = torch_sides.resnet9(width).eval()
    weights = {f"{layer}/{name}": np.asarray(x) for layer, entry in params.items() for name, x in entry.items()}
    torch_sides.set_weights(model, weights)
    x = torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))
    y = torch.from_numpy(label.astype(np.int64))

    def right(sample: Any) -> np.ndarray:
        with torch.no_grad():
            return (model(sample).argmax(1) == y).numpy()

    if not (right(x) == clean).all():
        raise RuntimeError(f"the models disagree on {np.sum(right(x) != clean)} clean images")

    def broken(makers: dict[str, Callable[[], Callable[..., Any]]]) -> Broken:
        for member, make in makers.items():
            start = time.perf_counter()
            sample = make()(x.clone(), y)
            inside = (sample - x).abs().amax((1, 2, 3)) <= eps * (1 + 1e-5) + 1e-6
            inside &= (sample.amin((1, 2, 3)) >= 0) & (sample.amax((1, 2, 3)) <= 1)
            print(f"{member}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            yield member, ~right(sample) & inside.numpy()

    return {name: broken(makers) for name, makers in _makers(model, eps, seed, queries).items()}


def _makers(model: Any, eps: float, seed: int, queries: int) -> dict[str, dict[str, Callable[[], Callable[..., Any]]]]:
    """How each peer's members are made."""
    import pyautoattack.autopgd_base as pgd
    import pyautoattack.fab_pt as fab
    import pyautoattack.square as square
    import torchattacks

    one = {"norm": "Linf", "eps": eps, "seed": seed}
    return {
        "torchattacks": {
            "apgd_ce": lambda: torchattacks.APGD(model, steps=NUM_STEPS, loss="ce", **one),
            "fab_t": lambda: torchattacks.FAB(model, steps=NUM_STEPS, multi_targeted=True, n_classes=2, **one),
            "square": lambda: torchattacks.Square(model, n_queries=queries, **one),
        },
        "pyautoattack": {
            "apgd_ce": lambda: pgd.APGDAttack(model, n_iter=NUM_STEPS, loss="ce", device="cpu", **one).perturb,
            "fab_t": lambda: fab.FABAttack_PT(
                model, n_iter=NUM_STEPS, targeted=True, n_target_classes=1, device="cpu", **one
            ).perturb,
            "square": lambda: square.SquareAttack(model, n_queries=queries, device="cpu", **one).perturb,
        },
    }


def _table(found: dict[str, dict[str, dict[str, float]]], eps: float) -> Table:
    sides = ("fedrobust", "torchattacks", "pyautoattack")
    view = Table(title=f"accuracy in % under each member alone, Linf {eps:.4f}")
    for title in ("model", "member", *sides):
        view.add_column(title, justify="right" if title in sides else "left")
    for model, members in found.items():
        for member, accuracy in members.items():
            view.add_row(model, member, *(f"{accuracy[side]:.2f}" if side in accuracy else "–" for side in sides))
    return view


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
