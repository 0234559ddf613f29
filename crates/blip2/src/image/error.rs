//! What is wrong with a picture, in the words of who holds it.

use std::path::PathBuf;

/// What is wrong with a picture and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// Which file it is about.
    #[error("{}: {problem}", path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: Box<ImageError>,
    },
    /// The file cannot be read.
    #[error("cannot be read: {0}")]
    Unreadable(std::io::Error),
    /// A folder, a device, a socket.
    #[error("is not a file: give the path of a picture")]
    NotAFile,
    /// Nothing in it.
    #[error("the file is empty: fetch or save it again")]
    Empty,
    /// The content is of no known picture format, whatever the file is called.
    #[error("is not a picture{}: give a JPEG, PNG, WebP, GIF, BMP or TIFF file", of_kind(*.found))]
    NotAPicture {
        /// What it is instead, where that can be told.
        found: Option<&'static str>,
    },
    /// A known format, or a variant of a format, that is not decoded here.
    #[error("{format} pictures cannot be decoded{}: convert it to JPEG or PNG", because(.reason))]
    Unsupported {
        /// The format (`HEIC`).
        format: &'static str,
        /// The variant, where the format itself is decoded.
        reason: Option<String>,
    },
    /// The end is missing.
    #[error("the {format} file is cut short: fetch or save it again")]
    Truncated {
        /// The format.
        format: &'static str,
    },
    /// The decoder cannot make sense of it.
    #[error("the {format} file is damaged ({reason}): fetch or save it again")]
    Damaged {
        /// The format.
        format: &'static str,
        /// The decoder's words.
        reason: String,
    },
    /// More bytes than [`Limits::max_bytes`](super::Limits::max_bytes).
    #[error("the file has {found} bytes, the limit is {limit}: make the picture smaller")]
    TooManyBytes {
        /// Of the file.
        found: u64,
        /// The limit.
        limit: u64,
    },
    /// More pixels than [`Limits::max_pixels`](super::Limits::max_pixels), found in the header before decoding.
    #[error(
        "the picture has {width}×{height} pixels, {} in all, the limit is {limit}: make it smaller",
        u64::from(*.width) * u64::from(*.height)
    )]
    TooManyPixels {
        /// Of the picture.
        width: u32,
        /// Of the picture.
        height: u32,
        /// The limit.
        limit: u64,
    },
    /// A side longer than [`Limits::max_side`](super::Limits::max_side), found in the header before decoding.
    #[error("the picture has {width}×{height} pixels, a side may have {limit}: make it smaller")]
    TooLong {
        /// Of the picture.
        width: u32,
        /// Of the picture.
        height: u32,
        /// The limit.
        limit: u32,
    },
}

fn of_kind(found: Option<&'static str>) -> String {
    found.map(|kind| format!(" but {kind}")).unwrap_or_default()
}

fn because(reason: &Option<String>) -> String {
    reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default()
}
