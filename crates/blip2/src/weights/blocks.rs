//! How stored numbers become f32: plain types, and the quantised blocks of ggml.
//!
//! A ggml block holds 32 values ("0" types: `q · d`; "1" types: `q · d + m`) or, for the k-quants, 256 values in
//! sub-blocks of 16 or 32 whose scales are quantised themselves under one (or two) f16 super-scales. Layouts as in
//! ggml's `ggml-common.h`; the products are taken in the order of `gguf.quants`, so that results are equal to the bit.
//! All integers and floats are little-endian.

use half::{bf16, f16};

/// How the numbers of a tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs)] // the names are the formats' own
pub enum Encoding {
    F32,
    F16,
    Bf16,
    F64,
    Bool,
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

/// Values in a block of the k-quants.
const SUPER_BLOCK: usize = 256;

impl Encoding {
    /// Values and bytes of the smallest piece that can be decoded alone.
    pub(super) fn block(self) -> (usize, usize) {
        match self {
            Self::Bool | Self::U8 | Self::I8 => (1, 1),
            Self::F16 | Self::Bf16 | Self::U16 | Self::I16 => (1, 2),
            Self::F32 | Self::U32 | Self::I32 => (1, 4),
            Self::F64 | Self::U64 | Self::I64 => (1, 8),
            Self::Q4_0 => (32, 2 + 16),
            Self::Q4_1 => (32, 4 + 16),
            Self::Q5_0 => (32, 2 + 4 + 16),
            Self::Q5_1 => (32, 4 + 4 + 16),
            Self::Q8_0 => (32, 2 + 32),
            Self::Q2K => (SUPER_BLOCK, 16 + 64 + 4),
            Self::Q3K => (SUPER_BLOCK, 32 + 64 + 12 + 2),
            Self::Q4K => (SUPER_BLOCK, 4 + 12 + 128),
            Self::Q5K => (SUPER_BLOCK, 4 + 12 + 32 + 128),
            Self::Q6K => (SUPER_BLOCK, 128 + 64 + 16 + 2),
        }
    }

    /// Bytes of a tensor of `shape`, or why there can be no such tensor.
    pub(super) fn n_bytes(self, shape: &[usize]) -> Result<usize, String> {
        let too_large = || format!("has the impossible shape {shape:?}");
        let (values, bytes) = self.block();
        let row_len = shape.last().copied().unwrap_or(1);
        if row_len % values != 0 {
            return Err(format!(
                "has rows of {row_len} values, which {self:?} cannot hold (blocks of {values})"
            ));
        }
        let n_values = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).ok_or_else(too_large)?;
        // Values are counted as f32 too, so that a decoded copy can be addressed.
        n_values.checked_mul(4).ok_or_else(too_large)?;
        (n_values / values).checked_mul(bytes).filter(|&n| n <= isize::MAX as usize).ok_or_else(too_large)
    }

