import io
import json
import random
import re
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax import losses, training

OPTIMIZER = optax.adam(0.05)
OBJECTIVE = losses.smoothing.gaussian_augmentation(sigma=0.1)


@pytest.fixture
def fit(problem):
    def run(num_steps=20, *, stream=None, mesh=None, state=None, **settings):
        state = training.init(jax.random.key(0), problem.model, OPTIMIZER) if state is None else state
        settings = {"objective": OBJECTIVE, "optimizer": OPTIMIZER, "checkpoint_every": 5, "log_every": 4, **settings}
        return training.fit(
            problem.apply, state, stream or problem.Stream(), num_steps=num_steps,
            mesh=mesh or training.make_mesh({"data": 1}), **{"progress": False, **settings},
        )  # fmt: skip

    return run


def same(a, b):
    plain = lambda state: jax.device_get(state._replace(key=jax.random.key_data(state.key)))
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), plain(a), plain(b)))


def steps(folder):
    return [int(path.name) for path in sorted(folder.iterdir())]


def test_fit_is_the_step_repeated(problem, fit):
    state = training.init(jax.random.key(0), problem.model, OPTIMIZER)
    step, stream, losses_seen = training.make_step(OBJECTIVE, OPTIMIZER), problem.Stream(), []
    for _ in range(10):
        state, metrics = step(problem.apply, state, next(stream))
        losses_seen.append(float(metrics["loss"]))
    result = fit(10)
    assert same(result.state, state)
    assert result.history["step"].tolist() == [4, 8, 10]
    want = [np.mean(losses_seen[a:b]) for a, b in ((0, 4), (4, 8), (8, 10))]
    np.testing.assert_allclose(result.history["loss"], want, rtol=1e-6)
    assert result.history.keys() == {"step", "loss", "accuracy"}


def test_the_loop_runs_two_steps_ahead_and_no_further(problem, fit, monkeypatch):
    taken, waited = [], []

    class Stream(problem.Stream):
        def __next__(self):
            taken.append(len(taken) - len(waited))  # steps that nobody has waited for when a batch is asked for
            return super().__next__()

    real = jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: waited.append(1) or real(tree))
    fit(10, stream=Stream())
    assert taken == [0, 1, *[2] * 8]


def test_without_a_terminal_progress_is_told_in_lines(fit, monkeypatch):
    lines = []
    fit(20, progress=True, log=lines.append)
    assert lines == []  # done within a minute
    monkeypatch.setattr("robustjax.training._fit._SECONDS_BETWEEN_LINES", 0)
    fit(20, progress=True, log=lines.append)
    assert len(lines) == 5
    assert re.fullmatch(r"Step 8 of 20: accuracy \d\.\d{4}  loss \d\.\d{4}  [\d,]+ images/s", lines[1])
    fit(20, log=lines.append)
    assert len(lines) == 5


def test_fit_learns(fit):
    history = fit(200).history
    assert history["loss"][-1] < 0.7 * history["loss"][0]


def test_the_state_passed_in_stays(problem, fit):
    state = training.init(jax.random.key(0), problem.model, OPTIMIZER)
    fit(2, state=state)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("first", [5, 13])
def test_resuming_changes_nothing(fit, tmp_path, first):
    whole = fit(20, folder=tmp_path / "whole")
    fit(first, folder=tmp_path / "parts")
    said = []
    parts = fit(20, folder=tmp_path / "parts", log=said.append)
    assert said == [f"Resuming from step {first} of 20, checkpoint in {tmp_path / 'parts'}."]
    assert same(parts.state, whole.state)
    assert steps(tmp_path / "parts") == [15, 20]
    if first == 5:  # otherwise the first part closed one more interval at its end
        for name, column in whole.history.items():
            assert column.tolist() == parts.history[name].tolist()


def test_a_finished_run_is_returned_as_it_is(problem, fit, tmp_path):
    finished = fit(6, folder=tmp_path)
    again = fit(6, folder=tmp_path, stream=problem.Stream(length=0), log=len)
    assert same(again.state, finished.state)
    assert again.history["step"].tolist() == [4, 5, 6]


def test_eight_devices_resume_too(problem, fit, tmp_path):
    mesh = training.make_mesh()
    fit(5, folder=tmp_path, mesh=mesh)
    state = fit(10, folder=tmp_path, mesh=mesh, log=len).state
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(state))
    assert same(state, fit(10, folder=tmp_path / "whole", mesh=mesh).state)


