"""Scripts that print ratios against peers. `python -m benchmarks.NAME --help`."""
