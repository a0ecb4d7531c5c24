"""Runs docs/notebook.ipynb and writes into it what it shows, without progress bars, warnings and times."""

from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient


def _is_noise(output: dict[str, Any]) -> bool:
    shown = output.get("text", "") + output.get("data", {}).get("text/html", "")
    return output.get("name") == "stderr" or "[WARNING]" in shown or "<progress" in shown


def main() -> None:
    file = Path(__file__).parents[1] / "notebook.ipynb"
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(notebook, timeout=None, record_timing=False).execute(cwd=file.parent)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_noise(output)]
    notebook.metadata.pop("language_info", None)
    nbformat.write(notebook, file)


if __name__ == "__main__":
    main()
