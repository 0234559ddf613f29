//! The library's frozen image encoder, as the feature cache wants it.

use blip2::image::{Limits, Pixels, decode};
use blip2::vision::VisionEncoder;
use image::RgbImage;

use crate::Result;
use crate::features::FeatureEncoder;

/// How files become pixels: another name whenever a decoder gives others, so that features of old ones are not taken for new.
const PIXELS: &str = "JPEG as libjpeg-turbo";

impl FeatureEncoder for VisionEncoder {
    fn key(&self) -> String {
        format!("{}|{:?}|{PIXELS}", self.fingerprint(), self.processor())
    }

    fn n_tokens(&self) -> usize {
        VisionEncoder::n_tokens(self)
    }

    fn width(&self) -> usize {
        VisionEncoder::width(self)
    }

    fn decode(&self, bytes: &[u8]) -> std::result::Result<RgbImage, String> {
        decode(bytes, &Limits::default(), Pixels::default()).map_err(|e| e.to_string())
    }

    fn encode(&self, pictures: &[RgbImage]) -> Result<Vec<f32>> {
        let processor = self.processor();
        let pixels: Vec<f32> = pictures.iter().flat_map(|picture| processor.pixels(picture)).collect();
        Ok(VisionEncoder::encode(self, &pixels)?)
    }
}
