"""What `python -m allo_kernels` runs: checks against the definitions, compilation ahead of time, benchmarks."""
