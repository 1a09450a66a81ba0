"""Weights from elsewhere as a run: Hugging Face, Megatron, and Composites made of a Llama's blocks."""
