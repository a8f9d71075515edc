"""A root of the second moment of many rows in float32; the moment itself would keep only half of the digits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_COLUMNS = 128
_BLOCKS = 8
_WELL_CONDITIONED = 0.01


def triangular_factor(rows: Float[Array, "rows dim"]) -> Float[Array, "dim dim"]:
    r"""An upper triangular :math:`R` with :math:`R^\top R = \frac1n \sum_i z_i z_i^\top`, up to the signs of its rows.

    The product of the rows with themselves is fast, but has an error of about :math:`10^{-6}` of its largest
    eigenvalue. Its Cholesky factor is used if, with all columns scaled to one length, the smallest eigenvalue is above
    a hundredth of the largest. Otherwise the rows themselves are factored, by Householder QR.

    Args:
      rows: ``(rows, dim)``, float32.

    Returns:
      ``(dim, dim)``; with fewer rows than dimensions the last rows are zero.
    """
    count, dim = rows.shape

    def householder():
        factor = jnp.linalg.qr(rows, mode="r") / count**0.5
        return jnp.pad(factor, ((0, dim - factor.shape[0]), (0, 0)))

    if count < dim:
        return householder()
    moment = _gram(rows) / count
    length = jnp.sqrt(jnp.diag(moment))
    scale = jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1.0), 0.0)
    eigenvalues = jnp.linalg.eigvalsh(scale[:, None] * moment * scale[None])
    well_conditioned = eigenvalues[0] > _WELL_CONDITIONED * eigenvalues[-1]
    return jax.lax.cond(well_conditioned, lambda: jnp.linalg.cholesky(moment, upper=True), householder)


def stacked_factor(factor: Float[Array, "dim dim"], rows: Float[Array, "rows dim"]) -> Float[Array, "dim dim"]:
    r"""An upper triangular root of the sum :math:`R^\top R + \sum_i z_i z_i^\top`, which is never formed."""
    return jnp.linalg.qr(jnp.concatenate([factor, rows]), mode="r")


def _gram(rows):
    """``rows.T @ rows``, of which XLA would compute both halves; the blocks are apart lest it copies slices again."""
    width = max(_COLUMNS, -(-rows.shape[1] // _BLOCKS))
    parts = jax.lax.optimization_barrier([rows[:, i : i + width] for i in range(0, rows.shape[1], width)])
    product = lambda i, j: jnp.matmul(parts[i].T, parts[j], precision=jax.lax.Precision.HIGHEST)
    upper = {(i, j): product(i, j) for i in range(len(parts)) for j in range(i, len(parts))}
    indices = range(len(parts))
    return jnp.block([[upper[i, j] if i <= j else upper[j, i].T for j in indices] for i in indices])
