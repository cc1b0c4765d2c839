#!/usr/bin/env bash
# The kernels without ONNX Runtime, against the references:
#
#   tests/native/check.sh sanitize [python]   with AddressSanitizer and UBSan, then with ThreadSanitizer
#   tests/native/check.sh arm64 [python]      cross-compiled, under an emulator
#
# python: one with torch, which makes the cases (cases.py). Nothing is installed here.
set -euo pipefail
cd "$(dirname "$0")/../.."
what="${1:-}"
python="${2:-python3}"
folder="build/check"

need() {  # need COMMAND PACKAGE
  command -v "$1" >/dev/null && return
  echo "$1 is missing (Debian: apt-get install $2)" >&2
  exit 2
}

# build NAME [cmake's arguments]
build() {
  cmake -S . -B "$folder/$1" -DXEXPORT_HARNESS=ON "${@:2}" >/dev/null
  cmake --build "$folder/$1" --parallel 2 >/dev/null
}

# run NAME VERSION [emulator]
run() { "${@:3}" "$folder/$1/harness" "$folder/$1/libxexport_ops.so" "$folder/cases" "$2"; }

need cmake cmake
mkdir -p "$folder"
case "$what" in
  sanitize)
    need c++ g++
    "$python" tests/native/cases.py "$folder/cases"
    build address "-DXEXPORT_SANITIZE=address,undefined"
    export UBSAN_OPTIONS=print_stacktrace=1
    run address 1.31.0
    run address 1.18.0
    build thread "-DXEXPORT_SANITIZE=thread"
    # its memory layout and much randomisation of addresses don't go together: where that is allowed, without
    if setarch "$(uname -m)" -R true 2>/dev/null; then
      run thread 1.31.0 setarch "$(uname -m)" -R
    else
      run thread 1.31.0
    fi
    ;;
  arm64)
    need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
    need qemu-aarch64-static qemu-user-static
    "$python" tests/native/cases.py "$folder/cases"
    build arm64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
      -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
    run arm64 1.31.0 qemu-aarch64-static -cpu cortex-a76 -L /usr/aarch64-linux-gnu | tee "$folder/arm64.txt"
    grep -q "best: neon" "$folder/arm64.txt" || { echo "the library doesn't say that it runs on neon" >&2; exit 1; }
    ;;
  *)
    sed -n '2,7s/^# \?//p' "$0" >&2
    exit 2
    ;;
esac
