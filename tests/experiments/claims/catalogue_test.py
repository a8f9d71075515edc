"""The catalogue: made of data, whole, and as it stands in docs/methods.md."""

import dataclasses
import functools
import json
import pathlib
import re

import pytest

import robustjax
from experiments.claims import __main__ as claims
from experiments.claims import _catalogue, _frame, _verdicts
from experiments.claims._verified import VERIFIED, Verified

ROOT = pathlib.Path(__file__).parents[3]
ENTRY = Verified("Area", "C 2019", None, ("metrics.auroc",), "experiments.ood", "It counts.")


def test_methods_md_is_what_the_records_say():
    made, stands = claims.catalogue(), (ROOT / "docs" / "methods.md").read_text()
    message = "run python -m experiments.claims --catalogue docs/methods.md"
    assert made.splitlines() == stands.splitlines(), message


@pytest.mark.parametrize("entry", VERIFIED, ids=lambda entry: entry.method)
def test_what_tests_verify_is_there(entry):
    functions = [functools.reduce(getattr, name.split("."), robustjax) for name in entry.functions]
    for arxiv in [entry.arxiv or "", *re.findall(r"arXiv:(\d{4}\.\d{4,5})", entry.paper)]:
        assert any(arxiv in (function.__doc__ or "") for function in functions), arxiv
    text = (ROOT / entry.test).read_text()
    assert any(name.rpartition(".")[2] in text for name in entry.functions)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "claims").glob("*.json")), ids=lambda path: path.stem)
def test_a_record_has_the_settings_and_the_bars_of_its_study(path):
    record = json.loads(path.read_text())
    study = claims.study_of(record["study"])
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in record["settings"].items()}
    config = dataclasses.replace(study.config, **tuples)
    assert record["settings"].keys() == {field.name for field in dataclasses.fields(config)} - {*_frame.SAME}
    assert [claim["method"] for claim in record["claims"]] == [claim.method for claim in study.claims]
    for claim, found in zip(study.claims, record["claims"], strict=True):
        assert [bar["bar"] for bar in found["bars"]] == [str(bar) for bar in claim.bars_of(config)]
    assert set(_frame.different(study, config)) == set(record["different"])


def bar(measured, verdict):
    return {"bar": "", "measured": measured, "verdict": verdict, "slack": {"mean": 0.0, "sd": 0.0}}


def record_of(verdict, *bars, seeds=3, **different):
    claims = [{"method": "New", "arxiv": "2001.00001", "verdict": verdict, "bars": list(bars)}]
    return {"study": "toy", "seeds": seeds, "claims": claims, "different": different}


def toy(method="New"):
    paper = "A, B 2020; before: C 2019, arXiv:1901.00001"
    claim = _frame.Claim(method, paper, "2001.00001", ("losses.trades", "attacks.pgd"), "It gains.", ())
    return {"toy": _frame.Study(lambda config, seed: {}, None, None, [], (claim,))}


def test_a_row_shows_the_first_bar_and_every_bar_that_does_not_appear():
    records = [
        record_of("unclear", bar("a 1 > b 2", "appears"), bar("c", "unclear"), bar("d", "appears"), sigma=0.5),
        record_of("appears", bar("a 3 > b 2", "appears"), bar("c", "appears"), bar("d", "appears")),
        {"study": "another", "claims": []},
    ]
    text = _catalogue.catalogue(toy(), records, [ENTRY])
    assert _verdicts.WORDS in text
    first, second = (line for line in text.splitlines() if line.startswith(("| New", "| Area")))
    assert first == (
        "| New | A, B 2020, [2001.00001](https://arxiv.org/abs/2001.00001); before: C 2019, "
        "[1901.00001](https://arxiv.org/abs/1901.00001) | `losses.trades`, `attacks.pgd` | "
        "`python -m experiments.claims.toy` | It gains. | **appears** (3 seeds): a 3 > b 2; 2 more bars appear<br>"
        "**unclear** (sigma 0.5, 3 seeds): a 1 > b 2 appears; c; 1 more bar appears |"
    )
    assert second == (
        "| Area | C 2019 (not on arXiv) | `metrics.auroc` | `python -m experiments.ood` | It counts. | "
        "Verified by `tests/metrics/detection_test.py` |"
    )
    assert text.index("## losses") < text.index("| New") < text.index("## metrics") < text.index("| Area")


def test_what_is_not_recorded_says_so_and_a_method_has_one_row():
    assert "| not recorded; see [measured](measured.md) |" in _catalogue.catalogue(toy(), [], [])
    with pytest.raises(ValueError, match="the method 'Area' has two rows"):
        _catalogue.catalogue(toy("Area"), [], [ENTRY])
