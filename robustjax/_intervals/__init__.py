"""Bounds of a function over a box, by interval arithmetic on its jaxpr."""

from robustjax._intervals._bounds import Interval as Interval
from robustjax._intervals._bounds import ball as ball
from robustjax._intervals._bounds import bounds as bounds
from robustjax._intervals._bounds import margin_bounds as margin_bounds
