"""Decoding: weights as kernels want them, the cache, the forward passes, the draw, and the loop that joins them."""
