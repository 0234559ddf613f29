//! Augmented views of a picture: a random part of it, mirrored, brighter or darker.

use image::RgbImage;
use serde::{Deserialize, Serialize};

use crate::random::Random;
use crate::{Error, Result};

/// What an augmented view does to a picture; each view draws its values from a seed of its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Augment {
    /// Least and greatest part of the area that is kept.
    pub scale: [f64; 2],
    /// Least and greatest width / height of the part, relative to the picture's own.
    pub ratio: [f64; 2],
    /// How likely the view is mirrored, 0 to 1.
    pub flip: f64,
    /// Brightness is multiplied by a number from `1 - brightness` to `1 + brightness`.
    pub brightness: f64,
}

impl Default for Augment {
    /// Half to all of the area, a quarter of freedom in shape, mirrored half of the time.
    fn default() -> Self {
        Self { scale: [0.5, 1.0], ratio: [0.75, 4.0 / 3.0], flip: 0.5, brightness: 0.0 }
    }
}

impl Augment {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Config`] that names the field below `field`.
    pub fn validate(&self, field: &str) -> Result<()> {
        let wrong = |name: &str, reason: &str| Err(Error::config(format!("{field}.{name}"), reason));
        let [least, greatest] = self.scale;
        if !(0.0 < least && least <= greatest && greatest <= 1.0) {
            return wrong("scale", "must be two numbers in order, above 0 and at most 1");
        }
        let [narrow, wide] = self.ratio;
        if !(0.1..=10.0).contains(&narrow) || !(narrow..=10.0).contains(&wide) {
            return wrong("ratio", "must be two numbers in order, from 0.1 to 10");
        }
        if !(0.0..=1.0).contains(&self.flip) {
            return wrong("flip", "must be a probability, 0 to 1");
        }
        if !(0.0..1.0).contains(&self.brightness) {
            return wrong("brightness", "must be at least 0 and below 1");
        }
        Ok(())
    }

    /// The view that `seed` draws, at least one pixel in each direction.
    pub fn apply(&self, picture: &RgbImage, seed: u64) -> RgbImage {
        let mut random = Random::new(&[seed]);
        let area = random.between(self.scale[0], self.scale[1]);
        let ratio = random.between(self.ratio[0].ln(), self.ratio[1].ln()).exp();
        // Shares of width and height: their product is the area unless one of them would leave the picture.
        let share =
            |wanted: f64, side: u32| ((wanted.min(1.0) * f64::from(side)).round() as u32).clamp(1, side);
        let width = share((area * ratio).sqrt(), picture.width());
        let height = share((area / ratio).sqrt(), picture.height());
        let left = random.below((picture.width() - width + 1) as usize) as u32;
        let top = random.below((picture.height() - height + 1) as usize) as u32;
        let mut view = image::imageops::crop_imm(picture, left, top, width, height).to_image();
        if random.unit() < self.flip {
            image::imageops::flip_horizontal_in_place(&mut view);
        }
        let factor = random.between(1.0 - self.brightness, 1.0 + self.brightness);
        if factor != 1.0 {
            brighten(&mut view, factor);
        }
        view
    }
}

/// Multiplies every channel.
pub(crate) fn brighten(picture: &mut RgbImage, factor: f64) {
    let table: [u8; 256] =
        std::array::from_fn(|value| (value as f64 * factor).round().clamp(0.0, 255.0) as u8);
    picture.as_mut().iter_mut().for_each(|value| *value = table[usize::from(*value)]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_stay_within_their_ranges() {
        let picture = RgbImage::from_fn(200, 100, |x, y| image::Rgb([x as u8, y as u8, 100]));
        let augment = Augment { scale: [0.5, 0.8], ratio: [0.8, 1.25], flip: 0.5, brightness: 0.2 };
        let mut n_mirrored = 0;
        let mut blues = Vec::new();
        for seed in 0..300 {
            let view = augment.apply(&picture, seed);
            let (width, height) = (f64::from(view.width()) / 200.0, f64::from(view.height()) / 100.0);
            assert!((0.49..=0.81).contains(&(width * height)), "{width} {height}");
            assert!((0.78..=1.28).contains(&(width / height)), "{width} {height}");
            n_mirrored += usize::from(view.get_pixel(0, 0)[0] > view.get_pixel(view.width() - 1, 0)[0]);
            blues.push(view.get_pixel(0, 0)[2]);
            assert_eq!(view, augment.apply(&picture, seed), "a view is a function of its seed");
        }
        assert!((110..=190).contains(&n_mirrored), "{n_mirrored}");
        let (least, most) = (*blues.iter().min().unwrap(), *blues.iter().max().unwrap());
        assert!((80..=84).contains(&least) && (116..=120).contains(&most), "{least} {most}");
    }

    #[test]
    fn a_view_of_one_pixel_and_the_identity_work() {
        let dot = RgbImage::from_pixel(1, 1, image::Rgb([1, 2, 3]));
        assert_eq!(Augment::default().apply(&dot, 1), dot);
        let picture = RgbImage::from_fn(30, 20, |x, y| image::Rgb([x as u8, y as u8, 0]));
        let identity = Augment { scale: [1.0, 1.0], ratio: [1.0, 1.0], flip: 0.0, brightness: 0.0 };
        assert_eq!(identity.apply(&picture, 5), picture);
    }
}