    /// Decodes whole blocks. Integers over 2²⁴ and doubles are rounded to the nearest f32.
    ///
    /// # Panics
    /// When `bytes` and `out` are not the same whole number of blocks.
    pub(crate) fn decode(self, bytes: &[u8], out: &mut [f32]) {
        let (values, size) = self.block();
        assert!(
            out.len().is_multiple_of(values) && bytes.len() == out.len() / values * size,
            "{} bytes of {self:?} are not {} values",
            bytes.len(),
            out.len()
        );
        match self {
            Self::F32 => plain(bytes, out, f32::from_le_bytes),
            Self::F16 => plain(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
            Self::Bf16 => plain(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
            Self::F64 => plain(bytes, out, |b| f64::from_le_bytes(b) as f32),
            Self::Bool => plain(bytes, out, |[b]| f32::from(b != 0)),
            Self::U8 => plain(bytes, out, |[b]| f32::from(b)),
            Self::I8 => plain(bytes, out, |b| f32::from(i8::from_le_bytes(b))),
            Self::U16 => plain(bytes, out, |b| f32::from(u16::from_le_bytes(b))),
            Self::I16 => plain(bytes, out, |b| f32::from(i16::from_le_bytes(b))),
            Self::U32 => plain(bytes, out, |b| u32::from_le_bytes(b) as f32),
            Self::I32 => plain(bytes, out, |b| i32::from_le_bytes(b) as f32),
            Self::U64 => plain(bytes, out, |b| u64::from_le_bytes(b) as f32),
            Self::I64 => plain(bytes, out, |b| i64::from_le_bytes(b) as f32),
            Self::Q4_0 => blocks(bytes, out, q4_0),
            Self::Q4_1 => blocks(bytes, out, q4_1),
            Self::Q5_0 => blocks(bytes, out, q5_0),
            Self::Q5_1 => blocks(bytes, out, q5_1),
            Self::Q8_0 => blocks(bytes, out, q8_0),
            Self::Q2K => blocks(bytes, out, q2_k),
            Self::Q3K => blocks(bytes, out, q3_k),
            Self::Q4K => blocks(bytes, out, q4_k),
            Self::Q5K => blocks(bytes, out, q5_k),
            Self::Q6K => blocks(bytes, out, q6_k),
        }
    }
}

fn plain<const N: usize>(bytes: &[u8], out: &mut [f32], convert: impl Fn([u8; N]) -> f32) {
    let (values, rest) = bytes.as_chunks::<N>();
    assert!(rest.is_empty() && values.len() == out.len());
    for (value, out) in values.iter().zip(out) {
        *out = convert(*value);
    }
}

fn blocks<const BYTES: usize, const VALUES: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; VALUES]),
) {
    let (stored, rest) = bytes.as_chunks::<BYTES>();
    let (decoded, rest_out) = out.as_chunks_mut::<VALUES>();
    assert!(rest.is_empty() && rest_out.is_empty() && stored.len() == decoded.len());
    for (block, out) in stored.iter().zip(decoded) {
        decode(block, out);
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// `[d: f16, q: 16 × 2 × u4]`: the low nibbles are values 0..16, the high ones 16..32.
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (i, &q) in block[2..].iter().enumerate() {
        out[i] = d * (f32::from(q & 15) - 8.0);
        out[i + 16] = d * (f32::from(q >> 4) - 8.0);
    }
}

/// `[d: f16, m: f16, q: 16 × 2 × u4]`.
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (i, &q) in block[4..].iter().enumerate() {
        out[i] = d * f32::from(q & 15) + m;
        out[i + 16] = d * f32::from(q >> 4) + m;
    }
}

/// The 5-bit integers of value `i` and `i + 16`: nibbles of `q`, fifth bits from the mask `high`.
fn five_bits(q: u8, high: u32, i: usize) -> (f32, f32) {
    let fifth = |at: usize| ((high >> at & 1) << 4) as u8;
    (f32::from(q & 15 | fifth(i)), f32::from(q >> 4 | fifth(i + 16)))
}

/// `[d: f16, fifth bits: u32, q: 16 × 2 × u4]`.
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    for (i, &q) in block[6..].iter().enumerate() {
        let (low_half, high_half) = five_bits(q, high, i);
        out[i] = d * (low_half - 16.0);
        out[i + 16] = d * (high_half - 16.0);
    }
}

/// `[d: f16, m: f16, fifth bits: u32, q: 16 × 2 × u4]`.
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let high = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    for (i, &q) in block[8..].iter().enumerate() {
        let (low_half, high_half) = five_bits(q, high, i);
        out[i] = d * low_half + m;
        out[i + 16] = d * high_half + m;
    }
}

/// `[d: f16, q: 32 × i8]`.
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (out, &q) in out.iter_mut().zip(&block[2..]) {
        *out = d * f32::from(q as i8);
    }
}

/// `[scales: 16 × (u4 scale, u4 minimum), q: 64 × 4 × u2, d: f16, d_min: f16]`.
///
/// Byte `j` of a half's 32 holds value `j` of its four runs of 32, two bits each.
fn q2_k(block: &[u8; 84], out: &mut [f32; SUPER_BLOCK]) {
    let (d, d_min) = (half_at(block, 80), half_at(block, 82));
    for (run, out) in out.chunks_exact_mut(32).enumerate() {
        let q = &block[16 + 32 * (run / 4)..][..32];
        for (j, out) in out.iter_mut().enumerate() {
            let scale = block[2 * run + j / 16];
            let q = q[j] >> (2 * (run % 4)) & 3;
            *out = d * f32::from(scale & 15) * f32::from(q) - d_min * f32::from(scale >> 4);
        }
    }
}

