//! The stored components to RGB, with libjpeg's numbers; CMYK with Pillow's.

use blip2_kernels::isa::{Isa, with_isa};

use super::markers::{Colours, Frame};
use super::upsample;

/// Pixels that are converted at once, in registers.
const SOME: usize = 16;

/// Bits after the point of the constants.
const POINT: u32 = 16;

const fn fixed(value: f64) -> i32 {
    (value * (1 << POINT) as f64 + 0.5) as i32
}

const HALF: i32 = 1 << (POINT - 1);

/// The picture's rows from `first` on, as many as `rgb` has room for.
pub(super) fn rows(frame: &Frame, colours: Colours, planes: &[Vec<u8>], first: usize, rgb: &mut [u8]) {
    with_isa(
        Isa::detect(),
        #[inline(always)]
        || {
            // A plane that is brought to size may be longer than the picture by what its last sample makes.
            let room = frame.width + 4;
            let mut sums = vec![0; room];
            let mut buffers: Vec<Vec<u8>> = planes.iter().map(|_| vec![0; room]).collect();
            for (down, rgb) in rgb.chunks_exact_mut(3 * frame.width).enumerate() {
                let mut lines = [&[][..]; 4];
                let parts = frame.components.iter().zip(planes).zip(&mut buffers);
                for (line, ((part, plane), buffer)) in lines.iter_mut().zip(parts) {
                    *line =
                        &upsample::row(frame, part, plane, first + down, buffer, &mut sums)[..frame.width];
                }
                match (colours, lines) {
                    (Colours::Grey, [grey, ..]) => {
                        for (rgb, &grey) in rgb.chunks_exact_mut(3).zip(grey) {
                            rgb.fill(grey);
                        }
                    }
                    (Colours::Rgb, [red, green, blue, _]) => {
                        for (rgb, ((&red, &green), &blue)) in
                            rgb.chunks_exact_mut(3).zip(red.iter().zip(green).zip(blue))
                        {
                            rgb.copy_from_slice(&[red, green, blue]);
                        }
                    }
                    (Colours::YCbCr, [y, cb, cr, _]) => from_ycbcr(y, cb, cr, rgb),
                    (Colours::Cmyk, [c, m, y, k]) => {
                        for (at, rgb) in rgb.chunks_exact_mut(3).enumerate() {
                            rgb.copy_from_slice(&[c[at], m[at], y[at]].map(|ink| over_black(ink, k[at])));
                        }
                    }
                    (Colours::Ycck, [y, cb, cr, k]) => {
                        from_ycbcr(y, cb, cr, rgb);
                        // Inks are what is left of white.
                        for (rgb, &k) in rgb.chunks_exact_mut(3).zip(k) {
                            rgb.iter_mut().for_each(|light| *light = over_black(255 - *light, k));
                        }
                    }
                }
            }
        },
    );
}

/// The light of an ink under black. Both are stored inverted, as Adobe's programs do and Pillow assumes of all.
#[inline(always)]
fn over_black(ink: u8, black: u8) -> u8 {
    let light = u32::from(black);
    let product = u32::from(255 - ink) * light + 128;
    (light - ((product + (product >> 8)) >> 8)) as u8
}

#[inline(always)]
fn from_ycbcr(y: &[u8], cb: &[u8], cr: &[u8], rgb: &mut [u8]) {
    let (y, y_rest) = y.as_chunks::<SOME>();
    let (cb, cb_rest) = cb.as_chunks::<SOME>();
    let (cr, cr_rest) = cr.as_chunks::<SOME>();
    let (rgb, rgb_rest) = rgb.split_at_mut(3 * SOME * y.len());
    for (rgb, ((y, cb), cr)) in rgb.chunks_exact_mut(3 * SOME).zip(y.iter().zip(cb).zip(cr)) {
        some(y, cb, cr, rgb);
    }
    for (rgb, ((&y, &cb), &cr)) in rgb_rest.chunks_exact_mut(3).zip(y_rest.iter().zip(cb_rest).zip(cr_rest)) {
        rgb.copy_from_slice(&pixel(y, cb, cr).map(|value| value as u8));
    }
}

#[inline(always)]
fn pixel(y: u8, cb: u8, cr: u8) -> [i32; 3] {
    let (y, cb, cr) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
    let red = y + ((fixed(1.402) * cr + HALF) >> POINT);
    let green = y + ((-fixed(0.34414) * cb - fixed(0.71414) * cr + HALF) >> POINT);
    let blue = y + ((fixed(1.772) * cb + HALF) >> POINT);
    [red, green, blue].map(|value| value.clamp(0, 255))
}

#[inline(always)]
fn some(y: &[u8; SOME], cb: &[u8; SOME], cr: &[u8; SOME], rgb: &mut [u8]) {
    let mut pixels = [0_u32; SOME];
    for at in 0..SOME {
        let [red, green, blue] = pixel(y[at], cb[at], cr[at]).map(|value| value as u32);
        pixels[at] = red | green << 8 | blue << 16;
    }
    // Four pixels are three words.
    for (rgb, pixels) in rgb.chunks_exact_mut(12).zip(pixels.chunks_exact(4)) {
        let words =
            [pixels[0] | pixels[1] << 24, pixels[1] >> 8 | pixels[2] << 16, pixels[2] >> 16 | pixels[3] << 8];
        for (to, word) in rgb.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
    }
}
