//! From sums to results: scales, bias, activation and residual, of a row of a panel at a time, which stays in registers.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::format::{WIDTH, f32_at};
#[cfg(target_arch = "x86_64")]
use crate::activation::{Activation, activate_few};
#[cfg(target_arch = "x86_64")]
use crate::buffer::fetch_row;
use crate::gemm::Output;
use crate::isa::{Isa, with_isa};
use crate::linear::Epilogue;

/// The sums of some rows with a panel.
#[derive(Clone, Copy)]
pub(super) enum TileSums<'a> {
    /// Of blocks, which are scaled.
    Scaled(&'a [[f32; WIDTH]]),
    /// To be scaled by the row and the output, after what each row's sums begin with was added.
    Integers { sums: &'a [[i32; WIDTH]], starts: &'a [i32], scales: &'a [f32] },
}

impl TileSums<'_> {
    fn n_rows(self) -> usize {
        match self {
            Self::Scaled(sums) => sums.len(),
            Self::Integers { sums, .. } => sums.len(),
        }
    }
}

/// What becomes of sums, and where it goes.
#[derive(Clone, Copy)]
pub(super) struct Results<'a> {
    pub(super) epilogue: Epilogue<'a>,
    pub(super) n_out: usize,
    /// `[n_rows, n_out]`.
    pub(super) y: Output,
    /// Whether they go past the caches; [`all_written`](crate::buffer::all_written) must follow then. Only with AMX: elsewhere it was
    /// not tried.
    #[cfg(target_arch = "x86_64")]
    pub(super) is_far: bool,
}

impl Results<'_> {
    /// Those of a panel, for rows from a first one on and outputs from a first one on. Meanwhile the residual of what is done next is
    /// fetched, which begins at another row and output: it lies in short pieces, which no processor fetches by itself.
    ///
    /// # Safety
    /// These rows and outputs must lie in `y`, and nobody else may use them meanwhile.
    pub(super) unsafe fn finish(
        self,
        isa: Isa,
        sums: TileSums<'_>,
        panel: &[u8],
        [first_row, first_out]: [usize; 2],
        next: Option<[usize; 2]>,
    ) {
        let n_rows = sums.n_rows();
        let at = first_row * self.n_out + first_out;
        let width = WIDTH.min(self.n_out - first_out);
        let last = at + (n_rows - 1) * self.n_out + width;
        assert!(self.epilogue.residual.is_none_or(|residual| residual.len() >= last));
        assert!(self.epilogue.bias.is_none_or(|bias| bias.len() >= first_out + width));
        if let TileSums::Integers { starts, scales, .. } = sums {
            assert!(starts.len() >= n_rows && scales.len() >= n_rows && panel.len() >= 4 * WIDTH);
        }
        #[cfg(target_arch = "x86_64")]
        if width == WIDTH {
            let next = next.map_or(at, |[row, out]| row * self.n_out + out);
            match isa {
                // SAFETY: what is read is there, as was asserted, and the machine has the instructions; what is written is the caller's
                // promise.
                Isa::Avx512 | Isa::Amx => return unsafe { avx512(self, sums, panel, first_out, at, next) },
                // SAFETY: as above.
                Isa::Avx2 | Isa::AvxVnni => return unsafe { avx2(self, sums, panel, first_out, at, next) },
                _ => {}
            }
        }
        let _ = next;
        with_isa(
            isa,
            #[inline(always)]
            || {
                for r in 0..n_rows {
                    let mut row = [0.0; WIDTH];
                    match sums {
                        TileSums::Scaled(sums) => row = sums[r],
                        TileSums::Integers { sums, starts, scales } => {
                            for (o, y) in row.iter_mut().enumerate() {
                                *y = (sums[r][o] + starts[r]) as f32 * (scales[r] * f32_at(panel, o));
                            }
                        }
                    }
                    let (row, at) = (&mut row[..width], at + r * self.n_out);
                    if let Some(bias) = self.epilogue.bias {
                        row.iter_mut().zip(&bias[first_out..]).for_each(|(y, bias)| *y += bias);
                    }
                    self.epilogue.finish(row, at);
                    // SAFETY: the caller's promise.
                    unsafe { self.y.at(at).copy_from_nonoverlapping(row.as_ptr(), width) };
                }
            },
        );
    }
}

