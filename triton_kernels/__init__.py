"""Triton kernels of fusednn; imported on demand, so that nobody needs Triton."""
