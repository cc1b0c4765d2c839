"""One node for a chain of row-wise operations: norms, gates, token shifts, interpolations."""
