"""Composer on Megatron-core: hybrid language-model architectures, searched and trained.

The package's centre is a *Composite sequence* such as ``2A4M``; see `composer_megatron.sequence`.
"""

__version__ = "0.1.0"
