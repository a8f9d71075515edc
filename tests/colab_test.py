"""Notebooks run from a clean kernel, as a reader would run them."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell

ROOT = pathlib.Path(__file__).parents[1]


def execute(notebook, folder: pathlib.Path):
    """Runs all cells in a kernel of the present Python, in an empty folder, in a process of its own."""
    kernel = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
    }
    environment = {
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_PATH": str(folder),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    (folder / "kernels" / "python3").mkdir(parents=True)
    (folder / "kernels" / "python3" / "kernel.json").write_text(json.dumps(kernel))
    path = folder / "empty" / "notebook.ipynb"
    path.parent.mkdir()
    nbformat.write(notebook, path)
    main = "import nbclient.cli; nbclient.cli.main()"
    arguments = [sys.executable, "-c", main, str(path), "--inplace", "--timeout=240"]
    done = subprocess.run(arguments, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(path.parent.iterdir()) == [path]
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", sorted((ROOT / "colab").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_stored_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [(cell.outputs, cell.execution_count) for cell in code] == [([], None)] * len(code)
    assert '%pip install -q "robustjax @ git+https://github.com/robustjax/robustjax"' in code[0].source


def test_certify(tmp_path):
    notebook = nbformat.read(ROOT / "colab" / "certify.ipynb", as_version=4)
    values = """{
        "certificates": {s: [field.tolist() for field in cert] for s, cert in certificates.items()},
        "clean": {s: float((logits_fns[s](images).argmax(-1) == labels).mean()) for s in sigmas},
        "acr": {s: metrics.average_certified_radius(certificates[s], labels) for s in sigmas},
        "same": same, "ratio": ratio.tolist(), "pair": len(pair),
    }"""
    notebook.cells.append(new_code_cell(f"print({values})"))
    cells = execute(notebook, tmp_path).cells
    if folder := os.environ.get("ROBUSTJAX_TEST_NOTEBOOKS"):  # to look at
        nbformat.write(nbformat.v4.new_notebook(cells=cells[:-1]), pathlib.Path(folder) / "certify.ipynb")
    found = ast.literal_eval("".join(output.text for output in cells[-1].outputs))
    for sigma, (label, radius, probability, abstained) in found["certificates"].items():
        assert len(label) == 60
        assert [y == -1 for y in label] == [r == 0 for r in radius] == [p <= 0.5 for p in probability] == abstained
        assert max(radius) <= 3.1987 * sigma  # 10,000 draws that all agree
        assert found["clean"][sigma] >= 0.9
    assert 0.45 < found["acr"][0.25] < 0.6
    assert 0.33 < found["acr"][0.5] < 0.5
    assert found["same"]
    ratio = sorted(found["ratio"])
    assert len(ratio) > 0.9 * found["pair"]
    assert 0.9 < ratio[len(ratio) // 2] <= ratio[-1] <= 1
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
