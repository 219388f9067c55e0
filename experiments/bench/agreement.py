"""AutoAttack beside torch implementations, member by member, on models of the study.

The models are files that `combinations` left: plain, at and dp+at of seed 0. Each member attacks, by itself, every
image that is classified rightly; both sides predict the same class for every clean image, or the command stops.
torchattacks and pyautoattack have no targeted DLR for two classes; our set has a margin in its place. Members that
start or search at random run once per seed: a seed moves the accuracy of a weak model. Square keeps its schedule, as
AutoAttack's does, on all sides.

Every run is a row: a command that was stopped goes on, and processes that get the same command share the work.

Command, with `pip install -e ".[attacks]"`: python -m experiments.bench.agreement MODELS --out DIR
"""

import functools
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro
from rich.console import Console

from experiments import grid
from experiments.bench import torch_sides
from experiments.combinations.federation import build_model
from experiments.combinations.presets import preset
from experiments.display import Show
from experiments.files import digest
from fedrobust import attacks, check, compression, data, keys, reporting
from fedrobust.types import Dataset

COMBINATIONS = ("plain", "at", "dp+at")
MEMBERS = {
    "fedrobust": ("apgd_ce", "apgd_t", "fab_t", "square"),
    "torchattacks": ("apgd_ce", "fab_t", "square"),
    "pyautoattack": ("apgd_ce", "fab_t", "square"),
}
RANDOM = ("apgd_ce", "square")
"""Members that run once per seed; the others run with the first one only."""
NUM_STEPS = 100
NUM_SLOTS = 64

FIELDS: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("model", "file", "side", "member", "seed", "num_images", "num_right", "standing"), ()
)
"""Of a row: `file` begins the SHA-256 of the model's file; `num_right` images are right when clean, those in
`standing` (their indices) under the member as well."""


class Setting(NamedTuple):
    """Of every attack. Attributes: eps, the Linf radius; num_queries, of Square."""

    eps: float
    num_queries: int


class Case(NamedTuple):
    """One model and its images. Attributes: params; apply; width; image; label; clean, [N] bool, what is right."""

    params: Any
    apply: Callable[[Any, Any], jax.Array]
    width: int
    image: np.ndarray
    label: np.ndarray
    clean: np.ndarray


def main(
    models: Annotated[Path, tyro.conf.Positional],
    out: Path,
    eps: float = 8 / 255,
    seeds: Sequence[int] = (0,),
    num_queries: int = 5000,
    combinations: Sequence[str] = COMBINATIONS,
) -> None:
    """Runs both sides on every model and prints what each member leaves.

    Args:
        models: the folder of the models' files, of seed 0.
        out: folder for the rows and the table.
        eps: Linf radius, images in [0, 1].
        seeds: of the attacks, one or more.
        num_queries: of Square.
        combinations: which models.
    """
    check.require(len(seeds) > 0, "--seeds", seeds, "one or more")
    setting, test = Setting(eps, num_queries), data.load("pneumonia_mnist").test
    versions = {name: version(name) for name in ("jax", "torch", "torchattacks", "pyautoattack")}
    config = {**setting._asdict(), "num_steps": NUM_STEPS, "versions": versions}
    grid.require_same(out, config)
    files = {combination: _digest(models / f"{combination}-seed0.safetensors") for combination in combinations}
    for row in reporting.read(out / "rows.jsonl"):
        same = files.get(row["model"], row["file"]) == row["file"]
        check.require(same, "models", str(models), f"the folder with the {row['model']} of which {out} has rows")
    tasks: dict[str, Callable[[Show], grid.Row]] = {}
    for combination in combinations:
        case = functools.cache(functools.partial(_case, models / f"{combination}-seed0.safetensors", test))
        for side, members in MEMBERS.items():
            for member in members:
                for seed in seeds if member in RANDOM else seeds[:1]:
                    label = {
                        "model": combination,
                        "file": files[combination],
                        "side": side,
                        "member": member,
                        "seed": seed,
                    }
                    tasks[name_of(label)] = functools.partial(_row, label, case, setting)
    console = Console()
    if grid.fill(out, config, tasks, name_of, console, fields=FIELDS):
        grid.write_table(out, "table", table(reporting.read(out / "rows.jsonl")), console)


def name_of(row: grid.Row) -> str:
    """`plain-fedrobust-apgd_ce-0`."""
    return "-".join(str(row[field]) for field in ("model", "side", "member", "seed"))


