"""Benchmark suite of fusednn: verified, interleaved comparisons against PyTorch and exported runtimes.

``python -m benchmarks.run --list`` shows the cases, ``python -m benchmarks.run`` measures them,
``python -m benchmarks.report FILE.json`` draws the results.
"""
