//! An upright RGB picture to the numbers that an encoder was trained on.

use ::image::RgbImage;
use ::image::imageops::crop_imm;
use candle_core::{Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{ImageError, resize_bicubic};
use crate::{Error, Result};

/// How pictures are resized and normalised: `(value · rescale_factor − image_mean) / image_std`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageProcessor {
    /// Side of the square that the encoder sees, in pixels (S).
    pub image_side: usize,
    /// How a picture of any shape becomes that square.
    pub geometry: Geometry,
    /// What 8-bit values are multiplied by first; 1/255 where mean and deviation are those of values from 0 to 1.
    pub rescale_factor: f64,
    /// Subtracted from red, green and blue.
    pub image_mean: [f64; 3],
    /// What the rest is divided by.
    pub image_std: [f64; 3],
}

/// How a picture of any shape becomes a square.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Geometry {
    /// All of the picture, its sides scaled independently (BLIP-2).
    Squash,
    /// Its shape kept, the shorter side scaled to this many pixels, and the centre cut out (ImageNet classifiers).
    CentreCrop {
        /// Pixels of the shorter side; at least the side of the square.
        shorter_side: usize,
    },
}

impl ImageProcessor {
    /// For EfficientNet-Lite: the whole picture, values from 0 to 255 to about −1 to 1.
    pub fn efficientnet_lite0(image_side: usize) -> Self {
        Self {
            image_side,
            geometry: Geometry::Squash,
            rescale_factor: 1.0,
            image_mean: [127.0; 3],
            image_std: [128.0; 3],
        }
    }

