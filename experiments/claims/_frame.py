"""The frame of all studies: seeds, run folder, verdicts, report and record; a study only measures.

A study is a module of this package with a frozen dataclass ``Config``, a function ``measure(config, seed)`` and a
``STUDY``; it ends with ``_frame.main(STUDY, __doc__)``. Everything else happens here.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import re
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from etils import epath
from rich.console import Console

from robustjax import plotting

from ..common import checks, command_line, files, folders, runtimes, tables
from . import _records, _verdicts
from ._verdicts import Bar as Bar
from ._verdicts import Claim as Claim
from ._verdicts import among as among

Numbers = Mapping[str, Mapping[str, Any]]
"""What a seed gives: for each arm, numbers by name; arrays among them are kept for the figure only."""
Results = dict[str, dict[str, Any]]
"""The same for all seeds, which are axis 0; a list of arrays, where their shapes differ."""
SAME = ("data_dir",)
"""Settings that may differ when a run resumes, and that no record holds."""
_SEPARATOR = " | "


class Column(NamedTuple):
    """A number in the table.

    Attributes:
      number: its name.
      header: of the column.
      form: format of mean and standard deviation, or a function from the numbers of all seeds to a text.
    """

    number: str
    header: str
    form: str | Callable[[np.ndarray], str] = ".3f"


class Study(NamedTuple):
    """A measurement.

    Attributes:
      measure: ``(config, seed) -> Numbers``, a pure function: equal arguments give equal numbers, but for numbers with
        ``seconds`` in their name.
      config: the default settings.
      tiny: settings for tests, of seconds.
      numbers: columns of the table, or a function of the config that makes them; ``-`` where an arm lacks a number.
      claims: what is claimed, with its bars.
      figure: ``(config, results) -> Figure``, or a mapping from names to figures; None: bars of the first column.
      details: ``(config, results)`` to tables and sentences that are printed below the verdicts.
      in_folder: whether ``measure(config, seed, place)`` keeps files: checkpoints, or runs of a product.
      seeds: default number of seeds.
    """

    measure: Callable[..., Numbers]
    config: Any
    tiny: Any
    numbers: Sequence[Column] | Callable[[Any], Sequence[Column]]
    claims: tuple[Claim, ...]
    figure: Callable[[Any, Results], Any] | None = None
    details: Callable[[Any, Results], Sequence[tables.Table | str]] | None = None
    in_folder: bool = False
    seeds: int = 3

    @property
    def name(self) -> str:
        """Name of the module or script that defines its config; ``study`` in a notebook."""
        module = sys.modules[type(self.config).__module__]
        script = epath.Path(getattr(module, "__file__", None) or "study").stem
        return script if module.__spec__ is None else module.__spec__.name.rpartition(".")[2]

    def columns(self, config: Any) -> Sequence[Column]:
        """The columns of the table at these settings."""
        return self.numbers(config) if callable(self.numbers) else self.numbers


class Place(NamedTuple):
    """Where a seed of a long study is measured.

    With several processes, all call ``measure`` alike; only the numbers of the first are used.

    Attributes:
      folder: of the seed, for checkpoints and files; what a killed call left there is found again.
      runtime: devices and processes.
      console: prints, in the first process only.
      watch: takes the numbers of a step, for loggers and signals.
    """

    folder: epath.Path
    runtime: runtimes.Runtime
    console: Console
    watch: runtimes.Watch

    def log(self, message: str) -> None:
        """Prints a line."""
        self.console.print(message, soft_wrap=True, highlight=False, markup=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repeat:
    """How often a study is measured, and where its results go."""

    seeds: int = 3
    """Measure seeds 0 to N - 1; seeds that are in the run folder are not measured again."""
    results_dir: str = "results"
    """Where run folders go."""
    name: str | None = None
    """Name of the run folder; None: made of the settings that are not the default."""
    overwrite: bool = False
    """Delete the run that is in the folder and start anew."""
    record: str | None = None
    """Also write the results to this folder, as STUDY.json or STUDY-NAME.json."""
    figure_format: Literal["png", "pdf"] = "png"
    """Format of the figure."""

    def __post_init__(self):
        checks.at_least(1, self, "seeds")
        if self.record == "":
            raise ValueError("record must be a folder, such as docs/claims, got ''.")


def different(study: Study, config: Any) -> dict[str, Any]:
    """The settings that are not the default, without those of :data:`SAME`."""
    default = dataclasses.asdict(study.config)
    return {k: v for k, v in dataclasses.asdict(config).items() if v != default[k] and k not in SAME}


def folder_of(study: Study, config: Any, repeat: Repeat) -> epath.Path:
    """``RESULTS_DIR/claims/STUDY/NAME``."""
    text = ",".join(f"{key}={value}" for key, value in different(study, config).items())
    name = re.sub(r"[^\w.,=+-]+", "_", text) or "default"
    if len(name) > 80:
        name = f"{name[:70]}-{zlib.crc32(text.encode()):08x}"
    name = repeat.name if repeat.name is not None else "tiny" if config == study.tiny else name
    return folders.run_folder(f"{repeat.results_dir}/claims", study.name, name)


def run(study: Study, config: Any, repeat: Repeat, runtime: runtimes.Runtime = runtimes.HERE) -> dict[str, Any]:
    """Measures the seeds that are not in the run folder, and reports on all that were asked for.

    Args:
      study: what is measured.
      config: its settings.
      repeat: how often, and where results go.
      runtime: devices and processes, for a study that is ``in_folder``.

    Returns:
      The record, which is also the content of ``metrics.json``; empty in all processes but the first.

    Raises:
      ValueError: the folder belongs to a run with another config, a seed on disk is damaged, a number is NaN, a bar
        is none or has no number, or the record would replace one of more seeds or other settings, or is of mixed code.
    """
    stopwatch, console, folder = runtimes.Stopwatch(), runtimes.console(), folder_of(study, config, repeat)
    notes = {"version": importlib.metadata.version("robustjax"), "code": files.source_digest()}
    for claim in study.claims:
        _verdicts.check(claim, config)
    record_path = None
    if repeat.record is not None:
        if config == study.tiny:
            raise ValueError(f"record must be left out at the settings of the tests, got {repeat.record}.")
        name = f"{study.name}-{folder.name}" if different(study, config) else study.name
        record_path = _records.place(repeat.record, name, repeat.seeds, different(study, config))
    folders.open_run(folder, config, same=SAME, overwrite=repeat.overwrite, notes=notes)
    paths = [folder / "seeds" / f"{seed}.npz" for seed in range(repeat.seeds)]
    missing = [seed for seed, path in enumerate(paths) if not path.exists()]
    _check_code(study, repeat, folder, [path for path in paths if path.exists()])
    runtimes.barrier("seeds that are there")
    with runtimes.watching(runtime, folder, dataclasses.asdict(config)) as watch:
        for seed in missing:
            place = (Place(folder / f"seed-{seed}", runtime, console, watch),) if study.in_folder else ()
            began = time.perf_counter()
            try:
                numbers = study.measure(config, seed, *place)
            except ValueError:  # settings that do not fit the data leave no folder behind
                if jax.process_index() == 0 and [path.name for path in folder.iterdir()] == ["config.json"]:
                    folder.rmtree()
                raise
            seconds = time.perf_counter() - began
            if jax.process_index() == 0:
                of_seed = {**notes, "seed": seed, "seconds": seconds}
                files.write_arrays(paths[seed], _arrays_of(study, seed, numbers, of_seed))
                try:  # a bar without its number is named now, not after the last seed
                    record_of(study, config, repeat, *read(paths[seed : seed + 1]))
                except ValueError:
                    paths[seed].unlink()
                    raise
                console.print(f"{study.name}: seed {seed} took {seconds:,.1f} s.", highlight=False)
            runtimes.barrier(f"seed {seed}")
    if jax.process_index() != 0:
        return {}
    results, meta = read(paths)
    record = record_of(study, config, repeat, results, meta)
    rows = [
        {"arm": arm, "seed": seed, **{k: v[seed] for k, v in of_arm.items() if _is_number(v)}}
        for arm, of_arm in results.items()
        for seed in range(repeat.seeds)
    ]
    files.write_rows(folder / "metrics.csv", dict.fromkeys(key for row in rows for key in row), rows)
    content = json.dumps(record, indent=1) + "\n"
    content = re.sub(r"\[\n[^\[\]{}]*\]", lambda part: re.sub(r"\n\s*", " ", part[0]).replace("[ ", "["), content)
    record = json.loads(content)
    files.write_whole(folder / "metrics.json", content)
    if record_path is not None:
        files.write_whole(record_path, content)
    _report(study, config, repeat, folder, results, record, console, stopwatch)
    return record


def _check_code(study: Study, repeat: Repeat, folder: epath.Path, paths: Sequence[epath.Path]) -> None:
    """Names seeds that other code has measured; a record is not made of them."""
    old = [path.stem for path in paths if read([path])[1][0].get("code") != files.source_digest()]
    if old:
        message = f"{study.name}: other code than today's measured seed {', '.join(old)} in {folder}; "
        if repeat.record is not None:
            raise ValueError(f"{message}record needs seeds of one code: pass --overwrite to measure all again.")
        runtimes.log(f"{message}--overwrite measures all again.")


def _arrays_of(study: Study, seed: int, numbers: Numbers, notes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A seed as arrays for an npz file."""
    notes = {**notes, "machine": runtimes.machine(), "date": datetime.date.today().isoformat(), "jax": jax.__version__}
    arrays = {f"{_SEPARATOR}{key}": np.asarray(value) for key, value in notes.items()}
    if not isinstance(numbers, Mapping) or not all(isinstance(of_arm, Mapping) for of_arm in numbers.values()):
        raise ValueError(
            f"{study.name}, seed {seed}: measure must return {{arm: {{number: value}}}}, got {numbers!r:.100}."
        )
    for arm, of_arm in numbers.items():
        for name, value in of_arm.items():
            value = np.asarray(value)
            if not (jax.numpy.issubdtype(value.dtype, np.number) or value.dtype == bool) or value.dtype.kind == "c":
                raise ValueError(
                    f"{study.name}, seed {seed}, arm {arm!r}: {name!r} must be a number or an array of numbers, "
                    f"got {of_arm[name]!r:.100}."
                )
            if value.ndim == 0:
                value = value.astype(np.float64)
                if np.isnan(value):
                    raise ValueError(f"{study.name}, seed {seed}, arm {arm!r}: the number {name!r} is NaN.")
            arrays[f"{arm}{_SEPARATOR}{name}"] = value
    return arrays


