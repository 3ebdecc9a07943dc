"""The doctor: what it tries step by step, and how it names the first cause."""
