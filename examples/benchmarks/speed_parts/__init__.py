"""Modules of `benchmarks/speed.py`; each timed side runs in a separate process."""
