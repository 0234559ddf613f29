//! JPEG files, to the pixels that libjpeg-turbo gives, byte for byte.
//!
//! Flow: [`markers`] reads the segments → [`scan`] decodes the coefficients with [`huffman`] codes → [`idct`] makes samples of
//! them → [`upsample`] brings the planes to one size → [`colour`] makes RGB.
//!
//! Models were trained on what Pillow read, that is libjpeg-turbo with its default settings (the slow integer cosine transform,
//! "fancy" upsampling). The standard leaves the rounding of both open, and other decoders differ from it in a fifth of a
//! photo's bytes, which is enough to change a caption. So this one computes the same integers.
//!
//! Read are sequential and progressive files with 8 bits a sample and Huffman codes, grey, RGB, YCbCr, CMYK and YCCK. Damage
//! that libjpeg passes over with a warning is passed over the same way; a file without its end is not.

mod colour;
mod huffman;
mod idct;
mod markers;
mod scan;
mod smooth;
mod standard;
mod upsample;

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use markers::{Component, Frame, Reader, Scan};

/// A block's coefficients, in rows.
type Block = [i16; 64];

/// Why a file cannot be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum JpegError {
    /// The bytes run out before the end marker.
    Truncated,
    /// What the standard allows and nobody writes.
    Unsupported(&'static str),
    /// It contradicts the standard.
    Damaged(&'static str),
}

/// From how many pixels a picture is spread over threads: below, that costs more than it gains.
const LARGE: usize = 1 << 18;

/// How often a progressive file may refine every block. Encoders need about ten scans, which cost nothing to repeat in a file,
/// and each is work over the whole picture.
const MOST_SCANS: u64 = 100;

/// What a scan costs beside its blocks, in blocks: its tables are built.
const SCAN_COST: u64 = 256;

/// A file whose header was read.
#[derive(Debug)]
pub(super) struct Jpeg<'a> {
    reader: Reader<'a>,
    frame: Frame,
    first: Scan,
}

impl<'a> Jpeg<'a> {
    /// Reads the segments before the picture's data.
    pub(super) fn read_header(bytes: &'a [u8]) -> Result<Self, JpegError> {
        let mut reader = Reader::new(bytes)?;
        let first = reader.next_scan()?.ok_or(JpegError::Damaged("it has no pixels"))?;
        reader.add_standard_codes();
        let frame = reader.frame.clone().ok_or(JpegError::Damaged("a scan comes before the frame"))?;
        Ok(Self { reader, frame, first })
    }

    /// Width and height.
    pub(super) fn dimensions(&self) -> (u32, u32) {
        (self.frame.width as u32, self.frame.height as u32)
    }

