"""A Markdown report as one HTML file: pictures inside, for a phone, a wide screen and paper, light and dark."""

from __future__ import annotations

import base64
import html

from etils import epath

STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --soft: #f6f8fa; --text: #1f2328; --back: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3d444d; --soft: #151b23; --text: #e6edf3; --back: #0d1117; }
  img { background: #ffffff; border-radius: 6px; }
}
body { margin: 0 auto; padding: 1.2rem; max-width: 46rem; color: var(--text); background: var(--back);
       font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { background: var(--soft); } td:not(:first-child) { font-variant-numeric: tabular-nums; }
img { display: block; max-width: 100%; height: auto; margin: 1rem auto; }
code { background: var(--soft); padding: .1em .3em; border-radius: 4px; }
@media (max-width: 30rem) {
  body { padding: .8rem; } table { font-size: .82rem; line-height: 1.4; } th, td { padding: .3rem .35rem; }
}
@media print { body { max-width: none; font-size: 11pt; } table, img { break-inside: avoid; } }
"""


def page(markdown: str, folder: epath.Path) -> str:
    """The page of a report whose pictures are PNG files in ``folder``."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    for child in (child for token in tokens for child in token.children or ()):
        if child.type == "image" and str(child.attrs["src"]).endswith(".png"):
            content = base64.b64encode((folder / str(child.attrs["src"])).read_bytes()).decode()
            child.attrs["src"] = f"data:image/png;base64,{content}"
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    title = html.escape(markdown.splitlines()[0].lstrip("# "))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )
