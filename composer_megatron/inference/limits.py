"""Numbers that decide how much memory decoding takes; without PyTorch, so that counting starts at once."""

SPARE = 32
"""A request that has ended goes on, unseen, until its batch has been looked at: at most so many tokens past the end."""

PREFILL_TOKENS = 32_768
"""Tokens in a pass over prompts: a few gigabytes of hidden layers. Longer prompts run in chunks."""
