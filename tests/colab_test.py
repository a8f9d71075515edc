"""Notebooks run from a clean kernel, as a reader would run them."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]


def execute(notebook, folder: pathlib.Path):
    """Runs all cells in a kernel of the present Python, in an empty folder, in a process of its own."""
    import nbformat

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


CERTIFY = """{
    "certificates": {s: [field.tolist() for field in cert] for s, cert in certificates.items()},
    "clean": {s: float((logits_fns[s](images).argmax(-1) == labels).mean()) for s in sigmas},
    "acr": {s: metrics.average_certified_radius(certificates[s], labels) for s in sigmas},
    "same": same, "ratio": ratio.tolist(), "pair": len(pair),
}"""


def check_certify(found):
    for sigma, (label, radius, probability, abstained) in found["certificates"].items():
        assert len(label) == 40
        assert [y == -1 for y in label] == [r == 0 for r in radius] == [p <= 0.5 for p in probability] == abstained
        assert max(radius) <= 3.1987 * sigma  # 10,000 draws that all agree
        assert found["clean"][sigma] >= 0.9
    assert 0.45 < found["acr"][0.25] < 0.6
    assert 0.33 < found["acr"][0.5] < 0.5
    assert found["same"]
    ratio = sorted(found["ratio"])
    assert len(ratio) > 0.9 * found["pair"]
    assert 0.9 < ratio[len(ratio) // 2] <= ratio[-1] <= 1


OOD = """{
    "sizes": {name: part.image.shape[0] for name, part in parts.items()},
    "accuracy": float((known.logits.argmax(-1) == known_labels).mean()),
    "auroc": {
        name: [metrics.auroc(by_part["known 0-5"], by_part[part]) for part in shown[1:]]
        for name, by_part in (scores | own_scores).items()
    },
    "flagged": {
        name: [float((by_part[part] > np.quantile(by_part["validation"], 0.95)).mean()) for part in shown]
        for name, by_part in scores.items()
    },
    "margin": own_scores["margin"]["textures"].tolist(), "logits": outputs["textures"].logits.tolist(),
    "cosine": own_scores["cosine"]["textures"].tolist(), "features": outputs["textures"].features.tolist(),
    "train_features": outputs["train"].features.tolist(), "train_labels": parts["train"].label.tolist(),
    "calibration": [
        [measure(jax.nn.softmax(logits / divisor), known_labels) for divisor in (1.0, temperature)]
        for measure in (metrics.expected_calibration_error, metrics.negative_log_likelihood)
        for logits in (noisy["known 0-5"].logits, known.logits)
    ],
}"""


def check_ood(found):
    assert found["sizes"]["known 0-5"] == found["sizes"]["textures"] > found["sizes"]["held-out 6-9"] > 200
    assert found["accuracy"] >= 0.97
    for name, (near, far) in found["auroc"].items():
        assert (0.82 if name == "mahalanobis" else 0.9) < near < 1
        assert 0.95 < far <= 1
    for known, _, far in found["flagged"].values():
        assert 0.01 < known < 0.2
        assert far > 0.9
    logits = np.sort(found["logits"])
    np.testing.assert_allclose(found["margin"], logits[:, -2] - logits[:, -1], atol=1e-4)
    features, train_features = (
        rows / np.linalg.norm(rows, axis=1)[:, None]
        for rows in map(np.array, (found["features"], found["train_features"]))
    )
    means = np.stack([train_features[np.array(found["train_labels"]) == label].mean(0) for label in range(6)])
    nearest = (features @ (means / np.linalg.norm(means, axis=1)[:, None]).T).max(1)
    np.testing.assert_allclose(found["cosine"], -nearest, atol=1e-4)
    (noisy_error, clean_error), (noisy_nll, clean_nll) = found["calibration"][:2], found["calibration"][2:]
    for before, after in (noisy_error, noisy_nll, clean_error[::-1], clean_nll[::-1]):
        assert after < before


ATTACK = """{
    "clean": {name: float((logits_fn(images).argmax(-1) == labels).mean()) for name, logits_fn in logits_fns.items()},
    "left": {name: [found.clean_accuracy, *found.per_attack.values()] for name, found in evaluations.items()},
    "curves": {name: accuracies for name, (_, accuracies) in curves.items()},
    "own": own, "masked": masked_accuracy, "warned": [name for name, of in diagnoses.items() if of.warnings],
}"""


def check_attack(found):
    for name, left in found["left"].items():
        assert left[0] == pytest.approx(found["clean"][name])
        assert left == sorted(left, reverse=True)
        assert left[-1] <= min(found["own"][name]["PGD"], 1) + 0.02
        for attack in ("FGSM", "PGD"):
            curve = found["curves"][f"{name}, {attack}"]
            assert curve[0] == left[0]
            assert curve[-1] < 0.5 * curve[0]
            assert all(later <= earlier + 0.03 for earlier, later in zip(curve, curve[1:]))
        alone = [accuracy for attack, accuracy in found["own"][name].items() if attack != "worst_of both"]
        assert found["own"][name]["worst_of both"] <= min(alone) + 0.01
    assert found["clean"]["standard"] > 0.95
    assert found["clean"]["adversarial"] > 0.9
    assert found["left"]["standard"][-1] < 0.2 < 0.4 < found["left"]["adversarial"][-1]
    assert found["warned"] == ["rounded"]
    honest, rounded, scaled = (found["masked"][name] for name in ("standard", "rounded", "scaled"))
    assert rounded["PGD"] > honest["PGD"] + 0.4
    assert scaled["PGD"] > honest["PGD"] + 0.4
    assert scaled["PGD, DLR loss"] < honest["PGD"] + 0.1
    assert rounded["Square"] < 0.4
    assert scaled["Square"] < 0.4


OWN_MODEL = """{
    name: {
        "accuracy": of["calibration"]["accuracy"], "coverage": of["conformal"]["THR"]["coverage"],
        "clean": of["attack"]["clean_accuracy"], "left": list(of["attack"]["left_after"].values()),
        "certified": of["certify"]["certified_accuracy"], "warnings": of["attack"]["warnings"],
    }
    for name, of in numbers.items()
}"""


def check_own_model(found):
    assert {"Flax", "Equinox"} <= {*found}
    for of in found.values():
        assert of["accuracy"] > 0.95
        assert of["coverage"] > 0.8
        assert [of["clean"], *of["left"]] == sorted([of["clean"], *of["left"]], reverse=True)
        assert of["certified"] == sorted(of["certified"], reverse=True)
        assert not of["warnings"]
    if "PyTorch" in found:  # trained without noise
        assert found["PyTorch"]["certified"][1] < found["Flax"]["certified"][1] - 0.1


CHECKS = {
    "attack": (ATTACK, check_attack, 2),
    "certify": (CERTIFY, check_certify, 2),
    "ood": (OOD, check_ood, 3),
    "own_model": (OWN_MODEL, check_own_model, 3),
}
"""By notebook: what to read from its kernel, what must hold of that, and how many figures it draws."""

NOTEBOOKS = pytest.mark.parametrize("path", sorted((ROOT / "colab").glob("*.ipynb")), ids=lambda path: path.stem)


@NOTEBOOKS
def test_notebooks_are_stored_clean(path):
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if path.stem == "own_model":  # what an evaluation looks like is to be seen without running one
        assert sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs) == 3
        assert not re.search(r"/tmp|/home|/root|\\u001b|Traceback", json.dumps(notebook))
        for cell in code:
            cell.outputs, cell.execution_count = [], None
    assert [(cell.outputs, cell.execution_count) for cell in code] == [([], None)] * len(code)
    extra = "[experiments]" if path.stem == "own_model" else ""
    assert f'%pip install -q "robustjax{extra} @ git+https://github.com/robustjax/robustjax"' in code[0].source


@pytest.mark.slow
@NOTEBOOKS
def test_notebooks_run(path, tmp_path):
    import nbformat

    values, check, num_figures = CHECKS[path.stem]
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(f"print({values})"))
    cells = execute(notebook, tmp_path).cells
    if folder := os.environ.get("ROBUSTJAX_TEST_NOTEBOOKS"):  # to look at
        nbformat.write(nbformat.v4.new_notebook(cells=cells[:-1]), pathlib.Path(folder) / path.name)
    check(ast.literal_eval("".join(output.text for output in cells[-1].outputs)))
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == num_figures
