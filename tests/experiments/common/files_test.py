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
