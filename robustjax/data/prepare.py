"""Prepares a TFDS data set in the format that this package reads: ``python -m robustjax.data.prepare NAME``."""

from __future__ import annotations

import argparse
import importlib.util

from robustjax import _paths


def prepare(name: str, data_dir: str | None = None) -> None:
    """Prepares a data set with random access (array_record files); this is the only step that needs TensorFlow.

    Args:
      name: TFDS name, as in ``"mnist"`` and ``"cifar10_corrupted/fog_1"``.
      data_dir: where to put it; by default ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.

    Raises:
      ModuleNotFoundError: if TensorFlow is not installed.
      ValueError: if the name is ``"digits"``, ``"arrays:FILE.npz"`` or ``"folder:PATH"``, which need no preparation.
    """
    if name == "digits":
        raise ValueError("digits comes with scikit-learn and needs no preparation: load it directly.")
    if name.startswith(("arrays:", "folder:")):
        raise ValueError(f"name must be of TFDS, got {name!r}, which needs no preparation: load it directly.")
    if importlib.util.find_spec("tensorflow") is None:
        raise ModuleNotFoundError(
            f'Preparing {name} needs TensorFlow, which is not installed: run `pip install "robustjax[tfds]"`, here or '
            "in another environment; reading the result does not need it."
        )
    import tensorflow_datasets as tfds

    data_dir = None if data_dir is None else str(_paths.path_of(data_dir=data_dir))
    tfds.builder(name, data_dir=data_dir, file_format="array_record").download_and_prepare()


def main(arguments: list[str] | None = None) -> None:
    """Runs :func:`prepare` from the command line."""
    parser = argparse.ArgumentParser(prog="python -m robustjax.data.prepare", description="Prepare a TFDS data set.")
    parser.add_argument("name", help="TFDS name, as in mnist or cifar10_corrupted/fog_1")
    parser.add_argument("--data-dir", help="where to put it (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)")
    parsed = parser.parse_args(arguments)
    try:
        prepare(parsed.name, parsed.data_dir)
    except (ModuleNotFoundError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
