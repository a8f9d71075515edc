import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import attacks, losses
from robustjax.attacks import _autoattack, autoattack
from robustjax.perturbations import image_keys

KEY = jax.random.key(0)
EPSILON = 0.1
FAKES = ("first", "second", "square")


def corner(x):
    """A model whose five logits are pixels: an attack has fooled it where it raises the wrong one."""
    return x[:, 0, :5, 0]


@pytest.fixture
def inputs():
    """Twenty inputs of class 0, whose pixel 1 is lower by 0.01 to 0.2; the last three are misclassified as they are."""
    x = np.full((20, 1, 5, 1), 0.2, np.float32)
    x[:, 0, 0] = 0.5
    x[:, 0, 1, 0] = 0.5 - np.arange(1, 21) / 100
    x[-3:, 0, 2] = 0.9
    return x, np.zeros(20, np.int32)


class Fakes:
    """Three attacks in place of the ensemble: each raises pixel 1 by its own step and notes what it sees."""

    def __init__(self, steps):
        self.steps, self.seen, self.keys = steps, [], []

    def attack(self, name, step):
        def attack(key, logits_fn, x, labels):
            x_adv = np.array(x)
            self.seen.append((name, np.rint(100 * (x_adv[:, 0, 0, 0] - x_adv[:, 0, 1, 0])).astype(int).tolist()))
            self.keys.append(key)
            x_adv[:, 0, 1] += np.float32(step)
            return x_adv

        return attack

    def __call__(self, _, num_classes):
        return {name: self.attack(name, step) for name, step in zip(FAKES, self.steps, strict=True)}


@pytest.fixture
def fakes(monkeypatch):
    def use(*steps):
        made = Fakes(steps)
        monkeypatch.setattr(attacks.autoattack, "attacks", lambda self, num_classes: made(self, num_classes))
        monkeypatch.setattr(attacks.autoattack, "_few_classes", lambda self, num_classes: ())
        return made

    return use


def evaluate(inputs, model=corner, **settings):
    arguments = {name: settings.pop(name) for name in ("on_attack", "resume") if name in settings}
    return autoattack(epsilon=EPSILON, **settings).evaluate(KEY, model, *inputs, **arguments)


def test_an_attack_sees_what_stands_and_nothing_else(inputs, fakes):
    seen = fakes(0.025, 0.055, 0.055).seen
    result = evaluate(inputs, batch_size=16)
    sizes = {}
    for name, gaps in seen:
        sizes.setdefault(name, []).append(len(gaps))
    of = lambda name: {gap for seen_by, gaps in seen if seen_by == name for gap in gaps}
    assert of("first") == set(range(1, 18))  # not the three that are misclassified
    assert of("second") == set(range(3, 18))
    assert of("square") == set(range(6, 18))
    assert sizes == {"first": [16, 1], "second": [15], "square": [12]}  # blocks of no more than stand
    assert result.clean_accuracy == 17 / 20
    assert result.per_attack == {"first": 15 / 20, "second": 12 / 20, "square": 12 / 20}
    assert result.robust_accuracy == result.correct.mean() == 12 / 20
    np.testing.assert_array_equal(result.correct, (np.arange(1, 21) > 5) & (np.arange(1, 21) < 18))
    np.testing.assert_array_equal(result.x_adv[result.correct], inputs[0][result.correct])
    np.testing.assert_array_equal(result.x_adv[-3:], inputs[0][-3:])
    assert (corner(result.x_adv).argmax(-1) == inputs[1]).mean() == 12 / 20
    assert set(result.seconds) == set(result.queries) == set(FAKES)
    assert result.warnings == ()


def test_the_ball_and_the_blocks_do_not_change_the_keys_of_an_input(inputs, fakes):
    by_size = {}
    for size in (None, 3):
        made = fakes(0.025, 0.055, 0.055)
        evaluate(inputs, batch_size=size)
        by_size[size] = {
            (name, gap, tuple(key))
            for (name, gaps), keys in zip(made.seen, made.keys, strict=True)
            for gap, key in zip(gaps, np.asarray(jax.random.key_data(keys)), strict=True)
        }
    assert by_size[None] == by_size[3]
    assert len({key for *_, key in by_size[3]}) == len(by_size[3])  # another for each attack


