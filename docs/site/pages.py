"""
The pages that no file of docs/ holds, made from the methods, the recipes, the package, the notebook and the gallery,
and where links to files of the repository lead on the site. Of the package, only the names of its methods are
imported, since the environment of the site has no torch.
"""

import ast
import json
import posixpath
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any

import yaml

from trl_opsd.methods import METHODS, summary


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NOTEBOOK = "notebook.ipynb"

Nav = list[Any]


def config() -> dict[str, Any]:
    """What mkdocs.yml says."""
    return yaml.safe_load((Path(__file__).parent / "mkdocs.yml").read_text(encoding="utf-8"))


def made_pages() -> dict[str, str]:
    """Markdown of every page that is made, by its place on the site."""
    pages = {"index.md": (ROOT / "README.md").read_text(encoding="utf-8"), "notebook.md": notebook_page()}
    pages |= {"gallery.md": gallery_page(), "recipes/index.md": recipes_page(), "api/index.md": names_page()}
    pages |= {f"methods/{name}.md": method_page(name) for name in METHODS}
    pages |= {f"{folder}.md": folder_page(folder) for folder in yaml_folders()}
    for room, modules in rooms().items():
        pages[f"api/{room}/index.md" if modules != [room] else f"api/{room}.md"] = room_page(room, modules)
        pages |= {api_page(module): module_page(module) for module in modules if module != room}
    return pages


def full_nav(nav: Nav) -> Nav:
    """The navigation of mkdocs.yml, with the pages that are made in the sections that ask for them."""
    made: dict[str, Nav] = {
        "Methods": [{method_fields(name)["name"]: f"methods/{name}.md"} for name in METHODS],
        "Recipes": [{folder.removeprefix("recipes/"): f"{folder}.md"} for folder in yaml_folders()],
        "API": [
            {room: [f"api/{room}/index.md", *({module.partition(".")[2]: api_page(module)} for module in modules)]}
            if modules != [room]
            else {room: f"api/{room}.md"}
            for room, modules in rooms().items()
        ],
    }
    return [
        {title: [*pages, *made.get(title, [])] if isinstance(pages, list) else pages}
        for section in nav
        for title, pages in section.items()
    ]


def listed(nav: Nav | str) -> Iterator[str]:
    """Every page of a navigation."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav:
            yield from listed(list(entry.values()) if isinstance(entry, dict) else entry)


def source_of(page: str) -> str:
    """File of the repository that the links of a page start from."""
    return "README.md" if page == "index.md" else f"docs/{page}"


def target_of(file: str) -> str | None:
    """Place on the site of a file or a folder of the repository, `None` if it has none."""
    if file.startswith("docs/"):
        return file.removeprefix("docs/").replace(NOTEBOOK, "notebook.md")
    method = re.fullmatch(r"trl_opsd/methods/(\w+)\.py", file)
    if method and method[1] in METHODS:
        return f"methods/{method[1]}.md"
    if file in yaml_folders():
        return f"{file}.md"
    if file.endswith(".yaml") and posixpath.dirname(file) in yaml_folders():
        return f"{posixpath.dirname(file)}.md#{Path(file).name}"
    module = file.removeprefix("trl_opsd/").removesuffix(".py").replace("/", ".")
    if file.startswith("trl_opsd/") and module in [name for modules in rooms().values() for name in modules]:
        return api_page(module)
    if file.removeprefix("trl_opsd/") in rooms():
        return f"api/{module}/index.md"
    fixed = {"README.md": "index.md", "recipes": "recipes/index.md", "trl_opsd/methods": "methods.md"}
    return fixed.get(file) or (f"files/{file}" if (ROOT / file).is_file() else None)


def turn_links(markdown: str, page: str) -> str:
    """
    Turns the links of a page, which lead through the repository, to where the same is on the site.

    Raises:
        ValueError: If a link leads to what the site does not show.
    """
    source = source_of(page)

    def turned(match: re.Match[str]) -> str:
        before, link, anchor, after = match.groups()
        if link is None:
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        if not (ROOT / file).exists():
            return match[0]  # a page that is made, or a link that mkdocs reports
        target = target_of(file)
        if target is None:
            raise ValueError(f"{source} links to {link}, which the site does not show.")
        return before + posixpath.relpath(target, posixpath.dirname(page) or ".") + (anchor or "") + after

    code, link = (
        r"```.*?```|`[^`\n]+`",
        r"""(\]\(|(?:src|srcset|href)=")(?![a-z]+:|\#)([^)"#\s]+)(\#[^)"\s]*)?([)"])""",
    )
    return re.sub(f"{code}|{link}", turned, markdown, flags=re.DOTALL)


