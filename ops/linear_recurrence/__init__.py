"""A linear recurrence with a decay a head or a key: our kernel where it is there, else LinearAttention."""
