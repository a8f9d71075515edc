"""Trains classifiers of two halves of an image, and tells what is left when one half is attacked or missing.

Cross-entropy alone beside the two steps of certifiable robust multi-modal training (CRMT), for each of several seeds.
Leaves results/multimodal/NAME with config.json, the numbers of every seed, metrics.csv, metrics.json, report.md and a
figure. Seeds that are there are not trained again, so that more of them can join.

    python -m experiments.multimodal
    python -m experiments.multimodal --dataset mnist --data-dir DIR --epsilons 1,2
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from rich.table import Table

from experiments.common import adversaries, command_line, files, folders, runtimes, subsets
from robustjax import attacks, data, losses, models, plotting, training
from robustjax.certification import multimodal as certificate
from robustjax.typing import ModelState

RECIPES = {
    "digits": training.RECIPES["digits"],
    "mnist": training.Recipe(algorithm="adam", learning_rate=1e-3, schedule="cosine", batch_size=256, num_epochs=10),
}
STEP_2_RATES = {"digits": 1e-3, "mnist": 3e-5}
"""Of 3e-5, 1e-4, 3e-4, 1e-3 and 3e-3 the largest that cost steps 1 and 2 at most 0.3 points of accuracy, on the last
30 % of the training digits (three seeds) and 10 % of those of MNIST (one)."""
ARMS = ("cross-entropy", "cross-entropy, step 2", "step 1", "steps 1 and 2")
"""How a model was trained: step 2 moves the weights of the modalities alone."""
HEADERS = ("cross-entropy", "and step 2", "step 1", "steps 1 and 2")
SIDES = ("left", "right")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run; radii are l2, in units of [0, 1] pixels."""

    dataset: str = "digits"
    """digits (embedded), or mnist."""
    data_dir: str | None = None
    """Folder of prepared TFDS data sets; None: $TFDS_DATA_DIR, else TFDS's own."""
    train_split: str = "train"
    """Images to train on, in TFDS syntax. To choose settings: 'train[:90%]' here and 'train[90%:]' to test on."""
    test_split: str = "test"
    """Images to test on."""
    hidden: int | None = 128
    """Units of each encoder; None: linear encoders."""
    num_epochs: int | None = None
    """Passes over the training images; None: 80 for digits, 10 for MNIST. Step 2 takes a third as many more."""
    rho: float = 2.0
    """Weight of the margins of each modality in step 1."""
    step_2_rate: float | None = None
    """Learning rate of step 2, SGD with momentum 0.9; None: as chosen on the end of the training split."""
    step_2_decay: float = 0.01
    """Weight decay of step 2."""
    epsilons: str = "0.25,0.5"
    """Comma-separated radii of PGD."""
    steps: int = 40
    """Steps of PGD."""
    num_images: int = 500
    """Attack at most so many test images, evenly spaced."""
    seeds: int = 3
    """Repetitions, from seed 0."""
    results_dir: str = "results"
    """Where run folders go."""
    name: str | None = None
    """Name of the run folder; None: made of data set and encoder."""
    overwrite: bool = False
    """Delete the run that is in the folder and start anew."""


def folder_of(config: Config) -> epath.Path:
    """The run folder."""
    encoder = "linear" if config.hidden is None else f"hidden-{config.hidden}"
    name = config.name if config.name is not None else f"{config.dataset.replace(':', '-')}-{encoder}"
    if name in ("", ".", "..") or epath.Path(name).name != name:
        raise ValueError(f"name must be the name of a folder, got {name!r}.")
    return epath.Path(config.results_dir) / "multimodal" / name


def constants_of(state: ModelState) -> np.ndarray:
    """Lipschitz constants of what each modality says, ``(modalities, classes)``."""
    params = state.params
    of_encoders = certificate.lipschitz_constants(params["kernel"]) if "kernel" in params else np.ones(len(SIDES))
    return np.repeat(of_encoders[:, None], params["bias"].shape[0], axis=1)


