"""The report of an evaluation: an answer to each question, with what it is worth; Markdown, and one HTML page."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from etils import epath

from robustjax import certification, metrics, plotting

from ..common import adversaries, certificates, files, pages, runtimes, sanity, smoothers, tables
from ._config import PARTS, Settings
from ._plan import SELECTION, Plan

NAMES = {
    "calibration": "Accuracy and calibration",
    "conformal": "Prediction sets",
    "ood": "Foreign inputs",
    "certify": "Certified accuracy",
    "attack": "Accuracy under attack",
}


class Section(NamedTuple):
    """What a part has measured, as it is kept on disk and shown."""

    numbers: dict[str, Any]  # for ``metrics.json``
    answer: str  # in the summary
    worth: str  # what of it is guaranteed, and what is only measured
    shown: list[Any]  # tables, sentences and pictures
    seconds: float  # that it took
    left_out: tuple[str, ...] = ()  # lines on what could not be measured


def share(count: int, of: int) -> str:
    """A share with its 95 % Clopper-Pearson interval."""
    found = scipy.stats.binomtest(int(count), int(of)).proportion_ci(0.95, method="exact")
    return f"{count / of:.3f} ({found.low:.3f} to {found.high:.3f})"


def of_calibration(arrays: dict[str, np.ndarray], class_names: tuple[str, ...]) -> Section:
    """Accuracy, also of the worst class, calibration and the reliability diagram."""
    count, correct = int(arrays["num_images"]), int(arrays["correct"])
    scores = ("expected_calibration_error", "brier_score", "negative_log_likelihood")
    numbers = {"num_images": count, "accuracy": correct / count} | {name: float(arrays[name]) for name in scores}
    error = numbers["expected_calibration_error"]
    points: Any = {"model": tuple(arrays[name] for name in metrics.Reliability._fields)}
    rows = [
        ("accuracy (95 % interval)", share(correct, count)),
        *_worst_class(arrays, class_names),
        ("expected calibration error, 15 bins", f"{error:.3f}"),
        ("Brier score", f"{numbers['brier_score']:.3f}"),
        ("negative log-likelihood", f"{numbers['negative_log_likelihood']:.3f}"),
    ]
    says = (
        "The interval holds for images drawn like these. The calibration error is the mean distance between confidence "
        f"and accuracy; with {count:,} images, even a perfectly calibrated model has an error above 0."
    )
    shown = [
        tables.Table(NAMES["calibration"], (f"{count:,} images", "value"), rows), says,
        tables.Picture("reliability", plotting.reliability_diagram(points)),
    ]  # fmt: skip
    answer, worth = f"accuracy {correct / count:.3f}, calibration error {error:.3f}", "measured, for images like these"
    return Section(numbers, answer, worth, shown, float(arrays["seconds"]))


def _worst_class(arrays: dict[str, np.ndarray], class_names: tuple[str, ...]) -> list[tuple[str, str]]:
    """The row of the class with the lowest accuracy, where there are two or more."""
    count, correct = arrays["class_images"], arrays["class_correct"]
    there = np.flatnonzero(count)
    if len(there) < 2:
        return []
    worst = int(there[(correct[there] / count[there]).argmin()])
    name = f"{worst} ({class_names[worst]})" if worst < len(class_names) else f"{worst}"
    return [(f"lowest of a class: {name}, {count[worst]:,} images", share(correct[worst], count[worst]))]


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
    if (1 - coverage) * (half + 1) < 1 - 1e-9:
        says += f" With {half:,} images to calibrate on, only sets of all labels have this guarantee."
    first = next(iter(numbers[name] for name in numbers if isinstance(numbers[name], dict)))
    answer = f"sets of {first['mean_size']:.2f} labels cover {first['coverage']:.3f}"
    worth = f"guaranteed: a coverage of {coverage:g} on average over new images; measured: the two numbers"
    headers = ("score", "coverage (95 % interval)", "mean size", "median", "largest")
    shown = [tables.Table(f"{NAMES['conformal']}, coverage {coverage:g}", headers, rows), says]
    return Section(numbers, answer, worth, shown, float(arrays["seconds"]))


def of_foreign(
    scores: dict[str, dict[str, np.ndarray]],
    groups: dict[str, str],
    left_out: dict[str, str],
    *,
    features: bool,
    fitted_on: str,
) -> Section:
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
        f"shows the energy score, which was chosen before the measurement. Detectors are fitted on {fitted_on}."
    )
    name = "energy" if "energy" in numbers else next(iter(numbers))
    answer = f"AUROC of {name}: " + ", ".join(f"{part} {of['auroc']:.3f}" for part, of in numbers[name].items())
    curves = {name: (of["in"], np.concatenate([of[part] for part in groups])) for name, of in scores.items()}
    shown = [
        tables.Table(NAMES["ood"], headers, rows), says,
        tables.Picture("roc", plotting.roc_curves(curves, title="all foreign sets together")),
    ]  # fmt: skip
    lines = [f"Detector {name}: {reason}" for name, reason in left_out.items()]
    if not features:
        lines.append(
            "Detectors that read features: the model returns only logits. Return robustjax.typing.Outputs(logits, "
            "features) to measure them."
        )
    seconds = sum(float(of["seconds"]) for of in scores.values())
    return Section(numbers, answer, "measured, for these foreign sets only", shown, seconds, tuple(lines))


def of_certificates(folder: epath.Path, settings: Settings, plan: Plan) -> Section:
    """Certified accuracy at round radii."""
    assert plan.draws is not None
    _, label, certificate, num_samples, seconds = certificates.read(folder)
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
        f"noise has small radii. At most {SELECTION + plan.draws:,} noisy copies of an image were drawn, on "
        f"average {num_samples.mean():,.0f}."
    )
    at = radii[1] if len(radii) > 1 else 0.0
    answer = f"{accuracy[min(1, len(radii) - 1)]:.3f} of the smoothed model at l2 {at:g}, sigma {settings.sigma:g}"
    curve = {f"sigma {settings.sigma:g}": (certificate.radius, (certificate.label == label) & ~certificate.abstained)}
    shown = [
        tables.Table(NAMES["certify"], (f"{len(label):,} images", "share (95 % interval)"), rows), says,
        tables.Picture("certified_accuracy", plotting.certified_accuracy_curve(curve)),
    ]  # fmt: skip
    worth = (
        f"guaranteed: the certificate of each image, at {100 * (1 - settings.alpha):g} % confidence; measured: the "
        "share of these images"
    )
    return Section(numbers, answer, worth, shown, float(seconds.sum()))


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
    worth = "measured, an upper bound: a stronger attack may leave less"
    shown = [tables.Table(title, (f"{correct.size:,} images", "accuracy"), rows), says, checks]
    return Section(numbers, answer, worth, shown, float(arrays["seconds"]))


def kept(folder: epath.Path, name: str, section: Section) -> Section:
    """Writes the section of a part, with its pictures, so that later calls can show it."""
    drawn = [tables.drawn(folder, part) if isinstance(part, tables.Picture) else part for part in section.shown]
    section = section._replace(shown=drawn)
    as_json = [part._asdict() if isinstance(part, tables.Table) else part for part in drawn]
    content = json.dumps(section._replace(shown=as_json)._asdict(), indent=1)
    files.write_whole(folder / "sections" / f"{name}.json", content + "\n")
    return section


def of_before(folder: epath.Path, name: str) -> Section | None:
    """The section of a part that an earlier call has measured, with the same settings; None where none has."""
    path = folder / "sections" / f"{name}.json"
    if not path.exists():
        return None
    found = files.read_json(path, *Section._fields, advice="delete it to leave it out")
    section = Section(**{field: found[field] for field in Section._fields})
    return section._replace(shown=[tables.Table(**part) if isinstance(part, dict) else part for part in section.shown])


def report(
    folder: epath.Path, config: Any, sections: dict[str, Section], failed: dict[str, str],
    stopwatch: runtimes.Stopwatch, *, about: str, images: str, plan: Plan,
) -> dict[str, Any]:  # fmt: skip
    """Prints the summary; writes metrics.json, report.md and report.html; parts not asked for are of earlier calls."""
    rows = [
        (name, sections[name].answer, sections[name].worth, f"{sections[name].seconds:,.1f}")
        if name in sections
        else (name, "not measured", failed[name], "-")
        for name in PARTS
        if name in sections or name in failed
    ]
    summary = tables.Table("Summary", ("part", "answer", "what it is worth", "seconds"), rows)
    earlier = [name for name in sections if name not in config.parts]
    notes = [f"An earlier call measured, with the same settings: {', '.join(earlier)}."] if earlier else []
    left_out = ["## Not measured", "", *(f"- {line}" for line in _not_measured(sections, failed))]
    shown = [part for section in sections.values() for part in section.shown]
    tables.report(
        folder, config, runtimes.console(), stopwatch, title=f"How far can {about} be trusted?",
        parts=[images, summary, *notes], details=[*shown, "\n".join(left_out), _budget(config, sections, plan)],
    )  # fmt: skip
    text = (folder / "report.md").read_text()
    files.write_whole(folder / "report.html", pages.page(text, folder))
    numbers = {name: section.numbers for name, section in sections.items()} | {"seconds": stopwatch.seconds()}
    files.write_whole(folder / "metrics.json", json.dumps(numbers, indent=1) + "\n")
    runtimes.log(f"Page: {folder / 'report.html'}")
    return numbers


def images_of(about: str | None, total: int, seen: int, class_names: tuple[str, ...], classes: int) -> str:
    """A sentence on the images that are evaluated, and on their classes."""
    names = list(class_names[:20]) + [f"and {len(class_names) - 20:,} more"] * (len(class_names) > 20)
    called = f" ({', '.join(names)})" if names else ""
    of = f"{seen:,} of the {total:,} images" if seen < total else f"{total:,} image{'s' * (total > 1)}"
    of += "" if about is None else f" of {about}"
    return f"Evaluated on {of}{called}; the model has {classes:,} classes."


def _budget(config: Any, sections: dict[str, Section], plan: Plan) -> str:
    """What the budget allowed, and where it did not last."""
    allowed = [f"at most {plan.looked_at:,} images of each set"]
    took = []
    if plan.certified is not None and "certify" in sections:
        allowed.append(f"{plan.certified:,} images with at most {plan.draws:,} noisy copies each for certificates")
        took.append(("certify", plan.certify_share))
    if plan.attacked is not None and "attack" in sections:
        allowed.append(f"{plan.attacked:,} images for the attack, of whose pilot PGD-20 left {plan.withstood:.2f}")
        took.append(("attack", plan.attack_share))
    text = (
        f"The budget of {config.budget:g} minutes allowed {'; '.join(allowed)}: a forward pass takes "
        f"{duration(plan.seconds_per_image)} an image."
    )
    over = [
        f"{NAMES[name]} took {duration(sections[name].seconds)}, {'with compiling, ' * (name == 'attack')}longer than "
        f"its share of {duration(part or 0.0)}."
        for name, part in took
        if sections[name].seconds > (part or 0.0)
    ]
    return " ".join([text, *over])


def duration(seconds: float) -> str:
    """Seconds with two digits in a unit that shows them, such as 14 us, 3.2 ms, 42 s and 12 min."""
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    unit, size = next((pair for pair in (("us", 1e-6), ("ms", 1e-3)) if seconds < 1000 * pair[1]), ("s", 1.0))
    return f"{float(f'{seconds / size:.2g}'):g} {unit}"


def _not_measured(sections: dict[str, Section], failed: dict[str, str]) -> list[str]:
    """What the report does not answer, and why."""
    lines = [f"{NAMES[part]}: {error}" for part, error in failed.items()]
    lines += [f"{NAMES[part]}: not among --parts." for part in PARTS if part not in sections and part not in failed]
    lines += [line for section in sections.values() for line in section.left_out]
    lines.append("Accuracy on corrupted images: robustjax has no common corruptions yet.")
    lines.append("Robustness to changes that no ball of pixels describes, such as rotations, and fairness over groups.")
    return lines
