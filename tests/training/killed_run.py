"""A training run to kill; started as a process of its own by kill_test.py: killed_run.py FOLDER RESULT."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from robustjax import losses, perturbations, training
from robustjax.typing import Batch, ModelState, Outputs

NUM_STEPS = 40


def convnet(state, x, *, train=False):
    features = jax.nn.relu(jax.lax.conv(x.transpose(0, 3, 1, 2), state.params["conv"], (2, 2), "SAME"))
    features = features.reshape(x.shape[0], -1)
    stats = {"mean": 0.9 * state.batch_stats["mean"] + 0.1 * features.mean(0)} if train else state.batch_stats
    return Outputs((features - stats["mean"][None]) @ state.params["dense"], features), ModelState(state.params, stats)


class Stream:
    position = 0

    def __iter__(self):
        return self

    def __next__(self):
        sys.stdout.write(f"batch {self.position}\n")
        sys.stdout.flush()
        rng = np.random.default_rng(self.position)
        self.position += 1
        image = rng.uniform(size=(16, 8, 8, 1)).astype(np.float32)
        return Batch(image, rng.integers(0, 10, 16, np.int32), np.arange(16, dtype=np.int32))

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def main(folder, result):
    rng = np.random.default_rng(0)
    params = {"conv": rng.normal(0, 0.1, (8, 1, 3, 3)), "dense": rng.normal(0, 0.1, (128, 10))}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    model = ModelState(params, {"mean": jnp.zeros(128)})
    optimizer = training.RECIPES["digits"].optimizer(NUM_STEPS, num_epochs=1)
    augment = perturbations.compose(perturbations.random_crop, perturbations.random_horizontal_flip)
    state, history = training.fit(
        convnet, training.init(jax.random.key(1), model, optimizer), Stream(),
        objective=losses.augmented(augment, losses.smoothing.gaussian_augmentation(sigma=0.25)), optimizer=optimizer,
        num_steps=NUM_STEPS, folder=folder, checkpoint_every=4, log_every=3,
    )  # fmt: skip
    leaves = jax.tree.leaves((state._replace(key=jax.random.key_data(state.key)), history))
    pathlib.Path(result).write_bytes(b"".join(np.asarray(leaf).tobytes() for leaf in leaves))


if __name__ == "__main__":
    main(*sys.argv[1:])
