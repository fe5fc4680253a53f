"""Measurements for `examples/ladder.py`, one module each."""
