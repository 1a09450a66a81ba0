"""Where a sequence is cut, what each stage holds and how long its step takes."""
