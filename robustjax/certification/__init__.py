"""Guarantees that hold for every perturbation in a set, and the statistics behind them.

Start with ``certify`` and ``predict`` under a measure such as ``gaussian``: randomized smoothing, for any classifier.
``sample_counts``, ``certificate_from_counts`` and ``prediction_from_counts`` are their parts.

The examples below certify a half-space: class 1 where the mean of the 16 pixels exceeds 0.4. The first image lies 0.4
in l2 from the boundary, the second 2.0.

>>> x = jnp.stack([jnp.full((4, 4, 1), 0.5), jnp.full((4, 4, 1), 0.9)])
>>> def logits_fn(x):
...     score = x.mean((1, 2, 3)) - 0.4
...     return jnp.stack([-score, score], axis=-1)
"""

from robustjax.certification import conformal as conformal
from robustjax.certification import halfspaces as halfspaces
from robustjax.certification import intervals as intervals
from robustjax.certification import mixing as mixing
from robustjax.certification import multimodal as multimodal
from robustjax.certification import prototypes as prototypes
from robustjax.certification._binomial import binomial_lower_bound as binomial_lower_bound
from robustjax.certification._binomial import sign_test_p_value as sign_test_p_value
from robustjax.certification._counts import sample_counts as sample_counts
from robustjax.certification._denoised import denoised as denoised
from robustjax.certification._denoised import diffusion_denoised as diffusion_denoised
from robustjax.certification._dual import DualCertificate as DualCertificate
from robustjax.certification._dual import checkerboard as checkerboard
from robustjax.certification._dual import dual as dual
from robustjax.certification._dual import dual_radius as dual_radius
from robustjax.certification._lipschitz import convolution_norm as convolution_norm
from robustjax.certification._lipschitz import lipschitz_radius as lipschitz_radius
from robustjax.certification._means import empirical_bernstein_lower_bound as empirical_bernstein_lower_bound
from robustjax.certification._means import hoeffding_lower_bound as hoeffding_lower_bound
from robustjax.certification._measures import Measure as Measure
from robustjax.certification._measures import gaussian as gaussian
from robustjax.certification._measures import in_norm as in_norm
from robustjax.certification._measures import laplace as laplace
from robustjax.certification._measures import uniform as uniform
from robustjax.certification._sequential import SequentialCertificate as SequentialCertificate
from robustjax.certification._sequential import certify_sequential as certify_sequential
from robustjax.certification._smoothing import ABSTAIN as ABSTAIN
from robustjax.certification._smoothing import Certificate as Certificate
from robustjax.certification._smoothing import certificate_from_counts as certificate_from_counts
from robustjax.certification._smoothing import certify as certify
from robustjax.certification._smoothing import predict as predict
from robustjax.certification._smoothing import prediction_from_counts as prediction_from_counts