def files_linked_to(pages: dict[str, str]) -> set[str]:
    """Files of the repository outside of docs/ that have to be copied, as links lead to them."""
    return {file for text in pages.values() for file in re.findall(r"\]\((?:\.\./)*files/([^)#]+)\)", text)}


# Methods


def method_file(name: str) -> Path:
    return ROOT / "trl_opsd" / "methods" / f"{METHODS[name].partition('.')[0]}.py"


@cache
def method_tree(name: str) -> ast.Module:
    return ast.parse(method_file(name).read_text(encoding="utf-8"))


def method_config(name: str) -> ast.ClassDef:
    class_name = METHODS[name].partition(".")[2]
    [found] = [node for node in method_tree(name).body if isinstance(node, ast.ClassDef) and node.name == class_name]
    return found


@cache
def method_fields(name: str) -> dict[str, str]:
    """What the file of a method hands to `Method`: name, paper, title, citation, status."""
    [call] = [
        node
        for node in ast.walk(method_config(name))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Method"
    ]
    fields = {}
    for keyword in call.keywords:
        value = keyword.value
        if isinstance(value, ast.Attribute):  # OtherConfig.method.title
            [other] = [
                key for key, place in METHODS.items() if place.endswith(f".{ast.unparse(value).partition('.')[0]}")
            ]
            fields[value.attr] = method_fields(other)[value.attr]
        else:
            [text] = [node.value for node in ast.walk(value) if isinstance(node, ast.Constant)]
            fields[str(keyword.arg)] = dedent(text)
    return fields


def method_row(name: str) -> list[str]:
    """The row of docs/methods.md."""
    table = (DOCS / "methods.md").read_text(encoding="utf-8").split("## The methods\n")[1].split("\n## ")[0]
    [row] = [line for line in table.splitlines() if line.split(" | ")[1:2] == [f"`{name}`"]]
    row = re.sub(r"\]\((?!https?:)", "](../", row)
    return row.strip("| ").split(" | ")


def method_recipes(name: str) -> list[Path]:
    recipes = ROOT / "recipes"
    return [*sorted((recipes / name).glob("*.yaml")), *sorted((recipes / "playground").glob(f"{name}.yaml"))]


