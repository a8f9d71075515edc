"""Examples in docstrings give what they show, and every public function has one."""

import doctest
import inspect

import numpy as np
import pytest

from docs import reference

WITHOUT = {
    "robustjax.attacks.apgd_targeted": "as apgd; compiling it takes seconds",
    "robustjax.attacks.autoattack": "compiling its attacks takes seconds",
    "robustjax.models.resnet50": "as resnet18; tracing it takes seconds",
    "robustjax.models.resnet56": "as resnet20; tracing it takes seconds",
    "robustjax.models.resnet110": "as resnet20; tracing it takes seconds",
    "robustjax.scoring.mahalanobis_ensemble": "its cross-validation takes seconds",
    "robustjax.training.restore_model": "needs a run with checkpoints",
}
"""Functions without an example; the list only shrinks."""

SLOW = {
    "attacks": (
        "apgd at_budget carlini_wagner diagnose expectation_over_transformation "
        "fab momentum_iterative robust_accuracy square worst_of"
    ),
    "certification": "certify_sequential diffusion_denoised dual lipschitz_radius predict sample_counts",
    "certification.conformal": "aps smoothed_scores",
    "certification.halfspaces": "disagreement_bound learn null_thresholds statistics tester_learner",
    "certification.intervals": "certify",
    "certification.mixing": "mixture",
    "certification.multimodal": "radius",
    "certification.prototypes": "radius",
    "losses": (
        "augmented boosted_cross_entropy conformal_training cutmix "
        "mixing_training mixup multimodal_margin multimodal_radius prototype_margin prototype_radius"
    ),
    "losses.adversarial": "adversarial_training awp logit_pairing mart trades",
    "losses.denoising": "diffusion",
    "losses.rrcm": "consistency_pretraining pretrained_model pretraining_state",
    "losses.smoothing": "consistency macer smoothadv smoothmix stability",
    "metrics": "bootstrap_interval",
    "models": "image_functional resnet18 resnet20 wide_resnet",
    "models.prototypes": "classifier log_detections log_probabilities radius",
    "perturbations": "compose cutmix image_keys standard_normal",
    "scoring": (
        "add_class ensemble fit_temperature kl_matching mahalanobis "
        "model_ensemble nac nearest_class neuron_states temperature_scaling"
    ),
    "training": "fit",
}
"""By module, functions that compile for half a second or longer: their examples run with the tests marked slow."""

MODULES = {module.__name__: module for module in reference.modules()}


def functions(module) -> dict[str, str]:
    """The docstrings of the public functions of a module, by full name."""
    named = {name: getattr(module, name) for name in reference.public_names(module)}
    return {
        f"{module.__name__}.{name}": inspect.getdoc(value) or ""
        for name, value in named.items()
        if inspect.isroutine(value) or reference.is_constructor(name, value)
    }


def run(name: str, text: str, names: dict) -> dict:
    """Runs the examples of a docstring on a copy of the names, and returns what they leave."""
    test = doctest.DocTestParser().get_doctest(text, names, name, name, 0)
    printed = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=printed.append, clear_globs=False)
    assert not result.failed, "".join(printed)
    return test.globs


def prepared(name: str) -> dict:
    """What the docstrings of a module and of those around it prepare for the examples of its functions."""
    around = prepared(name.rpartition(".")[0]) if "." in name else {}
    return run(name, MODULES[name].__doc__ or "", around)


def tried(name: str, *, slow: bool) -> list[str]:
    """Runs the examples of a module that take long, or the others; the functions that have them."""
    long = SLOW.get(name.removeprefix("robustjax."), "").split()
    with np.printoptions():  # the examples set their own
        names = prepared(name)
        chosen = {f: text for f, text in functions(MODULES[name]).items() if (f.rpartition(".")[2] in long) == slow}
        for function, text in chosen.items():
            run(function, text, names)
    return [*chosen]


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_show(name):
    module, long = MODULES[name], SLOW.get(name.removeprefix("robustjax."), "").split()
    assert len(tried(name, slow=False)) == len(functions(module)) - len(long)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_examples_that_take_long_give_what_they_show(name):
    assert len(tried(f"robustjax.{name}", slow=True)) == len(SLOW[name].split())


def test_every_public_function_has_an_example():
    texts = {name: text for module in MODULES.values() for name, text in functions(module).items()}
    assert len(texts) > 150
    without = {name for name, text in texts.items() if ">>> " not in text}
    assert without == {*WITHOUT}
    assert {f"robustjax.{module}.{name}" for module, names in SLOW.items() for name in names.split()} <= {*texts}


def test_a_wrong_example_fails():
    with pytest.raises(AssertionError, match=r"Expected:\s+3\s+Got:\s+2"):
        run("wrong", ">>> 1 + 1\n3\n", {})
