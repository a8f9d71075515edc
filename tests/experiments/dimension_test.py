"""Plain and dual smoothing over image sizes, made of runs of experiments.smoothing."""

import csv

import pytest

from experiments import dimension


def test_a_run_compares_both_at_every_size(tmp_path, capfd):
    tiny = {"model": "mlp", "num_epochs": 1, "num_images": 2, "num_estimation": 100, "seeds": 1}
    config = dimension.Config(**tiny, sizes=(6,), results_dir=str(tmp_path))
    rows = dimension.run(config)
    assert [(row["size"], row["dimension"], row["dual"]) for row in rows] == [
        (6, 36, False), (6, 36, True),
    ]  # fmt: skip
    assert dimension.run(config) == rows
    with (config.folder() / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2
    assert len((config.folder() / "figures" / "radius_over_dimension.png").read_bytes()) > 5000
    assert "dual" in capfd.readouterr().out
    assert (tmp_path / "smoothing" / "digits-mlp-0.5-6px-dual-0" / "certificates.csv").exists()


def test_bad_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match="sizes must be at least 2 pixels"):
        dimension.run(dimension.Config(sizes=(1, 8), results_dir=str(tmp_path)))
    with pytest.raises(ValueError, match=r"sizes must .* each once, got \(8, 8\)"):
        dimension.run(dimension.Config(sizes=(8, 8), results_dir=str(tmp_path)))
    for name in ("", "../../x"):
        with pytest.raises(ValueError, match=f"name must be the name of a folder, got {name!r}"):
            dimension.run(dimension.Config(name=name, results_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="num_estimation must be at least 2 with dual"):
        dimension.run(dimension.Config(num_estimation=1, results_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())