def damage(path, rng):
    """Truncates, flips a bit of, or deletes one file of a checkpoint at random."""
    file = rng.choice(sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size))
    data = bytearray(file.read_bytes())
    match rng.choice(["truncate", "flip", "delete"]):
        case "truncate":
            file.write_bytes(data[: rng.randrange(len(data))])
        case "flip":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(data)
        case "delete":
            file.unlink()
    return file


@pytest.fixture(scope="module")
def rng():
    seed = random.SystemRandom().randrange(2**32)
    return seed, random.Random(seed)


@pytest.mark.parametrize("trial", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 8))])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(fit, tmp_path, rng, trial):
    whole = fit(15, folder=tmp_path)
    file = damage(tmp_path / "00000015", rng[1])
    said = []
    again = fit(15, folder=tmp_path, log=said.append)
    assert len(said) == 2, (rng[0], file)
    assert said[0] == f"The checkpoint {tmp_path / '00000015'} is damaged; falling back to the previous one."
    assert said[1].startswith("Resuming from step 10 of 15")
    assert same(again.state, whole.state)
    assert steps(tmp_path) == [10, 15]
    fit(15, folder=tmp_path, log=said.append)
    assert said[2].startswith("Re-using the finished training of 15 steps")


def test_damaged_checkpoints_do_not_push_out_whole_ones(fit, tmp_path, rng):
    fit(15, folder=tmp_path)
    damage(tmp_path / "00000015", rng[1])
    fit(12, folder=tmp_path, keep=1, log=len)
    assert steps(tmp_path) == [12]


def test_all_checkpoints_damaged(fit, tmp_path, rng):
    fit(10, folder=tmp_path)
    for path in list(tmp_path.iterdir()):
        damage(path, rng[1])
    with pytest.raises(ValueError, match="no readable checkpoint; delete the folder or pass overwrite=True"):
        fit(10, folder=tmp_path, log=len)
    assert steps(tmp_path) == [5, 10]
    assert fit(5, folder=tmp_path, overwrite=True).state.step == 5


def test_what_a_kill_leaves_behind_is_cleared_away(fit, tmp_path):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    fit(5, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000005", "notes.txt"]
    fit(5, folder=tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_checksums_are_those_of_sha256sum(fit, tmp_path):
    fit(5, folder=tmp_path)
    done = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path / "00000005", check=False)
    assert done.returncode == 0


def test_restore_model(problem, fit, tmp_path):
    state = fit(7, folder=tmp_path).state
    model = training.restore_model(tmp_path, problem.model)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), model, state.model))
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*elsewhere"):
        training.restore_model(tmp_path / "elsewhere", problem.model)
    other = problem.model._replace(params={**problem.model.params, "b": jnp.zeros(4)})
    with pytest.raises(
        ValueError,
        match=r"at \['model'\].params\['b'\] it has float32\[3\].* name the folder of another run",
    ):
        training.restore_model(tmp_path, other)


def test_another_optimizer_is_refused(problem, fit, tmp_path):
    fit(5, folder=tmp_path)
    sgd = optax.sgd(0.1)
    with pytest.raises(ValueError, match=r"another model or optimizer: at \['training'\]\['opt_state'\]"):
        fit(5, folder=tmp_path, optimizer=sgd, state=training.init(jax.random.key(0), problem.model, sgd))


def test_another_config_is_refused(fit, tmp_path):
    fit(5, folder=tmp_path, config={"sigma": 0.25, "seed": 0})
    with pytest.raises(ValueError, match=r"another config \(sigma: 0.25 there, 0.5 now\); use another folder, delete"):
        fit(10, folder=tmp_path, config={"sigma": 0.5, "seed": 0})
    assert json.loads((tmp_path / "00000005" / "metadata.json").read_text())["config"] == {"sigma": 0.25, "seed": 0}
    assert fit(10, folder=tmp_path, config={"sigma": 0.25, "seed": 0}, log=len).state.step == 10
    assert fit(15, folder=tmp_path, log=len).state.step == 15
    assert json.loads((tmp_path / "00000015" / "metadata.json").read_text())["config"] == {"sigma": 0.25, "seed": 0}


def test_a_run_that_is_further_on_is_refused(fit, tmp_path):
    fit(10, folder=tmp_path)
    with pytest.raises(ValueError, match="is at step 10, beyond num_steps=5"):
        fit(5, folder=tmp_path)


