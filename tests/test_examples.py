"""The examples run from a shell, and do what they say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart.py"


def test_quickstart_trains_compresses_saves_and_loads():
    command = [sys.executable, str(QUICKSTART)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
    dense, small = map(float, re.search(r"accuracy ([\d.]+) % dense, ([\d.]+) % compressed", printed).groups())
    smaller = float(re.search(r"compressed: ([\d.]+)x smaller", printed)[1])
    assert dense >= 97
    assert small >= dense - 1
    assert smaller >= 8
    assert "equal predictions on 450 test images" in printed
