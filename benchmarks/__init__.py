"""Benchmark scripts, and the results that are committed."""
