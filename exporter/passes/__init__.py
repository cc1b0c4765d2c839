"""Graph passes: one file each, ``run(model) -> int`` says how many places it changed."""
