"""The settings of the site: ``make docs`` builds it into ``results/docs``."""

import importlib
import importlib.util
import inspect
import os
import pathlib
import re
import shutil
import sys

from docutils import nodes
from sphinx.util.nodes import make_refnode

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

from docs import reference  # noqa: E402

import robustjax  # noqa: E402

project = "robustjax"
author = "The robustjax developers"
copyright = author  # noqa: A001
version = release = robustjax.__version__
GITHUB = "https://github.com/robustjax/robustjax"

extensions = ["myst_nb", "sphinx.ext.linkcode", "sphinx.ext.mathjax", "sphinx_copybutton", "sphinx_design"]
exclude_patterns = ["claims"]

# Pages and notebooks. Notebooks are shown with the outputs that they are stored with.
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"

# Every reference in a docstring has to lead somewhere, but for those to Python's own exceptions.
nitpicky = True
nitpick_ignore_regex = [("py:exc", r"[A-Z]\w+"), ("py:mod", "etils.epath")]
add_module_names = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 60
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_title = "robustjax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "repository_url": GITHUB,
    "use_repository_button": True,
    "use_download_button": False,
    "navbar_persistent": [],
    "navbar_end": [],
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "pygments_light_style": "a11y-light",
    "pygments_dark_style": "a11y-dark",
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# MathJax without a network: one file, which draws its letters itself.
_mathjax = pathlib.Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent
html_static_path.append(str(_mathjax / "static" / "mathjax" / "tex-svg.js"))
mathjax_path = "tex-svg.js"


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """Where the source of a public name is on GitHub."""
    value = importlib.import_module(info["module"])
    for name in info["fullname"].split("."):
        value = getattr(value, name, None)
    try:
        value = inspect.unwrap(value)
        lines, first = inspect.getsourcelines(value)
    except (TypeError, ValueError):  # a value, or a property
        return None
    path = pathlib.Path(inspect.getsourcefile(value)).relative_to(ROOT)
    return f"{GITHUB}/blob/main/{path}#L{first}-L{first + len(lines) - 1}"


def on_site(path: pathlib.Path, page: pathlib.Path) -> str:
    """Where a link that works in the repository leads to from a page of the site."""
    path = pathlib.Path(os.path.normpath(path))
    inside = path.relative_to(ROOT)
    own = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "howto/add_a_method.md", "README.md": "index.md"}
    if inside.parts[0] == "colab" and path.suffix == ".ipynb":
        path = DOCS / "tutorials" / path.name
    elif inside.parts[0] == "robustjax" and (DOCS / "api" / f"{'.'.join(inside.parts[1:])}.rst").exists():
        path = DOCS / "api" / f"{'.'.join(inside.parts[1:])}.rst"
    elif str(inside) in own:
        path = DOCS / own[str(inside)]
    elif path.suffix not in (".md", ".ipynb", ".png") or DOCS not in path.parents:
        return f"{GITHUB}/{'tree' if path.is_dir() else 'blob'}/main/{inside}"
    return os.path.relpath(path, page.parent)


def mend_links(text: str, source: pathlib.Path, page: pathlib.Path) -> str:
    """The text of a Markdown page with links that lead somewhere from the site, too."""

    def mended(match):
        path, anchor = match[1], match[2] or ""
        return f"]({on_site(source.parent / path, page)}{anchor})"

    return re.sub(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)", mended, text)


def public_place(objects, name: str, room: str) -> str | None:
    """The public name that is meant: in full, or as seen from a room; None for what is none."""
    known = [f"robustjax.{name}", f"{room}.{name}"]
    inside = sorted((full for full in objects if full.startswith(f"{room}.") and full.endswith(f".{name}")), key=len)
    return next((full for full in [name, *known, *inside] if full in objects), None)


def add_links(app, tree, page):
    """Makes links of the names in code type, ``losses.smoothing.macer`` or within a room ``macer``, where they are public."""
    objects = app.env.domains.python_domain.objects
    room = f"robustjax.{page.removeprefix('api/')}" if page.startswith("api/") else "nowhere"
    for node in list(tree.findall(nodes.literal)):
        name = node.astext().removesuffix("()")
        if isinstance(node.parent, nodes.reference) or not re.fullmatch(r"[A-Za-z_][\w.]*", name):
            continue
        place = public_place(objects, name, room) if "." in name or page.startswith("api/") else None
        if place and objects[place].docname != page or place and name != room.rpartition(".")[2]:
            target = objects[place]
            link = make_refnode(app.builder, page, target.docname, target.node_id, node.deepcopy(), place)
            node.replace_self(link)


def resolve(app, env, node, text):
    """A reference in a docstring to what stands in the room around its module."""
    room = ".".join((node.get("py:module") or "").split(".")[:2])
    place = public_place(env.domains.python_domain.objects, node["reftarget"], room)
    if node.get("refdomain") != "py" or not place:
        return None
    target = env.domains.python_domain.objects[place]
    return make_refnode(app.builder, node["refdoc"], target.docname, target.node_id, text, place)


def setup(app):
    """Makes the pages that are not written by hand, and connects what changes links."""
    reference.write(DOCS / "api")
    for notebook in (ROOT / "colab").glob("*.ipynb"):
        shutil.copy2(notebook, DOCS / "tutorials")

    def read(app, name, text):
        page = pathlib.Path(app.env.doc2path(name))
        if page.suffix in (".md", ".ipynb"):
            text[0] = mend_links(text[0], page, page)

    def include(app, path, name, text):
        text[0] = mend_links(text[0], ROOT / path, pathlib.Path(app.env.doc2path(name)))

    app.connect("source-read", read)
    app.connect("include-read", include)
    app.connect("missing-reference", resolve)
    app.connect("doctree-resolved", add_links)
