#!/usr/bin/env bash
# Tests the kernels on an emulated AArch64 processor, for each instruction set that it has.
# Needs `rustup target add aarch64-unknown-linux-gnu`, and of Debian `gcc-aarch64-linux-gnu` and `qemu-user`.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu max"

for isa in neon-i8mm neon-dotprod neon scalar; do
    echo "BLIP2_ISA=$isa"
    BLIP2_ISA=$isa cargo test -p blip2-kernels --lib --locked --target aarch64-unknown-linux-gnu "$@"
done
