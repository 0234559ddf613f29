//! The header of a safetensors file, held to all that the format demands of one.

use std::fmt;

use safetensors::tensor::Metadata;
use safetensors::{SafeTensorError, SafeTensors};
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::MAX_HEADER_BYTES;
use crate::weights::recognise;

/// Where the file's data begin, and what its header says of them; or what is wrong with the file, in terms of what to do.
///
/// The tensors have names of their own and tile the data, without gaps and without bytes that two of them share.
pub(super) fn read(bytes: &[u8]) -> Result<(usize, Metadata), String> {
    let header_len = bytes.first_chunk().map_or(0, |len| u64::from_le_bytes(*len));
    if bytes.get(8) == Some(&b'{') && header_len > MAX_HEADER_BYTES {
        return Err(format!(
            "the header claims {header_len} bytes, more than any checkpoint has: the file is damaged"
        ));
    }
    let read = SafeTensors::read_metadata(bytes);
    if let Ok(_) | Err(SafeTensorError::InvalidOffset(_)) = read {
        // The crate takes the last of two tensors of one name, and of two that do not fit together it names one.
        check_ranges(&bytes[8..8 + header_len as usize])?;
    }
    let (header_len, header) = read.map_err(|error| explain(&error, bytes))?;
    Ok((8 + header_len, header))
}

/// The tensors of a header with the bytes of the data that are theirs, those of one name all of them.
struct Ranges(Vec<([u64; 2], String)>);

impl<'de> Deserialize<'de> for Ranges {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Info {
            data_offsets: [u64; 2],
        }

        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Ranges;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut header: A) -> Result<Ranges, A::Error> {
                let mut ranges = Vec::new();
                while let Some(name) = header.next_key::<String>()? {
                    if name == "__metadata__" {
                        header.next_value::<IgnoredAny>()?;
                    } else {
                        ranges.push((header.next_value::<Info>()?.data_offsets, name));
                    }
                }
                Ok(Ranges(ranges))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

/// Refuses two tensors of one name, and tensors that do not lie one behind the other; names both.
fn check_ranges(header: &[u8]) -> Result<(), String> {
    let refuse = |what: String| {
        Err(format!("{what}, which the format forbids: fetch it again, or have it written anew"))
    };
    let Ranges(mut ranges) = serde_json::from_slice(header)
        .map_err(|error| format!("its header cannot be read ({error}): fetch it again"))?;
    let shown = |([start, end], name): &([u64; 2], String)| format!("`{name}` (bytes {start} to {end})");
    ranges.sort_by(|(_, left), (_, right)| left.cmp(right));
    if let Some([one, other]) = ranges.windows(2).find(|pair| pair[0].1 == pair[1].1) {
        return refuse(format!(
            "its header has two tensors of one name: {} and {}",
            shown(one),
            shown(other)
        ));
    }
    ranges.sort();
    let mut end_before = 0;
    for (number, tensor) in ranges.iter().enumerate() {
        let [start, end] = tensor.0;
        let before = number.checked_sub(1).map(|number| shown(&ranges[number]));
        match before {
            _ if end < start => return refuse(format!("the tensor {} ends before it begins", shown(tensor))),
            Some(before) if start < end_before => {
                return refuse(format!("the tensors {before} and {} overlap", shown(tensor)));
            }
            Some(before) if start > end_before => {
                return refuse(format!(
                    "the bytes between the tensors {before} and {} are of none",
                    shown(tensor)
                ));
            }
            None if start > 0 => {
                return refuse(format!("the bytes before its first tensor, {}, are of none", shown(tensor)));
            }
            _ => end_before = end,
        }
    }
    Ok(())
}

/// What is wrong with a file that the format's own crate refused.
fn explain(error: &SafeTensorError, bytes: &[u8]) -> String {
    let looks_right = bytes.get(8) == Some(&b'{');
    if !looks_right && let Some(what) = recognise(bytes) {
        return what.into();
    }
    match error {
        SafeTensorError::HeaderTooSmall => "not a safetensors file, or cut short: fetch it again".into(),
        SafeTensorError::InvalidHeaderLength if looks_right => {
            format!("cut short inside the header ({} bytes in all): fetch it again", bytes.len())
        }
        SafeTensorError::HeaderTooLarge | SafeTensorError::InvalidHeaderLength => {
            "this is not a safetensors file".into()
        }
        SafeTensorError::MetadataIncompleteBuffer => {
            format!(
                "its {} bytes are not what the header describes: cut short or overlong, fetch it again",
                bytes.len()
            )
        }
        error => format!("not a valid safetensors file ({error}): fetch it again"),
    }
}
