//! Rounding weights to few bits; for use inside `with_isa`.

use half::f16;

use crate::lanes::{dot, round};

use super::format::{
    BLOCK, Format, Int4, Int4Offset, Int8Blocks, Int8LongBlocks, LONG_BLOCK, Layout, QUAD, SCALES, WIDTH,
};

/// A panel of zeros is not all bytes zero: integers are stored unsigned.
pub(super) fn clear(format: Format, panel: &mut [u8]) {
    panel.fill(0);
    let (zero, head, group) = match format {
        Format::Int8 => (128, 4 * WIDTH, panel.len()),
        Format::Int8Blocks => (128, Int8Blocks::HEAD, Int8Blocks::GROUP),
        Format::Int8LongBlocks => (128, Int8LongBlocks::HEAD, Int8LongBlocks::GROUP),
        Format::Int4 => (0x88, Int4::HEAD, Int4::GROUP),
        // The smallest value is zero, or the scale of the super-block is.
        Format::Int4Offset | Format::Q4K | Format::Q5K | Format::Q6K => return,
    };
    panel.chunks_exact_mut(group).for_each(|group| group[head..].fill(zero));
}

/// Rounds a row of weights into output `o` of a cleared panel.
///
/// # Panics
/// When the format is none of [`Format::ROUNDED`].
#[inline(always)]
pub(super) fn write_row(format: Format, panel: &mut [u8], o: usize, row: &[f32]) {
    match format {
        Format::Int8 => write_whole(panel, o, row),
        Format::Int8Blocks => write_blocks::<Int8Blocks, BLOCK>(format, panel, o, row),
        Format::Int8LongBlocks => write_blocks::<Int8LongBlocks, LONG_BLOCK>(format, panel, o, row),
        Format::Int4 => write_blocks::<Int4, BLOCK>(format, panel, o, row),
        Format::Int4Offset => write_blocks::<Int4Offset, BLOCK>(format, panel, o, row),
        Format::Q4K | Format::Q5K | Format::Q6K => panic!("{format:?} is made from stored blocks only"),
    }
}

/// A row with one scale.
#[inline(always)]
fn write_whole(panel: &mut [u8], o: usize, row: &[f32]) {
    let (scales, quads) = panel.split_at_mut(4 * WIDTH);
    let largest = largest(row);
    let scale = if largest.is_finite() { largest / 127.0 } else { f32::NAN };
    scales[4 * o..4 * o + 4].copy_from_slice(&scale.to_le_bytes());
    let inverse = inverse(scale);
    for (values, quad) in row.chunks(4).zip(quads.chunks_exact_mut(QUAD)) {
        for (value, q) in values.iter().zip(&mut quad[4 * o..]) {
            *q = (round(value * inverse).clamp(-127, 127) + 128) as u8;
        }
    }
}

#[inline(always)]
fn write_blocks<L: Layout, const N: usize>(format: Format, panel: &mut [u8], o: usize, row: &[f32]) {
    const { assert!(N == L::INPUTS) };
    for (values, block) in row.chunks(N).zip(panel.chunks_exact_mut(L::GROUP)) {
        let mut padded = [0.0; N];
        padded[..values.len()].copy_from_slice(values);
        let rounded = round_block(format, &padded, values.len());
        block[2 * o..2 * o + 2].copy_from_slice(&rounded.scale.to_le_bytes());
        if L::OFFSET {
            block[SCALES + 2 * o..][..2].copy_from_slice(&rounded.minimum.to_le_bytes());
        }
        L::write_values(&mut block[L::HEAD..], o, &rounded.values);
    }
}

/// Weights of one output and a block of inputs.
struct Block<const N: usize> {
    scale: f16,
    minimum: f16,
    values: [u8; N],
}

/// Rounds the weights of a block, of which the first `len` are there and the rest are zero.
#[inline(always)]
fn round_block<const N: usize>(format: Format, x: &[f32; N], len: usize) -> Block<N> {
    let largest = largest(x);
    let zero_point = format.zero_point();
    let none = Block { scale: f16::NAN, minimum: f16::ZERO, values: [zero_point as u8; N] };
    if !largest.is_finite() {
        return none;
    }
    let (scale, minimum) = match format {
        Format::Int4 => (f16::from_f32(best_scale(x)), f16::ZERO),
        Format::Int4Offset => {
            let x = &x[..len];
            let (min, max) = x.iter().fold((f32::MAX, f32::MIN), |(min, max), &x| (min.min(x), max.max(x)));
            (f16::from_f32((max - min) / 15.0), f16::from_f32(min))
        }
        _ => (f16::from_f32(largest / 127.0), f16::ZERO),
    };
    let inverse = inverse(scale.to_f32());
    let (first, last) = if matches!(format, Format::Int4 | Format::Int4Offset) { (0, 15) } else { (1, 255) };
    // Beyond half precision.
    if !scale.is_finite() || !minimum.is_finite() {
        return none;
    }
    let minimum_f32 = minimum.to_f32();
    let values = x.map(
        #[inline(always)]
        |x| round((x - minimum_f32) * inverse).wrapping_add(zero_point).clamp(first, last) as u8,
    );
    Block { scale, minimum, values }
}

/// The scale of -8 to 7 with the smallest squared error of a few: the weight that is largest either way keeps its place at an
/// end of the range or a little beyond, and the scale then is the least-squares one for the rounded values.
#[inline(always)]
fn best_scale<const N: usize>(x: &[f32; N]) -> f32 {
    let extreme = x.iter().fold(0.0f32, |extreme, &x| if x.abs() > extreme.abs() { x } else { extreme });
    if extreme == 0.0 {
        return 0.0;
    }
    let (mut best, mut most) = (extreme / -8.0, f32::NEG_INFINITY);
    for end in [-8.5, -8.0, -7.5, -7.0, 6.5, 7.0, 7.5, 8.0] {
        let scale = extreme / end;
        let inverse = inverse(scale);
        let q = x.map(
            #[inline(always)]
            |x| round(x * inverse).clamp(-8, 7) as f32,
        );
        let (x_q, q_q) = (dot(x, &q), dot(&q, &q));
        // The error is Σx² - (Σxq)² / Σq² with the scale Σxq / Σq².
        let explained = x_q * x_q / q_q;
        if explained > most {
            (best, most) = (x_q / q_q, explained);
        }
    }
    best
}

/// The largest magnitude; not finite where an element is not.
#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    f32::from_bits(x.iter().fold(0, |largest, x| largest.max(x.to_bits() & 0x7fff_ffff)))
}

/// What to multiply by instead of dividing by `scale`; everything is zero where the scale is.
#[inline(always)]
fn inverse(scale: f32) -> f32 {
    let inverse = 1.0 / scale;
    if inverse.is_finite() { inverse } else { 0.0 }
}
