//! What a file is, by its content: extensions lie.

use ::image::ImageFormat;

use super::ImageError;

/// A format that is decoded here, with the name that people know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Format {
    pub(super) decoder: ImageFormat,
    pub(super) name: &'static str,
}

/// Recognises the formats that are decoded here, and names the others that people try.
pub(super) fn recognise(bytes: &[u8]) -> Result<Format, ImageError> {
    let known = |decoder, name| Ok(Format { decoder, name });
    let unsupported = |format| Err(ImageError::Unsupported { format, reason: None });
    match bytes {
        [] => Err(ImageError::Empty),
        [0xff, 0xd8, 0xff, ..] => known(ImageFormat::Jpeg, "JPEG"),
        [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => known(ImageFormat::Png, "PNG"),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => known(ImageFormat::WebP, "WebP"),
        [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => known(ImageFormat::Gif, "GIF"),
        // Two letters alone would make a bitmap of any text that starts so; the reserved bytes are zero in all.
        [b'B', b'M', _, _, _, _, 0, 0, 0, 0, ..] => known(ImageFormat::Bmp, "BMP"),
        [b'I', b'I', b'*', 0, ..] | [b'M', b'M', 0, b'*', ..] => known(ImageFormat::Tiff, "TIFF"),
        [_, _, _, _, b'f', b't', b'y', b'p', brand @ ..] => match brand.get(..4) {
            Some(b"avif" | b"avis") => unsupported("AVIF"),
            Some(b"heic" | b"heix" | b"hevc" | b"heim" | b"heis" | b"mif1" | b"msf1") => unsupported("HEIC"),
            _ => Err(ImageError::NotAPicture { found: Some("a video") }),
        },
        [0, 0, 0, 12, b'J', b'X', b'L', b' ', ..] | [0xff, 0x0a, ..] => unsupported("JPEG XL"),
        [0, 0, 0, 12, b'j', b'P', b' ', b' ', ..] | [0xff, 0x4f, 0xff, 0x51, ..] => unsupported("JPEG 2000"),
        [b'8', b'B', b'P', b'S', ..] => unsupported("Photoshop"),
        [0, 0, 1, 0, ..] => unsupported("ICO"),
        [b'q', b'o', b'i', b'f', ..] => unsupported("QOI"),
        [0x76, 0x2f, 0x31, 0x01, ..] => unsupported("OpenEXR"),
        [b'P', b'1'..=b'7', b' ' | b'\n' | b'\r' | b'\t', ..] => unsupported("PNM"),
        _ => recognise_document(bytes),
    }
}

/// Files that are mistaken for pictures, told by their text.
fn recognise_document(bytes: &[u8]) -> Result<Format, ImageError> {
    let start = String::from_utf8_lossy(&bytes[..bytes.len().min(1024)]).trim_start().to_ascii_lowercase();
    if start.contains("<svg") {
        return Err(ImageError::Unsupported { format: "SVG", reason: None });
    }
    let found = if start.starts_with("%pdf") {
        Some("a PDF document")
    } else if start.starts_with("<!doctype html") || start.starts_with("<html") {
        Some("a web page (a download that failed?)")
    } else if start.starts_with("version https://git-lfs") {
        Some("a Git LFS pointer (run `git lfs pull`)")
    } else {
        None
    };
    Err(ImageError::NotAPicture { found })
}

/// Whether the end is there, for the format whose decoder does not ask for it: in a WebP file, the note on orientation comes
/// last.
pub(super) fn is_complete(format: Format, bytes: &[u8]) -> bool {
    match format.decoder {
        ImageFormat::WebP => webp_is_complete(bytes),
        _ => true,
    }
}

/// Whether there are as many bytes as the RIFF header says.
fn webp_is_complete(bytes: &[u8]) -> bool {
    let size = bytes.get(4..8).and_then(<[u8]>::first_chunk).map(|&size| u64::from(u32::from_le_bytes(size)));
    size.is_some_and(|size| size + 8 <= bytes.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_named_by_content() {
        let cases: [(&[u8], &str); 14] = [
            (b"\xff\xd8\xff\xe0", "JPEG"),
            (b"\x89PNG\r\n\x1a\n", "PNG"),
            (b"RIFF\x10\0\0\0WEBPVP8 ", "WebP"),
            (b"GIF89a", "GIF"),
            (b"BM\x46\0\0\0\0\0\0\0", "BMP"),
            (b"MM\0*", "TIFF"),
            (b"\0\0\0\x18ftypheic", "HEIC pictures cannot be decoded"),
            (b"\0\0\0\x1cftypavif", "AVIF pictures cannot be decoded"),
            (b"<?xml version=\"1.0\"?>\n<svg width=\"3\">", "SVG pictures cannot be decoded"),
            (b"\0\0\0\x18ftypisom", "a video"),
            (b"%PDF-1.7", "a PDF"),
            (b"<!DOCTYPE html><title>Not found</title>", "a web page"),
            (b"BMW is a maker of cars", "is not a picture: give"),
            (b"hello", "is not a picture: give"),
        ];
        for (bytes, expected) in cases {
            let told = match recognise(bytes) {
                Ok(format) => format.name.to_owned(),
                Err(error) => error.to_string(),
            };
            assert!(told.contains(expected), "{told:?} for {expected:?}");
        }
    }
}
