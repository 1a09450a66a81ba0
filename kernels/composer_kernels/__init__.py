"""Fused operations of hybrid language models in Triton: plain PyTorch in and out, torch and triton alone.

One file an operation; each reads from the top: what it computes and moves, kernels, launch choice, public function.
"""
