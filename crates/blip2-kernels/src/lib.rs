//! SIMD kernels of blip2 on plain slices.
//!
//! The only crate of the workspace with `unsafe` code; it knows no tensor type. One operation is one file, with its
//! tests. Results do not depend on the number of threads, and the result for a row does not depend on the rows
//! beside it, bit for bit.
//!
//! Which instructions are used is decided at run time ([`isa::Isa::detect`]); `BLIP2_ISA=scalar|avx2|avx-vnni|avx512`, on
//! AArch64 `BLIP2_ISA=scalar|neon|neon-dotprod|neon-i8mm`, forces a lower set.
#![allow(unsafe_code)]

pub mod activation;
pub mod adamw;
pub mod attention;
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
