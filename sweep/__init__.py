"""Sweeps: a grid of models and targets, exported, validated and profiled on one machine or on many."""
