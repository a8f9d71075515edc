import importlib.util

import pytest

from robustjax.data import prepare


def test_missing_tensorflow_is_one_clear_error(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        prepare.main(["mnist", "--data-dir", "somewhere"])
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("Preparing mnist needs TensorFlow, which is not installed")
    assert 'pip install "robustjax[tfds]"' in message
    assert message.count("\n") == 1


def test_digits_need_no_preparation(capsys):
    with pytest.raises(SystemExit):
        prepare.main(["digits"])
    assert capsys.readouterr().err == "digits comes with scikit-learn and needs no preparation: load it directly.\n"


def test_preparation_asks_tfds_for_random_access(monkeypatch):
    import tensorflow_datasets as tfds

    calls = []

    class Builder:
        def download_and_prepare(self):
            calls.append("prepared")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(tfds, "builder", lambda name, **settings: calls.append((name, settings)) or Builder())
    prepare.main(["mnist", "--data-dir", "somewhere"])
    assert calls == [("mnist", {"data_dir": "somewhere", "file_format": "array_record"}), "prepared"]
