"""Notebooks run from a clean kernel, as a reader would run them."""

import ast
import json
import os
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


def read(path):
    import nbformat

    return nbformat.read(path, as_version=4)


def execute(notebook, folder: pathlib.Path):
    """Runs all cells with the present Python in an empty folder; a cell that fails raises."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
        "env": {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / "ipython"), **cache},
    }
    (folder / "kernels" / "present").mkdir(parents=True)
    (folder / "kernels" / "present" / "kernel.json").write_text(json.dumps(spec))
    (folder / "empty").mkdir()
    specs = KernelSpecManager(kernel_dirs=[str(folder / "kernels")])
    manager = AsyncKernelManager(kernel_name="present", kernel_spec_manager=specs)
    resources = {"metadata": {"path": str(folder / "empty")}}
    return NotebookClient(notebook, km=manager, timeout=240, resources=resources).execute()


def text_of(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_clean(path):
    import nbformat

    notebook = read(path)
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert '%pip install -q "robustjax @ git+https://github.com/robustjax/robustjax"' in first.source


def test_certify(tmp_path, monkeypatch):
    from nbformat.v4 import new_code_cell

    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    notebook = read(ROOT / "colab" / "certify.ipynb")
    final = """
        "certificates": {s: [c.label.tolist(), c.radius.tolist(), c.abstained.tolist()] for s, c in certificates.items()},
        "acr": {s: metrics.average_certified_radius(c, labels) for s, c in certificates.items()},
        "clean": {s: float((logits_fns[s](images).argmax(-1) == labels).mean()) for s in sigmas},
        "same": bool(np.array_equal(again.radius, certificates[0.25].radius)),
        "ratio": ratio.tolist(), "pair": len(pair), "alphas": metrics.average_certified_radius(cert, labels),
    """
    notebook.cells.append(new_code_cell(f"print({{{final}}})"))
    done = execute(notebook, tmp_path)
    if folder := os.environ.get("ROBUSTJAX_TEST_NOTEBOOKS"):
        import nbformat

        nbformat.write(done, pathlib.Path(folder) / "certify.ipynb")
    found = ast.literal_eval(text_of(done.cells[-1]))
    for sigma, (label, radius, abstained) in found["certificates"].items():
        assert len(label) == len(radius) == 60
        assert [(c == -1, r == 0) for c, r in zip(label, radius)] == [(a, a) for a in abstained]
        assert max(radius) <= 3.1987 * sigma  # of 10,000 draws that all agree
        assert found["clean"][sigma] > 0.9
    assert 0.45 < found["acr"][0.25] < 0.75
    assert 0.55 < found["acr"][0.5] < 1.1
    assert found["same"]
    assert found["alphas"] < found["acr"][0.25]
    assert len(found["ratio"]) > 0.7 * found["pair"]
    assert 0.8 < sorted(found["ratio"])[len(found["ratio"]) // 2] <= max(found["ratio"]) <= 1
    pictures = [
        output.data for cell in done.cells if cell.cell_type == "code" for output in cell.outputs if "data" in output
    ]
    assert ["image/png" in data for data in pictures] == [True, True]
    assert not list((tmp_path / "empty").iterdir())
