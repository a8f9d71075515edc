"""Objectives for networks in front of a classifier: denoisers, and the noise predictor of a diffusion model.

Here ``apply`` returns images instead of ``Outputs``; see :func:`robustjax.models.image_functional`.

The examples share a denoiser that moves every pixel towards grey:

>>> def denoise(state, x, *, train=False):
...     return 0.5 + state.params["kept"] * (x - 0.5), state
>>> model = ModelState({"kept": jnp.array(0.5)}, {})
"""

from robustjax.losses._denoising import Schedule as Schedule
from robustjax.losses._denoising import alphas_bar as alphas_bar
from robustjax.losses._denoising import diffusion as diffusion
from robustjax.losses._denoising import mse as mse
from robustjax.losses._denoising import stability as stability