    /// For BLIP-2's encoders: the whole picture, CLIP's mean and deviation.
    pub fn blip2(image_side: usize) -> Self {
        Self {
            image_side,
            geometry: Geometry::Squash,
            rescale_factor: 1.0 / 255.0,
            image_mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            image_std: [0.268_629_54, 0.261_302_58, 0.275_777_11],
        }
    }

    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Config`] with the field to change.
    pub fn validate(&self) -> Result<()> {
        let wrong =
            |field: &str, reason: String| Err(Error::Config { field: format!("image.{field}"), reason });
        if !(1..=4096).contains(&self.image_side) {
            return wrong("image_side", format!("is {}, expected 1 to 4096", self.image_side));
        }
        if let Geometry::CentreCrop { shorter_side } = self.geometry
            && !(self.image_side..=8192).contains(&shorter_side)
        {
            return wrong(
                "geometry",
                format!("scales the shorter side to {shorter_side}, expected at least image_side"),
            );
        }
        if !(self.rescale_factor.is_finite() && self.rescale_factor > 0.0) {
            return wrong(
                "rescale_factor",
                format!("is {}, expected a positive number", self.rescale_factor),
            );
        }
        if !self.image_mean.iter().all(|mean| mean.is_finite()) {
            return wrong("image_mean", "has a number that is not finite".into());
        }
        if !self.image_std.iter().all(|std| std.is_finite() && *std > 0.0) {
            return wrong("image_std", "has a number that is not positive".into());
        }
        Ok(())
    }

    /// Resizes and normalises one picture: `[S, S, 3]` values, rows from the top, channels last.
    pub fn pixels(&self, picture: &RgbImage) -> Vec<f32> {
        let square = self.square(picture);
        let tables = self.tables();
        let values = square.as_raw().iter().zip((0..3).cycle());
        values.map(|(&value, channel)| tables[channel][usize::from(value)]).collect()
    }

    /// Opens and prepares pictures, some at once: for each `[S, S, 3]` values, or why it cannot be read. A photo in memory is
    /// hundreds of times its values, so it goes as soon as it is resized.
    pub fn pixels_of_all<T: Sync>(
        &self,
        pictures: &[T],
        open: impl Fn(&T) -> std::result::Result<RgbImage, ImageError> + Sync,
    ) -> Vec<std::result::Result<Vec<f32>, ImageError>> {
        pictures.par_iter().map(|picture| Ok(self.pixels(&open(picture)?))).collect()
    }

    /// Resizes and normalises a batch: `[B, S, S, 3]`. A batch equals its pictures one by one.
    ///
    /// # Errors
    /// When the tensor cannot be made.
    pub fn batch(&self, pictures: &[RgbImage]) -> Result<Tensor> {
        let pixels: Vec<Vec<f32>> = pictures.par_iter().map(|picture| self.pixels(picture)).collect();
        let shape = (pictures.len(), self.image_side, self.image_side, 3);
        Ok(Tensor::from_vec(pixels.concat(), shape, &Device::Cpu)?)
    }

    /// The square that the encoder sees, still in 8 bits: for looking at, and for comparisons with Pillow.
    pub fn square(&self, picture: &RgbImage) -> RgbImage {
        let side = self.image_side as u32;
        let Geometry::CentreCrop { shorter_side } = self.geometry else {
            return resize_bicubic(picture, side, side);
        };
        let (width, height) = picture.dimensions();
        // The longer side is rounded down, the corner to the nearest pixel, as torchvision does.
        let scaled =
            |length: u32| (shorter_side as u64 * u64::from(length) / u64::from(width.min(height))) as u32;
        let (width, height) = (scaled(width), scaled(height));
        let corner = |length: u32| (f64::from(length - side) / 2.0).round_ties_even() as u32;
        let resized = resize_bicubic(picture, width, height);
        crop_imm(&resized, corner(width), corner(height), side, side).to_image()
    }

    /// The normalised value of each 8-bit value, for each channel.
    fn tables(&self) -> [[f32; 256]; 3] {
        std::array::from_fn(|channel| {
            std::array::from_fn(|value| {
                let value = value as f64 * self.rescale_factor;
                ((value - self.image_mean[channel]) / self.image_std[channel]) as f32
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| ::image::Rgb([x as u8, y as u8, (x * y) as u8]))
    }

    #[test]
    fn values_are_normalised_by_channel() {
        let processor = ImageProcessor::efficientnet_lite0(2);
        let square = RgbImage::from_raw(2, 2, vec![0, 127, 255, 1, 2, 3, 4, 5, 6, 7, 8, 9]).unwrap();
        let pixels = processor.pixels(&square);
        assert_eq!(pixels[..3], [-127.0 / 128.0, 0.0, 1.0], "red, green and blue of the first pixel");
        assert_eq!(pixels[9], -120.0 / 128.0, "red of the last pixel");

        let blip2 = ImageProcessor { image_side: 2, ..ImageProcessor::blip2(224) };
        let expected = [(0.0 - 0.481_454_66) / 0.268_629_54, (127.0 / 255.0 - 0.457_827_5) / 0.261_302_58];
        let pixels = blip2.pixels(&square);
        assert!(
            (f64::from(pixels[0]) - expected[0]).abs() < 1e-6
                && (f64::from(pixels[1]) - expected[1]).abs() < 1e-6
        );
    }

    #[test]
    fn squash_keeps_all_and_centre_crop_keeps_the_shape() {
        let squash = ImageProcessor::blip2(20);
        assert_eq!(squash.square(&picture(60, 31)), resize_bicubic(&picture(60, 31), 20, 20));

        let crop = ImageProcessor { geometry: Geometry::CentreCrop { shorter_side: 31 }, ..squash };
        // The shorter side stays, so the crop is of the picture itself: columns from (60 - 20) / 2, rows from round(5.5).
        let square = crop.square(&picture(60, 31));
        assert_eq!(square.dimensions(), (20, 20));
        assert_eq!(square.get_pixel(0, 0).0[..2], [20, 6]);
        // Taller than wide, and a longer side that is rounded down: 50 · 24 / 33 = 36.36.
        let crop = ImageProcessor { geometry: Geometry::CentreCrop { shorter_side: 24 }, ..crop };
        let resized = resize_bicubic(&picture(33, 50), 24, 36);
        assert_eq!(crop.square(&picture(33, 50)), crop_imm(&resized, 2, 8, 20, 20).to_image());
    }

    #[test]
    fn a_batch_is_its_pictures() {
        let processor = ImageProcessor::blip2(5);
        let pictures = [picture(7, 9), picture(5, 5), picture(1, 1)];
        let batch = processor.batch(&pictures).unwrap();
        assert_eq!(batch.dims(), [3, 5, 5, 3]);
        let singles: Vec<f32> = pictures.iter().flat_map(|picture| processor.pixels(picture)).collect();
        assert_eq!(batch.flatten_all().unwrap().to_vec1::<f32>().unwrap(), singles);
        assert_eq!(processor.batch(&[]).unwrap().dims(), [0, 5, 5, 3]);
    }

    #[test]
    fn settings_survive_json_and_wrong_ones_are_named() {
        let processor = ImageProcessor {
            geometry: Geometry::CentreCrop { shorter_side: 256 },
            ..ImageProcessor::efficientnet_lite0(224)
        };
        let text = serde_json::to_string(&processor).unwrap();
        assert_eq!(serde_json::from_str::<ImageProcessor>(&text).unwrap(), processor);
        assert!(processor.validate().is_ok());
        let named = |processor: ImageProcessor| processor.validate().unwrap_err().to_string();
        assert!(named(ImageProcessor { image_side: 0, ..processor.clone() }).contains("image.image_side"));
        assert!(named(ImageProcessor { image_side: 300, ..processor.clone() }).contains("image.geometry"));
        assert!(
            named(ImageProcessor { image_std: [1.0, 0.0, 1.0], ..processor.clone() })
                .contains("image.image_std")
        );
        assert!(
            named(ImageProcessor { rescale_factor: f64::NAN, ..processor }).contains("image.rescale_factor")
        );
    }
}