    /// The camera's notes (EXIF), from their TIFF header on.
    pub(super) fn exif(&self) -> Option<&'a [u8]> {
        self.reader.exif
    }

    /// Bytes that [`decode`](Self::decode) takes at most, about.
    pub(super) fn memory(&self) -> u64 {
        let samples: u64 = self.frame.components.iter().map(|part| part.n_blocks() as u64 * 64).sum();
        // Two bytes a coefficient beside a sample, of which the coefficients go before the picture is made.
        3 * samples
    }

    /// The picture: three bytes a pixel, row by row.
    pub(super) fn decode(mut self) -> Result<Vec<u8>, JpegError> {
        let (width, height) = (self.frame.width, self.frame.height);
        // In a pool there is other work, other pictures most often, and threads would only wait for each other.
        let spread = width * height >= LARGE
            && rayon::current_thread_index().is_none()
            && rayon::current_num_threads() > 1;
        let is_all_at_once =
            !self.frame.is_progressive && self.first.parts.len() == self.frame.components.len();
        let planes = if is_all_at_once { self.one_scan(spread)? } else { self.many_scans(spread)? };

        let mut rgb = vec![0; 3 * width * height];
        // Enough rows for a thread to be worth waking, few enough to spread evenly.
        let n_rows = (LARGE / 8 / width).max(1);
        let colours = self.reader.colours(&self.frame);
        let some_rows = |(stripe, rgb): (usize, &mut [u8])| {
            colour::rows(&self.frame, colours, &planes, stripe * n_rows, rgb);
        };
        if spread {
            rgb.par_chunks_mut(3 * width * n_rows).enumerate().for_each(some_rows);
        } else {
            rgb.chunks_mut(3 * width * n_rows).enumerate().for_each(some_rows);
        }
        Ok(rgb)
    }

    /// Samples of a file that has everything in one scan: a row of MCUs is transformed while the next is decoded.
    fn one_scan(&mut self, spread: bool) -> Result<Vec<Vec<u8>>, JpegError> {
        let (frame, first) = (&self.frame, &self.first);
        let quantizers = self.reader.quantizers(first, frame)?;
        let mut entropy = scan::Entropy::new(&self.reader, frame, first)?;
        let mut planes: Vec<Vec<u8>> =
            frame.components.iter().map(|part| vec![0; part.n_blocks() * 64]).collect();
        let mut rows: Vec<_> = planes
            .iter_mut()
            .zip(&frame.components)
            .map(|(plane, part)| plane.chunks_mut(part.stripe()))
            .collect();
        let waiting = AtomicUsize::new(0);
        let most_waiting = 4 * rayon::current_num_threads();
        // All parts of the frame are in the scan, in the same order.
        let transform = |blocks: &[Vec<Block>], stripes: Vec<&mut [u8]>| {
            for (index, stripe) in stripes.into_iter().enumerate() {
                idct::blocks(
                    &blocks[index],
                    frame.components[index].blocks_across,
                    &quantizers[index],
                    stripe,
                );
            }
        };
        let empty = || -> Vec<Vec<Block>> {
            first
                .parts
                .iter()
                .map(|part| vec![[0; 64]; frame.components[part.component].blocks_in_row()])
                .collect()
        };
        let at = rayon::in_place_scope(|scope| {
            let mut blocks = empty();
            for row in 0..frame.mcus_down {
                entropy.sequential_row(row, &mut blocks)?;
                let stripes: Vec<_> = rows.iter_mut().filter_map(Iterator::next).collect();
                if spread && waiting.load(Ordering::Relaxed) < most_waiting {
                    let full = std::mem::replace(&mut blocks, empty());
                    waiting.fetch_add(1, Ordering::Relaxed);
                    let (waiting, transform) = (&waiting, &transform);
                    scope.spawn(move |_| {
                        transform(&full, stripes);
                        waiting.fetch_sub(1, Ordering::Relaxed);
                    });
                } else {
                    transform(&blocks, stripes);
                    blocks.iter_mut().for_each(|blocks| blocks.fill([0; 64]));
                }
            }
            Ok(entropy.at())
        })?;
        self.reader.seek(at);
        // Whatever else there is, the picture is whole; only the end has to be there.
        self.reader.find_end()?;
        Ok(planes)
    }

    /// Samples of a file that spreads its coefficients over scans: these are gathered first.
    fn many_scans(&mut self, spread: bool) -> Result<Vec<Vec<u8>>, JpegError> {
        let frame = &self.frame;
        let parts = &frame.components;
        let all: u64 = parts.iter().map(|part| part.n_blocks() as u64).sum();
        let mut budget = MOST_SCANS * all + 10 * MOST_SCANS * SCAN_COST;
        let mut coefficients: Vec<Vec<Block>> =
            parts.iter().map(|part| vec![[0; 64]; part.n_blocks()]).collect();
        let mut quantizers = vec![None; parts.len()];
        let mut known = scan::Known::new(parts.len());
        let mut next = Some(self.first.clone());
        while let Some(scan) = next {
            let cost: u64 = scan.parts.iter().map(|part| parts[part.component].n_blocks() as u64).sum();
            budget = budget
                .checked_sub(cost + SCAN_COST)
                .ok_or(JpegError::Damaged("it goes over the picture again and again"))?;
            for (part, table) in scan.parts.iter().zip(self.reader.quantizers(&scan, frame)?) {
                // A component keeps the table of its first scan, though a later segment may replace it.
                quantizers[part.component].get_or_insert(table);
            }
            known.see(frame, &scan);
            let mut entropy = scan::Entropy::new(&self.reader, frame, &scan)?;
            entropy.whole_scan(&mut coefficients)?;
            let at = entropy.at();
            self.reader.seek(at);
            next = self.reader.next_scan()?;
        }
        // What no scan told about is grey, as if its coefficients were zero.
        let tables: Vec<_> = quantizers.iter().map(|table| table.unwrap_or([0; 64])).collect();
        if frame.is_progressive {
            smooth::smooth(frame, &known, &quantizers, &mut coefficients);
        }
        let mut planes = Vec::with_capacity(parts.len());
        for ((blocks, part), table) in coefficients.into_iter().zip(parts).zip(&tables) {
            let mut plane = vec![0; part.n_blocks() * 64];
            let one_row = |(stripe, blocks): (&mut [u8], &[Block])| {
                idct::blocks(blocks, part.blocks_across, table, stripe)
            };
            let (stripe, n_blocks) = (part.stripe(), part.blocks_in_row());
            if spread {
                plane.par_chunks_mut(stripe).zip(blocks.par_chunks(n_blocks)).for_each(one_row);
            } else {
                plane.chunks_mut(stripe).zip(blocks.chunks(n_blocks)).for_each(one_row);
            }
            planes.push(plane);
        }
        Ok(planes)
    }
}

impl Component {
    /// Blocks of the component, with those that fill its last MCUs.
    fn n_blocks(&self) -> usize {
        self.blocks_across * self.blocks_down
    }

    /// Blocks in a row of MCUs.
    fn blocks_in_row(&self) -> usize {
        self.blocks_across * self.down
    }

    /// Samples in a row of MCUs.
    fn stripe(&self) -> usize {
        64 * self.blocks_in_row()
    }
}

#[cfg(test)]
mod tests;
