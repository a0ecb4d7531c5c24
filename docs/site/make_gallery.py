"""Makes pages of docs/gallery/ anew: runs the commands of pages.yaml and keeps the page that each writes."""

import argparse
import shutil
import subprocess
from pathlib import Path

import yaml


ROOT = Path(__file__).parents[2]
GALLERY = ROOT / "docs" / "gallery"


def main() -> None:
    pages = yaml.safe_load((GALLERY / "pages.yaml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"one of: {', '.join(pages)} (default: all)")
    names = parser.parse_args().names or list(pages)
    if unknown := [name for name in names if name not in pages]:
        parser.error(f"{unknown[0]} is none of: {', '.join(pages)}")
    for name in names:
        print(f"{name}: {pages[name]['command']}", flush=True)
        subprocess.run(f"set -e\n{pages[name]['command']}", shell=True, check=True, cwd=ROOT)
        shutil.copyfile(ROOT / pages[name]["writes"], GALLERY / f"{name}.html")


if __name__ == "__main__":
    main()
