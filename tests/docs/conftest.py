"""What the site is made by, which is no package."""

import sys
from importlib import import_module
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def site():
    """Imports a module of docs/site/."""
    folder = str(Path(__file__).parents[2] / "docs" / "site")

    def imported(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "path", [folder, *sys.path])
            return import_module(name)

    return imported
