"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import jax
import numpy as np

from fedrobust.types import Dataset, Model

README = (Path(__file__).parents[1] / "README.md").read_text()


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
