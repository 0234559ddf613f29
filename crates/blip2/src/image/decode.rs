//! Encoded bytes to an upright 8-bit RGB picture.

use std::fs::File;
use std::io::{Cursor, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use ::image::error::UnsupportedErrorKind;
use ::image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, RgbImage};

use super::ImageError;
use super::recognise::{Format, jpeg_is_complete, recognise};

/// What a picture may cost; checked before its pixels are decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the file; 25 MiB by default.
    pub max_bytes: u64,
    /// Pixels of the picture; 89,478,485 by default, which is Pillow's limit (a quarter of a gigabyte of RGB).
    pub max_pixels: u64,
    /// Pixels of a side; 65,535 by default, the longest side of a JPEG file.
    pub max_side: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_bytes: 25 << 20, max_pixels: 89_478_485, max_side: 65_535 }
    }
}

/// Whether a camera's note on how it was held (EXIF orientation) is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Orientation {
    /// Turn and mirror the picture as the note says: what a person sees in a viewer.
    #[default]
    Upright,
    /// The pixels as they are stored: what Pillow's `Image.open` gives, for comparisons with it.
    AsStored,
}

/// Reads and decodes the picture at `path`; see [`decode`].
///
/// # Errors
/// As [`decode`], wrapped in [`ImageError::InFile`]; besides [`ImageError::NotAFile`] and [`ImageError::Unreadable`].
pub fn open(
    path: impl AsRef<Path>,
    limits: &Limits,
    orientation: Orientation,
) -> Result<RgbImage, ImageError> {
    let path = path.as_ref();
    let picture = read(path, limits).and_then(|bytes| decode(&bytes, limits, orientation));
    picture.map_err(|problem| ImageError::InFile { path: path.into(), problem: Box::new(problem) })
}

/// Decodes a JPEG, PNG, WebP, GIF, BMP or TIFF file, whatever it is called.
///
/// Of several frames or pages it is the first. Transparency is laid over white; 16-bit values are rounded to 8; CMYK is
/// converted without its colour profile, as Pillow does.
///
/// # Errors
/// Says what is wrong with the picture in one line: see [`ImageError`].
pub fn decode(bytes: &[u8], limits: &Limits, orientation: Orientation) -> Result<RgbImage, ImageError> {
    check_bytes(bytes.len() as u64, limits)?;
    let format = recognise(bytes)?;
    // Decoders are other people's code on hostile bytes: should one panic, only this picture is lost.
    let decoded = catch_unwind(AssertUnwindSafe(|| decode_as(format, bytes, limits, orientation)));
    let picture = decoded.unwrap_or_else(|_| {
        Err(ImageError::Damaged { format: format.name, reason: "the decoder gave up".into() })
    })?;
    // Said last, because a damaged header is better named than a missing end.
    if format.decoder == ImageFormat::Jpeg && !jpeg_is_complete(bytes) {
        return Err(ImageError::Truncated { format: format.name });
    }
    Ok(picture)
}

fn read(path: &Path, limits: &Limits) -> Result<Vec<u8>, ImageError> {
    // Asked before opening: to open a named pipe would wait for its writer.
    let about = std::fs::metadata(path).map_err(ImageError::Unreadable)?;
    if !about.is_file() {
        return Err(ImageError::NotAFile);
    }
    check_bytes(about.len(), limits)?;
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(ImageError::Unreadable)?;
    // The file may be growing: never read more than was allowed.
    file.take(limits.max_bytes.saturating_add(1)).read_to_end(&mut bytes).map_err(ImageError::Unreadable)?;
    Ok(bytes)
}

fn check_bytes(found: u64, limits: &Limits) -> Result<(), ImageError> {
    let limit = limits.max_bytes;
    if found > limit { Err(ImageError::TooManyBytes { found, limit }) } else { Ok(()) }
}

fn check_size((width, height): (u32, u32), format: Format, limits: &Limits) -> Result<(), ImageError> {
    if width == 0 || height == 0 {
        return Err(ImageError::Damaged { format: format.name, reason: "it has no pixels".into() });
    }
    if u64::from(width) * u64::from(height) > limits.max_pixels {
        return Err(ImageError::TooManyPixels { width, height, limit: limits.max_pixels });
    }
    if width.max(height) > limits.max_side {
        return Err(ImageError::TooLong { width, height, limit: limits.max_side });
    }
    Ok(())
}

fn decode_as(
    format: Format,
    bytes: &[u8],
    limits: &Limits,
    orientation: Orientation,
) -> Result<RgbImage, ImageError> {
    let in_words = |error| in_words(error, format);
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format.decoder);
    let mut allocations = ::image::Limits::default();
    // Room for 16-bit RGBA and the decoder's copy of it.
    allocations.max_alloc = Some(limits.max_pixels.saturating_mul(16).saturating_add(64 << 20));
    reader.limits(allocations);
    let mut decoder = reader.into_decoder().map_err(in_words)?;
    check_size(decoder.dimensions(), format, limits)?;
    // A note that cannot be read is no reason to refuse the picture.
    let turn = decoder.orientation().ok().filter(|_| orientation == Orientation::Upright);
    let mut picture = DynamicImage::from_decoder(decoder).map_err(in_words)?;
    if let Some(turn) = turn {
        picture.apply_orientation(turn);
    }
    Ok(if picture.color().has_alpha() { over_white(&picture.into_rgba8()) } else { picture.into_rgb8() })
}

/// Lays a picture with transparency over white, rounding to the nearest value.
fn over_white(picture: &::image::RgbaImage) -> RgbImage {
    let mut opaque = RgbImage::new(picture.width(), picture.height());
    for (to, from) in opaque.pixels_mut().zip(picture.pixels()) {
        let [rgb @ .., alpha] = from.0.map(u32::from);
        to.0 = rgb.map(|value| ((value * alpha + 255 * (255 - alpha) + 127) / 255) as u8);
    }
    opaque
}

fn in_words(error: ::image::ImageError, format: Format) -> ImageError {
    use ::image::ImageError as Decoder;
    let name = format.name;
    match error {
        Decoder::Unsupported(error) => {
            let reason = match error.kind() {
                UnsupportedErrorKind::GenericFeature(feature) => feature.clone(),
                _ => error.to_string(),
            };
            ImageError::Unsupported { format: name, reason: Some(reason) }
        }
        Decoder::Limits(_) => ImageError::Damaged {
            format: name,
            reason: "it asks for more memory than its size allows".into(),
        },
        Decoder::IoError(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            ImageError::Truncated { format: name }
        }
        error if is_about_the_end(&error) => ImageError::Truncated { format: name },
        error => ImageError::Damaged { format: name, reason: one_line(&error.to_string()) },
    }
}

/// Whether the reason, however deep, is that the bytes ran out.
fn is_about_the_end(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error
            .downcast_ref::<std::io::Error>()
            .is_some_and(|io| io.kind() == std::io::ErrorKind::UnexpectedEof)
        {
            return true;
        }
        cause = error.source();
    }
    false
}

/// A decoder's message, on one line and not endless.
fn one_line(message: &str) -> String {
    let words: Vec<&str> = message.split_whitespace().collect();
    words.join(" ").trim_end_matches('.').chars().take(200).collect()
}
