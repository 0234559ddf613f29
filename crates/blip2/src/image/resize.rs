//! Pillow's antialiased bicubic resize, to the byte.
//!
//! Checkpoints were trained on pictures that Pillow resized, so ours must be the same. The method is that of Pillow's
//! `Resample.c`: separable, the kernel (a = −0.5) widened by the reduction so that every source
//! pixel counts, coefficients rounded to 22-bit fixed point, and values rounded to 8 bits between the passes.

use ::image::RgbImage;
use rayon::prelude::*;

/// Bits after the point of a coefficient: 32, less 8 for the value and 2 for sums beyond it.
const PRECISION_BITS: u32 = 32 - 8 - 2;
/// Half the width of the bicubic kernel, in pixels of the smaller picture.
const SUPPORT: f64 = 2.0;

/// Resizes to `width` × `height`, as `Image.resize((width, height), Image.Resampling.BICUBIC)` of Pillow does for an
/// RGB picture. A side that keeps its length is not touched.
///
/// # Panics
/// When a side of either picture is 0.
pub fn resize_bicubic(picture: &RgbImage, width: u32, height: u32) -> RgbImage {
    let from = (picture.width() as usize, picture.height() as usize);
    let pixels = resize::<3>(picture.as_raw(), from, (width as usize, height as usize));
    RgbImage::from_raw(width, height, pixels).expect("the resized pixels fill the picture")
}

/// The same for rows of pixels with `C` channels, each for itself.
fn resize<const C: usize>(pixels: &[u8], from: (usize, usize), to: (usize, usize)) -> Vec<u8> {
    assert!(from.0 > 0 && from.1 > 0 && to.0 > 0 && to.1 > 0, "a picture has at least one pixel");
    assert_eq!(pixels.len(), from.0 * from.1 * C, "the pixels fill the picture");
    let columns = (from.0 != to.0).then(|| Taps::new(from.0, to.0));
    let rows = (from.1 != to.1).then(|| Taps::new(from.1, to.1));
    match (columns, rows) {
        (None, None) => pixels.to_vec(),
        (Some(columns), None) => horizontal::<C>(pixels, from.0, &columns),
        (None, Some(rows)) => vertical(pixels, from.0 * C, &rows),
        (Some(columns), Some(rows)) if vertical_first(from, to) => {
            horizontal::<C>(&vertical(pixels, from.0 * C, &rows), from.0, &columns)
        }
        (Some(columns), Some(rows)) => vertical(&horizontal::<C>(pixels, from.0, &columns), to.0 * C, &rows),
    }
}

/// Which pass Pillow does first, which shows in the last bit because of the rounding between them. Since version 13 it
/// begins with the vertical one when the height shrinks by more than twice as many pixels as the width; before, never.
fn vertical_first(from: (usize, usize), to: (usize, usize)) -> bool {
    let (narrower, lower) = (from.0 as i64 - to.0 as i64, from.1 as i64 - to.1 as i64);
    lower > 0 && lower > 2 * narrower
}

/// Which source pixels make each output pixel of an axis, and with what weights.
struct Taps {
    /// First source pixel of each output pixel, and how many.
    spans: Vec<(usize, usize)>,
    /// `stride` fixed-point coefficients for each output pixel; those beyond its span are unused.
    coefficients: Vec<i32>,
    stride: usize,
}

impl Taps {
    /// The order of the floating-point operations is Pillow's: another order can turn the last bit of a coefficient.
    fn new(from: usize, to: usize) -> Self {
        let scale = from as f64 / to as f64;
        let widening = scale.max(1.0);
        let support = SUPPORT * widening;
        let stride = support.ceil() as usize * 2 + 1;
        let mut spans = Vec::with_capacity(to);
        let mut coefficients = vec![0; to * stride];
        let mut weights = Vec::with_capacity(stride);
        for (output, coefficients) in coefficients.chunks_exact_mut(stride).enumerate() {
            let center = (output as f64 + 0.5) * scale;
            let first = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(from);
            weights.clear();
            let per_pixel = 1.0 / widening;
            weights.extend((first..end).map(|at| bicubic((at as f64 - center + 0.5) * per_pixel)));
            let sum: f64 = weights.iter().sum();
            for (coefficient, weight) in coefficients.iter_mut().zip(&weights) {
                *coefficient = to_fixed_point(if sum == 0.0 { *weight } else { weight / sum });
            }
            spans.push((first, end - first));
        }
        Self { spans, coefficients, stride }
    }

