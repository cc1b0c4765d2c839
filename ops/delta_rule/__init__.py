"""Linear attention whose state forgets what it is about to overwrite."""
