"""The settings of the site: ``make docs`` builds it into ``results/docs``."""

import importlib.util
import pathlib
import shutil
import sys

DOCS = pathlib.Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

import links  # noqa: E402
import reference  # noqa: E402

import robustjax  # noqa: E402

project = "robustjax"
author = "The robustjax developers"
copyright = author  # noqa: A001
version = release = robustjax.__version__

extensions = ["myst_nb", "sphinx.ext.linkcode", "sphinx.ext.mathjax", "sphinx_copybutton", "sphinx_design"]
exclude_patterns = ["claims"]
smartquotes_action = "D"  # quotation marks stay as they are written

# Pages in Markdown. Notebooks are shown with the outputs that they are stored with.
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # outputs in Markdown may have tables

# The API reference. A reference in a docstring has to lead somewhere, but for those to other projects.
nitpicky = True
nitpick_ignore_regex = [("py:exc", r"[A-Z]\w+"), ("py:mod", "etils.epath")]
add_module_names = False
maximum_signature_line_length = 60
toc_object_entries_show_parents = "hide"
linkcode_resolve = links.source

html_theme = "sphinx_book_theme"
html_title = "robustjax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "repository_url": links.GITHUB,
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

# MathJax without a network, as one file, which draws its letters itself. The package's own extension copies 24 MB.
_mathjax = pathlib.Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent
html_static_path.append(str(_mathjax / "static" / "mathjax" / "tex-svg.js"))
mathjax_path = "tex-svg.js"


def setup(app):
    """Makes the pages that are not written by hand, and connects what makes links."""
    reference.write(DOCS / "api")
    for notebook in (DOCS.parent / "colab").glob("*.ipynb"):
        shutil.copy2(notebook, DOCS / "tutorials")
    links.connect(app)
