//! SIMD kernels of blip2 on plain slices.
//!
//! The `unsafe` code of the workspace is here, but for one memory map in `blip2`; no tensor type is known. One operation is
//! one file, with its tests. Results do not depend on the number of threads, and the result for a row does not depend on the
//! rows beside it, bit for bit.
//!
//! | | |
//! |---|---|
//! | matrix products | [`gemm`] of two matrices that change, [`linear`] with a weight that is packed once, [`quantized`] with one in eight or four bits |
//! | attention | [`attention`]: whole sequences, one step of generation, and the gradient; [`rope`] |
//! | rows | [`norm`], [`activation`], [`dropout`], [`column_sums`], [`cross_entropy`] |
//! | pictures | [`conv`] |
//! | training | [`adamw`] |
//! | the machine | [`isa`], [`peak`], [`awake`] |
//!
//! # How a kernel is chosen
//!
//! At run time, once: [`isa::Isa::detect`] takes the best instruction set that the machine has, or the one that `BLIP2_ISA` names
//! (`scalar`, `avx2`, `avx-vnni`, `avx512`, `amx`; on AArch64 `scalar`, `neon`, `neon-dotprod`, `neon-i8mm`). Most operations are loops
//! over 16 lanes in plain Rust, compiled once for each register width by [`isa::with_isa`]; the inner loops of `gemm` and
//! `quantized`, and what rearranges and rounds their operands and attention's keys, are written in intrinsics, those of AMX in
//! assembly. `scalar` is the
//! reference of every other form. Products with quantised weights are equal on all sets, bit for bit; other results may differ
//! between sets in their last bits.
#![allow(unsafe_code)]

pub mod activation;
pub mod adamw;
#[cfg(target_arch = "x86_64")]
mod amx;
pub mod attention;
pub mod awake;
mod buffer;
pub mod column_sums;
pub mod conv;
pub mod cross_entropy;
pub mod dropout;
pub mod gemm;
pub mod isa;
mod lanes;
pub mod linear;
mod memory;
pub mod norm;
pub mod peak;
pub mod quantized;
pub mod rope;
#[cfg(test)]
mod testing;
#[cfg(target_arch = "x86_64")]
mod transpose;
