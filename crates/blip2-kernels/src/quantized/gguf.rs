//! Blocks of GGUF tensors, rearranged into panels: every number stays what it is.
//!
//! How ggml's blocks lie is described in its `ggml-common.h`.

use half::f16;

use super::format::{BLOCK, Format, Layout, SCALES, SUPER_BLOCK, WIDTH, with_layout};

/// The most blocks that share a head.
const MOST_BLOCKS: usize = 16;

/// What one output has of the blocks that share a head.
struct Group {
    scale: f16,
    minimum: f16,
    /// Of a super-block's blocks.
    scales: [u8; MOST_BLOCKS],
    minima: [u8; MOST_BLOCKS],
    /// Unsigned, as they are stored in panels.
    values: [u8; SUPER_BLOCK],
}

/// Bytes of a block, or super-block, that a format is made from; the format is one of [`Format::STORED`].
fn stored_bytes(format: Format) -> usize {
    match format {
        Format::Int8 | Format::Int8LongBlocks => panic!("no GGUF file has blocks of {format:?}"),
        Format::Int8Blocks => 2 + 32,
        Format::Int4 => 2 + 16,
        Format::Int4Offset => 4 + 16,
        Format::Q4K => 4 + 12 + 128,
        Format::Q5K => 4 + 12 + 32 + 128,
        Format::Q6K => 128 + 64 + 16 + 2,
    }
}

/// Copies a row of GGUF blocks into output `o` of a panel.
///
/// # Panics
/// When the format is none of [`Format::STORED`] or `row` is not as many as the panel has.
pub(super) fn write_row(format: Format, panel: &mut [u8], o: usize, row: &[u8]) {
    let size = stored_bytes(format);
    with_layout!(format, L => {
        let groups = panel.chunks_exact_mut(L::GROUP);
        assert_eq!(row.len(), groups.len() * size, "a row of {} blocks of {size} bytes", groups.len());
        let mut group = Group {
            scale: f16::ZERO,
            minimum: f16::ZERO,
            scales: [0; MOST_BLOCKS],
            minima: [0; MOST_BLOCKS],
            values: [0; SUPER_BLOCK],
        };
        for (stored, to) in row.chunks_exact(size).zip(groups) {
            read(format, stored, &mut group);
            write::<L>(&group, to, o);
        }
    }, unreachable!("`stored_bytes` refuses it"));
}

fn write<L: Layout>(group: &Group, to: &mut [u8], o: usize) {
    to[2 * o..][..2].copy_from_slice(&group.scale.to_le_bytes());
    if L::OFFSET {
        to[SCALES + 2 * o..][..2].copy_from_slice(&group.minimum.to_le_bytes());
    }
    if L::BLOCKS > 1 {
        for i in 0..L::BLOCKS {
            to[L::BLOCK_SCALES + i * WIDTH + o] = group.scales[i];
            if L::OFFSET {
                to[L::BLOCK_MINIMA + i * WIDTH + o] = group.minima[i];
            }
        }
    }
    let bodies = to[L::HEAD..].chunks_exact_mut(L::BODY);
    for (values, body) in group.values.chunks_exact(L::INPUTS).zip(bodies) {
        L::write_values(body, o, values);
    }
}

fn read(format: Format, stored: &[u8], group: &mut Group) {
    let half = |at: usize| f16::from_le_bytes([stored[at], stored[at + 1]]);
    match format {
        Format::Int8 | Format::Int8LongBlocks => {}
        Format::Int8Blocks => {
            group.scale = half(0);
            for (q, stored) in group.values.iter_mut().zip(&stored[2..]) {
                *q = stored ^ 0x80; // i8 to a distance from -128
            }
        }
        Format::Int4 | Format::Int4Offset => {
            group.scale = half(0);
            if format == Format::Int4Offset {
                group.minimum = half(2);
            }
            for (i, byte) in stored[stored.len() - BLOCK / 2..].iter().enumerate() {
                group.values[i] = byte & 15;
                group.values[i + BLOCK / 2] = byte >> 4;
            }
        }
        Format::Q4K | Format::Q5K => {
            // What is subtracted there is added here.
            (group.scale, group.minimum) = (half(0), -half(2));
            for i in 0..8 {
                (group.scales[i], group.minima[i]) = six_bit_pair(&stored[4..16], i);
            }
            let nibbles = &stored[stored.len() - SUPER_BLOCK / 2..];
            for (run, values) in group.values.chunks_exact_mut(BLOCK).enumerate() {
                for (j, value) in values.iter_mut().enumerate() {
                    *value = nibbles[BLOCK * (run / 2) + j] >> (4 * (run % 2)) & 15;
                    if format == Format::Q5K {
                        *value |= (stored[16 + j] >> run & 1) << 4;
                    }
                }
            }
        }
        Format::Q6K => {
            group.scale = half(208);
            group.scales.copy_from_slice(&stored[192..208]);
            for (run, values) in group.values.chunks_exact_mut(BLOCK).enumerate() {
                let (half, run) = (run / 4, run % 4);
                for (j, value) in values.iter_mut().enumerate() {
                    let low = stored[64 * half + 32 * (run % 2) + j] >> (4 * (run / 2)) & 15;
                    *value = low | (stored[128 + 32 * half + j] >> (2 * run) & 3) << 4;
                }
            }
        }
    }
}

/// Scale and smallest value `i` of the eight pairs of six bits that Q4_K and Q5_K pack into 12 bytes: the first four are the low
/// six bits of bytes 0 to 3 and 4 to 7; of the others, the low four bits are the nibbles of bytes 8 to 11, and the high two the
/// upper bits of bytes 0 to 3 and 4 to 7.
fn six_bit_pair(packed: &[u8], i: usize) -> (u8, u8) {
    if i < 4 {
        (packed[i] & 63, packed[i + 4] & 63)
    } else {
        (packed[i + 4] & 15 | packed[i - 4] >> 6 << 4, packed[i + 4] >> 4 | packed[i] >> 6 << 4)
    }
}