def read(paths: Sequence[epath.Path]) -> tuple[Results, list[dict[str, Any]]]:
    """The numbers of all seeds, and what is noted of each: seconds, machine, date and versions."""
    seeds, meta = [], []
    for path in paths:
        arrays = {
            tuple(name.rsplit(_SEPARATOR, 1)): array
            for name, array in files.read_arrays(path, f"{_SEPARATOR}seconds").items()
        }
        meta.append({name: arrays.pop((arm, name)).item() for arm, name in list(arrays) if arm == ""})
        if str(meta[-1].get("seed", path.stem)) != path.stem:
            raise ValueError(f"{path} is a copy of seed {meta[-1]['seed']}; delete it to measure its own.")
        seeds.append(arrays)
        if not meta[-1] or arrays.keys() != seeds[0].keys():
            raise ValueError(f"{path} holds other numbers than {paths[0]}; delete the wrong one to measure it again.")
    results: Results = {}
    for arm, name in seeds[0]:
        values = [arrays[arm, name] for arrays in seeds]
        alike = len({value.shape for value in values}) == 1
        results.setdefault(arm, {})[name] = np.stack(values) if alike else values
    return results, meta


def _spread(values: np.ndarray) -> dict[str, Any]:
    with np.errstate(invalid="ignore"):  # inf - inf
        mean = values.mean()
    sd = tables.sd(values) if values.size > 1 else math.nan
    return {"mean": _verdicts.plain(mean), "sd": _verdicts.plain(sd)}


