//! Prints the speed of matrix products on the shapes of the default model's training.
//! `cargo run --release -p blip2-kernels --example gemm_speed`

use std::time::Instant;

use blip2_kernels::gemm::{MatrixRef, Precision, Start, gemm};

fn main() {
    // (m, n, k, a is transposed, b is transposed)
    let shapes = [
        (10_000, 384, 384, false, true),
        (10_000, 1536, 384, false, true),
        (10_000, 384, 1536, false, true),
        (10_000, 384, 384, false, false),
        (384, 384, 10_000, true, false),
        (1536, 384, 10_000, true, false),
        (512, 30_522, 384, false, true),
        (2_000, 1536, 576, false, true),
        (32, 384, 384, false, true),
    ];
    for precision in [Precision::F32, Precision::Bf16] {
        for (m, n, k, a_t, b_t) in shapes {
            let (a, b, mut c) = (vec![0.5; m * k], vec![0.25; k * n], vec![0.0; m * n]);
            let view = |data, rows, cols, transposed| {
                let (row_stride, col_stride) = if transposed { (1, rows) } else { (cols, 1) };
                MatrixRef { data, row_stride, col_stride }
            };
            let mut times: Vec<f64> = (0..7)
                .map(|_| {
                    let start = Instant::now();
                    gemm(
                        m,
                        n,
                        k,
                        view(&a[..], m, k, a_t),
                        view(&b[..], k, n, b_t),
                        Start::Zero,
                        &mut c,
                        precision,
                    );
                    start.elapsed().as_secs_f64()
                })
                .collect();
            times.sort_by(f64::total_cmp);
            let flops = 2.0 * m as f64 * n as f64 * k as f64;
            let (median, rate) = (times[3] * 1e3, flops / times[3] / 1e9);
            #[allow(clippy::print_stdout, reason = "an example prints")]
            {
                println!("{precision:?} {m:>6} x {n:>6} x {k:>6}  {median:8.3} ms  {rate:7.1} GFLOP/s");
            }
        }
    }
}
