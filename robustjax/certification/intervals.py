"""Certificates of the network itself by interval bound propagation, without noise and without sampling.

The examples begin with:

>>> from robustjax.certification import intervals
"""

from robustjax._intervals._bounds import Interval as Interval
from robustjax._intervals._bounds import bounds as bounds
from robustjax.certification._intervals import Certificate as Certificate
from robustjax.certification._intervals import certify as certify
