"""A run folder is made, resumed, refused or left alone."""

import pytest
from etils import epath

from experiments import smoothing
from experiments.common import folders


@pytest.mark.parametrize("content", ['{"model_type": "bert"}', "null", "{", "\x00"])
def test_a_config_of_something_else_is_left_alone_even_by_overwrite(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="is not a run of this experiment; use another name|cannot be read"):
        folders.open_run(epath.Path(tmp_path), smoothing.Config(), overwrite=True)
    assert (tmp_path / "config.json").read_text() == content


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("text")
    with pytest.raises(ValueError, match=r"holds files but no config.json"):
        folders.open_run(epath.Path(tmp_path), smoothing.Config(), overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "text"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../other"])
def test_names_are_names_of_folders(name):
    with pytest.raises(ValueError, match="name must be the name of a folder"):
        folders.run_folder("results", "smoothing", name)
