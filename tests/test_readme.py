"""What the README shows runs as it stands there."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_research_script_runs_and_is_fifteen_lines():
    script = re.search(r"```python\n(import numpy.*?)```", README, re.DOTALL).group(1)
    assert len(script.strip().splitlines()) == 15
    names = {}
    exec(compile(script, "README.md", "exec"), names)
    assert names["done"] == names["plan"].num_steps == int(names["state"].round)
    assert names["plan"].epsilon <= 8.0
