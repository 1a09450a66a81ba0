"""What was measured: runs, verdicts on kernels, gains by length, the report."""
