"""What robustjax costs, measured against what it could cost and what others cost: ``python -m benchmarks.certify``."""
