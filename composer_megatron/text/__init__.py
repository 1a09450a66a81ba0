"""From text files to token files that Megatron reads, and back: documents, tokenizers, text folders."""
