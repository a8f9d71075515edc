"""Guarantees that hold for every perturbation in a set, and the statistics behind them."""

from robustjax.certification import mixing as mixing
from robustjax.certification._binomial import binomial_lower_bound as binomial_lower_bound
from robustjax.certification._binomial import sign_test_p_value as sign_test_p_value
from robustjax.certification._dual import DualCertificate as DualCertificate
from robustjax.certification._dual import checkerboard as checkerboard
from robustjax.certification._dual import dual as dual
from robustjax.certification._dual import dual_radius as dual_radius
from robustjax.certification._measures import Gaussian as Gaussian
from robustjax.certification._measures import InNorm as InNorm
from robustjax.certification._measures import Laplace as Laplace
from robustjax.certification._measures import Measure as Measure
from robustjax.certification._measures import Uniform as Uniform
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
from robustjax.certification._smoothing import sample_counts as sample_counts
