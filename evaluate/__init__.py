"""Fidelity, drift, latency and memory of a runner, as records."""
