"""Small trained checkpoints, and the recipe that made them."""
