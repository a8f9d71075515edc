"""What every study keeps, at its tiny settings: a study joins by existing."""

import csv
import functools
import json
import re

import numpy as np
import pytest
import tyro
from rich.console import Console

import robustjax
from experiments import adversarial, ood
from experiments.claims import __main__ as claims
from experiments.claims import _frame, mixing, prototypes
from experiments.common import files, runtimes, sanity
from robustjax import attacks, losses, plotting

ONE = runtimes.Runtime(mesh="data=1")  # programs for one device compile sooner


@pytest.fixture
def quick(monkeypatch):
    """Runs of products go without their figures and checks, which the products' own tests hold."""
    for product in (adversarial, ood):
        monkeypatch.setattr(product._report, "figures_of", lambda *_, **settings: {})
    monkeypatch.setattr(plotting, "certified_accuracy_curve", lambda *_, **settings: None)
    monkeypatch.setattr(files, "figure_bytes", lambda *_: b"")
    monkeypatch.setattr(adversarial._attack, "steps_of", lambda *_: {})
    monkeypatch.setattr(sanity, "check", lambda *_: [])
    monkeypatch.setattr(prototypes, "ATTACK_LOSSES", ("margin",))  # one program less to compile


@pytest.fixture
def shared(monkeypatch):
    """One program for many, which the slow test below has all: objectives are made, and cross-entropy is minimised.

    Objectives, FAB and the attacks of mixtures have tests of their own.
    """
    for module, name in (
        (losses, "conformal_training"),
        (losses, "mixing_training"),
        (losses.adversarial, "adversarial_training"),
        (losses.smoothing, "gaussian_augmentation"),
    ):
        make = getattr(module, name)
        monkeypatch.setattr(module, name, lambda make=make, **settings: make(**settings) and losses.standard())
    objective_of, attacks_of = prototypes.objective_of, mixing.attacks_of
    monkeypatch.setattr(
        prototypes, "objective_of", lambda config, loss: objective_of(config, loss) and objective_of(config, "margin")
    )
    monkeypatch.setattr(mixing, "attacks_of", lambda *args: dict.fromkeys(found := attacks_of(*args), found["ce"]))
    monkeypatch.setattr(mixing, "_blind", lambda mixture: mixture)
    far = lambda key, logits_fn, x, labels: (x, np.full(len(x), 9.0))
    monkeypatch.setattr(attacks, "fab", lambda **settings: far)


def measured(study, seed, folder):
    """The numbers and arrays of a seed, without what was timed."""
    place = _frame.Place(folder, ONE, Console(quiet=True), runtimes.Watch([], None))
    found = study.measure(study.tiny, seed, *((place,) if study.in_folder else ()))
    return {(arm, name): v for arm, of in found.items() for name, v in of.items() if "seconds" not in name}


@pytest.mark.parametrize("name", claims.names())
def test_contract(name, tmp_path, quick, shared, monkeypatch):
    study = claims.study_of(name)
    assert study.name == name
    run = functools.partial(_frame.run, config=study.tiny, runtime=ONE)
    first = run(study._replace(figure=lambda *_: {}), repeat=_frame.Repeat(seeds=1, results_dir=str(tmp_path)))
    folder = tmp_path / "claims" / name / "tiny"
    monkeypatch.undo()
    monkeypatch.setattr(prototypes, "SHOWN", 1)  # sixty panels take seconds to draw

    # The report of two seeds that are there.
    arrays = files.read_arrays(folder / "seeds" / "0.npz") | {f"{_frame._SEPARATOR}seed": np.int64(1)}
    files.write_arrays(folder / "seeds" / "1.npz", arrays)
    again = study._replace(measure=lambda *_: pytest.fail("a seed that was there is measured again"))
    record = run(again, repeat=_frame.Repeat(seeds=2, results_dir=str(tmp_path)))
    assert json.loads((folder / "metrics.json").read_text()) == record
    assert record["seeds"] == 2
    assert json.loads((folder / "config.json").read_text())["run"] == name
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [(row["arm"], row["seed"]) for row in rows] == [(arm, seed) for arm in record["numbers"] for seed in "01"]
    report = (folder / "report.md").read_text()
    figures = list((folder / "figures").iterdir())
    assert figures
    assert all(f"(figures/{figure.name})" in report and figure.stat().st_size > 2000 for figure in figures)

    shown = {column.number for column in study.columns(study.tiny)}
    for arm, numbers in record["numbers"].items():
        for number in shown & numbers.keys():
            assert np.isfinite(numbers[number]["values"]).all(), (arm, number)
            assert numbers[number]["values"] == 2 * first["numbers"][arm][number]["values"]
    assert shown <= {number for numbers in record["numbers"].values() for number in numbers}

    with pytest.raises(ValueError, match=r"belongs to a run with another config \("):
        _frame.run(study, study.config, _frame.Repeat(seeds=1, results_dir=str(tmp_path), name="tiny"))


@pytest.mark.slow
@pytest.mark.parametrize("name", claims.names())
def test_a_seed_gives_the_same_numbers_in_any_folder_and_another_seed_gives_others(name, tmp_path, quick):
    study = claims.study_of(name)
    first, resumed, again, other = (
        measured(study, seed, tmp_path / folder)
        for seed, folder in ((0, "first/0"), (0, "first/0"), (0, "again/0"), (1, "other/1"))
    )
    for found in (resumed, again):
        assert found.keys() == first.keys()
        for key, value in first.items():
            np.testing.assert_array_equal(found[key], value, err_msg=str(key))
    assert any(not np.array_equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", claims.names())
def test_claims_name_what_there_is(name):
    study = claims.study_of(name)
    assert study.claims
    assert any(claim.bars_of(study.config) for claim in study.claims)
    for claim in study.claims:
        functions = [functools.reduce(getattr, f.split("."), robustjax) for f in claim.functions]
        assert functions
        for arxiv in [claim.arxiv or "", *re.findall(r"arXiv:(\d{4}\.\d{4,5})", claim.paper)]:
            assert any(arxiv in (function.__doc__ or "") for function in functions), (claim.method, arxiv)
        for bar in claim.bars_of(study.config):
            assert bar.relation in (">", "<", ">=", "<=")
            assert bar.by >= 0
    assert tyro.cli(_frame.arguments(study), args=["--seeds", "7"]).repeat.seeds == 7
    assert tyro.cli(_frame.arguments(study), args=[]).config == study.config
