use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Golden {
    file: String,
    width: u32,
    height: u32,
    crc: u32,
}

fn goldens() -> BTreeMap<String, Golden> {
    serde_json::from_str(include_str!("../../../tests/golden/jpeg.json")).unwrap()
}

fn file(name: &str) -> Vec<u8> {
    BASE64_STANDARD.decode(&goldens()[name].file).unwrap()
}

/// Size and pixels.
fn decoded(bytes: &[u8]) -> Result<((u32, u32), Vec<u8>), JpegError> {
    let jpeg = Jpeg::read_header(bytes)?;
    Ok((jpeg.dimensions(), jpeg.decode()?))
}

/// CRC-32, as of zlib.
fn crc(bytes: &[u8]) -> u32 {
    let mut table = [0_u32; 256];
    for (byte, entry) in table.iter_mut().enumerate() {
        *entry =
            (0..8).fold(byte as u32, |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 });
    }
    !bytes.iter().fold(!0, |crc, &byte| table[usize::from(crc as u8 ^ byte)] ^ crc >> 8)
}

#[test]
fn every_kind_of_jpeg_has_pillows_pixels_to_the_byte() {
    let goldens = goldens();
    assert!(goldens.len() > 200);
    for (name, golden) in goldens {
        let bytes = BASE64_STANDARD.decode(&golden.file).unwrap();
        let (size, rgb) = decoded(&bytes).unwrap_or_else(|error| panic!("{name}: {error:?}"));
        assert_eq!((size, crc(&rgb)), ((golden.width, golden.height), golden.crc), "{name}");
    }
}

#[test]
fn photos_have_pillows_pixels_to_the_byte() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data");
    if !folder.is_dir() {
        println!("SKIPPED: ../shared/data is not here");
        return;
    }
    let goldens: BTreeMap<String, (u32, u32, u32)> =
        serde_json::from_str(include_str!("../../../tests/golden/jpeg_photos.json")).unwrap();
    for (path, (width, height, expected)) in goldens {
        let bytes = std::fs::read(folder.join(&path)).unwrap();
        let (size, rgb) = decoded(&bytes).unwrap_or_else(|error| panic!("{path}: {error:?}"));
        assert_eq!((size, crc(&rgb)), ((width, height), expected), "{path}");
    }
}

#[test]
fn threads_change_nothing() {
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    for name in ["large_False", "large_True"] {
        let bytes = file(name);
        assert_eq!(decoded(&bytes), one.install(|| decoded(&bytes)), "{name}");
    }
}

#[test]
fn a_file_without_its_end_is_refused_wherever_it_is_cut() {
    for (name, golden) in goldens() {
        let bytes = BASE64_STANDARD.decode(&golden.file).unwrap();
        let end = bytes.windows(2).rposition(|pair| pair == [0xff, 0xd9]).unwrap();
        // Every place of the small ones.
        for length in (0..end).step_by(1 + bytes.len() / 1000) {
            if name == "trailing" && length > bytes.len() / 2 {
                continue; // it has two ends
            }
            let error = decoded(&bytes[..length]).err();
            assert!(error.is_some(), "{name} cut at {length} of {}", bytes.len());
            // Damaged files can be refused for what they are.
            assert!(error == Some(JpegError::Truncated) || name.starts_with("damaged"), "{name}: {error:?}");
        }
    }
}

#[test]
fn kinds_that_are_not_read_are_named() {
    let whole = file("L_baseline_30x21");
    let frame = whole.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
    let with = |changes: &[(usize, u8)]| {
        let mut bytes = whole.clone();
        changes.iter().for_each(|&(at, byte)| bytes[frame + at] = byte);
        decoded(&bytes).unwrap_err()
    };
    assert_eq!(with(&[(1, 0xc9)]), JpegError::Unsupported("arithmetic coding"));
    assert_eq!(with(&[(1, 0xc3)]), JpegError::Unsupported("lossless"));
    assert_eq!(with(&[(1, 0xc5)]), JpegError::Unsupported("a hierarchy of frames"));
    assert_eq!(with(&[(4, 12)]), JpegError::Unsupported("other than 8 bits a sample"));
    assert_eq!(with(&[(5, 0), (6, 0)]), JpegError::Damaged("it has no pixels"));
    assert!(matches!(with(&[(11, 0x55)]), JpegError::Damaged(_)), "sampling factors");

    let three = file("factors_all_2_43x29");
    let frame = three.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
    let mut fractional = three.clone();
    (fractional[frame + 11], fractional[frame + 14]) = (0x31, 0x21);
    assert_eq!(decoded(&fractional).unwrap_err(), JpegError::Unsupported("components of fractional sizes"));
}

/// Twenty-five megabytes of scans that say nothing, over a picture of many pixels, would take minutes.
#[test]
fn scans_over_and_over_again_are_refused() {
    let whole = file("large_True");
    let last = whole.windows(2).rposition(|pair| pair == [0xff, 0xda]).unwrap();
    let (start, scan) = whole[..whole.len() - 2].split_at(last);
    let repeated = |n_scans| [start, &scan.repeat(n_scans), b"\xff\xd9"].concat();
    assert!(decoded(&repeated(60)).is_ok(), "no more than an encoder could have reasons for");
    let began = Instant::now();
    let error = decoded(&repeated(5000)).unwrap_err();
    assert_eq!(error, JpegError::Damaged("it goes over the picture again and again"));
    assert!(began.elapsed().as_secs() < 60, "{:?}", began.elapsed());
}

#[test]
fn the_orientation_is_found_in_the_header() {
    assert_eq!(Jpeg::read_header(&file("rgb")).unwrap().exif(), None);
    let mut bytes = file("rgb");
    bytes.splice(2..2, *b"\xff\xe1\0\x0aExif\0\0ab");
    assert_eq!(Jpeg::read_header(&bytes).unwrap().exif(), Some(&b"ab"[..]));
}
