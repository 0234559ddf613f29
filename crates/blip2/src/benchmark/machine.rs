//! What the machine can do at best: multiply-adds, and reading memory.

use std::hint::black_box;
use std::time::Instant;

use blip2_kernels::gemm::Precision;
use blip2_kernels::isa::Isa;
use blip2_kernels::linear::{Epilogue, PackedWeight};
use blip2_kernels::peak::{MOST_ROUNDS, Numbers, multiply_adds};
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
    /// Operations a second of multiply-adds in f32, on registers alone; one is two operations.
    pub products_f32: f64,
    /// In bf16.
    pub products_bf16: f64,
    /// In eight bits.
    pub products_int8: f64,
    /// For which of these numbers the instruction set has no multiply-add that could be timed alone: these rates are those of a
    /// large matrix product by the kernels.
    pub by_kernels: Vec<&'static str>,
    /// Bytes a second read of memory.
    pub reading: f64,
}

impl Machine {
    /// Measures it: takes a second or two, and a quarter of a gigabyte of memory.
    pub fn measure() -> Self {
        let isa = Isa::detect();
        let mut by_kernels = Vec::new();
        let mut best = |numbers, name| {
            of_registers(isa, numbers).unwrap_or_else(|| {
                by_kernels.push(name);
                of_kernels(numbers)
            })
        };
        let products_f32 = best(Numbers::F32, "f32");
        let products_bf16 = best(Numbers::Bf16, "bf16");
        let products_int8 = best(Numbers::Int8, "int8");
        Self {
            isa: isa.name(),
            threads: rayon::current_num_threads(),
            products_f32,
            products_bf16,
            products_int8,
            by_kernels,
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

/// Operations a second of multiply-adds on the registers of all threads, where the set has an instruction for them.
fn of_registers(isa: Isa, numbers: Numbers) -> Option<f64> {
    let mut done = None;
    let seconds = fastest(|| {
        let counts = rayon::broadcast(|_| multiply_adds(isa, numbers, MOST_ROUNDS));
        done = counts.into_iter().sum::<Option<u64>>();
    });
    done.map(|n| 2.0 * n as f64 / seconds)
}

/// Operations a second of a large matrix product.
fn of_kernels(numbers: Numbers) -> f64 {
    let [n_rows, n_out, n_in] = PRODUCT;
    let x = vec![0.5; n_rows * n_in];
    let mut y = vec![0.0; n_rows * n_out];
    let row = |i: usize, row: &mut [f32]| row.fill((i % 7) as f32 * 0.1);
    let mut plain = |precision: Precision| {
        let weight = PackedWeight::pack(n_out, n_in, precision.into(), &row);
        fastest(|| weight.forward_into(&x, n_rows, Epilogue::bias(None), black_box(&mut y)))
    };
    let seconds = match numbers {
        Numbers::F32 => plain(Precision::F32),
        Numbers::Bf16 => plain(Precision::Bf16),
        Numbers::Int8 => {
            let weight = QuantizedWeight::quantize(n_out, n_in, Format::Int8, &row);
            fastest(|| weight.forward_into(&x, n_rows, Epilogue::bias(None), black_box(&mut y)))
        }
    };
    2.0 * PRODUCT.iter().product::<usize>() as f64 / seconds
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
        let of_kernels: &[&str] = match Isa::detect() {
            Isa::Scalar => &["f32", "bf16", "int8"],
            Isa::Avx2 | Isa::Neon => &["int8"],
            _ => &[],
        };
        assert_eq!(machine.by_kernels, of_kernels);
        assert_eq!(machine.products(Precision::Bf16, true), machine.products_int8);
        assert_eq!(machine.products(Precision::Bf16, false), machine.products_bf16);
    }
}
