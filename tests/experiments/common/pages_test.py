"""A report as one page: pictures inside, tables that scroll, text that is text."""

import base64
import html.parser

from etils import epath

from experiments.common import pages

REPORT = """# Is <b>this</b> one safe?

A sentence, 3 < 4.

## Table

| detector | AUROC |
|---|---|
| energy | 0.9 |

![roc](figures/roc.png)
"""


def test_a_page_needs_no_other_file(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "roc.png").write_bytes(b"a picture")
    page = pages.page(REPORT, epath.Path(tmp_path))
    seen = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            seen.append((tag, dict(attrs)))

    Reader().feed(page)
    tags = dict(seen)
    assert tags["img"]["src"] == "data:image/png;base64," + base64.b64encode(b"a picture").decode()
    assert tags["img"]["alt"] == "roc"
    assert not any("href" in attributes or tag in ("script", "link", "b") for tag, attributes in seen)
    assert "width=device-width" in tags["meta"]["content"]
    assert seen.index(("div", {"class": "wide"})) + 1 == seen.index(("table", {}))
    assert "A sentence, 3 &lt; 4." in page
    assert "<title>Is &lt;b&gt;this&lt;/b&gt; one safe?</title>" in page