class Poisoned:
    """A stream whose images turn to NaN at one position."""

    def __init__(self, stream, at):
        self._stream, self._at = stream, at
        self.get_state, self.set_state = stream.get_state, stream.set_state

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self._stream)
        return batch._replace(image=batch.image * np.float32("nan")) if self._stream.position == self._at else batch


@pytest.mark.parametrize("at", [10, 11])
def test_a_loss_that_is_not_finite_stops_at_its_step(problem, fit, tmp_path, at):
    with pytest.raises(FloatingPointError, match=f"the loss is nan at step {at}; training stopped"):
        fit(20, folder=tmp_path, stream=Poisoned(problem.Stream(), at))
    assert steps(tmp_path) == ([5] if at <= 10 else [5, 10])
    assert fit(20, folder=tmp_path, log=len).state.step == 20


def test_parameters_that_are_not_finite_are_not_saved(problem, fit, tmp_path):
    explosive = optax.sgd(lambda step: jnp.where(step == 4, jnp.float32("inf"), 0.0))
    state = training.init(jax.random.key(0), problem.model, explosive)
    with pytest.raises(FloatingPointError, match="a parameter or batch statistic is not finite at step 5"):
        fit(20, folder=tmp_path, optimizer=explosive, state=state)
    assert steps(tmp_path) == []


@pytest.mark.parametrize("at", [3, 5, 12])
def test_a_run_that_is_asked_to_stop_saves_at_once_and_continues(fit, tmp_path, at):
    asked = []

    def stop(step):
        asked.append(step)
        return np.bool_(step == at)

    kept = f"training was stopped after step {at} of 12; its checkpoint is in {tmp_path}."
    with pytest.raises(training.Preempted, match=f"^{re.escape(kept)}$"):
        fit(12, folder=tmp_path, stop=stop)
    assert asked == list(range(1, at + 1))
    assert steps(tmp_path)[-1] == at
    resumed = fit(12, folder=tmp_path, stop=lambda step: False, log=len)
    assert same(resumed.state, fit(12).state)
    assert resumed.history["step"].tolist() == sorted({4, 5, 8, 10, 12, at})


def test_a_run_without_a_folder_that_is_asked_to_stop_keeps_nothing(fit):
    with pytest.raises(training.Preempted, match="stopped after step 2 of 20; without a folder, nothing was kept"):
        fit(20, stop=lambda step: step == 2)


def test_metrics_are_told_as_the_history_grows(problem, fit, tmp_path):
    told, stream = [], problem.Stream()
    first = fit(10, folder=tmp_path, stream=stream, on_metrics=lambda *row: told.append((stream.position, *row)))
    assert [(position, step) for position, step, _ in told] == [(5, 4), (5, 5), (10, 8), (10, 10)]
    rows = {name: column for name, column in first.history.items() if name != "step"}
    assert [row for *_, row in told] == [
        {name: column[i] for name, column in rows.items()} for i in range(len(told))
    ]  # fmt: skip
    fit(12, folder=tmp_path, log=len, on_metrics=lambda *row: told.append((None, *row)))
    assert [step for _, step, _ in told] == [4, 5, 8, 10, 12]


def test_batches_that_end(problem, fit):
    with pytest.raises(ValueError, match="batches ended after 3 of num_steps=10"):
        fit(10, stream=problem.Stream(length=3))


@pytest.mark.parametrize("name", ["num_steps", "checkpoint_every", "keep", "log_every"])
def test_counts_must_be_positive(fit, name):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
        fit(**{name: 0})


def test_nothing_is_fetched_before_the_interval_after(problem, fit, monkeypatch):
    """The loop must not wait for the device: metrics are read one interval late, and all at the end."""
    fetched, stream = [], problem.Stream()
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: (fetched.append((stream.position, len(tree))), get(tree))[1])
    fit(12, stream=stream)
    assert fetched[:-1] == [(8, 4), (12, 4), (12, 4)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_shows_on_a_terminal_only(problem, fit, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    shown = {}
    for kind, stream in (("terminal", Terminal()), ("file", io.StringIO())):
        monkeypatch.setattr("sys.stderr", stream)
        training.fit(
            problem.apply, training.init(jax.random.key(0), problem.model, OPTIMIZER), problem.Stream(),
            objective=OBJECTIVE, optimizer=OPTIMIZER, num_steps=20, log_every=4, mesh=training.make_mesh({"data": 1}),
        )  # fmt: skip
        shown[kind] = stream.getvalue()
    assert shown["file"] == ""
    for word in ("20/20", "loss", "accuracy", "images/s"):
        assert word in shown["terminal"]
