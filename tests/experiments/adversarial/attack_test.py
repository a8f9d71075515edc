"""AutoAttack is kept part by part."""

import dataclasses
import types
from typing import Any

import jax
import numpy as np
import pytest

from experiments.common.targets import Target
from robustjax import attacks


def an_evaluation(n, **parts):
    return attacks.Evaluation(
        clean_accuracy=1.0, robust_accuracy=0.5, per_attack=parts, correct=np.arange(n) % 2 == 0,
        x_adv=np.zeros((n, 8, 8, 1), np.float32), queries=dict.fromkeys(parts, 100),
        seconds=dict.fromkeys(parts, 1.0), warnings=("a sentence.",),
    )  # fmt: skip


def test_what_a_part_of_autoattack_has_found_is_kept(monkeypatch, tmp_path):
    @dataclasses.dataclass
    class Interrupted:
        batch_size: int | None = None

        def evaluate(self, key, logits_fn, x, labels, on_attack=None, resume=None):
            assert self.batch_size == 4
            if resume is None:
                on_attack("one", an_evaluation(4, one=0.75))
                raise KeyboardInterrupt
            assert resume.per_attack == {"one": 0.75}
            assert resume.robust_accuracy == 0.75
            assert resume.warnings == ("a sentence.",)
            on_attack("two", an_evaluation(4, one=0.75, two=0.5))
            return an_evaluation(4, one=0.75, two=0.5)

    monkeypatch.setattr(Target, "answers", lambda self, key, images: np.zeros(len(images), int))
    classifier: Any = types.SimpleNamespace(logits_fn=lambda: None, place=lambda rows: rows)
    target = Target(classifier, np.arange(4), np.zeros((4, 8, 8, 1), np.float32), np.zeros(4, np.int32), 4)
    path = tmp_path / "linf-0.1-autoattack.npz"
    with pytest.raises(KeyboardInterrupt):
        target.attacked(jax.random.key(0), Interrupted(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["linf-0.1-autoattack.parts.npz"]
    arrays = target.attacked(jax.random.key(0), Interrupted(), path)
    assert not list(tmp_path.iterdir())
    assert arrays["part"].tolist() == ["one", "two"]
    assert arrays["queries"] == 200
    assert arrays["part_correct"].tolist() == [[True, False, True, False]] * 2