/// [`Results::finish`] of a whole panel in wide registers. Of the plain form the compiler makes pieces of rows, which go to the stack
/// and back.
#[cfg(target_arch = "x86_64")]
macro_rules! wide {
    (
        $name:ident, $features:literal, $lanes:literal, $load:ident, $store:ident, $stream:ident, $set:ident, $add:ident, $mul:ident,
        $load_integers:ident, $set_integers:ident, $add_integers:ident, $convert:ident
    ) => {
        /// # Safety
        /// As there; bias, residual, starts and scales must be as many as is read of them.
        #[target_feature(enable = $features)]
        unsafe fn $name(
            results: Results<'_>,
            sums: TileSums<'_>,
            panel: &[u8],
            first_out: usize,
            at: usize,
            next: usize,
        ) {
            const LANES: usize = $lanes;
            let Results { epilogue, n_out, y, is_far } = results;
            let bias = epilogue.bias.map(|bias| bias[first_out..].as_ptr());
            let residual = epilogue.residual.map(|residual| residual.as_ptr());
            let is_far = is_far
                && n_out.is_multiple_of(WIDTH)
                && y.0.wrapping_add(at).addr().is_multiple_of(4 * LANES);
            macro_rules! rows {
                ($n:expr, |$r:ident, $o:ident| $value:expr) => {
                    for $r in 0..$n {
                        let mut row = [0.0f32; WIDTH];
                        for $o in (0..WIDTH).step_by(LANES) {
                            let mut value = $value;
                            if let Some(bias) = bias {
                                value = $add(value, $load(bias.add($o)));
                            }
                            $store(row.as_mut_ptr().add($o), value);
                        }
                        if epilogue.activation != Activation::Identity {
                            activate_few(&mut row, epilogue.activation);
                        }
                        let at = at + $r * n_out;
                        if let Some(residual) = epilogue.residual {
                            fetch_row(residual, next + $r * n_out);
                        }
                        for o in (0..WIDTH).step_by(LANES) {
                            let mut value = $load(row.as_ptr().add(o));
                            if let Some(residual) = residual {
                                value = $add(value, $load(residual.add(at + o)));
                            }
                            if is_far {
                                $stream(y.at(at + o), value);
                            } else {
                                $store(y.at(at + o), value);
                            }
                        }
                    }
                };
            }
            // SAFETY: the caller's promise; nothing is read of what is fetched.
            unsafe {
                match sums {
                    TileSums::Scaled(sums) => rows!(sums.len(), |r, o| $load(sums[r].as_ptr().add(o))),
                    TileSums::Integers { sums, starts, scales } => {
                        let of_outputs: *const f32 = panel.as_ptr().cast();
                        rows!(sums.len(), |r, o| {
                            let integers = $load_integers(sums[r].as_ptr().add(o).cast());
                            let integers = $add_integers(integers, $set_integers(starts[r]));
                            $mul($convert(integers), $mul($set(scales[r]), $load(of_outputs.add(o))))
                        });
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
wide!(
    avx512,
    "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma",
    16,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_stream_ps,
    _mm512_set1_ps,
    _mm512_add_ps,
    _mm512_mul_ps,
    _mm512_loadu_si512,
    _mm512_set1_epi32,
    _mm512_add_epi32,
    _mm512_cvtepi32_ps
);
#[cfg(target_arch = "x86_64")]
wide!(
    avx2,
    "avx2,fma",
    8,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_stream_ps,
    _mm256_set1_ps,
    _mm256_add_ps,
    _mm256_mul_ps,
    _mm256_loadu_si256,
    _mm256_set1_epi32,
    _mm256_add_epi32,
    _mm256_cvtepi32_ps
);
