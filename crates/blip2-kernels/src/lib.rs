//! SIMD kernels of blip2: slices in, slices out.
//!
//! The only crate of the workspace with `unsafe` code; it knows no tensor type.
#![allow(unsafe_code)]

pub mod activation;
pub mod adamw;
pub mod attention;
pub mod conv;
pub mod cross_entropy;
pub mod dropout;
pub mod gemm;
pub mod isa;
pub mod linear;
pub mod norm;
pub mod rope;
