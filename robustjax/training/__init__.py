"""From an objective to trained parameters: step, loop, checkpoints, recipes.

``fit`` runs the whole loop; ``make_step`` is its compiled step.

The examples below train a linear classifier of digits:

>>> import optax
>>> digits = data.load("digits", "train")
>>> model = models.functional(models.mlp(jax.random.key(0), hidden=(), image_shape=(8, 8, 1)))
>>> optimizer = optax.adam(0.01)
"""

from robustjax.training._accelat import AccelATState as AccelATState
from robustjax.training._accelat import accelat as accelat
from robustjax.training._checkpoint import restore_model as restore_model
from robustjax.training._fit import FitResult as FitResult
from robustjax.training._fit import Preempted as Preempted
from robustjax.training._fit import fit as fit
from robustjax.training._mesh import make_mesh as make_mesh
from robustjax.training._mesh import replicate as replicate
from robustjax.training._mesh import shard_batch as shard_batch
from robustjax.training._recipes import RECIPES as RECIPES
from robustjax.training._recipes import Recipe as Recipe
from robustjax.training._step import TrainState as TrainState
from robustjax.training._step import init as init
from robustjax.training._step import make_step as make_step
