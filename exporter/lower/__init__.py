"""Passes over static graphs: standard operators that a device can't compute, or not well, become others.

One file each, ``rewrite(model) -> int`` says how many places it changed.
"""
