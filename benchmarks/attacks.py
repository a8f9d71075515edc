"""Speed and strength of `attacks.pgd` and `attacks.autoattack`, beside their peers, in one run on this machine.

A small cnn and an MLP, trained for seconds on digits of 28x28 pixels, are attacked within an linf ball by robustjax, by
torchattacks (PGD-40) and by the authors' AutoAttack, all on the same weights and images. Costs are seconds of CPU; both
sides have one thread and take turns in every round, so that both see the same state of the machine. The peers need
PyTorch, which the extra `bench` brings, and the packages `torchattacks` and `autoattack`, which it does not.

    python -m benchmarks.attacks
    python -m benchmarks.attacks --quick
    python -m benchmarks.attacks --rounds 5 --json benchmark.json
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from benchmarks._command import command
from benchmarks.certify import INSTALL, machine
from benchmarks.scoring import cpu_seconds
from experiments.common.files import write_whole
from robustjax import attacks, data, losses, models, training
from robustjax.typing import Batch

BARS = {("mlp", "PGD-40"): 4.0, ("cnn", "PGD-40"): 0.8, ("mlp", "AutoAttack"): 5.0}  # times the speed of the peer
COMPILE_BAR = 10.0  # seconds of AutoAttack
ACCURACY_BAR = 0.005
STEPS = 40
PEERS = {  # module, and how to get it
    "PGD-40": ("torchattacks", "pip install --no-deps torchattacks"),
    "AutoAttack": ("autoattack", "pip install git+https://github.com/fra31/auto-attack"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the benchmark."""

    num_images: int = 200
    """Test digits that are attacked; at most 500."""
    epsilon: float = 0.06
    """Radius of the linf ball: about half of the images withstand attacks in it."""
    train_steps: int = 100
    """Steps of Adam on 128 digits each."""
    rounds: int = 3
    """How often each attack is timed; attacks without a bar, which take a quarter of an hour, are timed once."""
    quick: bool = False
    """Take a tenth of the images and one round: shows that it runs, and measures little."""
    seed: int = 0
    """Of weights, batches and attacks."""
    json: str | None = None
    """File for all figures."""


def digits(split: str) -> Batch:
    """All digits of a split, resized to 28x28 pixels."""
    batch = data.load("digits", split).arrays()
    x = jax.image.resize(batch.image, (len(batch.image), 28, 28, 1), "bilinear")
    return batch._replace(image=jnp.asarray(np.asarray(x).clip(0, 1)))


class Subject:
    """A model, briefly trained, and the images on which it is attacked."""

    def __init__(self, name: str, config: Config):
        keys = jax.random.split(jax.random.key(config.seed), 3)
        functional = models.functional(models.create(name, keys[0], image_shape=(28, 28, 1)))
        optimizer = optax.adam(1e-3)
        step = training.make_step(losses.standard(), optimizer)
        state, train = training.init(keys[1], functional.state, optimizer), jax.tree.map(np.asarray, digits("train"))
        for index in np.random.default_rng(config.seed).integers(len(train.image), size=(config.train_steps, 128)):
            state = step(functional.apply, state, Batch(*(array[index] for array in train)))[0]
        self.key, self.state, test = keys[2], state.model, digits("test")
        self.logits_fn = jax.tree_util.Partial(lambda state, x: functional.outputs(state, x).logits, self.state)
        self.x, self.labels = (jnp.asarray(array[: config.num_images]) for array in (test.image, test.label))

    def stands(self, x: Any) -> np.ndarray:
        """Whether these images are classified correctly."""
        return np.asarray(jax.jit(lambda f, x: f(x))(self.logits_fn, jnp.asarray(x)).argmax(-1) == self.labels)

    def robust_accuracy(self, x_adv: Any, epsilon: float) -> float:
        """Share that is classified correctly before and after the attack; ValueError outside the ball."""
        farthest = float(np.abs(np.asarray(x_adv) - np.asarray(self.x)).max())
        if not (farthest <= epsilon + 1e-6 and np.min(x_adv) >= 0 and np.max(x_adv) <= 1):
            raise ValueError(f"x_adv must be in [0, 1] and within epsilon {epsilon}, got a distance of {farthest}.")
        return float((self.stands(self.x) & self.stands(x_adv)).mean())


Attacks = dict[str, Callable[[], Any]]
"""Attacks by row of the table; each call returns adversarial images ``(batch, 28, 28, 1)``."""


def our_attacks(subject: Subject, epsilon: float) -> Attacks:
    """The attacks of robustjax that are timed."""
    ours = {"PGD-40": attacks.pgd(epsilon=epsilon, steps=STEPS), "AutoAttack": attacks.autoattack(epsilon=epsilon)}
    return {
        name: functools.partial(attack, subject.key, subject.logits_fn, subject.x, subject.labels)
        for name, attack in ours.items()
    }


