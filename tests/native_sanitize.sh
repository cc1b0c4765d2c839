#!/usr/bin/env bash
# The kernel tests once more over a library built with AddressSanitizer and UndefinedBehaviorSanitizer.
# Needs cmake and GCC. About a minute on two idle cores:  tests/native_sanitize.sh [python]
set -euo pipefail
cd "$(dirname "$0")/.."
python="${1:-python3}"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

cmake -S . -B "$folder/build" -DXEXPORT_SANITIZE=ON >/dev/null
cmake --build "$folder/build" --parallel 2

# A plugin of pytest that puts this library in the place of the installed one.
cat >"$folder/sanitized.py" <<PLUGIN
import xexport.runtimes.native

xexport.runtimes.native.library_name = lambda: "$folder/build/libxexport_ops.so"
PLUGIN

# Python itself isn't instrumented, so the sanitizers' own libraries have to be loaded first, and what the
# interpreter leaks or frees its own way is none of their business.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH="$folder" XEXPORT_REQUIRE_NATIVE=1 OMP_NUM_THREADS=1
"$python" -m pytest -q -p sanitized tests/test_native.py