@functools.cache  # equal ones share compiled steps
def _optimizers(config: Config, per_epoch: int, num_epochs: int) -> tuple[optax.GradientTransformation, ...]:
    """Of step 1 and of step 2; the second knows the weights of the modalities alone."""
    rate = config.step_2_rate or STEP_2_RATES[config.dataset.split(":")[0]]
    descend = optax.chain(optax.add_decayed_weights(config.step_2_decay), optax.sgd(rate, momentum=0.9))
    only_weights = lambda params: {name: name == "weights" for name in params}  # elsewhere the gradient is 0
    return recipe_of(config).optimizer(per_epoch, num_epochs), optax.masked(descend, only_weights)


def recipe_of(config: Config) -> training.Recipe:
    """The recipe of the data set."""
    return RECIPES[config.dataset.split(":")[0]]


def train(config: Config, dataset: data.Dataset, functional: models.Functional, seed: int) -> dict[str, ModelState]:
    """The trained models, by the names of ``ARMS``; all begin with the same parameters."""
    recipe, key = recipe_of(config), jax.random.fold_in(jax.random.key(1), seed)
    num_epochs = config.num_epochs or recipe.num_epochs
    batch_size = min(recipe.batch_size, len(dataset))
    per_epoch = len(dataset) // batch_size
    first, second = _optimizers(dataclasses.replace(config, seeds=1), per_epoch, num_epochs)

    def fit(state, objective, optimizer, epochs):
        begun, batches = training.init(key, state, optimizer), data.batches(dataset, batch_size, seed=seed)
        settings = {"objective": objective, "optimizer": optimizer, "num_steps": per_epoch * epochs}
        return training.fit(functional.apply, begun, batches, **settings, progress=False).state.model

    def step_2(state):
        objective = losses.multimodal_radius(constants=tuple(map(tuple, constants_of(state).tolist())))
        return fit(state, objective, second, -(-num_epochs // 3))

    plain = fit(functional.state, losses.standard(), first, num_epochs)
    margin = fit(functional.state, losses.multimodal_margin(rho=config.rho), first, num_epochs)
    return dict(zip(ARMS, (plain, step_2(plain), margin, step_2(margin)), strict=True))


@functools.cache  # one function for each architecture, so that compiled programs are shared
def _logits_of(outputs):
    """``(state, free, x) -> logits``; gradients go through the columns ``free`` alone, which attacks then change."""

    def logits(state, free, x):
        return outputs(state, jnp.where(free[None, None, :, None], x, jax.lax.stop_gradient(x))).logits

    return logits


_answers = jax.jit(lambda logits_fn, x: logits_fn(x).argmax(-1))
_radius = jax.jit(certificate.radius, static_argnames="modality")


def without(image: np.ndarray, side: int) -> np.ndarray:
    """The images with one half black."""
    half, image = image.shape[2] // 2, image.copy()
    image[:, :, half * side : half * (side + 1)] = 0
    return image


def measure(config: Config, functional: models.Functional, state: ModelState, test, attacked) -> dict[str, np.ndarray]:
    """Accuracies, radii and what attacks found: of the halves ``left`` and ``right``, and of both together."""
    params, constants, width = state.params, constants_of(state), test.image.shape[2]
    logits_fn = lambda free: jax.tree_util.Partial(_logits_of(functional.outputs), state, jnp.asarray(free))
    everywhere, outputs = np.ones(width, bool), jax.jit(functional.outputs)
    answers = lambda image: np.asarray(_answers(logits_fn(everywhere), jnp.asarray(image)))
    found = {"clean": (answers(test.image) == test.label).mean()}
    found |= {f"without {name}": (answers(without(test.image, i)) == test.label).mean() for i, name in enumerate(SIDES)}

    def radii(batch, modality):
        scores = outputs(state, jnp.asarray(batch.image)).features.reshape(-1, *constants.shape)
        of_model = params["weights"], params["bias"], jnp.asarray(constants, jnp.float32)
        return np.asarray(_radius(scores, *of_model, labels=jnp.asarray(batch.label), modality=modality))

    violations, nearest, clean = 0, np.inf, answers(attacked.image) == attacked.label
    for side, name in [(None, "both"), *enumerate(SIDES)]:
        of_test, certified = radii(test, side), radii(attacked, side)
        found |= {f"radius {name}": of_test.mean(), f"certified radius {name}": np.maximum(of_test, 0).mean()}
        free = logits_fn(everywhere if side is None else np.arange(width) // (width // 2) == side)
        for epsilon in adversaries.epsilons_of(config.epsilons):
            attack = attacks.pgd(epsilon=epsilon, norm="l2", steps=config.steps, random_start=False, loss="margin")
            x_adv = attack(jax.random.key(2), free, attacked.image, attacked.label)
            kept = clean & (np.asarray(_answers(free, x_adv)) == attacked.label)
            found[f"PGD {epsilon:g} {name}"] = kept.mean()
            violations += int((~kept & (certified > epsilon)).sum())
        distance = attacks.fab(norm="l2", steps=config.steps)(jax.random.key(3), free, attacked.image, attacked.label)[
            1
        ]
        ratio = np.asarray(distance)[certified > 0] / certified[certified > 0]
        violations += int((ratio < 1).sum())
        nearest = min(nearest, ratio.min(initial=np.inf))
    found |= {"violations": violations, "nearest attack": nearest}
    return {name: np.asarray(value, np.float64) for name, value in found.items()}


def once(config: Config, dataset: data.Dataset, test: data.Dataset, seed: int) -> dict[str, np.ndarray]:
    """Trains and measures all arms of a seed; the names are those of an arm and a number."""
    dataset, test = dataset.cached(), test.cached()
    settings = {"image_shape": dataset.image_shape, "num_classes": dataset.num_classes, "hidden": config.hidden}
    key = jax.random.fold_in(jax.random.key(0), seed)
    functional = models.functional(models.multimodal(key, **settings))
    states = train(config, dataset, functional, seed)
    batch = test.arrays()
    attacked = test[subsets.evenly(len(test), min(config.num_images, len(test)))]
    found = {}
    for arm, state in states.items():
        measured = measure(config, functional, state, batch, attacked)
        found |= {f"{arm}: {name}": value for name, value in measured.items()}
    # The half that does better alone, by the plain model and on training images: nothing is chosen on test images.
    some = dataset[subsets.evenly(len(dataset), min(5000, len(dataset)))]
    plain = jax.tree_util.Partial(_logits_of(functional.outputs), states[ARMS[0]], jnp.ones(some.image.shape[2], bool))
    images = (jnp.asarray(without(np.asarray(some.image), 1 - side)) for side in range(2))
    alone = [(np.asarray(_answers(plain, image)) == some.label).mean() for image in images]
    return found | {"stronger": np.int64(np.argmax(alone))}


def run(config: Config) -> list[dict]:
    """Makes the seeds that are not there, and reports on all that were asked for.

    Returns:
      The rows of metrics.csv.
    """
    stopwatch, console = runtimes.Stopwatch(), runtimes.console()
    for name in ("seeds", "steps", "num_images"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {getattr(config, name)}.")
    if config.step_2_rate is not None and not 0 < config.step_2_rate < float("inf"):
        raise ValueError(f"step_2_rate must be positive and finite, got {config.step_2_rate}.")
    if config.num_epochs is not None and config.num_epochs < 1:
        raise ValueError(f"num_epochs must be an integer of at least 1, got {config.num_epochs}.")
    if config.dataset.split(":")[0] not in RECIPES:
        raise ValueError(f"dataset must be one of {', '.join(RECIPES)}, got {config.dataset!r}.")
    if config.hidden is not None and config.hidden < 2:
        raise ValueError(f"hidden must be an integer of at least 2, got {config.hidden}.")
    if not 0 <= config.step_2_decay < float("inf"):
        raise ValueError(f"step_2_decay must be at least 0 and finite, got {config.step_2_decay}.")
    losses.multimodal_margin(rho=config.rho)
    adversaries.epsilons_of(config.epsilons)
    splits = (config.train_split, config.test_split)
    dataset, test = (data.load(config.dataset, split, config.data_dir) for split in splits)
    folder = folder_of(config)
    same = ("seeds", "data_dir", "results_dir", "name", "overwrite")
    folders.open_run(folder, config, same=same, overwrite=config.overwrite)
    runs = []
    for seed in range(config.seeds):
        path = folder / "seeds" / f"{seed}.npz"
        if not path.exists():
            files.write_arrays(path, once(config, dataset, test, seed))
        runs.append(files.read_arrays(path))
    return report(config, runs, stopwatch, console)


def report(config: Config, runs: list[dict[str, np.ndarray]], stopwatch, console) -> list[dict]:
    """Prints the table, and writes it with the numbers of every seed."""
    folder, rows = folder_of(config), []
    for seed, found in enumerate(runs):
        stronger = SIDES[int(found["stronger"])]
        weaker = SIDES[1 - int(found["stronger"])]
        for arm in ARMS:
            row: dict[str, Any] = {"training": arm, "seed": seed, "stronger half": stronger}
            for name, value in found.items():
                if name.startswith(f"{arm}: "):
                    told = name.removeprefix(f"{arm}: ").replace(stronger, "stronger").replace(weaker, "weaker")
                    row[told] = float(value)
            rows.append(row)
    order = list(rows[0])
    files.write_rows(folder / "metrics.csv", order, rows)

    columns = {arm: {n: np.array([r[n] for r in rows if r["training"] == arm]) for n in order[3:]} for arm in ARMS}
    several = len(runs) > 1
    spread = lambda a: a.std(ddof=1) if several else 0.0
    summary = {
        arm: {name: {"mean": float(values.mean()), "sd": float(spread(values))} for name, values in of_arm.items()}
        for arm, of_arm in columns.items()
    }
    content = {"summary": summary, "seconds": stopwatch.seconds()}
    files.write_whole(folder / "metrics.json", json.dumps(content, indent=1) + "\n")
    shown = [n for n in columns[ARMS[0]] if n not in ("violations", "nearest attack") and not n.startswith("radius")]
    cell = lambda values: f"{values.mean():.3f}" + (f" ({spread(values):.3f})" if several else "")
    body = [
        [name.removeprefix("certified "), *(cell(columns[arm][name]) for arm in ARMS)]
        for name in sorted(shown, key=lambda name: ("radius" in name, name))
    ]
    title = f"{config.dataset}, two halves, {'linear' if config.hidden is None else config.hidden}"
    table = Table("", *HEADERS, title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in table.columns:
        column.no_wrap = True
    for cells in body:
        table.add_row(*cells)
    console.print(table)
    violations = int(sum(of_arm["violations"].sum() for of_arm in columns.values()))
    nearest = min(of_arm["nearest attack"].min() for of_arm in columns.values())
    over = f"mean (sd) over {len(runs)} seeds" if several else "of one seed"
    note = (
        f"Accuracies and mean certified radii of the label, 0 where the answer is wrong; {over}. PGD and FAB, l2, "
        f"found {violations} wrong answers inside a certified radius; the nearest was at {nearest:.3f} times one."
    )
    console.print(note, highlight=False)
    console.print(f"Run folder: {folder}", soft_wrap=True)
    bars = {name: {arm: columns[arm][name] for arm in ARMS} for name in shown if "radius" not in name}
    figure = plotting.bar_chart(bars, label="accuracy", panel_width=7.0)
    files.write_whole(folder / "figures" / "accuracy.png", files.figure_bytes(figure))
    text = [f"# {title}", "", f"| | {' | '.join(ARMS)} |", f"|---|{'---|' * len(ARMS)}"]
    text += [f"| {' | '.join(cells)} |" for cells in body]
    text += ["", note, "", "![accuracy](figures/accuracy.png)", "", stopwatch.told()]
    text += ["", "| setting | value |", "|---|---|"]
    text += [f"| {name} | {value} |" for name, value in dataclasses.asdict(config).items()]
    files.write_whole(folder / "report.md", "\n".join(text) + "\n")
    return rows


if __name__ == "__main__":
    command_line.command_line(Config, run, __doc__)
