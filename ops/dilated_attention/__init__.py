"""LongNet's dilated attention of a chunk, over the keys and values of the segments that are going on."""
