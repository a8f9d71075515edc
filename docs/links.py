"""Links of the site: those in Markdown, which also work in the repository, those of names, and those to sources."""

from __future__ import annotations

import importlib
import inspect
import os
import pathlib
import re

from docutils import nodes
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
GITHUB = "https://github.com/robustjax/robustjax"

BADGE = "[Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)"

_logger = logging.getLogger(__name__)
_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "howto/add_a_method.md", "README.md": "index.md"}


def on_site(path: pathlib.Path, page: pathlib.Path) -> str:
    """Where a link to a file or folder of the repository leads to from a page: to a page, or to GitHub."""
    path = pathlib.Path(os.path.normpath(path))
    inside = path.relative_to(ROOT)
    if not path.exists():
        _logger.warning("%s: a link leads to %s, which does not exist", page, inside)
    room = DOCS / "api" / f"{'.'.join(inside.with_suffix('').parts[1:])}.rst"
    if str(inside) in _PAGES:
        path = DOCS / _PAGES[str(inside)]
    elif inside.parts[0] == "colab" and path.suffix == ".ipynb":
        path = DOCS / "tutorials" / path.name
    elif inside.parts[0] == "robustjax" and room.exists():
        path = room
    elif DOCS not in path.parents or path.suffix not in (".md", ".ipynb", ".png"):
        return f"{GITHUB}/{'tree' if path.is_dir() else 'blob'}/main/{inside}"
    return pathlib.Path(os.path.relpath(path, page.parent)).as_posix()


def mended(text: str, source: pathlib.Path, page: pathlib.Path) -> str:
    """The text of a Markdown file, which may be included in another, with links that lead somewhere from the page."""

    def link(match):
        return f"]({on_site(source.parent / match[1], page)}{match[2] or ''})"

    return re.sub(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)", link, text)


def add_links(app, tree, page):
    """Makes links of public names in code type: ``losses.smoothing.macer``, and ``macer`` on its module's page."""
    objects = app.env.domains.python_domain.objects
    module = f"robustjax.{page.removeprefix('api/')}" if page.startswith("api/") else None
    for node in [*tree.findall(nodes.literal)]:
        name = node.astext().removesuffix("()")
        places = [name, f"robustjax.{name}"] if "." in name else [f"{module}.{name}"]
        place = next((place for place in places if place in objects), None)
        if place and not isinstance(node.parent, nodes.reference):
            target = objects[place]
            node.replace_self(make_refnode(app.builder, page, target.docname, target.node_id, node.deepcopy(), place))


def resolve(app, env, node, text):
    """Finds what a docstring refers to in the room around its module, or among the methods of its module."""
    objects = env.domains.python_domain.objects
    room = ".".join((node.get("py:module") or "").split(".")[:2])
    found = [place for place in objects if place.startswith(f"{room}.") and place.endswith(f".{node['reftarget']}")]
    if node.get("refdomain") != "py" or not found:
        return None
    place = min(found, key=len)
    return make_refnode(app.builder, node["refdoc"], objects[place].docname, objects[place].node_id, text, place)


def source(domain: str, info: dict[str, str]) -> str | None:
    """Where the source of a public name is on GitHub; None for a value or a property."""
    value = importlib.import_module(info["module"])
    for name in info["fullname"].split("."):
        value = getattr(value, name, None)
    try:
        value = inspect.unwrap(value)
        lines, first = inspect.getsourcelines(value)
    except (TypeError, ValueError):
        return None
    path = pathlib.Path(inspect.getsourcefile(value)).relative_to(ROOT)
    return f"{GITHUB}/blob/main/{path}#L{first}-L{first + len(lines) - 1}"


def connect(app) -> None:
    """Connects all of these to the build."""

    def read(app, name, text):
        page = pathlib.Path(app.env.doc2path(name))
        if page.suffix == ".ipynb":  # Colab, where relative links lead nowhere, needs whole ones
            text[0] = text[0].replace(f"]({GITHUB}/blob/main/", f"]({os.path.relpath(ROOT, page.parent)}/")
            text[0] = text[0].replace(f"[!{BADGE}]", "[Open in Colab]")  # a picture from the network
        if page.suffix in (".md", ".ipynb"):
            text[0] = mended(text[0], page, page)

    def include(app, path, name, text):
        text[0] = mended(text[0], ROOT / path, pathlib.Path(app.env.doc2path(name)))

    app.connect("source-read", read)
    app.connect("include-read", include)
    app.connect("missing-reference", resolve)
    app.connect("doctree-resolved", add_links)
