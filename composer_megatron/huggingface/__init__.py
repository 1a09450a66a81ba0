"""A Composite as Hugging Face knows it: names, files and the model's code."""
