"""The frame on a study that costs nothing: what it keeps, what it refuses, what it reports."""

import dataclasses
import importlib.util
import json
import pathlib
import sys
import types

import numpy as np
import pytest

from experiments.claims import __main__ as claims
from experiments.claims import _frame
from experiments.common import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings."""

    gain: float = 1.0
    data_dir: str | None = None


def measure(config, seed):
    noise = np.random.default_rng(seed).normal()
    return {
        "plain": {"accuracy": noise, "images": np.arange(3) + seed},
        "new": {"accuracy": noise + config.gain, "distance": np.inf, "images": np.arange(seed)},
    }


CLAIM = _frame.Claim(
    "New",
    "A, B 2020",
    None,
    ("losses.adversarial.trades",),
    "It gains.",
    (_frame.Bar("accuracy", "new", ">", "plain"),),
)
STUDY = _frame.Study(measure, Config(), Config(gain=-1.0), [_frame.Column("accuracy", "acc")], (CLAIM,))


def run(folder, study=STUDY, config=STUDY.config, **repeat):
    return _frame.run(study, config, _frame.Repeat(results_dir=str(folder), **repeat))


def folder_of(tmp_path, name="default"):
    return tmp_path / "claims" / "frame_test" / name


def test_numbers_verdicts_and_settings_are_recorded(tmp_path):
    record = run(tmp_path, record=str(tmp_path / "records"))
    noise = [np.random.default_rng(seed).normal() for seed in range(3)]
    plain = record["numbers"]["plain"]["accuracy"]
    assert plain["values"] == noise
    assert (plain["mean"], plain["sd"]) == pytest.approx((np.mean(noise), np.std(noise, ddof=1)), rel=1e-12)
    assert record["numbers"]["new"]["distance"] == {"mean": "inf", "sd": 0.0, "values": ["inf"] * 3}
    assert "images" not in record["numbers"]["plain"]
    (claim,) = record["claims"]
    assert (claim["method"], claim["verdict"]) == ("New", "appears")
    assert claim["bars"][0]["bar"] == "accuracy: new > plain"
    assert claim["bars"][0]["slack"]["mean"] == pytest.approx(1.0)
    assert (record["settings"], record["different"]) == ({"gain": 1.0}, {})
    assert json.loads((tmp_path / "records" / "frame_test.json").read_text()) == record
    report = (folder_of(tmp_path) / "report.md").read_text()
    assert claim["bars"][0]["measured"] == "accuracy: new 1.220 (0.113) > plain 0.220 (0.113)"
    assert "| accuracy: new 1.220 (0.113) > plain 0.220 (0.113) | appears | 1 (" in report
    assert "| gain | 1.0 |" in report
    other = run(tmp_path, config=Config(gain=-1.5), record=str(tmp_path / "records"))
    assert (other["claims"][0]["verdict"], other["different"]) == ("does not appear", {"gain": -1.5})
    assert json.loads((tmp_path / "records" / "frame_test-gain=-1.5.json").read_text()) == other


def test_seeds_that_are_there_are_not_measured_again(tmp_path):
    seen = []
    study = STUDY._replace(measure=lambda config, seed: (seen.append(seed), measure(config, seed))[1])
    for seeds in (2, 1, 4):
        run(tmp_path, study, seeds=seeds)
    assert seen == [0, 1, 2, 3]
    run(tmp_path, study, seeds=1, config=Config(data_dir="elsewhere"), name="default")
    assert seen == [0, 1, 2, 3]
    assert run(tmp_path, study, seeds=1, config=Config(gain=2.0), name="default", overwrite=True)["seeds"] == 1
    assert seen == [0, 1, 2, 3, 0]


def test_seeds_of_other_code_are_named_and_not_recorded(tmp_path, monkeypatch, capsys):
    run(tmp_path, seeds=1)
    assert "other code" not in capsys.readouterr().out
    code = files.source_digest()
    monkeypatch.setattr(files, "source_digest", lambda: "changed")
    with pytest.raises(ValueError, match="measured seed 0 in .*; record needs seeds of one code: pass --overwrite"):
        run(tmp_path, seeds=2, record=str(tmp_path / "records"))
    record = run(tmp_path, seeds=2)
    assert "other code than today's measured seed 0 in" in capsys.readouterr().out
    assert record["code"] == f"{code}; changed"


def test_a_record_is_not_replaced_by_one_of_fewer_seeds(tmp_path):
    records = tmp_path / "records"
    run(tmp_path, record=str(records))
    with pytest.raises(ValueError, match=r"seeds must be at least 3, as in the record .*frame_test.json, got 2"):
        run(tmp_path, name="other", record=str(records), seeds=2)
    with pytest.raises(ValueError, match="record must be a folder, but .*frame_test.json is a file"):
        run(tmp_path, name="other", record=str(records / "frame_test.json"))
    assert not folder_of(tmp_path, "other").exists()  # refused before anything is measured
    assert run(tmp_path, record=str(records), seeds=4)["seeds"] == 4
    with pytest.raises(ValueError, match="record must be left out at the settings of the tests"):
        run(tmp_path, config=STUDY.tiny, record=str(records))
    run(tmp_path, config=Config(gain=2.0), name="x", record=str(records))
    with pytest.raises(ValueError, match="name must be another one, since .*frame_test-x.json is a record of other"):
        run(tmp_path / "other", config=Config(gain=3.0), name="x", record=str(records))
    (records / "frame_test.json").write_text("{}")
    with pytest.raises(ValueError, match="frame_test.json lacks study, seeds"):
        run(tmp_path, record=str(records))
    (records / "frame_test.json").write_text('{"study": ')
    with pytest.raises(ValueError, match="frame_test.json cannot be read .* delete it, and record again"):
        run(tmp_path, record=str(records))


@pytest.mark.parametrize(
    ("bars", "message"),
    [
        (_frame.Bar("accuracy", "new", ">", "plain"), "bars of 'New' must be a tuple of Bar"),
        ((_frame.Bar("accuracy", "new", "=>", "plain"),), "relation of the bar .* must be >, <, >= or <=, got '=>'"),
        (
            (_frame.Bar("accuracy", "new", ">", None),),
            "other of a bar on accuracy must be an arm or a number, got None",
        ),
        (
            (_frame.Bar("accuracy", "new", ">", np.nan),),
            "other of a bar on accuracy must be an arm or a number, got nan",
        ),
        (
            (_frame.Bar("accuracy", "new", ">", "plain", -0.1),),
            "by of the bar .* must be at least 0 and finite, got -0.1",
        ),
    ],
)
def test_bars_that_are_none_are_refused_before_anything_is_measured(bars, message, tmp_path):
    study = STUDY._replace(claims=(CLAIM._replace(bars=bars),), measure=lambda config, seed: pytest.fail("measured"))
    with pytest.raises(ValueError, match=message):
        run(tmp_path, study)


def test_a_figure_gets_arrays_with_seeds_first(tmp_path):
    seen = []
    run(tmp_path, STUDY._replace(figure=lambda config, results: seen.append(results) or {}))
    (results,) = seen
    np.testing.assert_array_equal(results["plain"]["images"], np.arange(3) + np.arange(3)[:, None])
    assert [len(images) for images in results["new"]["images"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"new": {"accuracy": np.nan}}, "frame_test, seed 0, arm 'new': the number 'accuracy' is NaN"),
        ({"plain": {"accuracy": 1.0}}, "needs the number 'accuracy' of the arm 'new', which is not measured"),
        ({"new": {"accuracy": np.ones(2)}, "plain": {"accuracy": 1.0}}, "the number 'accuracy' of the arm 'new'"),
        ({"new": {"accuracy": "high"}}, "arm 'new': 'accuracy' must be a number or an array of numbers, got 'high'"),
        ({"new": {"accuracy": None}}, "'accuracy' must be a number or an array of numbers, got None"),
        ({"new": 0.5}, r"measure must return \{arm: \{number: value\}\}, got {'new': 0.5}"),
        (None, r"seed 0: measure must return \{arm: \{number: value\}\}, got None"),
    ],
)
def test_what_is_no_measurement_is_refused(numbers, message, tmp_path):
    seen = []
    with pytest.raises(ValueError, match=message):
        run(tmp_path, STUDY._replace(measure=lambda config, seed: (seen.append(seed), numbers)[1]))
    assert seen == [0]  # after the first seed, not the last
    assert not (folder_of(tmp_path) / "seeds" / "0.npz").exists()


def test_settings_that_do_not_fit_the_data_leave_nothing(tmp_path):
    def measure(config, seed):
        raise ValueError("no such split")

    with pytest.raises(ValueError, match="no such split"):
        run(tmp_path, STUDY._replace(measure=measure))
    assert not folder_of(tmp_path).exists()


def test_damaged_seeds_and_other_settings_are_named(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"another config \(gain: 1.0 there, 2.0 now\)"):
        run(tmp_path, config=Config(gain=2.0), name="default")
    path = folder_of(tmp_path) / "seeds" / "1.npz"
    arrays = files.read_arrays(path)
    files.write_arrays(path, {name: array for name, array in arrays.items() if name != "new | accuracy"})
    with pytest.raises(ValueError, match=r"1.npz holds other numbers than .*0.npz; delete the wrong one"):
        run(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="1.npz is damaged .* delete it to make it again"):
        run(tmp_path)
    np.savez(path, x=np.zeros(3))
    with pytest.raises(ValueError, match="1.npz"):
        run(tmp_path)
    path.write_bytes((path.parent / "0.npz").read_bytes())
    with pytest.raises(ValueError, match="1.npz is a copy of seed 0; delete it to measure its own"):
        run(tmp_path)
    path.unlink()
    assert run(tmp_path)["seeds"] == 3


def test_a_long_study_has_a_place_for_each_seed_and_takes_a_runtime(tmp_path):
    places = []
    study = STUDY._replace(in_folder=True, measure=lambda c, seed, place: (places.append(place), measure(c, seed))[1])
    run(tmp_path, study, seeds=2)
    assert [place.folder for place in places] == [folder_of(tmp_path) / f"seed-{seed}" for seed in range(2)]
    names = lambda study: [field.name for field in dataclasses.fields(_frame.arguments(study))]
    assert names(STUDY) == ["config", "repeat"]
    assert names(study) == ["config", "repeat", "runtime"]


def test_names_of_folders_are_made_of_settings_and_stay_short():
    name = lambda config: pathlib.Path(_frame.folder_of(STUDY, config, _frame.Repeat())).name
    assert (name(Config()), name(STUDY.tiny), name(Config(gain=0.5, data_dir="x"))) == ("default", "tiny", "gain=0.5")
    long = STUDY._replace(config=Config(gain=0.0))
    text = _frame.folder_of(long, dataclasses.replace(long.config, gain="a/b " * 40), _frame.Repeat()).name
    assert len(text) < 81
    assert text.startswith("gain=a_b_a_b")
    with pytest.raises(ValueError, match="seeds must be an integer of at least 1, got 0"):
        _frame.Repeat(seeds=0)


def test_a_study_may_be_defined_in_a_script_or_a_notebook(monkeypatch):
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(Config, "__module__", "__main__")
    assert STUDY.name == "study"
    main.__file__ = "/folder/label_smoothing.py"
    assert STUDY.name == "label_smoothing"
    main.__spec__ = importlib.util.spec_from_loader("experiments.claims.halfspaces", None)
    assert STUDY.name == "halfspaces"


def test_studies_are_listed_and_unknown_ones_named(capsys):
    assert claims.run(claims.Arguments()) == []
    listed = capsys.readouterr().out
    assert all(name in listed for name in claims.names())
    assert "2302.14853" in listed
    with pytest.raises(ValueError, match="names must be among .*halfspaces.*, got 'halfspace'"):
        claims.run(claims.Arguments(names=("halfspace",)))
    with pytest.raises(ValueError, match="names must be left out with --all, got a"):
        claims.Arguments(names=("a",), all=True)
    with pytest.raises(ValueError, match="record must be left out with --tiny"):
        claims.Arguments(names=("a",), tiny=True, record="docs/claims")
    with pytest.raises(ValueError, match="names must name a study, or pass --all, with --tiny, --seeds"):
        claims.Arguments(tiny=True, seeds=2)