def table(rows: Sequence[grid.Row]) -> reporting.Table:
    """Accuracy in % under each member by itself, and under a side's members together: mean and range over the seeds.

    A member with one seed counts with it in every seed's "together".
    """
    standing: dict[tuple[str, str], dict[str, dict[int, frozenset[int]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        standing[row["model"], row["side"]][row["member"]][row["seed"]] = frozenset(row["standing"])
    cells: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    of_model = {row["model"]: row for row in rows}
    for (model, side), members in standing.items():
        seeds = sorted(set().union(*members.values()))
        together = {
            seed: frozenset.intersection(*(sets.get(seed, sets[min(sets)]) for sets in members.values()))
            for seed in seeds
        }
        for member, sets in {**members, "together": together}.items():
            left = [100 * len(of_seed) / of_model[model]["num_images"] for of_seed in sets.values()]
            over = f" ({min(left):.2f} to {max(left):.2f}, {len(left)})" if len(left) > 1 else ""
            cells[model, member][side] = f"{np.mean(left):.2f}{over}"
    order = list(dict.fromkeys([member for members in MEMBERS.values() for member in members]))
    lines = [
        [model, member, *(cells[model, member].get(side, "–") for side in MEMBERS)]
        for model in of_model
        for member in (*order, "together")
        if (model, member) in cells
    ]
    clean = ", ".join(f"{model} {100 * row['num_right'] / row['num_images']:.2f}" for model, row in of_model.items())
    note = f"accuracy in % under each member alone; in brackets lowest, highest and number of seeds; clean: {clean}"
    return reporting.Table([("", name) for name in ("model", "member", *MEMBERS)], lines, [note], num_labels=2)


def _digest(path: Path) -> str:
    check.require(path.is_file(), "models", str(path), "a file that exists")
    return digest(path)


def _case(path: Path, test: Dataset) -> Case:
    study = preset("combinations", "pneumonia_mnist", "cpu")
    model = build_model(study, test.image.shape[1:], test.num_classes)
    image, label = np.asarray(test.image, np.float32), np.asarray(test.label)
    full = jax.eval_shape(model.init, jax.random.key(0), image[:1])
    params, apply = compression.load(path, model.apply, full, image[:1])
    clean = np.asarray(jax.jit(apply)(params, image).argmax(1)) == label
    return Case(params, apply, study.width, image, label, clean)


def _row(label: grid.Row, case: Callable[[], Case], setting: Setting, show: Show) -> grid.Row:
    """What one run leaves."""
    show("attack")(0, 1, {})
    run = _ours if label["side"] == "fedrobust" else _peers
    wrong = run(case(), setting, label)
    clean = case().clean
    return {
        **label,
        "num_images": len(clean),
        "num_right": int(clean.sum()),
        "standing": np.flatnonzero(clean & ~wrong).tolist(),
    }


def _ours(case: Case, setting: Setting, label: grid.Row) -> np.ndarray:
    """[N] bool, what one of our members breaks."""
    suite = attacks.auto_attack(
        version="standard", norm="linf", eps=setting.eps, num_classes=2, num_queries=setting.num_queries
    )
    [member] = [member for member in suite.members if member.name == label["member"]]

    def logits_fn(x: jax.Array) -> jax.Array:
        return case.apply(case.params, x)

    attack = attacks.run(member.search, num_slots=NUM_SLOTS, num_devices=None)
    key = keys.stream(keys.root(label["seed"]), "evaluate")
    return np.asarray(jax.jit(attack, static_argnums=1)(key, logits_fn, case.image, case.label, case.clean).wrong)


def _peers(case: Case, setting: Setting, label: grid.Row) -> np.ndarray:
    """[N] bool, what one of a peer's members breaks."""
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
    sample = _makers(model, setting, label["seed"])[label["side"]][label["member"]]()(x.clone(), y)
    inside = (sample - x).abs().amax((1, 2, 3)) <= setting.eps * (1 + 1e-5) + 1e-6
    inside &= (sample.amin((1, 2, 3)) >= 0) & (sample.amax((1, 2, 3)) <= 1)
    return ~right(sample) & inside.numpy()


def _makers(model: Any, setting: Setting, seed: int) -> dict[str, dict[str, Callable[[], Callable[..., Any]]]]:
    """How each peer's members are made."""
    import pyautoattack.autopgd_base as pgd
    import pyautoattack.fab_pt as fab
    import pyautoattack.square as square
    import torchattacks

    queries = {"n_queries": setting.num_queries, "resc_schedule": False}
    all_of = {"norm": "Linf", "eps": setting.eps, "seed": seed}
    all_py = {**all_of, "device": "cpu"}
    steps_py = {**all_py, "n_iter": NUM_STEPS}
    return {
        "torchattacks": {
            "apgd_ce": lambda: torchattacks.APGD(model, steps=NUM_STEPS, loss="ce", **all_of),
            "fab_t": lambda: torchattacks.FAB(model, steps=NUM_STEPS, multi_targeted=True, n_classes=2, **all_of),
            "square": lambda: torchattacks.Square(model, **queries, **all_of),
        },
        "pyautoattack": {
            "apgd_ce": lambda: pgd.APGDAttack(model, loss="ce", **steps_py).perturb,
            "fab_t": lambda: fab.FABAttack_PT(model, targeted=True, n_target_classes=1, **steps_py).perturb,
            "square": lambda: square.SquareAttack(model, **queries, **all_py).perturb,
        },
    }


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
