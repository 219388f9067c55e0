"""AutoAttack beside torch implementations, member by member, on models of the study.

The models are files that `combinations` left: plain, at and dp+at of one seed. Each member attacks, by itself, every
image that is classified rightly; both sides predict the same class for every clean image, or the command stops.
torchattacks and pyautoattack have no targeted DLR for two classes; our set has a margin in its place.

Command, with `pip install -e ".[attacks]"`: python -m experiments.bench.agreement MODELS [--json FILE]
"""

import json as json_format
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

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
NUM_SLOTS = 64


class Setting(NamedTuple):
    """Of every attack. Attributes: eps, the Linf radius; seed; num_queries, of Square."""

    eps: float
    seed: int
    num_queries: int


class Case(NamedTuple):
    """One model and its images. Attributes: params; apply; width; image; label; clean, [N] bool, what is right."""

    params: Any
    apply: Callable[[Any, Any], jax.Array]
    width: int
    image: np.ndarray
    label: np.ndarray
    clean: np.ndarray


Broken = Iterator[tuple[str, np.ndarray]]
"""Members, with which images each breaks [N] bool."""

Found = dict[str, dict[str, float]]
"""member -> side -> accuracy in %; also "clean" and "together"."""


def main(
    models: Annotated[Path, tyro.conf.Positional],
    json: Path | None = None,
    eps: float = 8 / 255,
    seed: int = 0,
    num_queries: int = 5000,
) -> None:
    """Runs both sides on every model and prints what each member leaves.

    Args:
        models: the folder of the models' files.
        json: where to write what was found.
        eps: Linf radius, images in [0, 1].
        seed: of the models and of the attacks.
        num_queries: of Square.
    """
    check.require(models.is_dir(), "models", str(models), "a folder that exists")
    check.require(json is None or json.parent.is_dir(), "--json", str(json), "in a folder that exists")
    setting, test = Setting(eps, seed, num_queries), data.load("pneumonia_mnist").test
    found = {}
    for name in COMBINATIONS:
        found[name] = compare(_case(models / f"{name}-seed{seed}.safetensors", test), setting, name)
    Console().print(_table(found, eps))
    if json is not None:
        versions = {name: version(name) for name in ("jax", "torch", "torchattacks", "pyautoattack")}
        record = {**setting._asdict(), "num_steps": NUM_STEPS, "versions": versions, "accuracy": found}
        write_text(json, json_format.dumps(record, indent=1) + "\n")


def compare(case: Case, setting: Setting, name: str) -> Found:
    """Accuracy in % under each member by itself, and under all of a side's members together."""
    result: Found = {"clean": {"fedrobust": 100 * float(case.clean.mean())}}
    for side, broken in {"fedrobust": _ours(case, setting), **_peers(case, setting)}.items():
        standing = case.clean.copy()
        for member, wrong in broken:
            accuracy = 100 * float(np.mean(case.clean & ~wrong))
            print(f"{name}: {member} of {side} leaves {accuracy:.2f}", file=sys.stderr, flush=True)
            result.setdefault(member, {})[side] = accuracy
            standing &= ~wrong
        result.setdefault("together", {})[side] = 100 * float(standing.mean())
    return result


def _case(path: Path, test: Dataset) -> Case:
    study = preset("combinations", "pneumonia_mnist", "cpu")
    model = build_model(study, test.image.shape[1:], test.num_classes)
    image, label = np.asarray(test.image, np.float32), np.asarray(test.label)
    full = jax.eval_shape(model.init, jax.random.key(0), image[:1])
    params, apply = compression.load(path, model.apply, full, image[:1])
    clean = np.asarray(jax.jit(apply)(params, image).argmax(1)) == label
    return Case(params, apply, study.width, image, label, clean)


def _ours(case: Case, setting: Setting) -> Broken:
    suite = attacks.auto_attack(
        version="standard", norm="linf", eps=setting.eps, num_classes=2, num_queries=setting.num_queries
    )
    key = keys.stream(keys.root(setting.seed), "evaluate")

    def logits_fn(x: jax.Array) -> jax.Array:
        return case.apply(case.params, x)

    for member in suite.members:
        attack = attacks.run(member.search, num_slots=NUM_SLOTS, num_devices=None)
        found = jax.jit(attack, static_argnums=1)(key, logits_fn, case.image, case.label, case.clean)
        yield member.name, np.asarray(found.wrong)


def _peers(case: Case, setting: Setting) -> dict[str, Broken]:
    import torch

    warnings.simplefilter("ignore")
    model = torch_sides.resnet9(case.width).eval()
    layers = case.params.items()
    torch_sides.set_weights(model, {f"{layer}/{name}": np.asarray(x) for layer, e in layers for name, x in e.items()})
    x = torch.from_numpy(np.ascontiguousarray(case.image.transpose(0, 3, 1, 2)))
    y = torch.from_numpy(case.label.astype(np.int64))

    def right(sample: Any) -> np.ndarray:
        with torch.no_grad():
            return (model(sample).argmax(1) == y).numpy()

    if not (right(x) == case.clean).all():
        raise RuntimeError(f"the models disagree on {np.sum(right(x) != case.clean)} clean images")

    def broken(makers: dict[str, Callable[[], Callable[..., Any]]]) -> Broken:
        for member, make in makers.items():
            sample = make()(x.clone(), y)
            inside = (sample - x).abs().amax((1, 2, 3)) <= setting.eps * (1 + 1e-5) + 1e-6
            inside &= (sample.amin((1, 2, 3)) >= 0) & (sample.amax((1, 2, 3)) <= 1)
            yield member, ~right(sample) & inside.numpy()

    return {name: broken(makers) for name, makers in _makers(model, setting).items()}


def _makers(model: Any, setting: Setting) -> dict[str, dict[str, Callable[[], Callable[..., Any]]]]:
    """How each peer's members are made."""
    import pyautoattack.autopgd_base as pgd
    import pyautoattack.fab_pt as fab
    import pyautoattack.square as square
    import torchattacks

    num = setting.num_queries
    all_of = {"norm": "Linf", "eps": setting.eps, "seed": setting.seed}
    all_py = {**all_of, "device": "cpu"}
    steps_py = {**all_py, "n_iter": NUM_STEPS}
    return {
        "torchattacks": {
            "apgd_ce": lambda: torchattacks.APGD(model, steps=NUM_STEPS, loss="ce", **all_of),
            "fab_t": lambda: torchattacks.FAB(model, steps=NUM_STEPS, multi_targeted=True, n_classes=2, **all_of),
            "square": lambda: torchattacks.Square(model, n_queries=num, **all_of),
        },
        "pyautoattack": {
            "apgd_ce": lambda: pgd.APGDAttack(model, loss="ce", **steps_py).perturb,
            "fab_t": lambda: fab.FABAttack_PT(model, targeted=True, n_target_classes=1, **steps_py).perturb,
            "square": lambda: square.SquareAttack(model, n_queries=num, **all_py).perturb,
        },
    }


def _table(found: dict[str, Found], eps: float) -> Table:
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
