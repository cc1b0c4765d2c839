"""cos and sin of positions times frequencies, exact at any distance."""
