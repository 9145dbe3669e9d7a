"""Measurements with rivals in the same run: `python -m benchmarks step --help`."""
