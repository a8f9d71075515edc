"""Training with outliers: rows of a batch with the label -1, inputs that belong to no class.

:func:`robustjax.data.with_outliers` makes such batches. The model sees both groups in one call, so batch normalisation
computes its statistics over both groups.

The examples share a batch whose second image is an outlier:

>>> mixed = batch._replace(label=jnp.array([0, -1]))
"""

from robustjax.losses._outliers import energy_bounded as energy_bounded
from robustjax.losses._outliers import energy_hinge as energy_hinge
from robustjax.losses._outliers import outlier_exposure as outlier_exposure
from robustjax.losses._outliers import uniform_cross_entropy as uniform_cross_entropy