def test_goes_on_from_what_has_finished(inputs, fakes):
    kept = []

    def stop_after_first(name, state):
        kept.append((name, state))
        raise KeyboardInterrupt

    made = fakes(0.025, 0.055, 0.055)
    whole = evaluate(inputs, batch_size=8)
    with pytest.raises(KeyboardInterrupt):
        evaluate(inputs, batch_size=8, on_attack=stop_after_first)
    [(name, state)] = kept
    assert (name, state.per_attack) == ("first", {"first": 15 / 20})
    made.seen.clear()
    resumed = evaluate(inputs, batch_size=8, resume=state)
    assert {name for name, _ in made.seen} == {"second", "square"}
    assert resumed.per_attack == whole.per_attack
    np.testing.assert_array_equal(resumed.x_adv, whole.x_adv)
    made.seen.clear()
    assert evaluate(inputs, resume=resumed).per_attack == whole.per_attack
    assert not made.seen

    tied, correct = whole.x_adv.copy(), whole.correct.copy()
    tied[5, 0, 1], correct[5] = tied[5, 0, 0], False  # of two equal logits, another batch may have had the other first
    assert evaluate(inputs, resume=whole._replace(x_adv=tied, correct=correct)).per_attack == whole.per_attack

    with pytest.raises(ValueError, match="resume must be an evaluation of .* inputs by first, second, square, got one"):
        evaluate((inputs[0][:5], inputs[1][:5]), resume=state)
    with pytest.raises(ValueError, match="resume must be an evaluation .* by other"):
        evaluate(inputs, resume=state._replace(per_attack={"other": 0.5}))
    with pytest.raises(ValueError, match="logits_fn must be deterministic, got other .* at 1 of 20 inputs: turn"):
        evaluate(inputs, resume=state._replace(correct=np.where(np.arange(20) == 5, False, state.correct)))


def test_a_gain_of_square_is_told(inputs, fakes):
    fakes(0.025, 0.025, 0.055)
    with pytest.warns(UserWarning, match=r"lowers the accuracy from 75.00% to 60.00% .* may be masked"):
        result = evaluate(inputs)
    assert len(result.warnings) == 1
    fakes(0.025, 0.025, 0.035)
    assert evaluate(inputs).warnings == ()  # one input more is chance


def test_square_attacks_alone_where_gradients_are_masked(inputs, fakes, monkeypatch):
    made = fakes(0.025, 0.025, 0.025)
    monkeypatch.setattr(_autoattack, "square", lambda **settings: made.attack("alone", 0.055))
    stepped = lambda x: jnp.floor(100.001 * corner(x))
    with pytest.warns(UserWarning, match="AutoAttack: ") as told:
        result = evaluate(inputs, stepped)
    assert [name for name, _ in made.seen] == ["alone"]
    assert list(result.per_attack) == ["square"]
    assert result.per_attack["square"] == result.robust_accuracy < result.clean_accuracy
    messages = [str(warning.message) for warning in told]
    assert "gradients are masked or broken: zero at 20 and not finite at 0 of 20 inputs" in messages[0]
    assert "only Square, which needs none, runs" in messages[1]
    assert len(result.warnings) == 2
    resumed = evaluate(inputs, stepped, resume=result)
    assert (resumed.per_attack, len(made.seen)) == (result.per_attack, 1)


def test_few_masked_gradients_are_told_and_do_not_matter(inputs, fakes):
    made = fakes(0.025, 0.025, 0.025)
    partly = lambda x: jnp.where(x[:, 0, 1] > 0.48, jnp.floor(100.001 * corner(x)), 100 * corner(x))
    with pytest.warns(UserWarning, match="masked or broken: zero at 1 and"):
        evaluate(inputs, partly)
    assert [name for name, _ in made.seen] == list(FAKES)


def test_a_model_that_is_not_sound_raises(inputs, fakes):
    fakes(0.025, 0.055, 0.055)
    of_batch = lambda x: corner(x) - jnp.array([[0.1, 0, 0, 0, 0]]) * x[:, 0, 1].mean() / 0.5  # as batch statistics do
    with pytest.raises(ValueError, match=r"logits_fn must be deterministic, got other answers .* at \d+ of 20 inputs"):
        evaluate(inputs, of_batch, batch_size=4)
    with pytest.raises(ValueError, match="logits_fn must return finite logits, got others at 3 of 20 inputs"):
        evaluate(inputs, lambda x: corner(x).at[:, 3].set(jnp.where(x[:, 0, 2, 0] > 0.8, jnp.nan, 0.0)))