    fn iter(&self) -> impl Iterator<Item = (usize, &[i32])> {
        let coefficients = self.coefficients.chunks_exact(self.stride);
        self.spans.iter().zip(coefficients).map(|(&(first, count), all)| (first, &all[..count]))
    }
}

/// The cubic convolution kernel with a = −0.5.
fn bicubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

/// Rounds half away from zero.
fn to_fixed_point(weight: f64) -> i32 {
    let scaled = weight * f64::from(1 << PRECISION_BITS);
    if scaled < 0.0 { (scaled - 0.5) as i32 } else { (scaled + 0.5) as i32 }
}

const HALF: i32 = 1 << (PRECISION_BITS - 1);

fn to_byte(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// Resizes every row of `width` pixels.
fn horizontal<const C: usize>(pixels: &[u8], width: usize, taps: &Taps) -> Vec<u8> {
    let mut out = vec![0; pixels.len() / (width * C) * taps.spans.len() * C];
    let rows = out.par_chunks_exact_mut(taps.spans.len() * C).zip(pixels.par_chunks_exact(width * C));
    rows.for_each(|(out, row)| {
        let (row, _) = row.as_chunks::<C>();
        let (out, _) = out.as_chunks_mut::<C>();
        for (pixel, (first, coefficients)) in out.iter_mut().zip(taps.iter()) {
            let mut sums = [HALF; C];
            for (source, &coefficient) in row[first..].iter().zip(coefficients) {
                for channel in 0..C {
                    sums[channel] += i32::from(source[channel]) * coefficient;
                }
            }
            *pixel = sums.map(to_byte);
        }
    });
    out
}

/// Resizes every column; a row is `row_len` bytes.
fn vertical(pixels: &[u8], row_len: usize, taps: &Taps) -> Vec<u8> {
    let mut out = vec![0; taps.spans.len() * row_len];
    let taps: Vec<_> = taps.iter().collect();
    out.par_chunks_exact_mut(row_len).zip(taps).for_each_init(
        || vec![0; row_len],
        |sums, (out, (first, coefficients))| {
            sums.fill(HALF);
            for (source, &coefficient) in pixels[first * row_len..].chunks_exact(row_len).zip(coefficients) {
                for (sum, &value) in sums.iter_mut().zip(source) {
                    *sum += i32::from(value) * coefficient;
                }
            }
            for (byte, &sum) in out.iter_mut().zip(sums.iter()) {
                *byte = to_byte(sum);
            }
        },
    );
    out
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;
    use crate::splitmix::{GAMMA, mix};

    /// The pictures of `tools/golden_resize.py`.
    fn picture(seed: u64, n: usize) -> Vec<u8> {
        let bytes = (1..=n as u64).map(|index| {
            let byte = (mix(seed.wrapping_add(index.wrapping_mul(GAMMA))) >> 56) as u8;
            if seed.is_multiple_of(3) { if byte < 128 { 0 } else { 255 } } else { byte }
        });
        bytes.collect()
    }

    fn checksum(bytes: &[u8]) -> String {
        Sha256::digest(bytes).iter().take(6).map(|byte| format!("{byte:02x}")).collect()
    }

    type Case = (usize, usize, usize, usize, usize, String);

    #[test]
    fn every_byte_is_pillows() {
        let cases: Vec<Case> =
            serde_json::from_str(include_str!("../../tests/golden/pillow_resize.json")).unwrap();
        assert!(cases.len() > 2500);
        let wrong = cases.iter().enumerate().filter_map(|(seed, case)| {
            let (n_channels, from, to) = (case.0, (case.1, case.2), (case.3, case.4));
            let pixels = picture(seed as u64, n_channels * from.0 * from.1);
            let resized = match n_channels {
                1 => resize::<1>(&pixels, from, to),
                3 => resize::<3>(&pixels, from, to),
                _ => resize::<4>(&pixels, from, to),
            };
            (checksum(&resized) != case.5).then_some(case)
        });
        let wrong: Vec<&Case> = wrong.collect();
        assert!(
            wrong.is_empty(),
            "{} of {} differ: {:?}",
            wrong.len(),
            cases.len(),
            &wrong[..wrong.len().min(16)]
        );
    }

    #[test]
    fn a_flat_picture_stays_flat() {
        for value in [0, 1, 127, 254, 255] {
            let flat = RgbImage::from_pixel(37, 91, ::image::Rgb([value; 3]));
            for (width, height) in [(1, 1), (200, 3), (37, 92), (36, 91), (224, 224)] {
                let resized = resize_bicubic(&flat, width, height);
                assert!(resized.as_raw().iter().all(|&byte| byte == value), "{value} at {width}×{height}");
            }
        }
    }
}
