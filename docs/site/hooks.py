"""What mkdocs calls while it builds the site: the pages that are made, and links between files of the repository."""

from typing import Any

from docstrings import typeset
from mkdocs.structure.files import File, Files
from pages import ROOT, files_linked_to, full_nav, made_pages, turn_links


def on_config(config: Any) -> Any:
    config.nav = full_nav(config.nav)
    return config


def on_files(files: Files, config: Any) -> Files:
    pages = made_pages()
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    for name in ("site.css", "iframe-worker.js"):
        files.append(File.generated(config, f"assets/{name}", abs_src_path=str(ROOT / "docs" / "site" / name)))
    texts = {file.src_uri: turn_links(file.content_string, file.src_uri) for file in files.documentation_pages()}
    for path in files_linked_to(texts):
        files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    return typeset(turn_links(markdown, page.file.src_uri), has_html=True)
