"""Results in a few words, which remain tuples in all other respects."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import attacks, certification
from robustjax.certification import intervals

RADII = np.array([0.5, 0.0, 1.0])
HELD = RADII > 0
CERTIFICATE = certification.Certificate(np.where(HELD, 1, -1), RADII, np.where(HELD, 0.9, 0.4), ~HELD)
SIGNS = attacks.Diagnosis(np.array([True, False]), np.zeros(2, bool), np.asarray(False), np.asarray(True))
EVALUATION = attacks.Evaluation(
    0.75, 0.5, {"apgd-ce": 0.625, "square": 0.5}, np.ones(8, bool), np.zeros((8, 2)), {"apgd-ce": 100}, {}, ("a sign.",)
)
SHOWN = {
    "Certificate(3 inputs: 1 abstained, mean radius 0.5)": CERTIFICATE,
    "Certificate(1 input: 0 abstained, mean radius 0.5)": certification.Certificate(*(f[:1] for f in CERTIFICATE)),
    "Certificate(0 inputs)": certification.Certificate(*(f[:0] for f in CERTIFICATE)),
    "SequentialCertificate(3 inputs: 1 abstained, mean radius 0.5)": certification.SequentialCertificate(
        *CERTIFICATE, np.full(3, 100)
    ),
    "DualCertificate(3 inputs: 1 abstained, mean radius 0.5)": certification.DualCertificate(*CERTIFICATE),
    "Certificate(3 inputs: 2 verified)": intervals.Certificate(jnp.zeros(3, jnp.int32), jnp.asarray(RADII), HELD),
    "Diagnosis(1 input: no warning)": attacks.Diagnosis(np.zeros(1, bool), np.zeros(1, bool), False, False),
    "Diagnosis(2 inputs:\n"
    "  gradients are masked or broken: zero at 1 and not finite at 0 of 2 inputs, where gradient-based attacks say "
    "nothing.\n"
    "  the model's outputs look like probabilities: attacks need logits, which do not saturate.)": SIGNS,
    "Evaluation(8 inputs: 75.00% clean accuracy, 50.00% robust accuracy\n"
    "  after apgd-ce: 62.50%\n"
    "  after square: 50.00%\n"
    "  warning: a sign.)": EVALUATION,
}


@pytest.mark.parametrize("words", SHOWN)
def test_they_are_shown_in_a_few_words(words):
    result = SHOWN[words]
    assert repr(result) == str(result) == words
    again = pickle.loads(pickle.dumps(result))
    assert type(again) is type(result)
    assert jax.tree.structure(again) == jax.tree.structure(result)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, result))
    assert tuple(result)[0] is result[0] is getattr(result, result._fields[0])
    assert isinstance(jax.tree.map(lambda a: a, result), type(result))


def test_equality_is_that_of_tuples():
    one, other = (certification.Certificate(1, 0.5, probability, False) for probability in (0.9, 0.8))
    assert one == (1, 0.5, 0.9, False)
    assert one != other
    assert hash(one) == hash(tuple(one))


def test_fields_without_numbers_are_shown_as_they_are():
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), CERTIFICATE)
    assert repr(shapes).startswith("Certificate(label=ShapeDtypeStruct(")
    assert repr(certification.Certificate(1, 2, 3, 4)) == "Certificate(label=1, radius=2, probability=3, abstained=4)"
    shown = []
    jax.eval_shape(lambda a: shown.append(repr(intervals.Certificate(a, a, a))), jnp.zeros(3))
    assert shown[0].startswith("Certificate(label=")
