//! Encoded bytes to an upright 8-bit RGB picture.

use std::fs::File;
use std::io::{Cursor, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use ::image::error::UnsupportedErrorKind;
use ::image::metadata::Orientation;
use ::image::{DynamicImage, ExtendedColorType, ImageDecoder, ImageFormat, ImageReader, RgbImage};

use super::ImageError;
use super::jpeg::{Jpeg, JpegError};
use super::recognise::{Format, is_complete, recognise};

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

/// Which pixels a file stands for, where viewers and Pillow do not agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pixels {
    /// What a person sees in a viewer: turned and mirrored as the camera's note says (EXIF orientation), transparency laid
    /// over white, 16-bit values rounded.
    #[default]
    AsSeen,
    /// Those of Pillow's `Image.open(file).convert("RGB")`, which LAVIS and transformers read: as they are stored, the colours
    /// under a transparency as if there were none, 16-bit colours without their lower byte, 16-bit greys clipped at 255.
    Pillow,
}

/// Reads and decodes the picture at `path`; see [`decode`].
///
/// # Errors
/// As [`decode`], wrapped in [`ImageError::InFile`]; besides [`ImageError::NotAFile`] and [`ImageError::Unreadable`].
pub fn open(path: impl AsRef<Path>, limits: &Limits, pixels: Pixels) -> Result<RgbImage, ImageError> {
    let path = path.as_ref();
    let picture = read(path, limits).and_then(|bytes| decode(&bytes, limits, pixels));
    picture.map_err(|problem| ImageError::InFile { path: path.into(), problem: Box::new(problem) })
}

/// Decodes a JPEG, PNG, WebP, GIF, BMP or TIFF file, whatever it is called.
///
/// A JPEG's pixels are those of libjpeg-turbo, and so of Pillow, to the byte (but for a JPEG inside a TIFF). A large one is
/// decoded on rayon's threads, unless this is called from one of them.
///
/// Of several frames or pages it is the first. CMYK is converted without its colour profile, as Pillow does; for
/// orientation, transparency and 16-bit values see [`Pixels`].
///
/// # Errors
/// Says what is wrong with the picture in one line: see [`ImageError`].
pub fn decode(bytes: &[u8], limits: &Limits, pixels: Pixels) -> Result<RgbImage, ImageError> {
    check_bytes(bytes.len() as u64, limits)?;
    let format = recognise(bytes)?;
    let picture = guarded(format, || decode_as(format, bytes, limits, pixels))?;
    // Said last, because a damaged header is better named than a missing end.
    if !is_complete(format, bytes) {
        return Err(ImageError::Truncated { format: format.name });
    }
    Ok(picture)
}

/// Memory that [`decode`] takes at most, about, in bytes: read in the file's header.
///
/// # Errors
/// As [`decode`], as far as the header tells.
pub fn memory_to_decode(bytes: &[u8], limits: &Limits) -> Result<u64, ImageError> {
    // RGB beside the coefficients of a progressive JPEG.
    const LEAST: u64 = 9;
    check_bytes(bytes.len() as u64, limits)?;
    let format = recognise(bytes)?;
    guarded(format, || {
        if format.decoder == ImageFormat::Jpeg {
            let jpeg = read_jpeg_header(format, bytes, limits)?;
            let (width, height) = jpeg.dimensions();
            return Ok((u64::from(width) * u64::from(height) * LEAST).max(jpeg.memory()));
        }
        let decoder = read_header(format, bytes, limits)?;
        let (width, height) = decoder.dimensions();
        // The picture as it is stored beside the decoder's copy of it, or beside itself turned.
        let a_pixel = (2 * u64::from(decoder.color_type().bytes_per_pixel())).max(LEAST);
        Ok((u64::from(width) * u64::from(height)).saturating_mul(a_pixel))
    })
}

/// Decoders are other people's code on hostile bytes: should one panic, only this picture is lost.
fn guarded<T>(format: Format, run: impl FnOnce() -> Result<T, ImageError>) -> Result<T, ImageError> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
        Err(ImageError::Damaged { format: format.name, reason: "the decoder gave up".into() })
    })
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

/// A decoder that has read the header of a picture of an allowed size.
fn read_header<'a>(
    format: Format,
    bytes: &'a [u8],
    limits: &Limits,
) -> Result<impl ImageDecoder + use<'a>, ImageError> {
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format.decoder);
    let mut allocations = ::image::Limits::default();
    // Room for 16-bit RGBA and the decoder's copy of it.
    let room = limits.max_pixels.saturating_mul(16).saturating_add(64 << 20);
    allocations.max_alloc =
        Some(if format.decoder == ImageFormat::Png { room.min(png_room(bytes, limits)) } else { room });
    reader.limits(allocations);
    let decoder = reader.into_decoder().map_err(|error| in_words(error, format))?;
    check_size(decoder.dimensions(), format, limits)?;
    Ok(decoder)
}

