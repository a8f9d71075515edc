"""What robustjax costs, beside the machine's limit and other libraries: ``python -m benchmarks.certify``."""
