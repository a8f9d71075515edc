"""One module per question asked of a model; run as ``python -m experiments.NAME --help``."""
