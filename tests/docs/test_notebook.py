"""The notebook runs from top to bottom, here in a short form."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


@pytest.mark.slow
@pytest.mark.needs("matplotlib")
def test_runs(tmp_path):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    settings, *cells = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    short, changed = re.subn(r"= \d+", "= 4", settings)
    assert changed == 3
    script = tmp_path / "notebook.py"
    script.write_text("\n".join([short, *cells]), encoding="utf-8")
    command = [sys.executable, str(script)]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "MPLBACKEND": "agg"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^right without the solution: \d+% before, \d+% after$", result.stdout, re.MULTILINE)
