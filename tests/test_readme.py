"""What the README shows runs as it stands there; the tables of the results are those of their rows."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.bench import agreement
from fedrobust import reporting
from fedrobust.types import Dataset, Model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "experiments" / "RESULTS.md").read_text()
ROWS = ROOT / "experiments" / "combinations" / "rows"


def test_the_research_script_runs_and_is_fifteen_lines():
    script = re.search(r"```python\n(import numpy.*?)```", README, re.DOTALL).group(1)
    assert len(script.strip().splitlines()) == 15
    names = {}
    exec(compile(script, "README.md", "exec"), names)
    assert names["done"] == names["plan"].num_steps == int(names["state"].round)
    assert names["plan"].epsilon <= 8.0


def test_auto_attack_and_the_verdict_run_on_any_model(capsys):
    """A linear model: its worst case is known."""
    script = re.search(r"```python\n(import jax, numpy.*?)```", README, re.DOTALL).group(1)
    rng = np.random.default_rng(0)
    weight, image = rng.normal(size=(9, 2)), rng.uniform(0.4, 0.6, (12, 3, 3, 1)).astype(np.float32)
    weight -= weight.mean(axis=0)
    logits = image.reshape(12, 9) @ weight
    test = Dataset(image, logits.argmax(1).astype(np.int32), 2)
    model = Model(lambda key, x: weight.astype(np.float32), lambda params, x: x.reshape(len(x), 9) @ params)
    names = {"test": test, "model": model, "params": model.init(None, None), "key": jax.random.key(0)}
    exec(compile(script, "README.md", "exec"), names)
    margin, reach = np.abs(logits[:, 0] - logits[:, 1]), np.abs(weight[:, 0] - weight[:, 1]).sum() * 8 / 255
    assert names["todo"].tolist() == (margin > reach).tolist()
    assert 0 < names["todo"].mean() < 1
    assert capsys.readouterr().out.startswith(str(names["todo"].mean()))


def test_a_model_gets_smaller_and_its_files_run(tmp_path, monkeypatch):
    script = re.search(r"```python\n(from fedrobust import compression.*?)```", README, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    params = {"hidden": rng.normal(size=(12, 8)), "head": rng.normal(size=(8, 2))}
    params = {name: x.astype(np.float32) for name, x in params.items()}
    apply = lambda p, x: jax.nn.relu(x.reshape(len(x), -1) @ p["hidden"]) @ p["head"]  # noqa: E731
    names = {"model": Model(None, apply), "params": params, "image": rng.uniform(size=(3, 2, 3, 2)).astype(np.float32)}
    exec(compile(script, "README.md", "exec"), names)
    assert [names["small"][name].shape for name in ("hidden", "head")] == [(12, 2), (2, 2)]
    loaded, run = names["compression"].load("model.safetensors", apply, params, names["image"])
    np.testing.assert_allclose(
        names["export"].load_onnx("model.onnx")(names["image"]), run(loaded, names["image"]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("path", sorted(ROWS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_tables_are_those_of_the_rows(path):
    table = reporting.markdown(reporting.table(reporting.read(path))).split("\n\n")[0]
    assert table in README or table in RESULTS


def test_the_table_of_other_implementations_is_that_of_its_rows():
    rows = reporting.read(ROOT / "experiments" / "bench" / "results" / "agreement.jsonl")
    assert reporting.markdown(agreement.table(rows)).split("\n\n")[0] in RESULTS