fn read_jpeg_header<'a>(format: Format, bytes: &'a [u8], limits: &Limits) -> Result<Jpeg<'a>, ImageError> {
    let jpeg = Jpeg::read_header(bytes).map_err(|error| jpeg_in_words(error, format))?;
    check_size(jpeg.dimensions(), format, limits)?;
    Ok(jpeg)
}

/// What the PNG decoder may take beside the pixels, which its limit does not count: a row of them, texts and colour profile.
/// Profiles are stored compressed, a thousandfold if somebody wants that, and unpacked with the header. What is this much
/// larger than the whole file is passed over, as if the picture had none; texts are never larger than the file.
fn png_room(bytes: &[u8], limits: &Limits) -> u64 {
    (4 * bytes.len() as u64).saturating_add(8 * u64::from(limits.max_side)).saturating_add(1 << 20)
}

fn decode_as(format: Format, bytes: &[u8], limits: &Limits, pixels: Pixels) -> Result<RgbImage, ImageError> {
    if format.decoder == ImageFormat::Jpeg {
        return decode_jpeg(format, bytes, limits, pixels);
    }
    let mut decoder = read_header(format, bytes, limits)?;
    // A note that cannot be read is no reason to refuse the picture.
    let turn = decoder.orientation().ok().filter(|_| pixels == Pixels::AsSeen);
    let is_grey = matches!(decoder.original_color_type(), ExtendedColorType::L16);
    let mut picture = DynamicImage::from_decoder(decoder).map_err(|error| in_words(error, format))?;
    if pixels == Pixels::Pillow {
        return Ok(stored(picture, is_grey));
    }
    if let Some(turn) = turn {
        picture.apply_orientation(turn);
    }
    Ok(if picture.color().has_alpha() { over_white(&picture.into_rgba8()) } else { picture.into_rgb8() })
}

fn decode_jpeg(
    format: Format,
    bytes: &[u8],
    limits: &Limits,
    pixels: Pixels,
) -> Result<RgbImage, ImageError> {
    let jpeg = read_jpeg_header(format, bytes, limits)?;
    let (width, height) = jpeg.dimensions();
    let turn = jpeg.exif().and_then(Orientation::from_exif_chunk).filter(|_| pixels == Pixels::AsSeen);
    let rgb = jpeg.decode().map_err(|error| jpeg_in_words(error, format))?;
    let picture = RgbImage::from_raw(width, height, rgb).expect("three bytes a pixel");
    Ok(match turn {
        None | Some(Orientation::NoTransforms) => picture,
        Some(turn) => {
            let mut picture = DynamicImage::from(picture);
            picture.apply_orientation(turn);
            picture.into_rgb8()
        }
    })
}

