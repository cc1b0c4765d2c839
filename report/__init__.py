"""Records in, HTML, Markdown or JSON out. Measures nothing."""
