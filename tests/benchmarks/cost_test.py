import dataclasses
import inspect
import json

import jax
import numpy as np
import pytest

from benchmarks import cost as benchmark
from robustjax import certification

TINY = benchmark.Config(repeats=2, devices=(1,))
SIZES = {"num_images": 3, "num_samples": 250, "batch_size": 100}


@pytest.fixture
def small(monkeypatch):
    """Small sizes and models, no further processes, and no work, which has a test of its own."""
    monkeypatch.setattr(benchmark, "ENOUGH", 1e-9)
    parameters = inspect.signature(benchmark.work)
    monkeypatch.setattr(benchmark, "work", lambda *args, **kwargs: parameters.bind(*args, **kwargs) and int)
    sweeps = {"samples": {"certify": (200, 400)}, "classes": {"mahalanobis": (2, 3)}}
    monkeypatch.setattr(benchmark, "SWEEPS", sweeps)
    monkeypatch.setattr(benchmark, "CHECKS", {("mlp", (4, 4, 1)): (2, 1_000)})
    monkeypatch.setattr(benchmark, "RUNS", {("mlp", (4, 4, 1)): (10, 20)})
    monkeypatch.setattr(benchmark, "SHARES", {("mlp", True): (0.1, 0.5), ("mlp", False): (0.2, 0.4)})
    curves = [{"quantity": "devices", "function": "images split", "sizes": [1, 2], "seconds": [[1.0], [1.5]]}]
    monkeypatch.setattr(benchmark, "devices", lambda config: curves)


@pytest.mark.parametrize(("num_devices", "sharing"), [(1, 1), (4, 1), (4, 2), (4, 4), (8, 2), (8, 8)])
@pytest.mark.parametrize(("num_images", "num_samples", "batch_size"), [(1, 1, 1), (5, 1_001, 100), (9, 900, 128)])
def test_the_model_counts_blocks_on_the_busiest_device(num_images, num_samples, batch_size, num_devices, sharing):
    turns = np.zeros((num_devices // sharing, sharing), int)
    for image in range(num_images):
        for block, _ in enumerate(range(0, num_samples, batch_size)):
            turns[image % len(turns), block % sharing] += 1
    predicted = benchmark.predicted_seconds(
        0.5,
        num_images=num_images,
        num_samples=num_samples,
        batch_size=batch_size,
        num_devices=num_devices,
        sharing=sharing,
        overhead=3.0,
    )
    assert predicted == 3 + 0.5 * turns.max()


def test_certify_calls_the_model_as_often_as_predicted():
    calls = []

    def logits_fn(x):
        jax.debug.callback(lambda: calls.append(1))
        return x.reshape(x.shape[0], -1)

    x = jax.random.uniform(jax.random.key(0), (3, 1, 2, 1))
    sizes = {"num_selection": 100, "num_estimation": 150, "batch_size": 100}
    certification.certify(jax.random.key(1), logits_fn, x, certification.gaussian(0.5), **sizes)
    jax.effects_barrier()
    assert len(calls) == benchmark.predicted_seconds(1.0, **SIZES) + 1 == 10  # one more, to see that rows are apart


@pytest.mark.parametrize("name", ["num_images", "num_samples", "batch_size", "num_devices", "sharing"])
def test_the_model_refuses_what_is_not_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        benchmark.predicted_seconds(1.0, **{**SIZES, name: 0})


def test_the_model_refuses_no_time_and_unequal_groups():
    with pytest.raises(ValueError, match="seconds_per_block must be positive, got nan"):
        benchmark.predicted_seconds(float("nan"), **SIZES)
    with pytest.raises(ValueError, match="sharing must divide num_devices=4, got 3"):
        benchmark.predicted_seconds(1.0, **SIZES, num_devices=4, sharing=3)


def test_operations_are_two_for_each_multiply_add():
    subject = benchmark.Subject("mlp", (28, 28, 1), 0)
    counted = benchmark.flops_per_image(subject.logits_of, subject.state, (28, 28, 1))
    assert counted == pytest.approx(2 * (784 * 128 + 128 * 128 + 128 * 10), rel=0.01)


def test_a_convolution_reads_its_input_and_writes_its_output():
    subject = benchmark.Subject("cnn", (28, 28, 1), 0)
    counted = benchmark.values_per_image(subject.logits_of, subject.state, (28, 28, 1))
    convolutions = 28 * 28 * (1 + 32) + 14 * 14 * (32 + 64)
    assert counted == convolutions + (7 * 7 * 64 + 128) + (128 + 10)


def test_a_standard_run_at_the_peak_is_its_operations_over_the_peak():
    draws = 500 * 101_000  # in whole blocks of 1,000
    assert benchmark.card_seconds(2e9, 1e12) == pytest.approx(draws * 2e9 / 1e12)


def test_the_exponent_is_that_of_a_power_law():
    sizes = np.asarray([1, 10, 100])
    times = 3.0 * sizes[:, None] ** 1.7 * np.asarray([[0.5, 1.0, 9.0]])  # the median counts
    assert benchmark.exponent(sizes, times) == pytest.approx(1.7)


def test_functions_take_turns_and_short_ones_are_called_often(monkeypatch):
    order, calls = [], []

    def seconds(function, n=1):
        calls.append(n)
        order.append(function())
        return 0.01 if order[-1] == "short" else 1.0

    monkeypatch.setattr(benchmark, "seconds", seconds)
    times = benchmark.measure([lambda: "short", lambda: "long"], 2)
    assert times.tolist() == [[0.01, 0.01], [1, 1]]
    assert order == ["short", "long"] * 3
    assert calls == [1, 1, 5, 1, 5, 1]


@pytest.mark.parametrize("name", ["certify", "pgd", "mahalanobis"])
def test_work_has_the_size_that_is_asked_for(name):
    result = benchmark.work(name, 0, images=5, dimension=64, classes=3)()
    assert len(result.label if name == "certify" else result) == 5
    if name == "pgd":
        assert result.shape == (5, 8, 8, 1)


def test_all_is_measured_and_told_in_80_columns(small, tmp_path, capsys):
    result = benchmark.run(dataclasses.replace(TINY, json=str(tmp_path / "figures.json")))
    assert json.loads((tmp_path / "figures.json").read_text()) == result
    assert [curve["function"] for curve in result["growth"]] == ["certify", "mahalanobis", "images split"]
    assert np.shape(result["growth"][0]["seconds"]) == (2, 2)
    (check,), (run,) = result["checks"], result["predictions"]
    assert check["predicted"] == pytest.approx(2 * 5 * np.median(check["block"]))
    assert check["error"] == check["predicted"] / np.median(check["seconds"]) - 1
    assert run["here"]["seconds"] == pytest.approx(500 * 5_005 * run["here"]["block"])
    for card in run["cards"]:
        low, high = card["shares"]
        assert card["at_peak"] == pytest.approx(card["fast"] * high) == pytest.approx(card["slow"] * low)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[1:])) <= 80
    assert not any("…" in line for line in lines)
    assert [line.split()[:3] for line in lines if line.startswith("H200")] == [
        ["H200", "bfloat16", "989"],
        ["H200", "TF32", "494"],
        ["H200", "float32", "67"],
    ]


