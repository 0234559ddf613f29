//! What the machine can do at best: matrix products, and reading memory.

use std::hint::black_box;
use std::time::Instant;

use blip2_kernels::gemm::Precision;
use blip2_kernels::isa::Isa;
use blip2_kernels::linear::{Epilogue, PackedWeight};
use blip2_kernels::quantized::{Format, QuantizedWeight};
use rayon::prelude::*;
use serde::Serialize;

/// A product that is limited by arithmetic: rows, outputs, inputs.
const PRODUCT: [usize; 3] = [768, 4096, 1024];
/// Bytes that no cache holds.
const BEYOND_CACHE: usize = 256 << 20;
/// The best of so many runs counts.
const N_RUNS: usize = 7;

/// The machine's best rates, with the threads of this process.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Machine {
    /// The instruction set of the kernels.
    pub isa: &'static str,
    /// Threads that compute.
    pub threads: usize,
    /// Operations a second of products in f32.
    pub products_f32: f64,
    /// In bf16.
    pub products_bf16: f64,
    /// In eight bits.
    pub products_int8: f64,
    /// Bytes a second read of memory.
    pub reading: f64,
}

impl Machine {
    /// Measures it: takes a second or two, and a quarter of a gigabyte of memory.
    pub fn measure() -> Self {
        let [n_rows, n_out, n_in] = PRODUCT;
        let x = vec![0.5; n_rows * n_in];
        let row = |i: usize, row: &mut [f32]| row.fill((i % 7) as f32 * 0.1);
        let plain = |precision: Precision| {
            let weight = PackedWeight::pack(n_out, n_in, precision.into(), &row);
            let mut y = vec![0.0; n_rows * n_out];
            fastest(|| weight.forward_into(&x, n_rows, None, black_box(&mut y)))
        };
        let quantised = || {
            let weight = QuantizedWeight::quantize(n_out, n_in, Format::Int8, &row);
            let mut y = vec![0.0; n_rows * n_out];
            fastest(|| weight.forward_into(&x, n_rows, Epilogue::bias(None), black_box(&mut y)))
        };
        let operations = 2.0 * PRODUCT.iter().product::<usize>() as f64;
        Self {
            isa: Isa::detect().name(),
            threads: rayon::current_num_threads(),
            products_f32: operations / plain(Precision::F32),
            products_bf16: operations / plain(Precision::Bf16),
            products_int8: operations / quantised(),
            reading: reading(),
        }
    }

    pub(super) fn products(&self, precision: Precision, in_bytes: bool) -> f64 {
        match (in_bytes, precision) {
            (true, _) => self.products_int8,
            (false, Precision::F32) => self.products_f32,
            (false, Precision::Bf16) => self.products_bf16,
        }
    }
}

/// Bytes a second of a sum over more than the caches hold.
fn reading() -> f64 {
    let words = vec![1u64; BEYOND_CACHE / size_of::<u64>()];
    let seconds = fastest(|| {
        // Some sums at a time, so that reading is what takes time.
        let sum: u64 = words
            .par_chunks(1 << 16)
            .map(|words| {
                let mut sums = [0u64; 16];
                for some in words.as_chunks::<16>().0 {
                    sums.iter_mut().zip(some).for_each(|(sum, word)| *sum = sum.wrapping_add(*word));
                }
                sums.iter().fold(0u64, |a, b| a.wrapping_add(*b))
            })
            .reduce(|| 0, u64::wrapping_add);
        black_box(sum);
    });
    BEYOND_CACHE as f64 / seconds
}

/// Seconds of the fastest run.
fn fastest(mut run: impl FnMut()) -> f64 {
    (0..N_RUNS)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rates_are_those_of_a_machine() {
        let machine = Machine::measure();
        for rate in [machine.products_f32, machine.products_bf16, machine.products_int8, machine.reading] {
            assert!((1e7..1e15).contains(&rate), "{machine:?}");
        }
        assert_eq!(machine.products(Precision::Bf16, true), machine.products_int8);
        assert_eq!(machine.products(Precision::Bf16, false), machine.products_bf16);
    }
}
