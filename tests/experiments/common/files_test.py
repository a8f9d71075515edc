"""Files of a run are whole, and are of that run."""

import numpy as np
import pytest

from experiments.common import files


def test_arrays_of_something_else_are_named(tmp_path):
    path = tmp_path / "clean.npz"
    files.write_arrays(path, {"images": np.zeros(3)})
    assert files.read_arrays(path, "images")["images"].shape == (3,)
    with pytest.raises(ValueError, match=r"clean.npz must hold id, correct, got no id; delete it to make it again"):
        files.read_arrays(path, "id", "correct")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"clean.npz is damaged \(.*\); delete it to make it again"):
        files.read_arrays(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "cannot be read .maximum recursion depth"),
        (b"\xff\x00", "cannot be read"),
        (b"[1]", "holds no JSON object"),
        (b'{"a": 1}', "lacks norm"),
        (None, "cannot be read .*No such file"),
    ],
)
def test_objects_of_something_else_are_named(content, message, tmp_path):
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^runs must be whole: .*metrics.json {message}.*; leave it out\.$"):
        files.read_json(path, "norm", advice="leave it out", error="runs must be whole: ")
    path.write_bytes(b'{\r\n "norm": "l2"\r\n}\r\n')
    assert files.read_json(path, "norm", advice="") == {"norm": "l2"}
