import re

import pytest
from etils import epath

from robustjax import _paths


def test_the_home_folder_is_a_tilde_and_stores_stay_urls(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _paths.path_of(data_dir="~/sets") == tmp_path / "sets"
    assert _paths.path_of(folder=epath.Path("~")) == tmp_path
    for same in ("gs://bucket/~/run", "s3://bucket/run", "runs/~", "~~"):
        assert str(_paths.path_of(folder=same)) == same


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("file:///tmp/runs", "got 'file:///tmp/runs'; pass '/tmp/runs'"),
        ("gs:/bucket/run", "got 'gs:/bucket/run', which lost a slash"),
        ("http://host/run", "got 'http://host/run'"),
        (3, "got 3"),
    ],
)
def test_what_is_no_path_is_named(path, message):
    with pytest.raises(ValueError, match=f"^results_dir must be a path, or a URL such as .*, {re.escape(message)}"):
        _paths.path_of(results_dir=path)


def test_what_is_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "file").write_text("")
    for path, what in [("link", "a link to .*gone, which is missing"), ("link/a", "a link"), ("file/a/b", "a file")]:
        with pytest.raises(ValueError, match=f"{path[:4]} must be a folder, but it is {what}.*; delete it, or use"):
            _paths.make_folder(epath.Path(tmp_path / path))
    for _ in range(2):
        _paths.make_folder(epath.Path(tmp_path / "a/b"))
    assert (tmp_path / "a/b").is_dir()
