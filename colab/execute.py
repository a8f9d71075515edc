"""Executes the notebooks of this folder from clean kernels, and stores them as executed: ``make notebooks``."""

from __future__ import annotations

import base64
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

COLAB = pathlib.Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}
SECONDS_OF_ALL_CELLS = 600


def executed(notebook: Any, folder: pathlib.Path) -> Any:
    """The notebook after all its cells ran in a kernel of the present Python, in an empty folder of ``folder``.

    Raises:
      RuntimeError: a cell failed, or the notebook left files behind.
    """
    import nbformat

    kernel = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
    kernel |= {key: METADATA["kernelspec"][key] for key in ("display_name", "language")}
    environment = {
        "PYTHONPATH": str(COLAB.parent),
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_PATH": str(folder),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
    }
    (folder / "kernels" / "python3").mkdir(parents=True)
    (folder / "kernels" / "python3" / "kernel.json").write_text(json.dumps(kernel))
    path = folder / "empty" / "notebook.ipynb"
    path.parent.mkdir()
    nbformat.write(notebook, path)
    main = "import nbclient.cli; nbclient.cli.main()"
    arguments = [sys.executable, "-c", main, str(path), "--inplace", f"--timeout={SECONDS_OF_ALL_CELLS}"]
    done = subprocess.run(arguments, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    if left := [file.name for file in path.parent.iterdir() if file != path]:
        raise RuntimeError(f"the notebook left {', '.join(left)} in its folder.")
    return nbformat.read(path, as_version=4)


def cleaned(notebook: Any) -> Any:
    """The notebook without what differs from run to run: standard error, seconds, temporary folders, metadata."""
    import nbformat

    cells = []
    for cell in notebook.cells:
        cell = nbformat.from_dict({**cell, "metadata": {}})
        if cell.cell_type == "code":
            kept = [output for output in cell.outputs if output.get("name") != "stderr"]
            cell.outputs = [nbformat.from_dict(_without_run(output)) for output in _joined(kept)]
        cells.append(cell)
    return nbformat.v4.new_notebook(cells=cells, metadata=METADATA)


def headline(notebook: Any) -> dict[str, float]:
    """The numbers that the last code cell, ``headline``, prints: a name, two spaces or more, and a number a line."""
    (cell,) = (cell for cell in notebook.cells if cell.id == "headline")
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    return {name: float(number) for name, number in re.findall(r"^(\S.*?) {2,}(-?[\d.]+)$", text, re.MULTILINE)}


def _joined(outputs: list[Any]) -> list[Any]:
    """Outputs in which what was printed, also by Rich, stands together, in however many pieces it came."""
    joined: list[Any] = []
    for output in outputs:
        if output.get("data", {}).get("text/html", "").endswith("</pre>\n"):
            text = re.sub(r"\x1b\[[\d;]*m", "", output["data"]["text/plain"])
            output = {"output_type": "stream", "name": "stdout", "text": re.sub(r" +$", "", text, flags=re.MULTILINE)}
        if joined and output["output_type"] == joined[-1]["output_type"] == "stream":
            joined[-1] = {**joined[-1], "text": joined[-1]["text"] + output["text"]}
        else:
            joined.append(output)
    return joined


def _without_run(output: Any) -> dict[str, Any]:
    output = json.loads(json.dumps(output))
    if "text" in output:
        output["text"] = _plain(output["text"])
    for kind, value in output.get("data", {}).items():
        if kind.startswith("text/"):
            output["data"][kind] = _plain(value)
        elif kind == "image/png":
            output["data"][kind] = _in_few_colours(value)
    return output


def _in_few_colours(png: str) -> str:
    """The picture with 128 colours, which no eye tells from the original, and a third of the bytes."""
    from PIL import Image

    picture, file = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    picture.quantize(128, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _plain(text: str) -> str:
    """Text without the folder of a run, and without seconds: those of a line, and a column at the right of a table."""
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+/", "results/", text)
    text = re.sub(r"^.*: seed \d+ took [\d.,]+ s\.\n", "", text, flags=re.MULTILINE)
    text = re.sub(r", [\d.,]+ s$", "", text, flags=re.MULTILINE)
    if re.search(r" seconds$", text, re.MULTILINE):
        text = re.sub(r" {2,}(?:seconds|[\d.,]+)$", "", text, flags=re.MULTILINE)
    return re.sub(r"^\|.*\| seconds \|$(?:\n\|.*\|$)*", _without_last_column, text, flags=re.MULTILINE)


def _without_last_column(table: re.Match[str]) -> str:
    return re.sub(r"\|[^|\n]*\|$", "|", table[0], flags=re.MULTILINE)


def main(names: list[str]) -> None:
    """Executes and stores the notebooks of these names, or all."""
    import nbformat

    for path in sorted(COLAB.glob("*.ipynb")):
        if not names or path.stem in names:
            with tempfile.TemporaryDirectory() as folder:
                notebook = executed(nbformat.read(path, as_version=4), pathlib.Path(folder))
            nbformat.write(cleaned(notebook), path)


if __name__ == "__main__":
    main(sys.argv[1:])
