"""Benchmarks, generation backends, one pinned scorer, metrics and their intervals."""