def test_an_attack_that_leaves_the_ball_raises(inputs, fakes):
    fakes(0.025, 0.12, 0.0)
    with pytest.raises(ValueError, match=r"x_adv must be within epsilon 0.1 of x in linf, got 0.1[12]"):
        evaluate(inputs)
    fakes(0.7, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"x_adv must lie in \[0, 1\], got .* to 1.1"):
        autoattack(epsilon=1.0).evaluate(KEY, corner, inputs[0], inputs[1])


def test_nothing_that_stands_and_nothing_at_all(inputs, fakes):
    made = fakes(0.025, 0.055, 0.055)
    wrong = (inputs[0], np.full(20, 4, np.int32))
    result = evaluate(wrong)
    assert (result.clean_accuracy, result.robust_accuracy, made.seen) == (0.0, 0.0, [])
    np.testing.assert_array_equal(result.x_adv, inputs[0])
    nothing = inputs[0][:0]
    assert autoattack(epsilon=0.1)(KEY, corner, jnp.asarray(nothing), jnp.asarray(inputs[1][:0])).shape == nothing.shape
    with pytest.raises(ValueError, match="x must hold at least one input, got none"):
        evaluate((nothing, inputs[1][:0]))


def test_cannot_be_traced_and_other_bad_input(inputs):
    attack = autoattack(epsilon=EPSILON)
    x, labels = map(jnp.asarray, inputs)
    with pytest.raises(ValueError, match="AutoAttack runs on the host and cannot be traced"):
        jax.jit(lambda x: attack(KEY, corner, x, labels))(x)
    with pytest.raises(ValueError, match=r"x must be \(batch, height, width, channels\), got \(20, 5\)"):
        attack(KEY, lambda x: x, x[:, 0, :, 0], labels)
    with pytest.raises(ValueError, match="epsilon must be at least 0 and finite, got -1.0"):
        autoattack(epsilon=-1.0)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        autoattack(epsilon=0.1, batch_size=0)


