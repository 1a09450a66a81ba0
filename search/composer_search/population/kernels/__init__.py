"""Triton kernels for what lies between a population's matrix products, and for its optimizer."""
