//! How a quantised weight lies in memory: one layout for all instruction sets, which a file can hold as it is.
//!
//! 32 outputs are a panel; panels follow one another, and the last is filled up with zeros. In a panel, four neighbours
//! along the input lie together for each output, a *quad* of 32 × 4 values: one multiply-and-add of bytes takes it.
//! Everything is little-endian, and every part of a panel starts at a multiple of 64 bytes from the panel.

use half::f16;

/// Outputs of a panel.
pub(super) const WIDTH: usize = 32;
/// Inputs of a block, which have a scale of their own for each output.
pub const BLOCK: usize = 32;
/// Bytes of a quad of eight-bit values.
pub(super) const QUAD: usize = 4 * WIDTH;
/// Bytes of 32 scales in half precision.
const SCALES: usize = 2 * WIDTH;

/// A format of quantised weights. Integers are stored unsigned; the zero point is subtracted in the products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// Eight bits and a scale for each output: `w = scale[o] * (q - 128)`. Activations are scaled by row.
    ///
    /// A panel: 32 scales in f32, then quads.
    Int8,
    /// Eight bits and a scale for each output and 32 inputs (GGUF's Q8_0): `w = scale[o, b] * (q - 128)`. Activations
    /// are scaled by 32 inputs too, so that an outlier among them costs its neighbours only.
    ///
    /// A panel: for each block 32 scales in f16, then 8 quads.
    Int8Blocks,
    /// Four bits and a scale for each output and 32 inputs (GGUF's Q4_0): `w = scale[o, b] * (q - 8)`. Activations as
    /// with [`Int8Blocks`](Self::Int8Blocks).
    ///
    /// A panel: for each block 32 scales in f16, then 4 quads of bytes whose low nibbles are inputs 0 to 15 of the block
    /// and whose high nibbles are inputs 16 to 31.
    Int4,
    /// Four bits, a scale and a smallest value for each output and 32 inputs (GGUF's Q4_1):
    /// `w = scale[o, b] * q + minimum[o, b]`. Activations as with [`Int8Blocks`](Self::Int8Blocks).
    ///
    /// A panel: for each block 32 scales and 32 smallest values in f16, then quads as in [`Int4`](Self::Int4).
    Int4Offset,
}

impl Format {
    /// All formats.
    pub const ALL: [Self; 4] = [Self::Int8, Self::Int8Blocks, Self::Int4, Self::Int4Offset];

    /// Bytes of a weight of this shape, or nothing when that is more than memory can address.
    pub fn n_bytes(self, out_features: usize, in_features: usize) -> Option<usize> {
        let panel = match self.block_bytes() {
            None => in_features.div_ceil(4).checked_mul(QUAD)?.checked_add(4 * WIDTH)?,
            Some(block) => in_features.div_ceil(BLOCK).checked_mul(block)?,
        };
        out_features.div_ceil(WIDTH).checked_mul(panel)
    }

    /// The largest input: within it no sum of products leaves 32 bits.
    pub fn max_in_features(self) -> usize {
        match self {
            Self::Int8 => 1 << 16,
            Self::Int8Blocks | Self::Int4 | Self::Int4Offset => usize::MAX,
        }
    }

    /// Bytes of a block of 32 inputs in a panel, where there are blocks.
    pub(super) fn block_bytes(self) -> Option<usize> {
        match self {
            Self::Int8 => None,
            Self::Int8Blocks => Some(SCALES + 8 * QUAD),
            Self::Int4 => Some(SCALES + 4 * QUAD),
            Self::Int4Offset => Some(2 * SCALES + 4 * QUAD),
        }
    }

    /// Inputs that share a scale of the activations.
    pub(super) fn scaled_together(self, in_features: usize) -> usize {
        if self == Self::Int8 { in_features } else { BLOCK }
    }

    /// The integer that stands for zero.
    pub(super) fn zero_point(self) -> i32 {
        match self {
            Self::Int8 | Self::Int8Blocks => 128,
            Self::Int4 => 8,
            Self::Int4Offset => 0,
        }
    }

    /// Bytes of a GGUF block of 32 values in this format.
    fn gguf_block(self) -> Option<usize> {
        match self {
            Self::Int8 => None,
            Self::Int8Blocks => Some(2 + 32),
            Self::Int4 => Some(2 + 16),
            Self::Int4Offset => Some(4 + 16),
        }
    }
}

