"""Certificates on disk: one line per image, so that an interrupted run loses none and repeats none.

A single process appends to ``certificates.csv``. Each of several appends to its own
``certificates-PROCESS-of-PROCESSES.csv``, and at the end the first one merges all lines, in order, into
``certificates.csv``. A line in any of these files counts, however many processes wrote them.
"""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from robustjax import certification

from . import files, runtimes

COLUMNS = ("index", "label", "predicted", "radius", "correct", "probability", "samples", "seconds", "checksum")
_SECONDS_BETWEEN_UPLOADS = 10


class Table(NamedTuple):
    """Certificates of a run, in the order of their images."""

    ids: np.ndarray  # ``(n,)`` positions in the split
    labels: np.ndarray  # ``(n,)`` true classes
    certificate: certification.Certificate  # ``(n,)`` in each field
    num_samples: np.ndarray  # ``(n,)`` noisy copies that were classified, per image
    seconds: np.ndarray  # ``(n,)`` of sampling, per image


def line_of(index: int, label: int, certificate: Any, seconds: float) -> str:
    """One line: the image, its ``(label, radius, probability, num_samples)``, and a checksum of all of these."""
    predicted, radius, probability, num_samples = certificate
    fields = (index, label, predicted, repr(float(radius)), int(predicted == label), repr(float(probability)))
    line = ",".join(map(str, (*fields, num_samples, f"{seconds:.4f}")))
    return f"{line},{zlib.crc32(line.encode()):08x}"


def read(folder: epath.Path, log: Callable[[str], None] | None = None) -> Table:
    """Reads the certificates of all files of a run, each image once.

    A last line that a kill cut short is left out; so is a line that does not match its checksum, with a message to
    ``log``.

    Raises:
      ValueError: a file was not written by this module.
    """
    found: dict[int, tuple] = {}
    for path in _paths(folder):
        head, *lines = _lines_of(path)
        damaged = 0
        for line in lines[:-1]:  # after the last newline comes nothing, or half a line
            content, _, checksum = line.rpartition(",")
            if checksum != f"{zlib.crc32(content.encode()):08x}":
                damaged += 1
                continue
            fields = content.split(",")
            if len(fields) != len(COLUMNS) - 1:
                raise ValueError(f"{path} has lines of another version of this experiment; move it away.")
            i, y, c, r, _, p, n, s = fields
            found.setdefault(int(i), (int(i), int(y), int(c), float(r), float(p), int(n), float(s)))
        if damaged and damaged == len(lines) - 1 and head != ",".join(COLUMNS):
            raise ValueError(f"{path} holds no certificates of this experiment, it begins {head[:60]!r}; move it away.")
        if damaged and log is not None:
            log(f"{path} has {damaged} damaged line(s); their images are certified again.")
    columns = [np.asarray(column) for column in zip(*(found[i] for i in sorted(found)))] or [np.zeros(0)] * 7
    ids, labels, predicted, num_samples = (columns[i].astype(np.int32) for i in (0, 1, 2, 5))
    abstained = predicted == certification.ABSTAIN
    certificate = certification.Certificate(predicted, columns[3], columns[4], abstained)
    return Table(ids, labels, certificate, num_samples, columns[6])


def merge(folder: epath.Path, log: Callable[[str], None] | None = None) -> None:
    """Puts all whole lines into ``certificates.csv``, in order, and deletes the other files."""
    paths = _paths(folder)
    table = read(folder, log)
    label, radius, probability, _ = table.certificate
    certificates = zip(label, radius, probability, table.num_samples)
    rows = zip(table.ids, table.labels, certificates, table.seconds)
    lines = [",".join(COLUMNS), *(line_of(*row) for row in rows)]
    files.write_whole(folder / "certificates.csv", "\n".join(lines) + "\n")
    for path in paths:
        if path.name != "certificates.csv":
            path.unlink()


@contextlib.contextmanager
def writer(folder: epath.Path, process: int, processes: int) -> Iterator[Callable[[list[str]], None]]:
    """Yields ``write(lines)``, which on a file system has written them when it returns.

    Object stores cannot append: there the whole file is written every ten seconds and at the end, so that a kill loses
    at most ten seconds of work.
    """
    path = folder / (f"certificates-{process}-of-{processes}.csv" if processes > 1 else "certificates.csv")
    content: list[str] = [",".join(COLUMNS)]
    if path.exists():  # of an earlier call with as many processes
        content = _lines_of(path)[:-1]
    if runtimes.is_remote(path):
        written = time.monotonic()

        def upload(lines: list[str]) -> None:
            nonlocal written
            content.extend(lines)
            if time.monotonic() - written >= _SECONDS_BETWEEN_UPLOADS:
                files.write_whole(path, "\n".join(content) + "\n")
                written = time.monotonic()

        try:
            yield upload
        finally:
            files.write_whole(path, "\n".join(content) + "\n")
        return
    files.write_whole(path, "\n".join(content) + "\n")  # without a half line at its end
    with open(path, "a") as file:

        def append(lines: list[str]) -> None:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()

        yield append


def _lines_of(path: epath.Path) -> list[str]:
    """Lines of a file, whatever ended them when it was last stored; half a line, or nothing, is the last of them."""
    return [line.removesuffix("\r") for line in path.read_bytes().decode(errors="replace").split("\n")]


def _paths(folder: epath.Path) -> list[epath.Path]:
    """``certificates.csv`` first: its lines take precedence."""
    whole = folder / "certificates.csv"
    return [*([whole] if whole.exists() else []), *files.files(folder, "certificates-*-of-*.csv")]
