//! How a quantised weight lies in memory: one layout for all instruction sets, which a file can hold as it is.
//!
//! 32 outputs are a panel; panels follow one another, and the last is filled up with zeros. In a panel, four neighbours
//! along the input lie together for each output, a *quad* of 32 × 4 values: one multiply-and-add of bytes takes it.
//! Everything is little-endian, and every part of a panel starts at a multiple of 32 bytes from the panel, quads at one of 64.

use half::f16;

/// Outputs of a panel.
pub(super) const WIDTH: usize = 32;
/// Inputs of a block, which have a scale of their own for each output.
pub const BLOCK: usize = 32;
/// Inputs of a long block.
pub(super) const LONG_BLOCK: usize = 64;
/// Inputs of a super-block of the k-quants, whose blocks' scales are integers under one scale.
pub const SUPER_BLOCK: usize = 256;
/// Bytes of a quad of eight-bit values.
pub(super) const QUAD: usize = 4 * WIDTH;
/// Bytes of 32 scales in half precision.
pub(super) const SCALES: usize = 2 * WIDTH;

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
    /// Eight bits and a scale for each output and 64 inputs: [`Int8Blocks`](Self::Int8Blocks) with half as many scales, which are
    /// memory to be read and products to be scaled.
    ///
    /// A panel: for each block 32 scales in f16, then 16 quads.
    Int8LongBlocks,
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
    /// GGUF's Q4_K: as [`Int4Offset`](Self::Int4Offset), but scales and smallest values are integers of six bits under one
    /// scale each for 256 inputs: `w = d[o] * s[o, b] * q + e[o] * m[o, b]`.
    ///
    /// A panel: for each super-block 32 `d` and 32 `e` in f16, for each of its 8 blocks 32 bytes `s`, for each 32 bytes `m`,
    /// then for each its quads.
    Q4K,
    /// GGUF's Q5_K: as [`Q4K`](Self::Q4K) with five bits.
    ///
    /// A panel as of [`Q4K`](Self::Q4K), but one more quad follows those of a block: bit `p` of its byte `j` is the fifth bit
    /// of input `4 p + j`.
    Q5K,
    /// GGUF's Q6_K: six bits, blocks of 16 inputs, whose scales are integers of eight bits under one scale for 256 inputs:
    /// `w = d[o] * s[o, b] * (q - 32)`. Activations are scaled by 16 inputs too.
    ///
    /// A panel: for each super-block 32 `d` in f16, for each of its 16 blocks 32 bytes `s`, then for each block 2 quads whose
    /// nibbles are the lower four bits of its two halves, and one more quad: bits `2 p` and `2 p + 1` of its byte `j` are
    /// the upper bits of input `4 p + j`.
    Q6K,
}

/// What a kernel knows of a format with blocks when it is compiled.
pub(super) trait Layout {
    /// Bits of an integer: eight in a byte, or four in a nibble and what is left in a quad of its own.
    const BITS: usize;
    /// Inputs of a block.
    const INPUTS: usize = BLOCK;
    /// The integer that stands for zero.
    const ZERO_POINT: i32 = 0;
    /// Whether a block has a smallest value.
    const OFFSET: bool = false;
    /// Blocks that share a head: one, or those of a super-block.
    const BLOCKS: usize = 1;

    /// Numbers that a block is scaled with.
    const PARTS: usize = 1 + Self::OFFSET as usize;
    /// Bytes before the quads.
    const HEAD: usize = Self::PARTS * if Self::BLOCKS == 1 { SCALES } else { SCALES + Self::BLOCKS * WIDTH };
    /// Quads of bytes or nibbles in a block.
    const QUADS: usize = Self::INPUTS / if Self::BITS == 8 { 4 } else { 8 };
    /// Bits of an integer beside its nibble.
    const EXTRA_BITS: usize = if Self::BITS == 8 { 0 } else { Self::BITS - 4 };
    /// Bytes of a block without its head.
    const BODY: usize = (Self::QUADS + (Self::EXTRA_BITS > 0) as usize) * QUAD;
    /// Bytes of the blocks that share a head, with it.
    const GROUP: usize = Self::HEAD + Self::BLOCKS * Self::BODY;
    /// Where the scales of a super-block's blocks begin.
    const BLOCK_SCALES: usize = Self::PARTS * SCALES;
    /// Where the smallest values of a super-block's blocks begin.
    const BLOCK_MINIMA: usize = Self::BLOCK_SCALES + Self::BLOCKS * WIDTH;

