//! The inverse cosine transform: libjpeg's slow integer one (Loeffler, Ligtenberg and Moschytz 1989, with 12 multiplications),
//! with the sixteen-bit sums of its vectors.

use std::array::from_fn;
use std::num::Wrapping;

use blip2_kernels::isa::{Isa, with_isa};

use super::Block;

/// Bits after the point of the constants.
const POINT: usize = 13;
/// Bits after the point that the columns leave to the rows.
const BETWEEN: usize = 2;

const fn fixed(value: f64) -> Wrapping<i32> {
    Wrapping((value * (1 << POINT) as f64 + 0.5) as i32)
}

const F_0_298: Wrapping<i32> = fixed(0.298631336);
const F_0_390: Wrapping<i32> = fixed(0.390180644);
const F_0_541: Wrapping<i32> = fixed(0.541196100);
const F_0_765: Wrapping<i32> = fixed(0.765366865);
const F_0_899: Wrapping<i32> = fixed(0.899976223);
const F_1_175: Wrapping<i32> = fixed(1.175875602);
const F_1_501: Wrapping<i32> = fixed(1.501321110);
const F_1_847: Wrapping<i32> = fixed(1.847759065);
const F_1_961: Wrapping<i32> = fixed(1.961570560);
const F_2_053: Wrapping<i32> = fixed(2.053119869);
const F_2_562: Wrapping<i32> = fixed(2.562915447);
const F_3_072: Wrapping<i32> = fixed(3.072711026);

/// Samples of `blocks`, rows of `across`, into `samples`, rows of eight times as many.
pub(super) fn blocks(blocks: &[Block], across: usize, quantizer: &[i16; 64], samples: &mut [u8]) {
    with_isa(
        Isa::detect(),
        #[inline(always)]
        || {
            for (blocks, samples) in blocks.chunks_exact(across).zip(samples.chunks_exact_mut(64 * across)) {
                for (column, block) in blocks.iter().enumerate() {
                    let square = one(block, quantizer);
                    for (row, samples) in square.iter().zip(samples.chunks_exact_mut(8 * across)) {
                        samples[8 * column..][..8].copy_from_slice(row);
                    }
                }
            }
        },
    );
}

#[inline(always)]
fn one(block: &Block, quantizer: &[i16; 64]) -> [[u8; 8]; 8] {
    let mut low_rows = [0; 8];
    let mut high_rows = [0; 8];
    for row in 1..4 {
        for column in 0..8 {
            low_rows[column] |= block[8 * row + column];
        }
    }
    for row in 4..8 {
        for column in 0..8 {
            high_rows[column] |= block[8 * row + column];
        }
    }
    let any = |columns: [i16; 8]| columns.iter().fold(0, |any, column| any | column) != 0;
    let mut high_columns = 0;
    for column in 4..8 {
        high_columns |= block[column] | low_rows[column];
    }
    if any(high_rows) || high_columns != 0 && any(low_rows) {
        transform::<8>(block, quantizer)
    } else if any(low_rows) {
        transform::<4>(block, quantizer)
    } else if any([0, block[1], block[2], block[3], block[4], block[5], block[6], block[7]]) {
        transform::<1>(block, quantizer)
    } else {
        // The same everywhere.
        let value = i32::from(block[0].wrapping_mul(quantizer[0]) << BETWEEN);
        [[sample(Wrapping((value + 16) >> 5)); 8]; 8]
    }
}

#[inline(always)]
fn sample(value: Wrapping<i32>) -> u8 {
    (value.0.clamp(-128, 127) + 128) as u8
}

/// Of a block whose coefficients are zero from row `N` on and, where `N` is 4, from that column on.
#[inline(always)]
fn transform<const N: usize>(block: &Block, quantizer: &[i16; 64]) -> [[u8; 8]; 8] {
    let value = |at: usize| Wrapping(i32::from(block[at].wrapping_mul(quantizer[at])));
    let values: [[Wrapping<i32>; 8]; 8] =
        from_fn(|row| from_fn(|column| if row < N { value(8 * row + column) } else { Wrapping(0) }));
    let rows = if N == 1 {
        // Columns of one number are the same all the way down, and libjpeg does not limit them to sixteen bits.
        let row = values[0].map(|value| Wrapping(i32::from((value.0 as i16) << BETWEEN)));
        let columns = row.map(|value| [value; 8]);
        pass::<8, { POINT + BETWEEN + 3 }>(&columns)
    } else {
        let columns = pass::<N, { POINT - BETWEEN }>(&values);
        pass::<N, { POINT + BETWEEN + 3 }>(&from_fn(|column| from_fn(|row| columns[row][column])))
    };
    from_fn(|row| from_fn(|column| sample(rows[column][row])))
}

/// Eight transforms side by side, of eight numbers below each other; the last `8 - N` of these are zero.
#[inline(always)]
fn pass<const N: usize, const SHIFT: usize>(values: &[[Wrapping<i32>; 8]; 8]) -> [[Wrapping<i32>; 8]; 8] {
    let mut out = [[Wrapping(0_i32); 8]; 8];
    for lane in 0..8 {
        let value = |row: usize| if row < N { values[row][lane] } else { Wrapping(0) };
        // The vectors of libjpeg add in sixteen bits before they multiply.
        let add = |a: Wrapping<i32>, b: Wrapping<i32>| Wrapping(i32::from((a + b).0 as i16));
        let (x0, x1, x2, x3) = (value(0), value(1), value(2), value(3));
        let (x4, x5, x6, x7) = (value(4), value(5), value(6), value(7));

        let shared = (x2 + x6) * F_0_541;
        let (even2, even3) = (shared - x6 * F_1_847, shared + x2 * F_0_765);
        let (even0, even1) = (add(x0, x4) << POINT, add(x0, -x4) << POINT);
        let (e0, e3) = (even0 + even3, even0 - even3);
        let (e1, e2) = (even1 + even2, even1 - even2);

        let (sum_73, sum_51) = (add(x7, x3), add(x5, x1));
        let shared = (sum_73 + sum_51) * F_1_175;
        let (sum_73, sum_51) = (shared - sum_73 * F_1_961, shared - sum_51 * F_0_390);
        let (sum_71, sum_53) = ((x7 + x1) * -F_0_899, (x5 + x3) * -F_2_562);
        let o0 = x7 * F_0_298 + sum_71 + sum_73;
        let o1 = x5 * F_2_053 + sum_53 + sum_51;
        let o2 = x3 * F_3_072 + sum_53 + sum_73;
        let o3 = x1 * F_1_501 + sum_71 + sum_51;

        let round = Wrapping(1 << (SHIFT - 1));
        // Packed with saturation.
        let narrow = |value: Wrapping<i32>| Wrapping(((value + round) >> SHIFT).0.clamp(-32768, 32767));
        out[0][lane] = narrow(e0 + o3);
        out[7][lane] = narrow(e0 - o3);
        out[1][lane] = narrow(e1 + o2);
        out[6][lane] = narrow(e1 - o2);
        out[2][lane] = narrow(e2 + o1);
        out[5][lane] = narrow(e2 - o1);
        out[3][lane] = narrow(e3 + o0);
        out[4][lane] = narrow(e3 - o0);
    }
    out
}
