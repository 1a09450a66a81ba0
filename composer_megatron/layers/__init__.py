"""Modules that play Megatron-core's parts (norm, core attention, …) without TransformerEngine or apex."""
