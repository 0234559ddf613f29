#!/usr/bin/env bash
# Tests the kernels with AddressSanitizer, for each instruction set that this machine has: reads and writes outside of memory.
# In these tests slices end where their memory ends, and threads keep none that is larger.
set -euo pipefail
cd "$(dirname "$0")/.."
# The sanitiser is not for stable compilers; this lets one take it, for a build in a folder of its own.
export RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address"
# Leaks are not what is looked for: a pool of rayon's that a thread has joined stays, as its documentation says.
export ASAN_OPTIONS="${ASAN_OPTIONS:-detect_leaks=0}"
target=$(rustc --print host-tuple)

has() { grep -qw "$1" /proc/cpuinfo; }
sets=(scalar)
case $target in
x86_64-*)
    if has avx2; then sets+=(avx2); fi
    if has avx512_vnni || has avx_vnni; then sets+=(avx-vnni); fi
    if has avx512_bf16; then sets+=(avx512); fi
    if has amx_tile; then sets+=(amx); fi
    ;;
aarch64-*) sets+=(neon) ;;
esac
for isa in "${sets[@]}"; do
    echo "BLIP2_ISA=$isa"
    BLIP2_ISA=$isa cargo test -p blip2-kernels --lib --locked --target "$target" \
        --target-dir "${CARGO_TARGET_DIR:-target}/sanitized" "$@"
done