/// The colours as Pillow has them; `is_grey` tells 16-bit greys, which it keeps as numbers until they are converted.
fn stored(picture: DynamicImage, is_grey: bool) -> RgbImage {
    let to_byte = |value: u16| if is_grey { value.min(255) as u8 } else { (value >> 8) as u8 };
    let (width, height) = (picture.width(), picture.height());
    let grey =
        |luma: &mut dyn Iterator<Item = u16>| luma.flat_map(|value| [to_byte(value); 3]).collect::<Vec<_>>();
    let bytes = match &picture {
        DynamicImage::ImageLuma16(picture) => grey(&mut picture.as_raw().iter().copied()),
        DynamicImage::ImageLumaA16(picture) => grey(&mut picture.pixels().map(|pixel| pixel.0[0])),
        DynamicImage::ImageRgb16(picture) => picture.as_raw().iter().copied().map(to_byte).collect(),
        DynamicImage::ImageRgba16(picture) => {
            picture.pixels().flat_map(|pixel| [0, 1, 2].map(|channel| to_byte(pixel.0[channel]))).collect()
        }
        _ => return picture.into_rgb8(),
    };
    RgbImage::from_raw(width, height, bytes).expect("three bytes a pixel")
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

fn jpeg_in_words(error: JpegError, format: Format) -> ImageError {
    let format = format.name;
    match error {
        JpegError::Truncated => ImageError::Truncated { format },
        JpegError::Unsupported(what) => ImageError::Unsupported { format, reason: Some(what.into()) },
        JpegError::Damaged(what) => ImageError::Damaged { format, reason: what.into() },
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use std::collections::BTreeMap;

    #[derive(Deserialize)]
    struct Golden {
        file: String,
        width: u32,
        height: u32,
        rgb: String,
        /// What Pillow's own conversion gives, where that is something else.
        pillow: Option<(u32, u32, String)>,
        tolerance: u8,
    }

    fn unhex(text: &str) -> Vec<u8> {
        let digits = text.as_bytes().chunks_exact(2);
        digits.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
    }

    fn goldens() -> BTreeMap<String, Golden> {
        serde_json::from_str(include_str!("../../tests/golden/pictures.json")).unwrap()
    }

    fn file(name: &str) -> Vec<u8> {
        unhex(&goldens()[name].file)
    }

    fn decoded(bytes: &[u8]) -> Result<RgbImage, ImageError> {
        decode(bytes, &Limits::default(), Pixels::default())
    }

    #[test]
    fn every_kind_of_picture_has_pillows_pixels() {
        for (name, golden) in goldens() {
            let picture = decoded(&unhex(&golden.file)).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(picture.dimensions(), (golden.width, golden.height), "{name}");
            let expected = unhex(&golden.rgb);
            let differences = picture.as_raw().iter().zip(&expected).map(|(a, b)| a.abs_diff(*b));
            let worst = differences.max().unwrap();
            assert!(worst <= golden.tolerance, "{name} differs by {worst}");
        }
    }

    #[test]
    fn every_kind_of_picture_can_be_had_as_pillow_converts_it() {
        let mut n_different = 0;
        for (name, golden) in goldens() {
            let picture = decode(&unhex(&golden.file), &Limits::default(), Pixels::Pillow).unwrap();
            n_different += usize::from(golden.pillow.is_some());
            let (width, height, rgb) = golden.pillow.unwrap_or((golden.width, golden.height, golden.rgb));
            assert_eq!(picture.dimensions(), (width, height), "{name}");
            let differences = picture.as_raw().iter().zip(unhex(&rgb)).map(|(a, b)| a.abs_diff(b));
            let worst = differences.max().unwrap();
            assert!(worst <= golden.tolerance, "{name} differs by {worst}");
        }
        assert!(n_different >= 15, "{n_different}");
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        for (name, golden) in goldens() {
            let bytes = unhex(&golden.file);
            // What ends a file may be needless (a PNG's last chunk, a GIF's trailer, padding, later frames): a picture
            // that decodes from less must be the whole picture.
            let whole = decoded(&bytes).unwrap();
            for length in 0..bytes.len() {
                match decoded(&bytes[..length]) {
                    Ok(picture) => assert!(picture == whole, "{name} cut at {length} of {}", bytes.len()),
                    Err(error) => assert!(!error.to_string().contains('\n'), "one line: {error}"),
                }
            }
            let later_frames = name.contains("animated") || name.contains("pages");
            assert!(decoded(&bytes[..bytes.len() / 2]).is_err() || later_frames, "{name}");
        }
    }

    #[test]
    fn damaged_files_never_panic() {
        for (_, golden) in goldens() {
            let bytes = unhex(&golden.file);
            for at in 0..bytes.len().min(400) {
                let mut damaged = bytes.clone();
                damaged[at] ^= 0xff;
                let _ = decoded(&damaged); // any answer will do
            }
        }
    }

    /// The checksum of a PNG's chunks.
    fn crc(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0_u32, |crc, &byte| {
            (0..8).fold(
                crc ^ u32::from(byte),
                |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 },
            )
        })
    }

    /// A PNG header that claims `width` × `height`, with hardly any data: a decompression bomb.
    fn png_claiming(width: u32, height: u32) -> Vec<u8> {
        let mut bytes = file("png");
        bytes[16..20].copy_from_slice(&width.to_be_bytes());
        bytes[20..24].copy_from_slice(&height.to_be_bytes());
        let crc = crc(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&crc.to_be_bytes());
        bytes
    }

    #[test]
    fn sizes_are_refused_from_the_header() {
        assert!(decoded(&png_claiming(24, 16)).is_ok(), "the checksum is right");
        let bomb = decoded(&png_claiming(60_000, 60_000)).unwrap_err();
        assert!(matches!(bomb, ImageError::TooManyPixels { width: 60_000, height: 60_000, .. }), "{bomb}");
        assert!(bomb.to_string().contains("3600000000"), "{bomb}");
        assert!(matches!(
            decoded(&png_claiming(65_536, 1)).unwrap_err(),
            ImageError::TooLong { limit: 65_535, .. }
        ));
        assert!(!matches!(decoded(&png_claiming(65_535, 1)).unwrap_err(), ImageError::TooLong { .. }));
        assert!(decoded(&png_claiming(0, 1)).is_err());
        let small = Limits { max_bytes: 100, ..Limits::default() };
        let error = decode(&file("png"), &small, Pixels::AsSeen).unwrap_err();
        assert!(matches!(error, ImageError::TooManyBytes { limit: 100, .. }), "{error}");
        let few = Limits { max_pixels: 24 * 16 - 1, ..Limits::default() };
        assert!(matches!(decode(&file("jpeg"), &few, Pixels::AsSeen), Err(ImageError::TooManyPixels { .. })));
    }

    /// A PNG with a colour profile of so many bytes, which are all the same.
    fn png_with_profile(n_bytes: usize) -> Vec<u8> {
        use ::image::ImageEncoder;
        let mut bytes = Vec::new();
        let mut encoder = ::image::codecs::png::PngEncoder::new(&mut bytes);
        encoder.set_icc_profile(vec![0; n_bytes]).unwrap();
        encoder.write_image(&[9; 12], 2, 2, ExtendedColorType::Rgb8).unwrap();
        bytes
    }

    #[test]
    fn a_profile_that_unpacks_to_much_more_than_its_file_is_passed_over() {
        let limits = Limits::default();
        let format = Format { decoder: ImageFormat::Png, name: "PNG" };
        for (n_bytes, is_read) in [(3000, true), (1 << 20, true), (16 << 20, false)] {
            let bytes = png_with_profile(n_bytes);
            assert!(bytes.len() < 100_000);
            let profile = read_header(format, &bytes, &limits).unwrap().icc_profile().unwrap();
            assert_eq!(profile.map(|profile| profile.len()), is_read.then_some(n_bytes));
            assert_eq!(decoded(&bytes).unwrap(), RgbImage::from_pixel(2, 2, [9; 3].into()));
        }
    }

    #[test]
    fn long_texts_in_a_png_are_no_reason_to_refuse_it() {
        let whole = file("png");
        let text = [&b"Comment\0"[..], &[b'x'; 6 << 20]].concat();
        let body = [&b"tEXt"[..], &text].concat();
        let length = u32::try_from(text.len()).unwrap().to_be_bytes();
        // Between the header, of 33 bytes with the signature, and the pixels.
        let chunk = [&length[..], &body, &crc(&body).to_be_bytes()].concat();
        assert_eq!(
            decoded(&[&whole[..33], &chunk, &whole[33..]].concat()).unwrap(),
            decoded(&whole).unwrap()
        );
    }

    #[test]
    fn the_header_tells_what_decoding_takes() {
        let memory = |bytes: &[u8]| memory_to_decode(bytes, &Limits::default());
        for (name, a_pixel) in [
            ("jpeg", 9),
            ("jpeg_gray", 9),
            ("png_alpha", 9),
            ("png_16_bit", 12),
            ("png_16_bit_alpha", 16),
            ("webp_animated", 9),
        ] {
            assert_eq!(memory(&file(name)).unwrap(), 24 * 16 * a_pixel, "{name}");
        }
        assert_eq!(memory(&png_claiming(9000, 9000)).unwrap(), 81_000_000 * 9, "nothing is decoded for it");
        assert!(matches!(memory(&png_claiming(60_000, 60_000)), Err(ImageError::TooManyPixels { .. })));
        for (name, golden) in goldens() {
            let least = u64::from(golden.width) * u64::from(golden.height) * 9;
            assert!(memory(&unhex(&golden.file)).unwrap() >= least, "{name}");
        }
        assert!(memory(&file("png")[..20]).is_err() && memory(b"hello").is_err());
    }

    #[test]
    fn files_are_opened_by_content_and_errors_name_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("picture.txt");
        std::fs::write(&path, file("webp_lossless")).unwrap();
        assert!(open(&path, &Limits::default(), Pixels::AsSeen).is_ok());

        let message = |path: &Path| open(path, &Limits::default(), Pixels::AsSeen).unwrap_err().to_string();
        std::fs::write(&path, b"").unwrap();
        assert!(message(&path).contains("picture.txt: the file is empty"));
        std::fs::write(&path, b"hello").unwrap();
        assert!(message(&path).contains("picture.txt: is not a picture"));
        std::fs::write(&path, &file("jpeg")[..300]).unwrap();
        assert!(message(&path).contains("picture.txt: the JPEG file is"));
        assert!(message(folder.path()).contains("is not a file"));
        assert!(message(&folder.path().join("absent.jpg")).contains("absent.jpg: cannot be read"));
    }
}
