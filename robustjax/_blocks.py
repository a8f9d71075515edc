"""How many inputs a model sees at once, wherever a loop works through more of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax

_MOST = {"forward": (200, 1000), "backward": (256, 1000)}  # on a CPU, and on an accelerator
_BYTES = {"forward": (2**27, 2**30), "backward": (2**25, 2**25)}  # of inputs: a backward pass keeps every layer
_STEP = 40


def at_once(image_shape: Sequence[int], *, backward: bool = False) -> int:
    """Inputs in a block of a forward pass, or of a gradient, on the default backend, from the bytes of an input.

    A CPU is fastest with a block that its caches hold, an accelerator with one that fills it. Blocks of more bytes than
    a device has room for become smaller.
    """
    kind, accelerator = "backward" if backward else "forward", jax.default_backend() != "cpu"
    return max(1, min(_MOST[kind][accelerator], _BYTES[kind][accelerator] // (4 * max(1, math.prod(image_shape)))))


def evenly(total: int, most: int, step: int = 1) -> int:
    """The size of the fewest blocks of at most ``most`` that hold ``total``, as equal as multiples of ``step`` are."""
    blocks = max(1, -(-total // most))
    return min(most, -(-max(1, total) // (blocks * step)) * step)


def of_draws(num_samples: int | None, image_shape: Sequence[int]) -> tuple[int, int]:
    """Draws of an image in a block, and images in a block, for this number of draws; None if it is traced.

    Draws are divided evenly, into blocks of a multiple of 40, so that only few sizes are ever compiled. On an
    accelerator, images whose draws do not fill a block share one.
    """
    most = at_once(image_shape)
    if num_samples is None:
        return most, 1
    size = evenly(num_samples, most, _STEP)
    return size, 1 if jax.default_backend() == "cpu" else most // size
