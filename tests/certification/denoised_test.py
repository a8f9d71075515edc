"""Denoisers in front of classifiers beside closed forms; attacks inside the certified radii find nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from robustjax import attacks, certification, losses

SIGMA = 0.5
MEASURE = certification.gaussian(SIGMA)
RNG = np.random.default_rng(0)
X = RNG.uniform(size=(8, 4, 4, 1)).astype(np.float32)
NORMAL = RNG.normal(size=16)
NORMAL /= np.linalg.norm(NORMAL)
MIX = np.eye(16) + 0.3 * RNG.normal(size=(16, 16))
SHARE = losses.denoising.alphas_bar(200)


def half_space(normal, x):
    """Two classes, split by a hyperplane through the grey image."""
    distance = (x.reshape(x.shape[0], -1) - 0.5) @ normal
    return jnp.stack([jnp.zeros_like(distance), distance], axis=-1)


def linear(mix, x):
    return (0.5 + (x.reshape(x.shape[0], -1) - 0.5) @ mix).reshape(x.shape)


F = jax.tree_util.Partial(half_space, jnp.asarray(NORMAL, jnp.float32))
D = jax.tree_util.Partial(linear, jnp.asarray(MIX, jnp.float32))


def true_radii():
    """Of the half-space behind the linear denoiser, which is a half-space with another normal."""
    normal = MIX @ NORMAL
    return (X.reshape(len(X), -1) - 0.5) @ normal / np.linalg.norm(normal)


def test_a_half_space_behind_a_linear_denoiser_is_another_half_space():
    n, whole = 10_000, certification.denoised(F, D)
    few, votes = (
        np.asarray(certification.sample_counts(jax.random.key(0), whole, X, MEASURE, num_samples=m, first_sample=start))
        for start, m in ((0, 100), (100, n))
    )
    p_values = [stats.binomtest(int(k), n, p).pvalue for k, p in zip(votes[:, 1], special.ndtr(true_radii() / SIGMA))]
    assert min(p_values) > 0.001 / len(X)
    certificate = certification.certificate_from_counts(few, votes, MEASURE)
    certified, radius = ~certificate.abstained, np.abs(true_radii())
    assert (certificate.radius <= radius).all()
    assert (certificate.radius > 0.8 * radius - 0.02)[certified].all()
    assert (certificate.label == (true_radii() > 0))[certified].all()
    assert certified.sum() >= 6


def test_attacks_inside_the_radii_find_nothing():
    """A model that is bent everywhere, and projected gradient descent on its smoothed answers."""
    measure = certification.gaussian(0.2)
    inner, outer = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((16, 12), (12, 3)))

    def bent(inner, outer, x):
        return jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ inner) @ outer

    def squash(mix, x):
        return 0.5 + 0.5 * jnp.tanh(2 * (linear(mix, x) - 0.5))

    whole = certification.denoised(
        jax.tree_util.Partial(bent, inner, outer), jax.tree_util.Partial(squash, jnp.asarray(MIX, jnp.float32))
    )
    certificate = certification.certify(jax.random.key(1), whole, X, measure, num_estimation=2000)
    chosen = np.flatnonzero(~certificate.abstained)
    assert len(chosen) >= 5
    noisy = jax.tree_util.Partial(lambda whole, key, x: whole(measure.sample(key, x[0])[None]), whole)
    changed = {}
    for factor in (0.999, 4.0):
        moved = []
        for i in chosen:
            attack = attacks.pgd(epsilon=factor * float(certificate.radius[i]), norm="l2", steps=10, samples=16)
            moved.append(attack(jax.random.key(i), noisy, X[i : i + 1], certificate.label[i : i + 1]))
        answers = certification.predict(jax.random.key(2), whole, np.concatenate(moved), measure, num_samples=2000)
        changed[factor] = ((answers != certificate.label[chosen]) & (answers != certification.ABSTAIN)).sum()
    assert changed[0.999] == 0
    assert changed[4.0] > 0  # the attack is one


def seen_by(sigma, x, share=SHARE):
    """What the noise predictor is called with, and what the classifier then sees if no noise is predicted."""
    calls = []

    def noise_fn(x_t, time):
        calls.append((np.asarray(x_t), np.asarray(time)))
        return jnp.zeros_like(x_t)

    image = certification.diffusion_denoised(lambda x: x.reshape(len(x), -1), noise_fn, share, sigma=sigma)(x)
    [(x_t, time)] = calls
    return x_t, time, np.asarray(image).reshape(x.shape)


@pytest.mark.parametrize("sigma", [0.12, 0.25, 0.5, 1.0])
def test_the_predictor_sees_images_at_its_own_scale(sigma):
    x_t, time, image = seen_by(sigma, jnp.asarray(X))
    assert time.dtype == np.int32
    assert len(set(time)) == 1
    step = int(time[0])
    assert time.shape == (8,)
    level = np.sqrt((1 - SHARE) / SHARE)
    gap = abs(level[step] - 2 * sigma)
    assert all(gap <= abs(other - 2 * sigma) for other in level)
    np.testing.assert_allclose(x_t, np.sqrt(SHARE[step]) * (2 * X - 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(image, X, atol=1e-6)
    # The noise of the measure, at that scale, is what the model was trained on: 1 - alpha_bar, up to the grid.
    noisy = np.asarray(seen_by(sigma, jnp.asarray(RNG.normal(0.5, sigma, (1, 200, 200, 1)), jnp.float32))[0])
    assert noisy.std() == pytest.approx(np.sqrt(1 - SHARE[step]), rel=0.05)


def test_the_true_noise_gives_the_image_back_and_the_best_guess_its_mean():
    step = int(np.abs(np.sqrt((1 - SHARE) / SHARE) - 2 * SIGMA).argmin())
    left = SHARE[step]
    noisy = jnp.asarray(X + SIGMA * RNG.normal(size=X.shape), jnp.float32)
    flat = lambda x: x.reshape(len(x), -1)

    def knows(x_t, time):
        return (x_t - np.float32(np.sqrt(left)) * (2 * X - 1)) / np.float32(np.sqrt(1 - left))

    found = certification.diffusion_denoised(flat, knows, SHARE, sigma=SIGMA)(noisy)
    np.testing.assert_allclose(found, flat(X), atol=1e-5)

    def guesses(x_t, time):  # the mean of the noise given x_t, where images in [-1, 1] are N(0.1, 0.3^2)
        mean, power = np.sqrt(left) * 0.1, left * 0.09 + 1 - left
        return jnp.asarray(np.sqrt(1 - left) / power * (np.asarray(x_t, np.float64) - mean), jnp.float32)

    level = (1 - left) / left  # nearly (2 sigma)^2
    centred = 2 * np.asarray(noisy, np.float64) - 1
    posterior = (0.09 * centred + level * 0.1) / (0.09 + level)
    found = certification.diffusion_denoised(flat, guesses, SHARE, sigma=SIGMA)(noisy)
    np.testing.assert_allclose(found, flat((1 + np.clip(posterior, -1, 1)) / 2), atol=1e-5)


def test_sigma_may_lie_a_factor_of_two_below_the_first_step_and_at_the_last():
    level = np.sqrt((1 - SHARE) / SHARE)
    for sigma, step in ((level[0] / 4 * 1.01, 0), (level[-1] / 2, 199)):
        assert diffusion(sigma=float(sigma)).args[2] == step
    for sigma in (level[0] / 4 * 0.99, level[-1] / 2 * 1.01):
        with pytest.raises(ValueError, match="sigma must lie between"):
            diffusion(sigma=float(sigma))


def test_what_is_beyond_black_and_white_is_clipped():
    x = jnp.asarray([[-3.0, 0.25, 9.0]]).reshape(1, 3, 1, 1)
    np.testing.assert_allclose(seen_by(0.5, x)[2].ravel(), [0, 0.25, 1], atol=1e-6)


def test_weights_and_sigma_are_arguments_of_one_program():
    traces = []

    def noise_of(scale, x_t, time):
        traces.append(x_t.shape)
        return scale * x_t

    for scale, sigma in ((0.1, 0.5), (0.2, 0.25)):
        noise_fn = jax.tree_util.Partial(noise_of, jnp.float32(scale))
        whole = certification.diffusion_denoised(F, noise_fn, SHARE, sigma=sigma)
        certification.sample_counts(jax.random.key(0), whole, X[:2], MEASURE, num_samples=5, batch_size=5)
    assert len(traces) <= 2  # the shape check, and the loop's body
    leaves = jax.tree.leaves(certification.denoised(F, D))
    assert [leaf.shape for leaf in leaves] == [(16,), (16, 16)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: certification.denoised(F, None), "denoiser_fn must be a function, got None"),
        (
            lambda: certification.denoised(F, lambda x: x[:, 1:])(X),
            r"denoiser_fn must return images of shape \(8, 4, 4, 1",
        ),
        (lambda: diffusion(lambda x, t: x[:, 1:])(X), r"must return images of shape \(8, 4, 4, 1\), got \(8, 3"),
        (lambda: diffusion(sigma=0.0), "sigma must be positive and finite, got 0.0"),
        (lambda: diffusion(sigma=1e-4), r"sigma must lie between 0.00\d+ and .*, got 0.0001"),
        (
            lambda: diffusion(share=losses.denoising.alphas_bar(1000)[:500], sigma=0.6),
            r"between .* and 0\.5\d*, for .* got 0.6",
        ),
        (lambda: diffusion(share=[0.5, 0.6]), r"alphas_bar must be decreasing .* got \[0.5, 0.6\]"),
        (lambda: diffusion(share=[1.0, 0.6]), "alphas_bar must be decreasing numbers strictly between 0 and 1"),
    ],
)
def test_bad_input_is_named(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()


def diffusion(noise_fn=lambda x, t: x, *, share=SHARE, sigma=0.5):
    return certification.diffusion_denoised(F, noise_fn, share, sigma=sigma)
