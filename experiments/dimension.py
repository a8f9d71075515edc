"""How certified radii change as images grow: plain and dual randomized smoothing with as many draws, on resized images.

Each run is one of experiments.smoothing, beside the others in results/smoothing, and is taken up where it was left.
Leaves results/dimension/NAME with config.json, metrics.csv, report.md and a figure, which also has the upper bounds of
arXiv:2404.09586: the radii of inputs of dimension d whose class has probability p = 0.999 under noise of standard
deviation s / sqrt(d). They are s q / sqrt(d) for plain smoothing, q = Phi^-1(p), and for halves of m and n numbers
s q (1 / sqrt(m) + 1 / sqrt(n)) / sqrt(2), twice as much. Here s makes the noise on the smallest images sigma.

    python -m experiments.dimension
    python -m experiments.dimension --dataset mnist --data-dir DIR --sizes 28 56 --model lenet --num-epochs 3 --seeds 1
"""

from __future__ import annotations

import dataclasses
import statistics

import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from experiments import smoothing
from experiments.common import command_line, files, folders
from robustjax import data, plotting

PROBABILITY = 0.999  # of the class, in the upper bounds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings; sigma is in units of [0, 1] pixels, whatever the size."""

    dataset: str = "digits"
    """digits (embedded), or any prepared TFDS data set with image and label."""
    data_dir: str | None = None
    """Folder of prepared TFDS data sets; None: $TFDS_DATA_DIR, else TFDS's own."""
    train_split: str = "train"
    """Images to train on, in TFDS syntax."""
    sizes: tuple[int, ...] = (8, 16, 32)
    """Pixels a side."""
    model: str = "cnn"
    """As in experiments.smoothing, and so what follows."""
    sigma: float = 0.5
    """Standard deviation of the noise."""
    recipe: str | None = None
    """Training recipe."""
    num_epochs: int | None = None
    """Passes over the training images; None: as the recipe."""
    num_estimation: int = 10_000
    """Draws of each image, of both halves together where smoothing is dual."""
    num_images: int | None = 200
    """Certify at most so many images."""
    seeds: int = 3
    """Number of models of each size and kind."""
    results_dir: str = "results"
    """Where run folders go."""
    name: str | None = None
    """Name of the run folder; None: made of data set, model and sigma."""
    overwrite: bool = False
    """Delete the comparison that is in the folder; runs of experiments.smoothing stay."""

    def folder(self) -> epath.Path:
        """The run folder."""
        dataset = self.dataset.replace("/", "-").replace(":", "-")
        name = self.name if self.name is not None else f"{dataset}-{self.model}-{self.sigma:g}"
        if name in ("", ".", "..") or epath.Path(name).name != name:
            raise ValueError(f"name must be the name of a folder, got {name!r}.")
        return epath.Path(self.results_dir) / "dimension" / name


SAME = ("results_dir", "name", "overwrite", "data_dir", "sizes", "seeds")
COLUMNS = ("size", "dimension", "dual", "seed", "standard_accuracy", "average_certified_radius", "abstained")


def run_of(config: Config, size: int, dual: bool, seed: int) -> smoothing.Config:
    """One of the runs that are compared."""
    name = f"{config.folder().name}-{size}px{'-dual' if dual else ''}-{seed}"
    return smoothing.Config(
        dataset=config.dataset, data_dir=config.data_dir, train_split=config.train_split, image_size=size,
        model=config.model, sigma=config.sigma, dual=dual, recipe=config.recipe, num_epochs=config.num_epochs,
        num_estimation=config.num_estimation, num_images=config.num_images, seed=seed, results_dir=config.results_dir,
        name=name,
    )  # fmt: skip


def run(config: Config) -> list[dict]:
    """Makes the runs that are missing, prints the table and writes the figure.

    Returns:
      The rows of metrics.csv.
    """
    if not config.sizes or min(config.sizes) < 2 or len(set(config.sizes)) < len(config.sizes):
        raise ValueError(f"sizes must be at least 2 pixels, and each once, got {config.sizes}.")
    if config.seeds < 1:
        raise ValueError(f"seeds must be an integer of at least 1, got {config.seeds}.")
    for dual in (False, True):
        run_of(config, config.sizes[0], dual, 0)
    folders.open_run(config.folder(), config, same=SAME, overwrite=config.overwrite)
    channels = data.load(config.dataset, config.train_split, config.data_dir).image_shape[-1]
    rows, console = [], Console()
    for seed in range(config.seeds):
        for size in config.sizes:
            for dual in (False, True):
                found = smoothing.run(run_of(config, size, dual, seed))
                row = {"size": size, "dimension": channels * size**2, "dual": dual, "seed": seed}
                rows.append(row | {name: found[name] for name in COLUMNS[4:]})
    report(config, rows, console)
    return rows


def report(config: Config, rows: list[dict], console: Console) -> None:
    """Prints the table; writes metrics.csv, report.md and the figure."""
    folder, title = config.folder(), f"{config.dataset} {config.model}, sigma {config.sigma:g}"
    files.write_rows(folder / "metrics.csv", COLUMNS, rows)
    of = lambda size, dual, name: np.asarray([row[name] for row in rows if (row["size"], row["dual"]) == (size, dual)])
    told = lambda values: f"{values.mean():.3f}" + (f" ({values.std(ddof=1):.3f})" if len(values) > 1 else "")
    headers = ["pixels", "smoothing", "accuracy", "ACR", "abstained"]
    lines = [
        [f"{size} x {size}", "dual" if dual else "plain", *(told(of(size, dual, name)) for name in COLUMNS[4:])]
        for size in config.sizes
        for dual in (False, True)
    ]
    table = Table(*headers, title=title)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    console.print(f"Run folder: {folder}", soft_wrap=True)
    sides = sorted(config.sizes)
    d = np.asarray([of(size, False, "dimension")[0] for size in sides], np.float64)
    measured = {
        f"{name}, measured": (d, np.stack([of(size, dual, "average_certified_radius") for size in sides]))
        for name, dual in (("plain", False), ("dual", True))
    }
    m, scale = np.ceil(d / 2), config.sigma * d[0] ** 0.5 * statistics.NormalDist().inv_cdf(PROBABILITY)
    bounds = {"plain": d**-0.5, "dual": (m**-0.5 + (d - m) ** -0.5) / 2**0.5}
    references = {f"{name}, bound, falling noise": (d, scale * bound) for name, bound in bounds.items()}
    labels = ("dimension", "average certified radius (ACR)")
    figure = plotting.spread_curve(measured, references, labels=labels, title=title)
    files.write_whole(folder / "figures" / "radius_over_dimension.png", files.figure_bytes(figure))
    note = (
        f"{config.num_estimation:,} draws of each image in all, {config.num_images or 'all'} images, {config.seeds} "
        f"seeds, standard deviations in brackets. Upper bounds: of inputs whose class has probability {PROBABILITY} "
        "under noise that falls with the root of the dimension; the runs keep their sigma."
    )
    text = [
        f"# Certified radius and dimension: {title}",
        "",
        note,
        "",
        f"| {' | '.join(headers)} |",
        "|---|---|---|---|---|",
    ]
    text += [*(f"| {' | '.join(line)} |" for line in lines), "", "![radius](figures/radius_over_dimension.png)"]
    files.write_whole(folder / "report.md", "\n".join(text) + "\n")


if __name__ == "__main__":
    command_line.command_line(Config, run, __doc__)
