"""The report of an evaluation: an answer to each question, with what it is worth; Markdown, and one HTML page."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import scipy.stats
from etils import epath

from robustjax import certification, metrics, plotting

from ..common import adversaries, certificates, files, pages, runtimes, sanity, smoothers, tables
from ._config import PARTS, Settings
from ._plan import Plan

NAMES = {
    "calibration": "Accuracy and calibration",
    "conformal": "Prediction sets",
    "ood": "Foreign inputs",
    "certify": "Certified accuracy",
    "attack": "Accuracy under attack",
}
Section = tuple[dict[str, Any], tuple[str, str], list[Any]]
"""Numbers for ``metrics.json``; the answer of the summary and what it is worth; and what the report shows."""


def share(count: int, of: int) -> str:
    """A share with its 95 % Clopper-Pearson interval."""
    found = scipy.stats.binomtest(int(count), int(of)).proportion_ci(0.95, method="exact")
    return f"{count / of:.3f} ({found.low:.3f} to {found.high:.3f})"


def of_calibration(arrays: dict[str, np.ndarray]) -> Section:
    """Accuracy, calibration and the reliability diagram."""
    count, correct = int(arrays["num_images"]), int(arrays["correct"])
    scores = ("expected_calibration_error", "brier_score", "negative_log_likelihood")
    numbers = {"num_images": count, "accuracy": correct / count} | {name: float(arrays[name]) for name in scores}
    error = numbers["expected_calibration_error"]
    points: Any = {"model": tuple(arrays[name] for name in metrics.Reliability._fields)}
    rows = [
        ("accuracy (95 % interval)", share(correct, count)),
        ("expected calibration error, 15 bins", f"{error:.3f}"),
        ("Brier score", f"{numbers['brier_score']:.3f}"),
        ("negative log-likelihood", f"{numbers['negative_log_likelihood']:.3f}"),
    ]
    says = (
        "The interval holds for images drawn like these. The calibration error is the mean distance between confidence "
        f"and accuracy; with {count:,} images, even a perfectly calibrated model has an error above 0."
    )
    answer = f"accuracy {correct / count:.3f}, calibration error {error:.3f}"
    shown = [tables.Table(NAMES["calibration"], (f"{count:,} images", "value"), rows), says]
    return numbers, (answer, "estimate"), [
        *shown, tables.Picture("reliability", plotting.reliability_diagram(points))
    ]  # fmt: skip


def of_conformal(arrays: dict[str, np.ndarray], coverage: float) -> Section:
    """Coverage and sizes of prediction sets."""
    count, half = int(arrays["num_images"]), int(arrays["calibrated_on"])
    numbers: dict[str, Any] = {"calibrated_on": half, "num_images": count}
    rows = []
    for name in (key.removesuffix("_size") for key in arrays if key.endswith("_size")):
        size, covered = arrays[f"{name}_size"], int(arrays[f"{name}_covered"])
        numbers[name] = {"coverage": covered / count, "mean_size": float(size.mean())}
        rows.append((name, share(covered, count), f"{size.mean():.2f}", f"{np.median(size):g}", str(size.max())))
    says = (
        f"Guarantee: the sets hold the true label of a new image with probability at least {coverage:g}, on average "
        f"over calibration and test images, if these are exchangeable. {half:,} images calibrate the threshold, and "
        "the coverage is measured on the others. Under attack or on foreign images there is no guarantee."
    )
    first = next(iter(numbers[name] for name in numbers if isinstance(numbers[name], dict)))
    answer = f"sets of {first['mean_size']:.2f} labels cover {first['coverage']:.3f}"
    headers = ("score", "coverage (95 % interval)", "mean size", "median", "largest")
    return numbers, (answer, "guarantee"), [
        tables.Table(f"{NAMES['conformal']}, coverage {coverage:g}", headers, rows), says
    ]  # fmt: skip


def of_foreign(scores: dict[str, dict[str, np.ndarray]], groups: dict[str, str]) -> Section:
    """AUROC and FPR@95TPR of each detector on each foreign set."""
    numbers: dict[str, Any] = {}
    rows = []
    for name, of in scores.items():
        found = {part: metrics.detection_metrics(of["in"], of[part]) for part in groups}
        numbers[name] = {
            part: {"auroc": float(m.auroc), "fpr_at_95_tpr": float(m.fpr_ood_positive)} for part, m in found.items()
        }
        rows.append((name, *(f"{m.auroc:.3f} / {m.fpr_ood_positive:.3f}" for m in found.values())))
    known = next(iter(scores.values()))["in"].size
    headers = ("detector", *(f"{part} ({group})" for part, group in groups.items()))
    says = (
        "AUROC / FPR at 95 % TPR, with foreign images as positives: 1 and 0 are best, 0.5 and 0.95 are chance. An "
        f"estimate for these sets only, on {known:,} known images: other foreign images may be harder. The summary "
        "shows the energy score, which was chosen before the measurement."
    )
    energy = numbers.get("energy", next(iter(numbers.values())))
    answer = ", ".join(f"{part} {of['auroc']:.3f}" for part, of in energy.items())
    curves = {name: (of["in"], np.concatenate([of[part] for part in groups])) for name, of in scores.items()}
    return numbers, (f"AUROC of energy: {answer}", "estimate"), [
        tables.Table(NAMES["ood"], headers, rows), says,
        tables.Picture("roc", plotting.roc_curves(curves, title="all foreign sets together")),
    ]  # fmt: skip


def of_certificates(folder: epath.Path, settings: Settings, plan: Plan) -> Section:
    """Certified accuracy at round radii."""
    _, label, certificate, num_samples, _ = certificates.read(folder)
    bound = certification.binomial_lower_bound(plan.draws, plan.draws, settings.alpha)
    radii = smoothers.default_radii(float(certification.gaussian(settings.sigma).radius(bound)))
    accuracy = metrics.certified_accuracy(certificate, label, radii)
    acr = metrics.average_certified_radius(certificate, label)
    numbers = {
        "num_images": len(label), "sigma": settings.sigma, "max_samples": plan.draws, "radii": list(radii),
        "certified_accuracy": accuracy.tolist(), "average_certified_radius": acr,
        "abstained": float(certificate.abstained.mean()), "samples_per_image": float(num_samples.mean()),
    }  # fmt: skip
    rows = [
        (f"l2 radius {r:g}", share(round(a * len(label)), len(label))) for r, a in zip(radii, accuracy, strict=True)
    ]
    rows += [("average certified radius", f"{acr:.3f}"), ("abstained", f"{certificate.abstained.mean():.3f}")]
    says = (
        "Guarantee: no change of an image within its radius changes the answer of the smoothed model, which adds noise "
        f"of sigma {settings.sigma:g} and takes a vote; each certificate is wrong with probability at most "
        f"{settings.alpha:g}. It concerns the smoothed model, not the model itself. A model that was not trained with "
        f"noise has small radii. At most {plan.draws:,} noisy copies of an image were drawn, on average "
        f"{num_samples.mean():,.0f}."
    )
    shown = radii[1] if len(radii) > 1 else 0.0
    answer = f"{accuracy[min(1, len(radii) - 1)]:.3f} at l2 {shown:g}, sigma {settings.sigma:g}"
    curve = {f"sigma {settings.sigma:g}": (certificate.radius, (certificate.label == label) & ~certificate.abstained)}
    return numbers, (answer, "guarantee"), [
        tables.Table(NAMES["certify"], (f"{len(label):,} images", "share (95 % interval)"), rows), says,
        tables.Picture("certified_accuracy", plotting.certified_accuracy_curve(curve)),
    ]  # fmt: skip


def of_attack(
    arrays: dict[str, np.ndarray], findings: list[sanity.Finding], settings: Settings, epsilon: float
) -> Section:
    """Accuracy left by AutoAttack, by its parts, and the sanity checks."""
    correct, clean = arrays["correct"], float(arrays["clean_accuracy"])
    where = f"{settings.norm} {adversaries.text_of(epsilon)}"
    left = dict(zip(arrays["part"].tolist(), arrays["part_accuracy"].tolist(), strict=True))
    numbers = {
        "num_images": correct.size, "norm": settings.norm, "epsilon": epsilon, "clean_accuracy": clean,
        "robust_accuracy": float(correct.mean()), "left_after": left,
        "warnings": [finding.text for finding in findings if not finding.passed],
    }  # fmt: skip
    rows = [("without an attack", f"{clean:.3f}"), *((f"after {name}", f"{a:.3f}") for name, a in left.items())]
    rows.append(("robust accuracy (95 % interval)", share(int(correct.sum()), correct.size)))
    says = (
        "An upper bound: a stronger attack may leave less. No attack proves robustness; a warning below would say that "
        "this one is weaker than it looks."
    )
    checks = tables.Table("Checks of the attack", ("check", "found"), [(f.word, f.text) for f in findings])
    answer = f"{correct.mean():.3f} at {where}" + ("" if all(f.passed for f in findings) else ", with warnings")
    title = f"{NAMES['attack']}, AutoAttack, {where}"
    return numbers, (answer, "upper bound"), [
        tables.Table(title, (f"{correct.size:,} images", "accuracy"), rows), says, checks
    ]  # fmt: skip


def report(
    folder: epath.Path, config: Any, sections: dict[str, Section], missing: list[str], seconds: dict[str, float],
    stopwatch: runtimes.Stopwatch, *, about: str, plan: Plan,
) -> dict[str, Any]:  # fmt: skip
    """Prints the summary; writes metrics.json, report.md and report.html."""
    rows = [(name, *answer, f"{seconds[name]:,.1f}") for name, (_, answer, _) in sections.items()]
    summary = tables.Table("Summary", ("part", "answer", "worth", "seconds"), rows)
    budget = (
        f"A budget of {config.budget:g} minutes allowed {plan.certified:,} images with at most {plan.draws:,} noisy "
        f"copies each for certificates, and {plan.attacked:,} images for the attack: a forward pass takes "
        f"{1e3 * plan.seconds_per_image:.2f} ms an image, and PGD-20 left {plan.withstood:.2f} of the pilot's images."
    )
    left_out = ["## Not measured", "", *(f"- {line}" for line in missing)]
    parts = [part for _, _, shown in sections.values() for part in shown]
    tables.report(
        folder, config, runtimes.console(), stopwatch, title=f"How far can {about} be trusted?",
        parts=[summary], details=[*parts, "\n".join(left_out), budget],
    )  # fmt: skip
    text = (folder / "report.md").read_text()
    files.write_whole(folder / "report.html", pages.page(text, folder))
    numbers = {name: found for name, (found, _, _) in sections.items()} | {"seconds": stopwatch.seconds()}
    files.write_whole(folder / "metrics.json", json.dumps(numbers, indent=1) + "\n")
    runtimes.log(f"Page: {folder / 'report.html'}")
    return numbers


def not_measured(parts: tuple[str, ...], failed: dict[str, str], *, features: bool) -> list[str]:
    """What the report does not answer, and why."""
    lines = [f"{NAMES[part]}: not among --parts." for part in PARTS if part not in parts]
    lines += [f"{NAMES[part]}: {error}" for part, error in failed.items()]
    if "ood" in parts and not features:
        lines.append(
            "Detectors that read features: the model returns only logits. Return robustjax.typing.Outputs(logits, "
            "features) to measure them."
        )
    lines.append("Accuracy on corrupted images: robustjax has no common corruptions yet.")
    lines.append("Robustness to changes that no ball of pixels describes, such as rotations, and fairness over groups.")
    return lines