def test_quick_is_one_repeat_of_small_sizes(small):
    result = benchmark.run(dataclasses.replace(TINY, quick=True))
    assert np.shape(result["growth"][0]["seconds"]) == (2, 1)
    assert (result["predictions"], result["checks"][0]["num_samples"]) == ([], 200)


@pytest.mark.slow
def test_devices_are_measured_in_a_process_of_their_own():
    curves = benchmark.devices(dataclasses.replace(TINY, devices=(2, 8), quick=True, repeats=1))
    assert [(curve["function"], curve["sizes"]) for curve in curves] == [("images split", [2]), ("draws shared", [2])]
    assert all(np.shape(curve["seconds"]) == (1, 1) and curve["seconds"][0][0] > 0 for curve in curves)


def test_blocks_hold_the_noise_of_certificates():
    subject = benchmark.Subject("mlp", (4, 4, 1), 0)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(subject.key, np.arange(benchmark.BLOCKS * 5))
    noisy = jax.vmap(subject.measure.sample, (0, None))(keys, subject.x[0])
    expected = np.asarray(subject.logits_fn(noisy)).reshape(benchmark.BLOCKS, 5, 10).sum(0)
    np.testing.assert_allclose(subject.blocks(5)(), expected, rtol=1e-4, atol=1e-5)


def test_bad_settings_are_refused():
    for wrong in ({"repeats": 0}, {"devices": ()}, {"devices": (3,)}, {"devices": (0,)}):
        with pytest.raises(ValueError, match="repeats must be positive and devices divide 8"):
            benchmark.run(dataclasses.replace(TINY, **wrong))
