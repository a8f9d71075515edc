"""Certificates on disk: what is written is read, by however many processes; nothing damaged is believed."""

import itertools
import zlib

import numpy as np
import pytest
from etils import epath

from experiments.common import certificates

ROWS = [(i, i % 3, (i % 4 - 1, i / 7, 0.5 + i / 30, 100 * i), i / 100) for i in range(12)]
LINES = [certificates.line_of(*row) for row in ROWS]


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path)


def write(folder, process, processes, lines):
    with certificates.writer(folder, process, processes) as append:
        for line in lines:
            append([line])


def test_lines_of_another_version_are_refused(folder):
    content = "0,1,1,0.25,1,0.75,0.1"
    (folder / "certificates.csv").write_text(f"head\n{content},{zlib.crc32(content.encode()):08x}\n")
    with pytest.raises(ValueError, match="certificates.csv has lines of another version of this experiment"):
        certificates.read(folder)


def test_what_is_written_is_read_bit_by_bit(folder):
    write(folder, 0, 1, LINES)
    table = certificates.read(folder)
    np.testing.assert_array_equal(table.ids, np.arange(12))
    np.testing.assert_array_equal(table.labels, [row[1] for row in ROWS])
    for field, i in (("label", 0), ("radius", 1), ("probability", 2)):
        np.testing.assert_array_equal(getattr(table.certificate, field), [row[2][i] for row in ROWS])
    np.testing.assert_array_equal(table.num_samples, [row[2][3] for row in ROWS])
    np.testing.assert_array_equal(table.certificate.abstained, [row[2][0] == -1 for row in ROWS])


def test_shards_of_any_number_of_processes_come_together_once_each_and_in_order(folder):
    write(folder, 0, 1, LINES[3:0:-1])
    for process, count in ((0, 2), (1, 2), (0, 3), (2, 3)):
        write(folder, process, count, LINES[4 + process :: count])
    before = certificates.read(folder)
    certificates.merge(folder)
    assert [path.name for path in folder.glob("*.csv")] == ["certificates.csv"]
    after = certificates.read(folder)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert after.ids.tolist() == list(range(1, 12))
    content = (folder / "certificates.csv").read_text()
    assert content.split("\n")[1:-1] == LINES[1:]
    certificates.merge(folder)
    assert (folder / "certificates.csv").read_text() == content


def test_every_flipped_bit_and_every_cut_is_noticed(folder):
    path = folder / "certificates.csv"
    head = ",".join(certificates.COLUMNS)
    line = LINES[5].encode()
    for place, bit in itertools.product(range(len(line)), range(0, 8, 3)):
        damaged = bytearray(line)
        damaged[place] ^= 1 << bit
        path.write_bytes(b"\n".join([head.encode(), LINES[4].encode(), bytes(damaged), LINES[6].encode(), b""]))
        assert certificates.read(folder).ids.tolist() == [4, 6]
    for length in range(len(line)):
        path.write_bytes(b"\n".join([head.encode(), LINES[4].encode(), line[:length]]))
        assert certificates.read(folder).ids.tolist() == [4]


def test_lines_may_end_as_on_windows(folder):
    write(folder, 0, 1, LINES[:6])
    path = folder / "certificates.csv"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    write(folder, 0, 1, LINES[6:])
    assert path.read_bytes() == "\n".join([",".join(certificates.COLUMNS), *LINES, ""]).encode()
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert certificates.read(folder).ids.tolist() == list(range(12))


def test_half_a_line_does_not_spoil_the_next(folder):
    path = folder / "certificates-1-of-2.csv"
    path.write_text("\n".join([",".join(certificates.COLUMNS), LINES[1], LINES[3][:9]]))
    write(folder, 1, 2, LINES[3:4])
    assert certificates.read(folder).ids.tolist() == [1, 3]


def test_a_file_of_something_else_is_left_alone(folder):
    text = "index,label\n1,2\n3,4\n"
    (folder / "certificates.csv").write_text(text)
    with pytest.raises(ValueError, match="holds no certificates of this experiment, it begins 'index,label'"):
        certificates.merge(folder)
    assert (folder / "certificates.csv").read_text() == text


def test_nothing_is_an_empty_table(folder):
    assert certificates.read(folder).ids.shape == (0,)
    certificates.merge(folder)
    assert certificates.read(folder).certificate.radius.shape == (0,)
