"""Measurements: what is asked of an engine (workload), and how it did (offline)."""
