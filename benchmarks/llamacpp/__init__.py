"""What benchmarks/llama_cpp.py needs of llama.cpp: its tools, its files, its logits, its timings."""
