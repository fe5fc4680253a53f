"""The measurements of `examples/ladder.py`, a file each."""
