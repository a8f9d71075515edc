"""A run folder is made, resumed, refused or left alone."""

import pytest
from etils import epath

from experiments import smoothing
from experiments.common import folders


@pytest.mark.parametrize("content", ['{"model_type": "bert"}', "null", "{", "\x00"])
def test_a_config_of_something_else_is_left_alone_even_by_overwrite(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="is not a run of this experiment|cannot be read|no JSON object"):
        folders.open_run(epath.Path(tmp_path), smoothing.Config(), overwrite=True)
    assert (tmp_path / "config.json").read_text() == content


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("text")
    with pytest.raises(ValueError, match=r"holds files but no config.json"):
        folders.open_run(epath.Path(tmp_path), smoothing.Config(), overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "text"


def test_what_is_in_the_way_is_named_and_the_home_folder_is_a_tilde(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = folders.run_folder("~", "smoothing", "a")
    (tmp_path / "smoothing").mkdir()
    (tmp_path / "smoothing/a").symlink_to("/gone/a")
    with pytest.raises(ValueError, match="smoothing/a must be a folder, but it is a link to /gone/a, which is missing"):
        folders.open_run(folder, smoothing.Config())
    (tmp_path / "smoothing/a").unlink()
    folders.open_run(folder, smoothing.Config())
    path = tmp_path / "smoothing/a/config.json"
    assert folders.settings_of("~/smoothing/a", sigma=0.25)["run"] == "smoothing"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n").replace(b'"version": "', b'"version": "0'))
    folders.open_run(folder, smoothing.Config())
    assert "smoothing/a was begun by version 0" in capsys.readouterr().out.replace("\n", "")
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config.json cannot be read \(.*\); delete the folder to start again"):
        folders.open_run(folder, smoothing.Config())


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../other"])
def test_names_are_names_of_folders(name):
    with pytest.raises(ValueError, match="name must be the name of a folder"):
        folders.run_folder("results", "smoothing", name)
