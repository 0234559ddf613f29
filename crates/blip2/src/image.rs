//! Pictures: from the bytes of a file to the numbers an encoder reads.
//!
//! Flow: file → [`open`] or [`decode`] → [`RgbImage`] (8-bit RGB, upright, no transparency) →
//! [`ImageProcessor::pixels`] (resized by [`resize_bicubic`], normalised) → [`vision`](crate::vision).
//!
//! JPEG files are read here, because models were trained on libjpeg-turbo's pixels and no other decoder in Rust gives them to
//! the byte; the rest by the `image` crate.
//!
//! Files are hostile until decoded: the format is recognised by content, sizes are checked before memory is spent, and
//! a decoder that panics is an error like any other.

mod decode;
mod error;
mod jpeg;
mod processor;
mod recognise;
mod resize;

pub use ::image::RgbImage;
pub use decode::{Limits, Pixels, decode, memory_to_decode, open};
pub use error::ImageError;
pub use processor::{Geometry, ImageProcessor};
pub use resize::resize_bicubic;

/// The bytes of a PNG file of a picture.
///
/// # Panics
/// When the picture has no pixels.
pub fn png(picture: &RgbImage) -> Vec<u8> {
    let mut bytes = Vec::new();
    let encoder = ::image::codecs::png::PngEncoder::new(&mut bytes);
    picture.write_with_encoder(encoder).expect("memory takes every picture that has pixels");
    bytes
}
