"""The parts of `examples/benchmarks/speed.py`; a side that is timed is a module that runs as a process of its own."""
