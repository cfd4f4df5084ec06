"""The examples run from a shell, and do what they say."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parent.parent / "examples"
PERCENT = r"([\d.]+) %"


def printed(name: str) -> str:
    """Return what an example prints."""
    command = [sys.executable, str(EXAMPLES / name)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout


def notebook_cells(name: str) -> list[dict]:
    """Return the code cells of a notebook."""
    cells = json.loads((EXAMPLES / name).read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_quickstart_trains_compresses_saves_and_loads():
    text = printed("quickstart.py")
    dense, small = map(float, re.search(rf"accuracy {PERCENT} dense, {PERCENT} compressed", text).groups())
    smaller = float(re.search(r"compressed: ([\d.]+)x smaller", text)[1])
    assert dense >= 97
    assert small >= dense - 1
    assert smaller >= 8
    assert "equal predictions on 450 test images" in text


def test_own_loop_recovers_what_replacing_layers_cost():
    pattern = rf"accuracy {PERCENT} dense, {PERCENT} replaced, {PERCENT} after five epochs, {PERCENT} with cores"
    text = printed("own_loop.py")
    dense, before, after, rounded = map(float, re.search(pattern, text).groups())
    assert before < after
    assert after >= dense - 2
    assert rounded >= after - 0.5
    assert float(re.search(r"params ([\d.]+)x", text)[1]) >= 5


def test_filters_halves_the_work():
    pattern = rf"accuracy {PERCENT} dense, {PERCENT} with filters removed, {PERCENT} after"
    text = printed("filters.py")
    dense, removed, tuned = map(float, re.search(pattern, text).groups())
    assert min(removed, tuned) >= dense - 2
    assert float(re.search(r"macs ([\d.]+)x", text)[1]) >= 2
    assert "fc: 10 units, frozen: reaches the output of the model" in text


def test_deploy_runs_the_exported_graph():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pattern = rf"accuracy {PERCENT} dense, {PERCENT} in integers, {PERCENT} in onnxruntime, which agrees on {PERCENT}"
    text = printed("deploy.py")
    dense, integers, exported, agrees = map(float, re.search(pattern, text).groups())
    assert min(integers, exported) >= dense - 1
    assert agrees >= 99
    assert float(re.search(r"compressed: ([\d.]+)x smaller", text)[1]) >= 8


def test_notebook_runs_and_shows_what_it_computes():
    sources = ["".join(cell["source"]) for cell in notebook_cells("tour.ipynb")]
    # The value of a cell's last expression is what a notebook shows.
    program = f"""
import ast
names = {{}}
for source in {sources!r}:
    *before, last = ast.parse(source).body
    shown = isinstance(last, ast.Expr)
    exec(compile(ast.Module(before if shown else [*before, last], []), "cell", "exec"), names)
    value = eval(compile(ast.Expression(last.value), "cell", "eval"), names) if shown else None
    if value is not None:
        print(value)
"""
    command = [sys.executable, "-W", "error", "-c", program]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600, cwd=EXAMPLES).stdout
    shares = re.findall(rf"(\d+)% of the parameters.*: {PERCENT}", text)
    assert [int(share) for share, _ in shares] == [50, 33, 20, 10]
    assert min(float(value) for _, value in shares[:3]) >= 97
    assert float(re.search(rf"in integers; {PERCENT} after loading", text)[1]) >= 97
    kept = json.dumps(notebook_cells("tour.ipynb"))
    assert "after loading" in kept
    assert "Traceback" not in kept