/// `[third bits: 32 × 8 × u1, q: 64 × 4 × u2, scales: 16 × u6 in 12 bytes, d: f16]`.
///
/// A value is `q − 4` unless its third bit is set; a scale is stored plus 32: its low four bits are the nibbles of
/// bytes 0..8 (first all low, then all high ones), its high two bits those of bytes 8..12.
fn q3_k(block: &[u8; 110], out: &mut [f32; SUPER_BLOCK]) {
    let (third_bits, packed) = (&block[..32], &block[96..108]);
    let d = half_at(block, 108);
    let scale = |i: usize| {
        let low = packed[i % 8] >> (4 * (i / 8)) & 15;
        let high = packed[8 + i % 4] >> (2 * (i / 4)) & 3;
        d * (f32::from(low | high << 4) - 32.0)
    };
    for (run, out) in out.chunks_exact_mut(32).enumerate() {
        let q = &block[32 + 32 * (run / 4)..][..32];
        let scales = [scale(2 * run), scale(2 * run + 1)];
        for (j, out) in out.iter_mut().enumerate() {
            let q = f32::from(q[j] >> (2 * (run % 4)) & 3);
            let below = if third_bits[j] >> run & 1 == 0 { 4.0 } else { 0.0 };
            *out = scales[j / 16] * (q - below);
        }
    }
}

/// The eight (scale, minimum) pairs of 6 bits that Q4_K and Q5_K pack into 12 bytes: pairs 0..4 in the low six bits of
/// bytes 0..4 and 4..8; of pairs 4..8 the low four bits are nibbles of bytes 8..12, the high two those left over.
fn six_bit_pair(packed: &[u8], i: usize) -> (f32, f32) {
    let (scale, minimum) = if i < 4 {
        (packed[i] & 63, packed[i + 4] & 63)
    } else {
        (packed[i + 4] & 15 | packed[i - 4] >> 6 << 4, packed[i + 4] >> 4 | packed[i] >> 6 << 4)
    };
    (f32::from(scale), f32::from(minimum))
}

/// `[d: f16, d_min: f16, 8 × (scale, minimum) in 12 bytes, q: 128 × 2 × u4]`.
fn q4_k(block: &[u8; 144], out: &mut [f32; SUPER_BLOCK]) {
    let (d, d_min) = (half_at(block, 0), half_at(block, 2));
    for (run, out) in out.chunks_exact_mut(32).enumerate() {
        let q = &block[16 + 32 * (run / 2)..][..32];
        let (scale, minimum) = six_bit_pair(&block[4..16], run);
        let (scale, minimum) = (d * scale, d_min * minimum);
        for (out, &q) in out.iter_mut().zip(q) {
            *out = scale * f32::from(q >> (4 * (run % 2)) & 15) - minimum;
        }
    }
}

/// `[d: f16, d_min: f16, 8 × (scale, minimum) in 12 bytes, fifth bits: 32 × 8 × u1, q: 128 × 2 × u4]`.
fn q5_k(block: &[u8; 176], out: &mut [f32; SUPER_BLOCK]) {
    let (d, d_min) = (half_at(block, 0), half_at(block, 2));
    let fifth_bits = &block[16..48];
    for (run, out) in out.chunks_exact_mut(32).enumerate() {
        let q = &block[48 + 32 * (run / 2)..][..32];
        let (scale, minimum) = six_bit_pair(&block[4..16], run);
        let (scale, minimum) = (d * scale, d_min * minimum);
        for ((out, &q), &fifth) in out.iter_mut().zip(q).zip(fifth_bits) {
            *out = scale * f32::from(q >> (4 * (run % 2)) & 15 | (fifth >> run & 1) << 4) - minimum;
        }
    }
}

/// `[low bits: 128 × 2 × u4, high bits: 64 × 4 × u2, scales: 16 × i8, d: f16]`; a value is `q − 32`.
///
/// In each half, runs 0 and 1 are the low nibbles of 64 bytes, runs 2 and 3 the high ones.
fn q6_k(block: &[u8; 210], out: &mut [f32; SUPER_BLOCK]) {
    let d = half_at(block, 208);
    for (run, out) in out.chunks_exact_mut(32).enumerate() {
        let (half, run_of_half) = (run / 4, run % 4);
        let low = &block[64 * half + 32 * (run_of_half % 2)..][..32];
        let high = &block[128 + 32 * half..][..32];
        let scales = &block[192 + 2 * run..][..2];
        let scales = [d * f32::from(scales[0] as i8), d * f32::from(scales[1] as i8)];
        for (j, out) in out.iter_mut().enumerate() {
            let q = low[j] >> (4 * (run_of_half / 2)) & 15 | (high[j] >> (2 * run_of_half) & 3) << 4;
            *out = scales[j / 16] * (f32::from(q) - 32.0);
        }
    }
}
