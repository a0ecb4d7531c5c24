"""The site's pages: what is made for them, where their links lead, and that none is missing from the navigation."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from trl_opsd.methods import METHODS, config_class


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def pages(site):
    return site("pages")


def test_every_page_is_in_the_navigation_once(pages):
    shown = list(pages.listed(pages.full_nav(pages.config()["nav"])))
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert sorted(shown) == sorted(written | {*pages.made_pages()})


def test_every_method_has_its_page(pages):
    [section] = [section["Methods"] for section in pages.full_nav(pages.config()["nav"]) if "Methods" in section]
    assert [place for entry in section[1:] for place in entry.values()] == [f"methods/{name}.md" for name in METHODS]


@pytest.mark.parametrize("name", METHODS)
def test_page_of_a_method(pages, name):
    page, method = pages.method_page(name), config_class(name).method
    assert page.startswith(f"# {method.name}\n")
    assert f"[{method.title}](https://huggingface.co/papers/{method.paper})" in page
    assert f"```bibtex\n{method.citation.strip()}\n```" in page
    assert f"| [written from](../methods.md#the-methods) | {method.status} |" in page
    assert f"\n::: trl_opsd.methods.{METHODS[name]}\n" in page
    recipes = {path.relative_to(ROOT / "recipes").as_posix() for path in pages.method_recipes(name)}
    assert f"playground/{name}.yaml" in recipes
    assert recipes == set(re.findall(r"\[`([\w./-]+\.yaml)`\]", page))
    command, config = re.search(r"^trl-opsd (\w+) --config (.+)$", page, re.MULTILINE).groups()
    assert command == name
    assert (ROOT / config).is_file()


@pytest.mark.parametrize(
    ("page", "link", "turned"),
    [
        ("index.md", "docs/methods.md#defaults", "methods.md#defaults"),
        ("index.md", "recipes", "recipes/index.md"),
        ("index.md", "LICENSE", "files/LICENSE"),
        ("contexts.md", "metrics.md", "metrics.md"),
        ("methods.md", "../recipes/opsd", "recipes/opsd.md"),
        ("methods.md", "../trl_opsd/methods/opsd.py", "methods/opsd.md"),
        ("quickstart.md", "../recipes/accelerate/zero2.yaml", "recipes/accelerate.md#zero2.yaml"),
        ("evaluation.md", "../trl_opsd/eval/metrics.py", "api/eval/metrics.md"),
        ("evaluation.md", "../trl_opsd/eval/benchmarks", "trl_opsd/eval/benchmarks.md"),
        ("evaluation.md", "../trl_opsd/eval", "api/eval/index.md"),
        ("scoring.md", "../tests/eval/completions.jsonl", "files/tests/eval/completions.jsonl"),
        ("methods/opsd.md", "../methods.md#the-methods", "../methods.md#the-methods"),
        ("notebook.md", "https://huggingface.co/papers/2601.18734", "https://huggingface.co/papers/2601.18734"),
    ],
)
def test_where_links_lead(pages, page, link, turned):
    assert pages.turn_links(f"see [`it`]({link}) and `that`.", page) == f"see [`it`]({turned}) and `that`."
    assert pages.turn_links(f'<img src="{link}">', page) == f'<img src="{turned}">'
    assert pages.turn_links(f"`[it]({link})`", page) == f"`[it]({link})`"


def test_a_link_to_what_the_site_does_not_show_is_an_error(pages):
    with pytest.raises(ValueError, match=r"docs/methods\.md links to \.\./tests, which the site does not show"):
        pages.turn_links("[tests](../tests)", "methods.md")


def test_gallery_has_what_it_lists(pages):
    assert {path.stem for path in (DOCS / "gallery").glob("*.html")} == {*pages.gallery()}
    for name, page in pages.gallery().items():
        assert {*page} == {"title", "shows", "command", "writes"}, name


def test_versions_agree():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((DOCS / "CITATION.cff").read_text())["version"] == version
    assert re.search(r"^## (.+)$", (DOCS / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version


def test_notebook_shows_no_paths():
    for output in re.findall(r'"outputs": (\[.*?\n   \])', (DOCS / "notebook.ipynb").read_text(), re.DOTALL):
        text = re.sub(r'"image/png": "[^"]*"', "", output)
        assert not re.search(r"/(home|root|tmp|usr|work)\b", text)
        assert "stderr" not in text
