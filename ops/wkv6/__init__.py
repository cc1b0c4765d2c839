"""The recurrence of RWKV-5 and RWKV-6 (decaying outer products, a bonus for the current one)."""
