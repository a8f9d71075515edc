"""One process of a training run, started by processes_test.py: process_run.py ADDRESS COUNT INDEX FOLDER SETTINGS."""

import json
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from robustjax import losses, training
from robustjax.training import _fit
from robustjax.typing import Batch, ModelState, Outputs

NUM_STEPS = 20
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def network(state, x, *, train=False):
    flat = x.reshape(x.shape[0], -1)
    stats = {"mean": 0.9 * state.batch_stats["mean"] + 0.1 * flat.mean(0)} if train else state.batch_stats
    features = jax.nn.relu((flat - stats["mean"][None]) @ state.params["hidden"])
    return Outputs(features @ state.params["out"], features), ModelState(state.params, stats)


def model():
    rng = np.random.default_rng(0)
    params = {"hidden": rng.normal(0, 0.5, (4, 5)), "out": rng.normal(0, 0.5, (5, 3))}
    return ModelState(jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params), {"mean": jnp.zeros(4)})


class Stream:
    """The rows of one process of endless batches, those of the processes one after the other."""

    def __init__(self, index=0, count=1, *, pause=0.0):
        self.position, self.rows, self.pause = 0, slice(index * 8 // count, (index + 1) * 8 // count), pause

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(self.pause)
        rng = np.random.default_rng(self.position)
        self.position += 1
        image = rng.uniform(size=(8, 2, 2, 1)).astype(np.float32)
        batch = Batch(image, (image.mean((1, 2, 3)) * 3).astype(np.int32), np.arange(8, dtype=np.int32))
        return Batch(*(field[self.rows] for field in batch))

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def train(stream, **settings):
    return training.fit(
        network, training.init(jax.random.key(1), model(), OPTIMIZER), stream,
        objective=losses.smoothing.gaussian_augmentation(sigma=0.25), optimizer=OPTIMIZER,
        **{"num_steps": NUM_STEPS, "checkpoint_every": 5, "log_every": 3, "progress": False, **settings},
    )  # fmt: skip


def main(address, count, index, folder, settings):
    def say(name, value):
        sys.stdout.write(f"{json.dumps([name, value])}\n")
        sys.stdout.flush()

    count, index, settings = int(count), int(index), json.loads(settings)
    jax.config.update("jax_num_cpu_devices", settings.get("devices", 2))
    jax.distributed.initialize(
        address, count, index, cluster_detection_method="deactivate", heartbeat_timeout_seconds=10
    )
    stop_at = settings.get("stop_at", {}).get(str(index))

    def stop(step):
        say("step", step)
        return step == stop_at

    try:
        for refused in (
            lambda: training.make_mesh({"data": 1}),
            lambda: train(Stream(index, count), folder=folder, mesh=training.make_mesh(devices=jax.local_devices())),
            lambda: train(Stream(index, count), folder="s3://bucket/run"),
        ):
            try:
                refused()
            except ValueError as error:
                say("refused", str(error))
        agreed = _fit._agreed(lambda step: index == 0 and step == 2, training.make_mesh(), steps_late=1)
        say("agreed", [agreed(step) for step in range(1, 5)])
        state, _ = train(
            Stream(index, count, pause=settings.get("pause", 0)), folder=folder, stop=stop,
            on_metrics=lambda step, row: say("row", step), log=lambda line: say("log", line),
        )  # fmt: skip
        local = training.replicate(state, training.make_mesh(devices=jax.local_devices()))
        restored = training.restore_model(folder, model())
        same = jax.tree.map(lambda *arrays: len({np.asarray(a).tobytes() for a in arrays}) == 1, local.model, restored)
        say(
            "restored the same",
            jax.tree.all(same) and jax.tree.all(jax.tree.map(lambda a: a.is_fully_addressable, local)),
        )
        say("parameters", jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), state.model.params))
    except Exception as error:
        say("error", f"{type(error).__name__}: {error}")
        os._exit(1)  # an orderly end would wait for the processes that are stuck or gone


if __name__ == "__main__":
    main(*sys.argv[1:])