/// A panel of zeros is not all bytes zero: integers are stored unsigned.
pub(super) fn clear(format: Format, panel: &mut [u8]) {
    panel.fill(0);
    match format {
        Format::Int8 => panel[4 * WIDTH..].fill(128),
        Format::Int8Blocks => {
            panel.chunks_exact_mut(SCALES + 8 * QUAD).for_each(|block| block[SCALES..].fill(128));
        }
        Format::Int4 => {
            panel.chunks_exact_mut(SCALES + 4 * QUAD).for_each(|block| block[SCALES..].fill(0x88))
        }
        Format::Int4Offset => {}
    }
}

/// Rounds a row of weights into output `o` of a cleared panel.
pub(super) fn write_row(format: Format, panel: &mut [u8], o: usize, row: &[f32]) {
    let Some(block_bytes) = format.block_bytes() else {
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
        return;
    };
    for (values, block) in row.chunks(BLOCK).zip(panel.chunks_exact_mut(block_bytes)) {
        let mut padded = [0.0; BLOCK];
        padded[..values.len()].copy_from_slice(values);
        let rounded = round_block(format, &padded, values.len());
        write_block(format, block, o, &rounded);
    }
}

/// Copies a row of GGUF blocks into output `o` of a panel, bit for bit.
///
/// # Panics
/// When the format has no blocks or `row` is not as many as the panel has.
pub(super) fn write_gguf_row(format: Format, panel: &mut [u8], o: usize, row: &[u8]) {
    let (Some(size), Some(block_bytes)) = (format.gguf_block(), format.block_bytes()) else {
        panic!("{format:?} has no blocks");
    };
    let blocks = panel.chunks_exact_mut(block_bytes);
    assert_eq!(row.len(), blocks.len() * size, "a row of {} blocks of {size} bytes", blocks.len());
    for (stored, block) in row.chunks_exact(size).zip(blocks) {
        let half = |at: usize| f16::from_le_bytes([stored[at], stored[at + 1]]);
        let mut rounded = Block { scale: half(0), minimum: f16::ZERO, values: [0; BLOCK] };
        if format == Format::Int8Blocks {
            for (q, stored) in rounded.values.iter_mut().zip(&stored[2..]) {
                *q = stored ^ 0x80; // i8 to a distance from -128
            }
        } else {
            if format == Format::Int4Offset {
                rounded.minimum = half(2);
            }
            for (i, byte) in stored[size - 16..].iter().enumerate() {
                rounded.values[i] = byte & 15;
                rounded.values[i + 16] = byte >> 4;
            }
        }
        write_block(format, block, o, &rounded);
    }
}

/// Output `o` of a panel, as it was rounded.
pub(super) fn read_row(format: Format, panel: &[u8], o: usize, into: &mut [f32]) {
    let zero_point = format.zero_point() as f32;
    let Some(block_bytes) = format.block_bytes() else {
        let (scales, quads) = panel.split_at(4 * WIDTH);
        let scale = f32_at(scales, o);
        for (values, quad) in into.chunks_mut(4).zip(quads.chunks_exact(QUAD)) {
            for (value, q) in values.iter_mut().zip(&quad[4 * o..]) {
                *value = scale * (f32::from(*q) - zero_point);
            }
        }
        return;
    };
    for (values, block) in into.chunks_mut(BLOCK).zip(panel.chunks_exact(block_bytes)) {
        let (scale, quads) = (f16_at(block, o), &block[block_bytes - n_quads(format) * QUAD..]);
        let minimum = if format == Format::Int4Offset { f16_at(&block[SCALES..], o) } else { 0.0 };
        for (i, value) in values.iter_mut().enumerate() {
            let q = f32::from(value_at(format, quads, o, i));
            *value = match format {
                Format::Int4Offset => scale * q + minimum,
                _ => scale * (q - zero_point),
            };
        }
    }
}

/// Quads of bytes in a block.
fn n_quads(format: Format) -> usize {
    if format == Format::Int8Blocks { 8 } else { 4 }
}

/// Input `i` of a block for output `o`.
fn value_at(format: Format, quads: &[u8], o: usize, i: usize) -> u8 {
    let byte = |i: usize| quads[i / 4 * QUAD + 4 * o + i % 4];
    match format {
        Format::Int8 | Format::Int8Blocks => byte(i),
        Format::Int4 | Format::Int4Offset if i < 16 => byte(i) & 15,
        Format::Int4 | Format::Int4Offset => byte(i - 16) >> 4,
    }
}

