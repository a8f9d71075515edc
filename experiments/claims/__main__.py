"""Lists the studies of papers' claims, or measures some of them."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import pkgutil
from typing import Annotated, Any

import tyro

from .. import claims
from ..common import checks, command_line, files, runtimes, tables
from . import _catalogue, _frame, _records, _verified

RECORDS = pathlib.Path(__file__).parents[2] / "docs" / "claims"


def names() -> list[str]:
    """The studies, by the names of their modules."""
    return [module.name for module in pkgutil.iter_modules(claims.__path__) if not module.name.startswith("_")]


def study_of(name: str) -> _frame.Study:
    """The study of that name.

    Raises:
      ValueError: there is none.
    """
    if name not in names():
        hint = " Separate names by spaces." if "," in name else ""
        raise ValueError(f"names must be among {', '.join(names())}, got {name!r}.{hint}")
    return importlib.import_module(f"{claims.__name__}.{name}").STUDY


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure; a study's own settings are flags of ``python -m experiments.claims.NAME``."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Studies; none: list them."""
    all: bool = False
    """Measure every study."""
    tiny: bool = False
    """Use the settings of the tests: seconds a study, and no result to rely on."""
    seeds: int | None = None
    """Measure seeds 0 to N - 1; None: as each study says."""
    results_dir: str = "results"
    """Where run folders go."""
    overwrite: bool = False
    """Delete runs that are in these folders and start anew."""
    record: str | None = None
    """Also write the results to this folder, such as docs/claims."""
    catalogue: str | None = None
    """Only write the catalogue of methods to this file, such as docs/methods.md."""

    def __post_init__(self):
        checks.at_least(1, self, "seeds")
        if self.names and (self.all or self.catalogue is not None):
            flag = "--all" if self.all else "--catalogue"
            raise ValueError(f"names must be left out with {flag}, got {', '.join(self.names)}.")
        if self.tiny and self.record is not None:
            raise ValueError(f"record must be left out with --tiny, whose numbers mean nothing, got {self.record}.")
        if not (self.names or self.all):
            given = [f"--{flag}" for flag in ("tiny", "record", "seeds", "overwrite") if getattr(self, flag)]
            if given:
                raise ValueError(f"names must name a study, or pass --all, with {', '.join(given)}.")


def listed() -> tables.Table:
    """The studies with their papers, seeds, and the minutes of the recorded run."""
    rows = []
    for name in names():
        study, path = study_of(name), RECORDS / f"{name}.json"
        papers = dict.fromkeys(claim.arxiv or claim.paper for claim in study.claims)
        minutes = f"{_records.read(path)['seconds'] / 60:.1f}" if path.exists() else "-"
        rows.append([name, ", ".join(papers), str(study.seeds), minutes])
    return tables.Table("Studies", ["name", "papers", "seeds", "minutes"], rows)


def catalogue() -> str:
    """The catalogue of methods, of all studies and of the records in :data:`RECORDS`."""
    records = [_records.read(path) for path in sorted(RECORDS.glob("*.json"))]
    return _catalogue.catalogue({name: study_of(name) for name in names()}, records, _verified.VERIFIED)


def run(arguments: Arguments) -> list[dict[str, Any]]:
    """Measures the studies that are named, or lists all.

    Returns:
      The record of each; none, where nothing is measured.
    """
    if arguments.catalogue is not None:
        files.write_whole(arguments.catalogue, catalogue())
        return []
    if not arguments.all and not arguments.names:
        console = runtimes.console()
        tables.show(console, listed())
        some = command_line.as_called("python -m experiments.claims NAME ...")
        console.print(f"Measure some: {some}; all: --all.", highlight=False)
        return []
    found = []
    for study in [study_of(name) for name in dict.fromkeys(arguments.names or names())]:
        settings = {name: getattr(arguments, name) for name in ("results_dir", "overwrite", "record")}
        repeat = _frame.Repeat(seeds=arguments.seeds or study.seeds, **settings)
        found.append(_frame.run(study, study.tiny if arguments.tiny else study.config, repeat))
    return found


if __name__ == "__main__":
    fields = [("arguments", tyro.conf.OmitArgPrefixes[Arguments])]
    command_line.call(dataclasses.make_dataclass("Parsed", fields), run, claims.__doc__)
