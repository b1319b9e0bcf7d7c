"""Measurements. Each is one command: ``python -m benchmarks.<name>``."""
