"""What has to be set before JAX touches a device: strictness, and less time for compiling."""

import functools
import gc
import importlib.metadata
import inspect
import os
import pathlib
import sys

import pytest

gc.disable()  # until all tests are collected: what that makes stays

# Bytecode is kept, whatever the environment says: without it, each process compiles the package and its tests anew.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# In the environment, so that the processes that tests start compile and round alike.
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as many test processes as cores: more threads wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(__file__).parents[1] / ".cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # programs go without the stack of Python below each operation
# A process that is killed, or not yet done, leaves half an entry there: it is compiled again.
os.environ["PYTHONWARNINGS"] = "ignore:Error reading persistent compilation cache entry"
KNOWN = importlib.metadata.version("jaxlib").startswith("0.10.")  # an XLA that does not know a flag ends the process
if KNOWN:
    quick = "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"
    quick += " --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()

import jax  # noqa: E402

if KNOWN:  # JAX loads every dialect of MLIR again for each program, a fifth of what a small one costs
    from jax._src.interpreters import mlir

    context = mlir.make_ir_context()
    mlir.make_ir_context = lambda: context

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def data_dir() -> str:
    """Prepared TFDS folders; the tests that ask for them are skipped where there are none."""
    path = pathlib.Path(os.environ.get("ROBUSTJAX_TEST_DATA", pathlib.Path(__file__).parents[2] / "shared" / "tfds"))
    if not (path / "mnist").is_dir():
        pytest.skip(f"no prepared TFDS data in {path}; set ROBUSTJAX_TEST_DATA to a folder that has mnist and cifar10")
    return str(path)


@pytest.fixture
def unchecked():
    """Takes the run-time type checker off for one test: a wrong type meets our own error, as it does for users."""
    found = _checked(frozenset(name for name in sys.modules if name.startswith("robustjax")))
    for owner, name, _, plain in found:
        setattr(owner, name, plain)
    yield
    for owner, name, checked, _ in found:
        setattr(owner, name, checked)


@functools.cache
def _checked(names):
    """Functions and methods of these modules: who has them, their name, and they with and without the checker."""
    from robustjax import _arguments  # by the hook that checks types, which is not yet there when this file is read

    # The package's own check stays; what it wraps is looked at in its turn.
    own = lambda f: getattr(getattr(f, "__code__", None), "co_filename", None) == _arguments.__file__
    last = lambda f: not hasattr(f, "__wrapped__") or hasattr(f, "lower") or own(f)
    plain = functools.partial(inspect.unwrap, stop=last)

    def of(owner, belongs):
        functions = [(owner, name, f) for name, f in vars(owner).items() if inspect.isfunction(f) and belongs(f)]
        wrappers = [plain(f) for *_, f in functions if own(plain(f)) and hasattr(plain(f), "__wrapped__")]
        functions += [(f, "__wrapped__", f.__wrapped__) for f in wrappers]
        return [(*where, f, plain(f)) for *where, f in functions if plain(f) is not f]

    found = []
    for module in map(sys.modules.get, names):
        found += of(module, lambda f: f.__module__.startswith("robustjax"))
        classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
        found += [entry for c in classes for entry in of(c, lambda f: True)]
    return found