pub(super) fn f32_at(bytes: &[u8], i: usize) -> f32 {
    let &[a, b, c, d] = &bytes[4 * i..4 * i + 4] else { unreachable!("four bytes") };
    f32::from_le_bytes([a, b, c, d])
}

pub(super) fn f16_at(bytes: &[u8], i: usize) -> f32 {
    f16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32()
}

/// 32 weights of one output.
struct Block {
    scale: f16,
    minimum: f16,
    values: [u8; BLOCK],
}

fn write_block(format: Format, block: &mut [u8], o: usize, rounded: &Block) {
    block[2 * o..2 * o + 2].copy_from_slice(&rounded.scale.to_le_bytes());
    if format == Format::Int4Offset {
        block[SCALES + 2 * o..][..2].copy_from_slice(&rounded.minimum.to_le_bytes());
    }
    let start = block.len() - n_quads(format) * QUAD;
    let quads = &mut block[start..];
    if format == Format::Int8Blocks {
        for (quad, values) in quads.chunks_exact_mut(QUAD).zip(rounded.values.as_chunks::<4>().0) {
            quad[4 * o..4 * o + 4].copy_from_slice(values);
        }
        return;
    }
    let (low, high) = rounded.values.split_at(16);
    for (i, (low, high)) in low.iter().zip(high).enumerate() {
        quads[i / 4 * QUAD + 4 * o + i % 4] = low | high << 4;
    }
}

/// Rounds 32 weights, of which the first `len` are there and the rest are zero.
fn round_block(format: Format, x: &[f32; BLOCK], len: usize) -> Block {
    let largest = largest(x);
    let zero_point = format.zero_point();
    if !largest.is_finite() {
        return Block { scale: f16::NAN, minimum: f16::ZERO, values: [zero_point as u8; BLOCK] };
    }
    let (scale, minimum) = match format {
        Format::Int8 | Format::Int8Blocks => (f16::from_f32(largest / 127.0), f16::ZERO),
        Format::Int4 => (f16::from_f32(best_scale(x)), f16::ZERO),
        Format::Int4Offset => {
            let x = &x[..len];
            let (min, max) = x.iter().fold((f32::MAX, f32::MIN), |(min, max), &x| (min.min(x), max.max(x)));
            (f16::from_f32((max - min) / 15.0), f16::from_f32(min))
        }
    };
    let inverse = inverse(scale.to_f32());
    let (first, last) = match format {
        Format::Int8 | Format::Int8Blocks => (1, 255),
        Format::Int4 | Format::Int4Offset => (0, 15),
    };
    let values = x.map(|x| {
        (round((x - minimum.to_f32()) * inverse).saturating_add(zero_point)).clamp(first, last) as u8
    });
    Block { scale, minimum, values }
}

/// The scale of -8 to 7 with the smallest squared error of a few: the weight that is largest either way keeps its place at an
/// end of the range or a little beyond, and the scale then is the least-squares one for the rounded values.
fn best_scale(x: &[f32; BLOCK]) -> f32 {
    let extreme = x.iter().fold(0.0f32, |extreme, &x| if x.abs() > extreme.abs() { x } else { extreme });
    if extreme == 0.0 {
        return 0.0;
    }
    let (mut best, mut most) = (extreme / -8.0, f32::NEG_INFINITY);
    for end in [-8.5, -8.0, -7.5, -7.0, 6.5, 7.0, 7.5, 8.0] {
        let scale = extreme / end;
        let inverse = inverse(scale);
        let (mut x_q, mut q_q) = (0.0, 0.0);
        for &x in x {
            let q = round(x * inverse).clamp(-8, 7) as f32;
            (x_q, q_q) = (x_q + x * q, q_q + q * q);
        }
        // The error is Σx² - (Σxq)² / Σq² with the scale Σxq / Σq².
        let explained = x_q * x_q / q_q;
        if explained > most {
            (best, most) = (x_q / q_q, explained);
        }
    }
    best
}

/// The largest magnitude; not finite where an element is not.
fn largest(x: &[f32]) -> f32 {
    f32::from_bits(x.iter().fold(0, |largest, x| largest.max(x.abs().to_bits())))
}

/// What to multiply by instead of dividing by `scale`; everything is zero where the scale is.
fn inverse(scale: f32) -> f32 {
    let inverse = 1.0 / scale;
    if inverse.is_finite() { inverse } else { 0.0 }
}

fn round(x: f32) -> i32 {
    x.round_ties_even() as i32
}
