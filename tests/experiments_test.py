"""The experiments as a part of the package, in a checkout and in a wheel."""

import os
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

import robustjax.experiments
from experiments.common import files

ROOT = pathlib.Path(__file__).parents[1]


def test_experiments_are_found_in_the_checkout():
    from robustjax.experiments import evaluate

    assert robustjax.experiments.evaluate is evaluate
    assert pathlib.Path(evaluate.__file__) == ROOT / "experiments" / "evaluate" / "__init__.py"
    with pytest.raises(AttributeError, match=r"module 'robustjax\.experiments' has no attribute 'evaluation'"):
        robustjax.experiments.evaluation  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name"):
        exec("from robustjax.experiments import nothing")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """The contents of a wheel, as they are installed."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def test_a_wheel_has_the_experiments_in_the_package_alone(wheel):
    assert sorted(path.name.split("-")[0] for path in wheel.iterdir()) == ["robustjax", "robustjax"]
    wanted = {path.relative_to(ROOT / "robustjax") for path in (ROOT / "robustjax").rglob("*.py")}
    wanted |= {path.relative_to(ROOT) for path in (ROOT / "experiments").rglob("*.py")}
    assert {path.relative_to(wheel / "robustjax") for path in (wheel / "robustjax").rglob("*.py")} == wanted
    assert (wheel / "robustjax" / "py.typed").exists()
    kept, source = (folder / "experiments" / "__init__.py" for folder in (wheel / "robustjax", ROOT / "robustjax"))
    assert kept.read_text() == source.read_text()


def test_all_links_of_the_page_on_the_index_are_absolute(wheel):
    """The index shows the README, and knows nothing of the other files of the repository."""
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    links = re.findall(r"\]\(([^)]+)\)", metadata.read_text())
    assert len(links) > 20
    assert not [link for link in links if not link.startswith("https://")]


@pytest.mark.slow
def test_a_wheel_is_enough_to_run_the_commands(wheel, tmp_path):
    def call(*code):
        environment = os.environ | {"PYTHONPATH": str(wheel)}
        command = [sys.executable, "-c", *code]
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    run = "from robustjax import _command; _command.main()"
    flags = ["--num-epochs", "2", "--num-images", "4", "--num-estimation", "200", "--model", "mlp"]
    call(run, "smoothing", *flags)
    assert list(tmp_path.glob("results/smoothing/*/report.md"))
    assert "Measure some: robustjax claims NAME" in call(run, "claims")
    place, digest = call(
        "from robustjax.experiments.common import files; print(files.__file__, files.source_digest())"
    ).split()
    assert pathlib.Path(place) == wheel / "robustjax" / "experiments" / "common" / "files.py"
    assert digest == files.source_digest()
