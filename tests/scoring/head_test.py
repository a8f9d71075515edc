import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp, softmax

from robustjax import scoring
from robustjax.typing import Outputs

ROWS, DIM, CLASSES = 40, 9, 4


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


KERNEL = random(0, DIM, CLASSES)
HEAD = scoring.Head(KERNEL - KERNEL.mean(0), random(1, CLASSES) / 10)  # predicts every class of the features below
TRAIN, TEST = np.abs(random(2, ROWS, DIM)), np.abs(random(3, 20, DIM))


def outputs(features, logits=None):
    return Outputs(jnp.asarray(features @ HEAD.kernel + HEAD.bias if logits is None else logits), jnp.asarray(features))


GUESS = np.asarray(outputs(TRAIN).logits).argmax(-1)
LABELS = np.where(np.arange(ROWS) % 5, GUESS, (GUESS + 1) % CLASSES)


def wide(features):
    """Features, logits and predictions in float64."""
    features = features.astype(np.float64)
    logits = features @ HEAD.kernel.astype(np.float64) + HEAD.bias
    return features, logits, logits.argmax(-1)


def scores(detector, train=None, test=None, head=HEAD, labels=LABELS):
    state = detector.fit(outputs(TRAIN) if train is None else train, labels, head)
    return np.asarray(detector.score(state, outputs(TEST) if test is None else test))


def gradnorm(train, test):
    features, logits, _ = wide(test)
    return -np.abs(features).sum(-1) * np.abs(1 / CLASSES - softmax(logits, axis=-1)).sum(-1)


def she(train, test):
    (stored, _, guess), (features, _, predicted) = wide(train), wide(test)
    patterns = np.stack([stored[(guess == c) & (c == LABELS)].mean(0) for c in range(CLASSES)])
    return -(features * patterns[predicted]).sum(-1)


def nnguide(train, test, k=10):
    (stored, stored_logits, _), (features, logits, _) = wide(train), wide(test)
    result = []
    for row, own in zip(features, logsumexp(logits, axis=-1)):
        cosines = stored @ row / np.linalg.norm(stored, axis=-1) / np.linalg.norm(row)
        result.append(-np.sort(cosines * logsumexp(stored_logits, axis=-1))[-k:].mean() * own)
    return np.array(result)


def fdbd(train, test):
    features, logits, predicted = wide(test)
    weights, mean, result = HEAD.kernel.T.astype(np.float64), train.astype(np.float64).mean(0), []
    for row, own, top in zip(features, logits, predicted):
        others = [c for c in range(CLASSES) if c != top]
        distances = [(own[top] - own[c]) / np.linalg.norm(weights[top] - weights[c]) for c in others]
        result.append(-np.mean(distances) / np.linalg.norm(row - mean))
    return np.array(result)


def nci(train, test, alpha=1e-4):
    features, _, predicted = wide(test)
    centred = features - train.astype(np.float64).mean(0)
    projected = (centred * HEAD.kernel.T[predicted]).sum(-1) / np.linalg.norm(centred, axis=-1)
    return -projected - alpha * np.abs(features).sum(-1)


FLOAT64 = {
    "gradnorm": (scoring.gradnorm(), gradnorm),
    "she": (scoring.she(), she),
    "nnguide": (scoring.nnguide(), nnguide),
    "nnguide 1": (scoring.nnguide(k=1), lambda train, test: nnguide(train, test, 1)),
    "nnguide all": (scoring.nnguide(k=ROWS), lambda train, test: nnguide(train, test, ROWS)),
    "fdbd": (scoring.fdbd(), fdbd),
    "nci": (scoring.nci(), nci),
    "nci 0.1": (scoring.nci(alpha=0.1), lambda train, test: nci(train, test, 0.1)),
}


@pytest.mark.parametrize("name", FLOAT64)
@pytest.mark.parametrize("size", [1, 1000])
def test_float64_is_met(name, size):
    detector, reference = FLOAT64[name]
    train, test = TRAIN * np.float32(size), TEST * np.float32(size)
    found, want = scores(detector, outputs(train), outputs(test)), reference(train, test)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_gradnorm_is_the_norm_of_a_gradient():
    def loss(kernel, features):
        return -jax.nn.log_softmax(features @ kernel + HEAD.bias).mean()

    gradients = np.asarray(jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(HEAD.kernel, TEST))
    np.testing.assert_allclose(scores(scoring.gradnorm()), -np.abs(gradients).sum((1, 2)), rtol=1e-4)


def test_fdbd_measures_the_way_to_the_boundary():
    mean, row = TRAIN.mean(0), TEST[:1]
    logits = np.asarray(outputs(row).logits)[0]
    top, second = np.argsort(logits)[:-3:-1]
    step = HEAD.kernel[:, top] - HEAD.kernel[:, second]
    distance = (logits[top] - logits[second]) / np.linalg.norm(step)
    at = np.asarray(outputs(row - distance * step / np.linalg.norm(step)).logits)[0]
    np.testing.assert_allclose(at[top], at[second], rtol=1e-4)
    two = scoring.Head(HEAD.kernel[:, [top, second]])
    found = scores(
        scoring.fdbd(), outputs(TRAIN, TRAIN @ two.kernel), outputs(row, logits[None, [top, second]]), two, None
    )
    np.testing.assert_allclose(found, -distance / np.linalg.norm(row - mean), rtol=1e-4)


def test_equal_weights_and_the_mean_itself_are_no_trouble():
    twins = HEAD._replace(kernel=HEAD.kernel[:, [0, 0, 2, 3]], bias=np.zeros(CLASSES, np.float32))
    test = np.concatenate([TEST, TRAIN.mean(0, keepdims=True), np.zeros((1, DIM), np.float32)])
    for detector in (scoring.fdbd(), scoring.nci(), scoring.nnguide()):
        found = scores(detector, outputs(TRAIN, TRAIN @ twins.kernel), outputs(test, test @ twins.kernel), twins)
        assert np.isfinite(found).all()


def test_she_wants_a_correct_row_of_every_class():
    with pytest.raises(ValueError, match="she needs a correctly classified row of every class, class 2 has none"):
        scores(scoring.she(), labels=np.where(GUESS == 2, 0, GUESS))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scoring.nnguide(k=0), "k must be an integer of at least 1, got 0"),
        (lambda: scores(scoring.nnguide(k=41)), "k must be at most the 40 training rows, got 41"),
        (lambda: scoring.nci(alpha=-0.1), "alpha must be finite and at least 0, got -0.1"),
        (lambda: scoring.nci(alpha=np.inf), "alpha must be finite and at least 0, got inf"),
        (lambda: scores(scoring.fdbd(), head=None), "head must be given to fit fdbd, got None"),
        (lambda: scores(scoring.nci(), head=None), "head must be given to fit nci, got None"),
        (lambda: scores(scoring.she(), labels=None), "labels must be given to fit she, got None"),
        (lambda: scoring.nnguide().fit(), "outputs must be given to fit nnguide, got None"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
