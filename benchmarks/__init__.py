"""Measurements of privfl beside the alternative, in the same run.

Each is `python -m benchmarks.NAME [--json FILE]`.
"""
