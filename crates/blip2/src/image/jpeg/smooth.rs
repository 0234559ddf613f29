//! Progressive files that never told their finer coefficients: the first nine of a block are guessed from the mean colours of
//! the 5 × 5 blocks around it, as libjpeg does ("block smoothing", section K.8 of the standard, extended).

use super::Block;
use super::markers::{Component, Frame, ZIGZAG};
use super::scan::Known;

/// Weights of the 5 × 5 blocks.
type Weights = [[i64; 5]; 5];

/// How a coefficient follows from the mean colours, where finer ones are known of the component, at places 1, 9 and 2 ...
const SLOPE: Weights = [[0; 5], [0; 5], [-7, 50, 0, -50, 7], [0; 5], [0; 5]];
const TWIST: Weights = [[0, -1, 0, 1, 0], [-1, 10, 0, -10, 1], [0; 5], [1, -10, 0, 10, -1], [0, 1, 0, -1, 0]];
const BEND: Weights = [[0; 5], [0; 5], [-1, 13, -24, 13, -1], [0; 5], [0; 5]];

/// ... and where none are, at places 0, 1, 9, 2, 3 and 10. Those at the mirrored places have the mirrored weights.
const WIDE_MEAN: Weights = [
    [-2, -6, -8, -6, -2],
    [-6, 6, 42, 6, -6],
    [-8, 42, 152, 42, -8],
    [-6, 6, 42, 6, -6],
    [-2, -6, -8, -6, -2],
];
const WIDE_SLOPE: Weights =
    [[-1, -1, 0, 1, 1], [-3, 13, 0, -13, 3], [-3, 38, 0, -38, 3], [-3, 13, 0, -13, 3], [-1, -1, 0, 1, 1]];
const WIDE_TWIST: Weights = [[-1, 0, 0, 0, 1], [0, 9, 0, -9, 0], [0; 5], [0, -9, 0, 9, 0], [1, 0, 0, 0, -1]];
const WIDE_BEND: Weights = [[0; 5], [0, 2, -5, 2, 0], [1, 7, -14, 7, 1], [0, 2, -5, 2, 0], [0; 5]];
const WIDE_WAVE: Weights = [[0; 5], [0, 1, 0, -1, 0], [0, 2, 0, -2, 0], [0, 1, 0, -1, 0], [0; 5]];
const WIDE_KNOT: Weights = [[0; 5], [0, 1, -3, 1, 0], [0; 5], [0, -1, 3, -1, 0], [0; 5]];

/// Coefficients that are guessed, in the order of the file; the mean colour is the first.
const GUESSED: usize = 10;

/// Guesses what is missing, if anything is.
pub(super) fn smooth(
    frame: &Frame,
    known: &Known,
    quantizers: &[Option<[i16; 64]>],
    coefficients: &mut [Vec<Block>],
) {
    let is_possible = quantizers.iter().zip(&known.bits).all(|(table, known)| {
        let divides = |table: &[i16; 64]| ZIGZAG[..GUESSED].iter().all(|&at| table[usize::from(at)] != 0);
        table.as_ref().is_some_and(divides) && known[0].is_some()
    });
    let is_useful = known.bits.iter().any(|known| known[1..GUESSED].iter().any(|&bit| bit != Some(0)));
    if !is_possible || !is_useful {
        return;
    }
    for (((part, known), table), blocks) in
        frame.components.iter().zip(&known.bits).zip(quantizers.iter().flatten()).zip(coefficients)
    {
        let guesses = guesses(known);
        let means: Vec<i16> = blocks.iter().map(|block| block[0]).collect();
        let step = |place: usize| i64::from(table[place] as u16);
        for (row, rows) in rows_around(frame, part) {
            let n_columns = part.width.div_ceil(8);
            for column in 0..n_columns {
                let around = rows.map(|row| {
                    [0, 1, 2, 3, 4].map(|across: usize| {
                        let column = (column + across).saturating_sub(2).min(n_columns - 1);
                        i64::from(means[row * part.blocks_across + column])
                    })
                });
                let block = &mut blocks[row * part.blocks_across + column];
                for &(place, bit, weights, is_mirrored) in &guesses {
                    if place > 0 && block[place] != 0 {
                        continue;
                    }
                    let mut sum = 0;
                    for down in 0..5 {
                        for across in 0..5 {
                            let weight =
                                if is_mirrored { weights[across][down] } else { weights[down][across] };
                            sum += weight * around[down][across];
                        }
                    }
                    let sum = sum * step(0);
                    let mut size = ((step(place) << 7) + sum.abs()) / (step(place) << 8);
                    if let Some(bit) = bit {
                        // Were it larger, the file would have told it.
                        size = size.min((1 << bit) - 1);
                    }
                    block[place] = (if sum >= 0 { size } else { -size }) as i16;
                }
            }
        }
    }
}

/// Which coefficients of a component to guess where they are zero: the place, the lowest bit that is known, the weights, and
/// whether these are mirrored.
fn guesses(known: &[Option<u32>; 64]) -> Vec<(usize, Option<u32>, &'static Weights, bool)> {
    let none_is_known = known[1..GUESSED].iter().all(Option::is_none);
    let weights: &[(usize, &Weights, bool)] = if none_is_known {
        &[
            (1, &WIDE_SLOPE, false),
            (2, &WIDE_SLOPE, true),
            (3, &WIDE_BEND, true),
            (4, &WIDE_TWIST, false),
            (5, &WIDE_BEND, false),
            (6, &WIDE_WAVE, false),
            (7, &WIDE_KNOT, false),
            (8, &WIDE_KNOT, true),
            (9, &WIDE_WAVE, true),
            (0, &WIDE_MEAN, false),
        ]
    } else {
        &[(1, &SLOPE, false), (2, &SLOPE, true), (3, &BEND, true), (4, &TWIST, false), (5, &BEND, false)]
    };
    let uncertain = weights.iter().filter(|&&(at, ..)| at == 0 || known[at] != Some(0));
    uncertain
        .map(|&(at, weights, is_mirrored)| {
            (usize::from(ZIGZAG[at]), known[at].filter(|_| at > 0), weights, is_mirrored)
        })
        .collect()
}

/// The rows of blocks, each with the five rows around it. At the edges the last are repeated. In the last MCUs libjpeg counts
/// rows by those that are left, so that where one of several is, it takes the picture for shorter than it is.
fn rows_around(frame: &Frame, part: &Component) -> Vec<(usize, [usize; 5])> {
    let mut rows = Vec::new();
    for mcu in 0..frame.mcus_down {
        let rest = part.height.div_ceil(8) % part.down;
        let n_rows = if mcu + 1 == frame.mcus_down && rest > 0 { rest } else { part.down };
        for down in 0..n_rows {
            let (counted, end) = (mcu * n_rows + down, n_rows * frame.mcus_down);
            let row = mcu * part.down + down;
            let above = if counted > 0 { row - 1 } else { row };
            let above_that = if counted > 1 { row - 2 } else { above };
            let below = if counted + 1 < end { row + 1 } else { row };
            let below_that = if counted + 2 < end { row + 2 } else { below };
            rows.push((row, [above_that, above, row, below, below_that]));
        }
    }
    rows
}
