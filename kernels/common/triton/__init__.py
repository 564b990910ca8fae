"""Triton helpers that kernels of several operators share; imported, and triton with them, when a kernel first runs."""
