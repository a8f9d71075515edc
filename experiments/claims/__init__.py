"""Measurements of what papers claim: a module for each study, all on one frame.

python -m experiments.claims                  # lists the studies
python -m experiments.claims halfspaces       # measures one, or several, with default settings
python -m experiments.claims.halfspaces --help
"""