    /// The scale of block `i` of a group for output `o`.
    fn scale(group: &[u8], i: usize, o: usize) -> f32 {
        let scale = f16_at(group, o);
        // At most 11 and 7 significant bits: the product is exact.
        if Self::BLOCKS == 1 { scale } else { scale * byte_at(group, Self::BLOCK_SCALES + i * WIDTH + o) }
    }

    /// The smallest value of block `i` of a group for output `o`.
    fn minimum(group: &[u8], i: usize, o: usize) -> f32 {
        let minimum = f16_at(&group[SCALES..], o);
        if Self::BLOCKS == 1 { minimum } else { minimum * byte_at(group, Self::BLOCK_MINIMA + i * WIDTH + o) }
    }

    /// Integer `i` of a block for output `o`.
    #[inline(always)]
    fn value(body: &[u8], o: usize, i: usize) -> u8 {
        let (p, at) = (i / 4, 4 * o + i % 4);
        if Self::BITS == 8 {
            return body[p * QUAD + at];
        }
        let nibble = body[p % Self::QUADS * QUAD + at] >> (4 * (p / Self::QUADS)) & 15;
        if Self::EXTRA_BITS == 0 {
            return nibble;
        }
        let extra = body[Self::QUADS * QUAD + at] >> (Self::EXTRA_BITS * p);
        nibble | (extra & ((1 << Self::EXTRA_BITS) - 1)) << 4
    }

    /// Writes the integers of a block for output `o`.
    fn write_values(body: &mut [u8], o: usize, values: &[u8]) {
        let at = |i: usize| i / 4 * QUAD + 4 * o + i % 4;
        if Self::BITS == 8 {
            for (i, values) in values.as_chunks::<4>().0.iter().enumerate() {
                body[at(4 * i)..][..4].copy_from_slice(values);
            }
            return;
        }
        let (low, high) = values.split_at(Self::INPUTS / 2);
        for (i, (low, high)) in low.iter().zip(high).enumerate() {
            body[at(i)] = low & 15 | high << 4;
        }
        if Self::EXTRA_BITS > 0 {
            let extra = &mut body[Self::QUADS * QUAD + 4 * o..][..4];
            extra.fill(0);
            for (p, values) in values.as_chunks::<4>().0.iter().enumerate() {
                for (extra, value) in extra.iter_mut().zip(values) {
                    *extra |= value >> 4 << (Self::EXTRA_BITS * p);
                }
            }
        }
    }
}

/// [`Format::Int8Blocks`].
pub(super) struct Int8Blocks;
impl Layout for Int8Blocks {
    const BITS: usize = 8;
    const ZERO_POINT: i32 = 128;
}

/// [`Format::Int8LongBlocks`].
pub(super) struct Int8LongBlocks;
impl Layout for Int8LongBlocks {
    const BITS: usize = 8;
    const INPUTS: usize = LONG_BLOCK;
    const ZERO_POINT: i32 = 128;
}

/// [`Format::Int4`].
pub(super) struct Int4;
impl Layout for Int4 {
    const BITS: usize = 4;
    const ZERO_POINT: i32 = 8;
}

/// [`Format::Int4Offset`].
pub(super) struct Int4Offset;
impl Layout for Int4Offset {
    const BITS: usize = 4;
    const OFFSET: bool = true;
}

/// [`Format::Q4K`].
pub(super) struct Q4K;
impl Layout for Q4K {
    const BITS: usize = 4;
    const OFFSET: bool = true;
    const BLOCKS: usize = 8;
}

/// [`Format::Q5K`].
pub(super) struct Q5K;
impl Layout for Q5K {
    const BITS: usize = 5;
    const OFFSET: bool = true;
    const BLOCKS: usize = 8;
}

/// [`Format::Q6K`].
pub(super) struct Q6K;
impl Layout for Q6K {
    const BITS: usize = 6;
    const INPUTS: usize = 16;
    const ZERO_POINT: i32 = 32;
    const BLOCKS: usize = 16;
}

