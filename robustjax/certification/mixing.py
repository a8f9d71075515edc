"""Mixtures of an accurate and a robust classifier, and the certified radii of the mixtures.

The examples begin with:

>>> from robustjax.certification import mixing
"""

from robustjax.certification._mixing import ClassBounds as ClassBounds
from robustjax.certification._mixing import bounds_from_counts as bounds_from_counts
from robustjax.certification._mixing import lipschitz_radius as lipschitz_radius
from robustjax.certification._mixing import mix as mix
from robustjax.certification._mixing import mixture as mixture
from robustjax.certification._mixing import smoothed_radius as smoothed_radius