def _is_number(values: Any) -> bool:
    return isinstance(values, np.ndarray) and values.ndim == 1


def _values(study: Study, results: Results, arm: str, number: str) -> np.ndarray:
    values = results.get(arm, {}).get(number)
    if values is None or not _is_number(values):
        raise ValueError(f"{study.name}: a bar needs the number {number!r} of the arm {arm!r}, which is not measured.")
    return values


def record_of(
    study: Study, config: Any, repeat: Repeat, results: Results, meta: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Numbers, verdicts, and how they came about, as JSON holds them."""
    numbers = {
        arm: {
            name: {**_spread(values), "values": [_verdicts.plain(value) for value in values]}
            for name, values in of_arm.items()
            if _is_number(values)
        }
        for arm, of_arm in results.items()
    }
    forms = {column.number: column.form for column in reversed(study.columns(config)) if isinstance(column.form, str)}
    claims = []
    for claim in study.claims:
        bars, slacks, of_bars = claim.bars_of(config), [], []
        for bar in bars:
            left, right, shown = _values(study, results, bar.arm, bar.number), np.asarray(bar.other), ""
            form = forms.get(bar.number, ".4g")
            if isinstance(bar.other, str):
                right = _values(study, results, bar.other, bar.number)
                shown = f" {tables.mean_and_sd(right, form)}"
            slacks.append(_verdicts.slack(bar, left, right))
            measured = f"{bar.number}: {bar.arm} {tables.mean_and_sd(left, form)} {bar.bound}{shown}{bar.margin}"
            verdict = _verdicts.verdict(bar, slacks[-1])
            of_bars.append({"bar": str(bar), "measured": measured, "verdict": verdict, "slack": _spread(slacks[-1])})
        verdict = _verdicts.weakest(bars, slacks)
        claims.append({"method": claim.method, "arxiv": claim.arxiv, "verdict": verdict, "bars": of_bars})
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in SAME}
    joined = lambda name: "; ".join(dict.fromkeys(str(note.get(name, "unknown")) for note in meta))
    return {
        "study": study.name,
        "seeds": repeat.seeds,
        "claims": claims,
        "numbers": numbers,
        "different": different(study, config),
        "settings": settings,
        "seconds": round(sum(note["seconds"] for note in meta), 1),
        "date": max(note["date"] for note in meta),
        **{name: joined(name) for name in ("machine", "version", "code", "jax")},
    }


def _report(
    study: Study, config: Any, repeat: Repeat, folder: epath.Path, results: Results, record: dict[str, Any],
    console: Console, stopwatch: runtimes.Stopwatch,
) -> None:  # fmt: skip
    columns, over = study.columns(config), tables.over_seeds(repeat.seeds)

    def cell(of_arm: dict[str, Any], column: Column) -> str:
        if column.number not in of_arm:
            return "-"
        values = of_arm[column.number]
        return column.form(values) if callable(column.form) else tables.mean_and_sd(values, column.form)

    rows = [[arm, *(cell(of_arm, column) for column in columns)] for arm, of_arm in results.items()]
    rows = [row for row in rows if set(row[1:]) != {"-"}]
    verdicts = []
    for claim in record["claims"]:
        verdicts.append([f"**{claim['method']}**", f"**{claim['verdict']}**", ""])
        for bar in claim["bars"]:
            mean, sd = (None if value is None else f"{float(value):.4g}" for value in bar["slack"].values())
            verdicts.append([bar["measured"], bar["verdict"], f"{mean or '-'} ({sd})" if sd else mean or "-"])
    figure = (study.figure or functools.partial(_bar_chart, columns))(config, results)
    module = sys.modules[type(study.config).__module__]
    title = f"{study.name}: {(module.__doc__ or study.name).splitlines()[0].rstrip('.')}"
    tables.report(
        folder, config, console, stopwatch,
        title=title,
        parts=[
            tables.Table(f"{study.name}, {over}", ["arm", *(column.header for column in columns)], rows),
            tables.Table("Claims and their bars", ["bar", "verdict", "slack"], verdicts),
            *(study.details(config, results) if study.details else ()),
        ],
        figures=figure if isinstance(figure, Mapping) else {study.name: figure},
        figure_format=repeat.figure_format,
    )  # fmt: skip


def _bar_chart(columns: Sequence[Column], config: Any, results: Results) -> Any:
    """The first column, a bar for each arm."""
    number, header, _ = columns[0]
    values = {arm: {header: of_arm[number]} for arm, of_arm in results.items() if number in of_arm}
    return plotting.bar_chart(values, label=header)


def arguments(study: Study) -> Any:
    """The command line of a study as a dataclass: its settings, how often, and the runtime of a long one."""
    parts: dict[str, Any] = {"config": study.config, "repeat": Repeat(seeds=study.seeds)}
    parts |= {"runtime": runtimes.HERE} if study.in_folder else {}
    omit: Any = tyro.conf.OmitArgPrefixes
    return dataclasses.make_dataclass("Arguments", [(name, omit[type(v)], v) for name, v in parts.items()])


def main(study: Study, description: str | None) -> None:
    """The command line ``python -m experiments.claims.STUDY``."""
    command_line.call(arguments(study), functools.partial(run, study), description)