def their_attacks(subject: Subject, name: str, epsilon: float, seed: int) -> tuple[Attacks, list[str]]:
    """The attacks of the installed peers for the same rows, and the peers that were left out."""
    if jax.default_backend() != "cpu":
        return {}, ["the peers, which run on the CPU here: set JAX_PLATFORMS=cpu to compare"]
    if importlib.util.find_spec("torch") is None:
        return {}, [f"the peers, for which PyTorch is not installed: {INSTALL}"]
    import torch  # pyrefly: ignore[missing-import]

    from benchmarks import _peers

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = {"mlp": _peers.Mlp, "cnn": _peers.Cnn}[name](subject.state)
    error = np.abs(_peers.logits(model, np.asarray(subject.x)) - subject.logits_fn(subject.x)).max()
    if not error < 1e-4:
        raise ValueError(f"the {name} of PyTorch must be the same function, got logits {error} off.")
    make = {"PGD-40": functools.partial(_peers.pgd, steps=STEPS), "AutoAttack": _peers.autoattack}
    theirs, left_out = {}, []
    for row, (module, install) in PEERS.items():
        try:
            importlib.import_module(module)
        except ImportError as reason:
            left_out.append(f"{module}, which cannot be imported ({reason}): {install}")
        else:
            theirs[row] = make[row](model, np.asarray(subject.x), np.asarray(subject.labels), epsilon=epsilon)
    return theirs, left_out


def use_one_thread() -> None:
    """Limits XLA's matrix products on the CPU to one thread; call it before any device is used."""
    flag = "--xla_cpu_multi_thread_eigen=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    jax.config.update("jax_enable_compilation_cache", False)  # a cache would hide the cost of compiling


def measure(attacks: list[Callable[[], Any]], rounds: int) -> tuple[np.ndarray, list[list[Any]]]:
    """Seconds of each attack in each round, ``(attacks, rounds)``: A B, A B, ...; and the results."""
    seconds, results = np.empty((len(attacks), rounds)), [[] for _ in attacks]
    for i in range(rounds):
        for j, attack in enumerate(attacks):
            # Only finished arrays are appended: one that is still being computed would count as no time.
            take = lambda attack=attack, j=j: results[j].append(jax.block_until_ready(attack()))
            seconds[j, i] = cpu_seconds(take)
    return seconds, results


def run(config: Config) -> dict[str, Any]:
    """Runs the benchmark, prints its table, and returns all figures."""
    if config.quick:
        config = dataclasses.replace(config, num_images=config.num_images // 10, rounds=1)
    if not 1 <= config.num_images <= 500 or min(config.rounds, config.train_steps) < 1 or not 0 < config.epsilon < 1:
        raise ValueError(f"num_images must be 1 to 500, epsilon in (0, 1), other numbers positive, got {config}.")
    here, left_out = machine(), []
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for column in ("", "images/s", "peer", "ratio", "bar", "met", "robust", "peer", "met", "compile", "met"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    verdict = lambda met: "[green]yes" if met else "[red]no"
    figures: list[dict[str, Any]] = []
    for model in ("mlp", "cnn"):
        subject = Subject(model, config)
        ours = our_attacks(subject, config.epsilon)
        theirs, missing = their_attacks(subject, model, config.epsilon, config.seed)
        left_out += [reason for reason in missing if reason not in left_out]
        table.add_row(f"[bold]{model}, clean {subject.stands(subject.x).mean():.1%}")
        for name, attack in ours.items():
            first = cpu_seconds(attack)
            rounds = config.rounds if (model, name) in BARS else 1
            seconds, results = measure([attack, *([theirs[name]] if name in theirs else [])], rounds)
            robust = [[subject.robust_accuracy(x, config.epsilon) for x in of_one] for of_one in results]
            rates = [f"{config.num_images / np.median(of_one):,.1f}" for of_one in seconds]
            shares = [f"{np.median(of_one):.1%}" for of_one in robust]
            compiled, ratio, bar = max(first - float(np.median(seconds[0])), 0.0), None, BARS.get((model, name))
            cells = [rates[0], "", "", "", "", shares[0], "", ""]
            if name in theirs:
                ratio = float(np.median(seconds[1] / seconds[0]))
                excess = float(np.median(robust[0]) - np.median(robust[1]))
                cells = [*rates, f"{ratio:.2f}", *([f">= {bar:g}", verdict(ratio >= bar)] if bar else ["", ""])]
                cells += [*shares, verdict(excess <= ACCURACY_BAR + 1e-9)]
            cells += [f"{compiled:.1f} s", *([verdict(compiled < COMPILE_BAR)] if name == "AutoAttack" else [])]
            table.add_row(name, *cells)
            entry = {"model": model, "name": name, "peer": PEERS[name][0], "ratio": ratio, "bar": bar}
            entry |= {"ours": seconds[0].tolist(), "theirs": seconds[1:].reshape(-1).tolist(), "compile": compiled}
            figures.append({**entry, "robust": robust[0], "their_robust": [a for of_one in robust[1:] for a in of_one]})

    console = Console(highlight=False)
    console.print(f"{here['cpu']}, one thread; JAX on {here['device']}; {here['dtype']}")
    console.print(", ".join(f"{package} {version}" for package, version in here["versions"].items()))
    if here["load"] > 0.5:
        console.print(f"[yellow]The machine was busy (load {here['load']:.1f}): idle, it gives others.")
    console.print(f"{config.num_images} images of 28x28x1, linf, epsilon {config.epsilon:g}; standard AutoAttack.")
    console.print(table)
    console.print("Medians; images per second of CPU; ratio: how many times as fast as its peer robustjax is.")
    console.print(f"robust: accuracy under the attack; at most {ACCURACY_BAR:.1%} above the peer's.")
    console.print(f"compile: extra seconds of the first call; below {COMPILE_BAR:g} s for AutoAttack.")
    for reason in left_out:
        console.print(f"Left out: {reason}.", markup=False, soft_wrap=True)
    settings = dataclasses.asdict(config)
    result = {"machine": here, "settings": settings, "rows": figures, "left_out": left_out}
    if config.json:
        write_whole(config.json, json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    use_one_thread()
    command(Config, run, __doc__)