/// Calls `$body` with the layout of a format as the type `$L`; `$without` where the format has no blocks.
macro_rules! with_layout {
    ($format:expr, $L:ident => $body:expr, $without:expr) => {
        with_layout!($format, $L => $body, $without; Int8Blocks Int8LongBlocks Int4 Int4Offset Q4K Q5K Q6K)
    };
    ($format:expr, $L:ident => $body:expr, $without:expr; $($name:ident)*) => {
        match $format {
            Format::Int8 => $without,
            $(Format::$name => {
                type $L = $crate::quantized::format::$name;
                $body
            })*
        }
    };
}
pub(super) use with_layout;

impl Format {
    /// All formats.
    pub const ALL: [Self; 8] = [
        Self::Int8,
        Self::Int8Blocks,
        Self::Int8LongBlocks,
        Self::Int4,
        Self::Int4Offset,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// Those that weights can be rounded to; the others are made from stored blocks only.
    pub const ROUNDED: [Self; 5] =
        [Self::Int8, Self::Int8Blocks, Self::Int8LongBlocks, Self::Int4, Self::Int4Offset];

    /// Those that a GGUF file's blocks can be.
    pub const STORED: [Self; 6] =
        [Self::Int8Blocks, Self::Int4, Self::Int4Offset, Self::Q4K, Self::Q5K, Self::Q6K];

    /// Bytes of a weight of this shape, or nothing when that is more than memory can address.
    pub fn n_bytes(self, out_features: usize, in_features: usize) -> Option<usize> {
        let panel = with_layout!(
            self,
            L => in_features.div_ceil(L::INPUTS * L::BLOCKS).checked_mul(L::GROUP)?,
            in_features.div_ceil(4).checked_mul(QUAD)?.checked_add(4 * WIDTH)?
        );
        out_features.div_ceil(WIDTH).checked_mul(panel)
    }

    /// The largest input: within it no sum of products leaves 32 bits.
    pub fn max_in_features(self) -> usize {
        if self == Self::Int8 { 1 << 16 } else { usize::MAX }
    }

    /// What the input must be a multiple of: there are no blocks in part where they come from GGUF.
    pub fn in_features_multiple(self) -> usize {
        with_layout!(self, L => if L::BLOCKS == 1 { 1 } else { L::INPUTS * L::BLOCKS }, 1)
    }

    /// Inputs that share a scale of the activations; nothing where all of a row do.
    pub(super) fn block(self) -> Option<usize> {
        with_layout!(self, L => Some(L::INPUTS), None)
    }

    /// The integer that stands for zero.
    pub(super) fn zero_point(self) -> i32 {
        with_layout!(self, L => L::ZERO_POINT, 128)
    }
}

/// Output `o` of a panel, as it was rounded.
pub(super) fn read_row(format: Format, panel: &[u8], o: usize, into: &mut [f32]) {
    with_layout!(format, L => read_blocks::<L>(panel, o, into), {
        let (scales, quads) = panel.split_at(4 * WIDTH);
        let scale = f32_at(scales, o);
        for (values, quad) in into.chunks_mut(4).zip(quads.as_chunks::<QUAD>().0) {
            for (value, q) in values.iter_mut().zip(&quad[4 * o..]) {
                *value = scale * (f32::from(*q) - 128.0);
            }
        }
    });
}

fn read_blocks<L: Layout>(panel: &[u8], o: usize, into: &mut [f32]) {
    let groups = panel.chunks_exact(L::GROUP);
    for (values, group) in into.chunks_mut(L::INPUTS * L::BLOCKS).zip(groups) {
        let (head, bodies) = group.split_at(L::HEAD);
        let blocks = values.chunks_mut(L::INPUTS).zip(bodies.chunks_exact(L::BODY));
        for (i, (values, body)) in blocks.enumerate() {
            let scale = L::scale(head, i, o);
            let minimum = if L::OFFSET { L::minimum(head, i, o) } else { 0.0 };
            for (j, value) in values.iter_mut().enumerate() {
                let q = f32::from(L::value(body, o, j));
                *value = if L::OFFSET { scale * q + minimum } else { scale * (q - L::ZERO_POINT as f32) };
            }
        }
    }
}

pub(super) fn f32_at(bytes: &[u8], i: usize) -> f32 {
    let &[a, b, c, d] = &bytes[4 * i..4 * i + 4] else { unreachable!("four bytes") };
    f32::from_le_bytes([a, b, c, d])
}

pub(super) fn f16_at(bytes: &[u8], i: usize) -> f32 {
    f16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32()
}

fn byte_at(bytes: &[u8], i: usize) -> f32 {
    f32::from(bytes[i] as i8)
}
