import dataclasses

from experiments.common import adversaries
from robustjax import attacks, losses


def test_objectives_are_those_of_the_papers():
    attack = attacks.pgd(epsilon=0.15, norm="linf", steps=10, keep="last")
    beside = dataclasses.replace(attack, random_start=0.001)
    wanted = {
        "standard": losses.standard(),
        "gaussian": losses.smoothing.gaussian_augmentation(sigma=0.5),
        "entropy": losses.adversarial.entropy_regularization(),
        "pgd": losses.adversarial.adversarial_training(attack=attack),
        "trades": losses.adversarial.trades(attack=dataclasses.replace(beside, loss=losses.kl_divergence), beta=6.0),
        "mart": losses.adversarial.mart(attack=beside, beta=6.0),
        "awp": losses.adversarial.awp(objective=losses.adversarial.adversarial_training(attack=attack)),
        "logit_pairing": losses.adversarial.logit_pairing(attack=attack),
        "intervals": losses.scheduled(
            losses.interval_training(epsilon=0.15),
            epsilon=losses.ramp(end=0.15, begin=2, steps=10),
            kappa=losses.ramp(start=1.0, end=0.5, begin=2, steps=10),
        ),
    }
    assert set(wanted) == set(adversaries.TRAINING)
    for training, objective in wanted.items():
        found = adversaries.objective_of(training, epsilon=0.15, num_steps=60)
        assert found == objective


def test_every_attack_can_be_made():
    queries = {"fgsm": 1, "momentum_iterative": 10, "pgd_20": 20, "pgd_40": 200, "apgd_ce": 100, "apgd_dlr": 100}
    queries |= {"apgd_targeted": 900, "fab": 900, "deepfool": 50, "carlini_wagner": 9000, "square": 5000}
    for name, attack in adversaries.ATTACKS.items():
        for norm in attack.norms:
            made = adversaries.make(name, 0.1, norm)
            assert getattr(made, "attack", made).__dict__.get("norm", "l2") == norm
            assert name not in queries or attacks.queries_of(made) == queries[name]
        if attack.averages:
            assert adversaries.make(name, 0.1, attack.norms[0], samples=7).samples == 7
    assert [adversaries.text_of(epsilon) for epsilon in (8 / 255, 0.15, 1.0)] == ["8/255", "0.15", "1"]
