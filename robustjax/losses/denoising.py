"""Objectives for what stands in front of a classifier: denoisers, and the noise predictor of a diffusion model.

Here ``apply`` gives images in place of ``Outputs``; see :func:`robustjax.models.image_functional`.
"""

from robustjax.losses._denoising import Schedule as Schedule
from robustjax.losses._denoising import alphas_bar as alphas_bar
from robustjax.losses._denoising import diffusion as diffusion
from robustjax.losses._denoising import mse as mse
from robustjax.losses._denoising import stability as stability
