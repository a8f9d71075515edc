"""Classification by distances to prototypes: pure functions of arrays, and the module that trains them.

A network answers from how strongly it detects each of its components, which are images themselves. Its radius of
robustness is a formula, so that it stands here, where objectives can maximise it and certificates can report it.

The examples share a network of two prototypes, a black and a white image, one of each class:

>>> from robustjax.models import prototypes
>>> components = jnp.stack([jnp.zeros((2, 2, 1)), jnp.ones((2, 2, 1))])
>>> settings = {"labels": jnp.array([0, 1]), "num_classes": 2, "reasoning": "rbf"}
>>> module = prototypes.classifier(jax.random.key(0), components, **settings)
>>> net = prototypes.network(models.functional(module).state.params)
>>> x = jnp.full((1, 2, 2, 1), 0.1)
"""

from robustjax._prototypes import PrototypeNetwork as PrototypeNetwork
from robustjax._prototypes import log_detections as log_detections
from robustjax._prototypes import log_probabilities as log_probabilities
from robustjax._prototypes import network as network
from robustjax._prototypes import radius as radius
from robustjax.models._prototypes import classifier as classifier
