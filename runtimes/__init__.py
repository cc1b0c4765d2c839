"""Running a bundle: one file a runtime, streaming, sampling, tokenizers. Needs no torch."""