@pytest.mark.parametrize("size", [1, 5, 16, None])
def test_blocks_hold_every_place_once(size):
    for count in range(1, 60):
        x = np.zeros((max(count, 40), 2, 2, 1), np.float32)
        places = np.arange(count) * 2
        whole = min(size or 256, len(x))
        blocks = list(_autoattack._Inputs(None, None, x, None, None, size).blocks(places, part=-(-whole // 8)))
        np.testing.assert_array_equal(np.unique(np.concatenate(blocks)), places)
        assert len({len(block) for block in blocks}) <= 2
        assert sum(map(len, blocks)) <= max(-(-count // whole) * whole, count)
        if whole == 40 and count <= 16:
            assert sum(map(len, blocks)) < count + 5


def test_the_ensemble_is_the_published_one():
    ball = {"epsilon": 0.3, "norm": "l2"}
    assert autoattack(**ball).attacks(10) == {
        "apgd-ce": attacks.apgd(**ball, steps=100, loss="ce", restarts=1),
        "apgd-t": attacks.apgd_targeted(**ball, steps=100, num_targets=9, restarts=1),
        "fab-t": attacks.at_budget(attacks.fab(**ball, steps=100, num_targets=9, restarts=1), 0.3),
        "square": attacks.square(**ball, queries=5000, initial_fraction=0.8, restarts=1, rescale_schedule=False),
    }
    assert list(autoattack(**ball).attacks(10)) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert autoattack(**ball, version="rand").attacks(10) == {
        "apgd-ce": attacks.apgd(**ball, loss="ce", samples=20),
        "apgd-dlr": attacks.apgd(**ball, loss="dlr", samples=20),
    }
    of_l1 = autoattack(epsilon=12.0, norm="l1").attacks(10)
    assert (of_l1["apgd-ce"].restarts, of_l1["apgd-t"].num_targets, of_l1["fab-t"].attack.num_targets) == (5, 5, 9)
    queries = {name: attacks.queries_of(attack) for name, attack in autoattack(**ball).attacks(10).items()}
    assert queries == {"apgd-ce": 100, "apgd-t": 900, "fab-t": 900, "square": 5000}


def test_few_classes_change_the_ensemble_and_are_told():
    attack, random = autoattack(epsilon=0.1), autoattack(epsilon=0.1, version="rand")
    assert list(attack.attacks(3)) == ["apgd-ce", "apgd-dlr", "fab-t", "square"]
    assert list(attack.attacks(2)) == ["apgd-ce", "apgd-margin", "fab-t", "square"]
    assert list(random.attacks(2)) == ["apgd-ce", "apgd-margin"]
    assert attack.attacks(6)["apgd-t"].num_targets == attack.attacks(6)["fab-t"].attack.num_targets == 5
    assert [*attack._few_classes(10), *attack._few_classes(4), *random._few_classes(3)] == []  # all classes are targets
    assert "3 classes has no loss for apgd-t: apgd-dlr replaces it" in next(attack._few_classes(3))
    assert "2 classes has no loss for apgd-dlr: apgd-margin replaces it" in next(random._few_classes(2))


@pytest.fixture(scope="module")
def network():
    """A small random network, eight inputs with its own answers as labels, and a radius that fools about half."""
    k1, k2, k3 = jax.random.split(jax.random.key(3), 3)
    w1, w2 = jax.random.normal(k1, (25, 16)), jax.random.normal(k2, (16, 10))
    model = jax.tree_util.Partial(lambda w, x: jax.nn.relu((x.reshape(-1, 25) - 0.5) @ w[0]) @ w[1], (w1, w2))
    x = jax.random.uniform(k3, (8, 5, 5, 1))
    return model, x, model(x).argmax(-1).astype(jnp.int32), 0.03


@pytest.fixture
def small(monkeypatch):
    """The ensemble with a fifth of its steps, fewer targets, and a tenth of the queries."""
    for name, few in {"apgd": {"steps": 20}, "apgd_targeted": {"steps": 20}, "fab": {"steps": 20}}.items():
        monkeypatch.setattr(_autoattack, name, functools.partial(getattr(_autoattack, name), **few))
    monkeypatch.setattr(_autoattack, "square", functools.partial(_autoattack.square, queries=500))
    monkeypatch.setattr(_autoattack, "_TARGETS", 3)


def test_no_part_alone_leaves_less(network, small):
    """In blocks of one input, so that each part is compiled once; the first and the last part stand for all."""
    model, x, labels, epsilon = network
    attack = autoattack(epsilon=epsilon, batch_size=1)
    result = attack.evaluate(KEY, model, x, labels)
    assert 0 < result.robust_accuracy < result.clean_accuracy == 1
    accuracies = [1.0, *result.per_attack.values()]
    assert accuracies == sorted(accuracies, reverse=True)
    assert abs(result.x_adv - np.asarray(x)).max() <= epsilon + 1e-6
    parts = attack.attacks(10)
    for name in ("apgd-ce", "square"):
        place = list(parts).index(name)
        keys = jax.vmap(jax.random.fold_in, (0, None))(image_keys(KEY, x), 2 + place)  # its own in the ensemble
        assert attacks.robust_accuracy(keys, parts[name], model, x, labels, batch_size=1) >= result.robust_accuracy

    # As an ordinary attack among others.
    both = attacks.worst_of(lambda key, logits_fn, x, labels: x, attack)
    assert attacks.robust_accuracy(KEY, both, model, x, labels, batch_size=8) == result.robust_accuracy


def test_random_model(network, monkeypatch):
    """With single steps in place of APGD."""
    monkeypatch.setattr(_autoattack, "apgd", attacks.fgsm)
    monkeypatch.setattr(_autoattack, "_DRAWS", 4)
    model, x, labels, epsilon = network
    noisy = lambda key, z: model(z) + 0.1 * jax.random.normal(key, (1, 10))
    result = autoattack(epsilon=epsilon, version="rand", batch_size=1).evaluate(KEY, noisy, x, labels)
    assert list(result.per_attack) == ["apgd-ce", "apgd-dlr"]
    assert result.queries == {"apgd-ce": 4, "apgd-dlr": 4}
    assert result.robust_accuracy < result.clean_accuracy
    assert result.warnings == ()
    still = (losses.margin(model(jnp.asarray(result.x_adv)), labels) < 0).mean()
    assert abs(float(still) - result.robust_accuracy) <= 1 / 8