def method_page(name: str) -> str:
    fields, row, config = method_fields(name), method_row(name), method_config(name)
    module, _, class_name = METHODS[name].partition(".")
    public = [node.name for node in method_tree(name).body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    parts = [part for part in public if part != class_name and not part.startswith("_")]
    defaults = [
        f"| `{ast.literal_eval(key)}` | `{ast.unparse(value)}` |"
        for keyword in config.keywords
        if keyword.arg == "defaults" and isinstance(keyword.value, ast.Dict)
        for key, value in zip(keyword.value.keys, keyword.value.values, strict=True)
        if key is not None
    ]
    recipes = method_recipes(name)
    example = recipes[0].relative_to(ROOT).as_posix()
    lines = [
        f"# {fields['name']}",
        summary(name),
        f"| paper | [{fields['title']}](https://huggingface.co/papers/{fields['paper']}) |\n|---|---|\n"
        f"| [written from](../methods.md#the-methods) | {row[3]} |\n| deviations | {row[4]} |\n"
        f"| constants we chose | {row[5]} |",
        f"```bash\ntrl-opsd {name} --config {example}\n```",
        f"```python\nfrom trl_opsd import {class_name}, SelfDistillationTrainer\n\n"
        f'args = {class_name}(output_dir="run")\n'
        'trainer = SelfDistillationTrainer(\n    model="Qwen/Qwen3-1.7B", args=args, train_dataset=dataset\n)\n```',
        "## Formula and parts",
        *(_object(f"trl_opsd.methods.{module}.{part}", heading_level=3) for part in [class_name, *parts]),
        "## Defaults",
        "| field | value |\n|---|---|\n" + "\n".join(defaults),
        "## Recipes",
        "| recipe | |\n|---|---|\n" + "\n".join(_recipe_row(path, "..") for path in recipes),
        f"## trl_opsd/methods/{module}.py {{ #source data-search-exclude }}",
        f"```python\n{method_file(name).read_text(encoding='utf-8').strip()}\n```",
        "## Citation",
        f"```bibtex\n{fields['citation'].strip()}\n```",
    ]
    return "\n\n".join(lines)


# Recipes


@cache
def yaml_folders() -> list[str]:
    """Folders whose files are shown on a page."""
    files = [*ROOT.glob("recipes/*/*.yaml"), *ROOT.glob("trl_opsd/eval/benchmarks/*.yaml")]
    return sorted({file.parent.relative_to(ROOT).as_posix() for file in files})


def _recipe_row(path: Path, up: str) -> str:
    folder = path.parent.relative_to(ROOT).as_posix()
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    name = path.relative_to(ROOT).as_posix().removeprefix("recipes/")
    return f"| [`{name}`]({up}/{folder}.md#{path.name}) | {first.lstrip('# ') if first.startswith('#') else ''} |"


def recipes_page() -> str:
    rows = [_recipe_row(path, "..") for folder in yaml_folders() for path in sorted((ROOT / folder).glob("*.yaml"))]
    return (
        "# Recipes\n\n`trl-opsd METHOD --config FILE` trains by one of these.\n\n| file | |\n|---|---|\n"
        + "\n".join(rows)
    )


def folder_page(folder: str) -> str:
    parts = [f"# {folder}"]
    for path in sorted((ROOT / folder).glob("*.yaml")):
        text = path.read_text(encoding="utf-8").strip()
        parts.append(f"## `{path.name}` {{ #{path.name} }}\n\n```yaml\n{text}\n```")
    return "\n\n".join(parts)


# API


@cache
def rooms() -> dict[str, list[str]]:
    """Modules with something public to document, by the folder that they are in. Methods have pages of their own."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "trl_opsd").rglob("*.py")):
        parts = path.relative_to(ROOT / "trl_opsd").with_suffix("").parts
        if parts[0] == "methods" or parts[-1].startswith("_"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(
            isinstance(node, ast.ClassDef | ast.FunctionDef)
            and not node.name.startswith("_")
            and ast.get_docstring(node)
            for node in tree.body
        ):
            found.setdefault(parts[0], []).append(".".join(parts))
    return found


def api_page(module: str) -> str:
    return f"api/{module.replace('.', '/')}.md"


def names_page() -> str:
    """The public names."""
    package = ast.parse((ROOT / "trl_opsd" / "__init__.py").read_text(encoding="utf-8"))
    [modules] = [
        ast.literal_eval(node.value)
        for node in package.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "_MODULES"
    ]
    for place in METHODS.values():
        module, _, name = place.partition(".")
        modules[name] = f"trl_opsd.methods.{module}"
    names = "\n".join(f"- [`{name}`][{module}.{name}]" for name, module in sorted(modules.items()))
    return f"# API\n\n`from trl_opsd import …`\n\n{names}\n\nAll else is in the module that it is made in."


def room_page(room: str, modules: list[str]) -> str:
    if modules == [room]:
        return module_page(room)
    docstring = ast.get_docstring(ast.parse((ROOT / "trl_opsd" / room / "__init__.py").read_text(encoding="utf-8")))
    links = [f"- [`{module}`]({posixpath.relpath(api_page(module), f'api/{room}')})" for module in modules]
    return f"# trl_opsd.{room}\n\n{docstring or ''}\n\n" + "\n".join(links)


def module_page(module: str) -> str:
    return f"# trl_opsd.{module}\n\n" + _object(
        f"trl_opsd.{module}", show_root_heading=False, show_root_toc_entry=False, heading_level=2
    )


def _object(path: str, **options: object) -> str:
    return f"::: {path}\n    options:\n" + "\n".join(
        f"      {key}: {json.dumps(value)}" for key, value in options.items()
    )


# Notebook and gallery


def notebook_page() -> str:
    """The notebook as it was run."""
    notebook = json.loads((DOCS / NOTEBOOK).read_text(encoding="utf-8"))
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                parts.append(f'<img alt="" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">')
            elif "text/html" in data:
                parts.append("".join(data["text/html"]))
            else:
                parts.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    title, *rest = parts
    return "\n\n".join([title, f"This page is [a notebook to run]({NOTEBOOK}).", *rest])


def gallery() -> dict[str, dict[str, str]]:
    """Pages of docs/gallery/, by their names: what pages.yaml says of them."""
    return yaml.safe_load((DOCS / "gallery" / "pages.yaml").read_text(encoding="utf-8"))


def gallery_page() -> str:
    parts = ["# Gallery", "Pages that the commands write, each in one file. `make gallery` makes them anew."]
    for name, page in gallery().items():
        command = page["command"]
        parts.append(f"## [{page['title']}](gallery/{name}.html)\n\n{page['shows']}\n\n```bash\n{command}\n```")
    return "\n\n".join(parts)
