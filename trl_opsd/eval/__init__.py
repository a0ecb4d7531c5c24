"""Benchmarks, one pinned scorer, metrics and their intervals."""
