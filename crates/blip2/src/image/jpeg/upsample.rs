//! Planes that are stored smaller, brought to the size of the picture: libjpeg's "fancy" upsampling, a triangle filter that
//! takes three quarters of the nearer sample and one of the farther, where a side is halved; else repetition.

use super::markers::{Component, Frame};

/// Row `y` of the picture, of one component. `row` and `sums` are room for it.
#[inline(always)]
pub(super) fn row<'a>(
    frame: &Frame,
    part: &Component,
    plane: &'a [u8],
    y: usize,
    row: &'a mut [u8],
    sums: &mut [i16],
) -> &'a [u8] {
    let stride = 8 * part.blocks_across;
    let width = part.width;
    let line = |y: usize| &plane[y * stride..][..width];
    let (wide, high) = (frame.across / part.across, frame.down / part.down);
    let near = y / high;
    // Beyond the edges the last rows are repeated.
    let is_upper = y.is_multiple_of(2);
    let far = if is_upper { near.saturating_sub(1) } else { (near + 1).min(part.height - 1) };
    match (wide, high) {
        (1, 1) => return line(y),
        (2, 1) if width > 2 => twice_as_wide(line(near), row),
        (1, 2) => {
            // Alternately rounded up and down.
            let bias = if is_upper { 1 } else { 2 };
            for ((to, &near), &far) in row.iter_mut().zip(line(near)).zip(line(far)) {
                *to = ((3 * i16::from(near) + i16::from(far) + bias) >> 2) as u8;
            }
        }
        (2, 2) if width > 2 => {
            let sums = &mut sums[..width];
            for ((to, &near), &far) in sums.iter_mut().zip(line(near)).zip(line(far)) {
                *to = 3 * i16::from(near) + i16::from(far);
            }
            twice_as_large(sums, row);
        }
        _ => {
            for (to, &from) in row.chunks_mut(wide).zip(line(near)) {
                to.fill(from);
            }
        }
    }
    row
}

#[inline(always)]
fn twice_as_wide(from: &[u8], to: &mut [u8]) {
    let last = from.len() - 1;
    let value = |at: usize| i16::from(from[at]);
    let to = &mut to[..2 * from.len()];
    to[0] = from[0];
    to[1] = ((3 * value(0) + value(1) + 2) >> 2) as u8;
    for (to, near) in to[2..2 * last].chunks_exact_mut(2).zip(from.windows(3)) {
        let [left, near, right] = [near[0], near[1], near[2]].map(i16::from);
        to[0] = ((3 * near + left + 1) >> 2) as u8;
        to[1] = ((3 * near + right + 2) >> 2) as u8;
    }
    to[2 * last] = ((3 * value(last) + value(last - 1) + 1) >> 2) as u8;
    to[2 * last + 1] = from[last];
}

/// `from` are sums of two rows, four times the samples.
#[inline(always)]
fn twice_as_large(from: &[i16], to: &mut [u8]) {
    let last = from.len() - 1;
    let to = &mut to[..2 * from.len()];
    to[0] = ((4 * from[0] + 8) >> 4) as u8;
    to[1] = ((3 * from[0] + from[1] + 7) >> 4) as u8;
    for (to, near) in to[2..2 * last].chunks_exact_mut(2).zip(from.windows(3)) {
        to[0] = ((3 * near[1] + near[0] + 8) >> 4) as u8;
        to[1] = ((3 * near[1] + near[2] + 7) >> 4) as u8;
    }
    to[2 * last] = ((3 * from[last] + from[last - 1] + 8) >> 4) as u8;
    to[2 * last + 1] = ((4 * from[last] + 7) >> 4) as u8;
}
