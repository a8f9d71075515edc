"""What every study keeps, at its tiny settings: a study joins by existing."""

import csv
import functools
import json
import os
import re

import numpy as np
import pytest
import tyro
from rich.console import Console

import robustjax
from experiments.claims import __main__ as claims
from experiments.claims import _frame
from experiments.common import files, runtimes

ONE = runtimes.Runtime(mesh="data=1")  # programs for one device compile sooner


def quick(study):
    """The study without the figures of a product's runs, which the product's own tests hold."""

    def measure(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "figure_bytes", lambda *_: b"")
            return study.measure(*arguments)

    return study._replace(measure=measure)


def measured(study, seed, folder):
    """A seed, measured anew, or resumed from what a long study left in its folder."""
    if not study.in_folder:
        return study.measure(study.tiny, seed)
    place = _frame.Place(folder, ONE, Console(quiet=True), runtimes.Watch([], None))
    return study.measure(study.tiny, seed, place)


def numbers_of(seed):
    """The numbers and arrays of a seed, without what was timed."""
    return {(arm, name): v for arm, of in seed.items() for name, v in of.items() if "seconds" not in name}


@pytest.mark.parametrize("name", claims.names())
def test_contract(name, tmp_path):
    study = quick(claims.study_of(name))
    assert study.name == name
    run = functools.partial(_frame.run, study, study.tiny, runtime=ONE)
    first = run(_frame.Repeat(seeds=1, results_dir=str(tmp_path)))
    folder = tmp_path / "claims" / name / "tiny"
    before = os.stat(folder / "seeds" / "0.npz").st_mtime_ns

    record = run(_frame.Repeat(seeds=2, results_dir=str(tmp_path), record=str(tmp_path / "records")))
    assert os.stat(folder / "seeds" / "0.npz").st_mtime_ns == before
    assert json.loads((folder / "metrics.json").read_text()) == record
    assert record == json.loads((tmp_path / "records" / f"{name}-tiny.json").read_text())
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
            assert numbers[number]["values"][0] == first["numbers"][arm][number]["values"][0]
    assert shown <= {number for numbers in record["numbers"].values() for number in numbers}

    # Each array has an axis of one seed.
    seeds = [numbers_of(_frame.read([folder / "seeds" / f"{seed}.npz"])[0]) for seed in range(2)]
    again = numbers_of(measured(study, 0, folder / "seed-0"))
    assert again.keys() == seeds[0].keys()
    for key, value in again.items():
        np.testing.assert_array_equal(seeds[0][key][0], value, err_msg=str(key))
    assert any(not np.array_equal(seeds[0][key], seeds[1][key]) for key in again)

    with pytest.raises(ValueError, match=r"belongs to a run with another config \("):
        _frame.run(study, study.config, _frame.Repeat(seeds=1, results_dir=str(tmp_path), name="tiny"))


@pytest.mark.slow
@pytest.mark.parametrize("name", claims.names())
def test_a_seed_gives_the_same_numbers_in_another_folder(name, tmp_path):
    study = claims.study_of(name)
    first, again = (numbers_of(measured(study, 0, tmp_path / folder)) for folder in ("first", "again"))
    assert first.keys() == again.keys()
    for key, value in first.items():
        np.testing.assert_array_equal(again[key], value, err_msg=str(key))


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
