//! TensorBoard event files: records (TFRecord framing) of the protobuf message `tensorflow.Event`, of which we need
//! so little that it is written by hand.
//!
//! ```text
//! record:  length u64 | masked CRC-32C of the length u32 | message | masked CRC-32C of the message u32
//! Event:   1 wall_time double, 2 step int64, one of: 3 file_version string, 5 summary, 7 session_log
//! Summary: 1 value* { 1 tag string, 2 simple_value float }
//! SessionLog: 1 status enum, START = 1
//! ```

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::{StepValues, crc32c};
use crate::{Error, Result};

/// Says that a session starts at this step; TensorBoard then forgets what earlier files have from there on.
const SESSION_START: &[u8] = &[1 << 3, 1];

/// One event file; each opening of a log begins a new one, as TensorBoard expects.
#[derive(Debug)]
pub(super) struct EventFile {
    file: File,
    path: PathBuf,
}

impl EventFile {
    /// Creates `events.out.tfevents.<unix>.<host>` for a run that goes on after step `last`.
    pub(super) fn create(run_dir: &Path, time: f64, last: u64) -> Result<Self> {
        let name = format!("events.out.tfevents.{:010}.{}", time.max(0.0) as u64, host());
        let (file, path) = create_new(run_dir, &name)?;
        let mut events = Self { file, path };
        let mut header = record(&event(time, 0, 3, b"brain.Event:2"));
        // At the first step to come. Also for a new run: its directory may hold an old one's files.
        header.extend(record(&event(time, last + 1, 7, SESSION_START)));
        events.write(&header)?;
        Ok(events)
    }

    /// Writes all values of a step, as one record.
    pub(super) fn append(&mut self, values: &StepValues) -> Result<()> {
        self.write(&record(&step_event(values)))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io(&self.path))
    }
}

/// Creates a file that was not there: two openings within a second must not share one.
fn create_new(run_dir: &Path, name: &str) -> Result<(File, PathBuf)> {
    let mut path = run_dir.join(name);
    let mut n = 0;
    loop {
        match File::create_new(&path) {
            Ok(file) => return Ok((file, path)),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                n += 1;
                path = run_dir.join(format!("{name}.{n}"));
            }
            Err(error) => return Err(Error::io(&path)(error)),
        }
    }
}

/// The machine's name where it is easily known; it only tells files of several machines apart.
fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").or_else(|_| std::env::var("HOSTNAME"));
    let name = name.unwrap_or_default();
    let name: String =
        name.trim().chars().filter(|c| c.is_ascii_alphanumeric() || "-._".contains(*c)).collect();
    if name.is_empty() { "localhost".to_owned() } else { name }
}

fn step_event(values: &StepValues) -> Vec<u8> {
    let mut summary = Vec::new();
    for (name, value) in &values.values {
        let mut entry = Vec::new();
        push_bytes(&mut entry, 1, name.as_bytes());
        entry.push(2 << 3 | FIXED32);
        entry.extend((*value as f32).to_le_bytes());
        push_bytes(&mut summary, 1, &entry);
    }
    event(values.time, values.step, 5, &summary)
}

fn event(time: f64, step: u64, field: u8, content: &[u8]) -> Vec<u8> {
    let mut message = vec![1 << 3 | FIXED64];
    message.extend(time.to_le_bytes());
    if step != 0 {
        message.push(2 << 3);
        push_varint(&mut message, step);
    }
    push_bytes(&mut message, field, content);
    message
}

/// Wire types, the low three bits of a field's key; 0 is a varint.
const FIXED64: u8 = 1;
const LENGTH: u8 = 2;
const FIXED32: u8 = 5;

fn push_bytes(message: &mut Vec<u8>, field: u8, content: &[u8]) {
    message.push(field << 3 | LENGTH);
    push_varint(message, content.len() as u64);
    message.extend_from_slice(content);
}

fn push_varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

fn record(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(message.len() + 16);
    record.extend(length);
    record.extend(crc32c::masked(&length).to_le_bytes());
    record.extend(message);
    record.extend(crc32c::masked(message).to_le_bytes());
    record
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The run that `tools/golden_tensorboard.py` wrote with TensorBoard's own classes.
    fn golden_steps() -> Vec<StepValues> {
        let step = |step: u64, time: f64, values: &[(&str, f64)]| StepValues {
            step,
            time,
            values: values.iter().map(|&(name, value)| (name.to_owned(), value)).collect(),
        };
        vec![
            step(
                42,
                1_700_000_001.25,
                &[("loss/itc", 4.125), ("temperature", 0.07), ("learning_rate", 1e-6)],
            ),
            step(300, 1_700_000_002.5, &[("loss/itc", f64::NAN), ("temperature", -0.0), ("größe", 3e9)]),
            step(5_000_000_000, 1_700_000_003.0, &[(&"long/".repeat(60), 1.0)]),
        ]
    }

    #[test]
    fn bytes_equal_those_of_tensorboard() {
        let mut bytes = record(&event(1_700_000_000.5, 0, 3, b"brain.Event:2"));
        bytes.extend(record(&event(1_700_000_000.5, 42, 7, SESSION_START)));
        for step in golden_steps() {
            bytes.extend(record(&step_event(&step)));
        }
        let golden = include_bytes!("../../tests/golden/events.out.tfevents.1700000000.golden");
        let first = bytes.iter().zip(golden).position(|(a, b)| a != b);
        assert_eq!(first, None, "first byte that differs");
        assert_eq!(bytes.len(), golden.len());
    }

    #[test]
    fn a_file_has_its_header_and_two_openings_do_not_share_one() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut first = EventFile::create(dir.path(), 1_700_000_000.5, 0).expect("first");
        first.append(&golden_steps()[0]).expect("append");
        let second = EventFile::create(dir.path(), 1_700_000_000.5, 41).expect("second");
        assert_ne!(first.path, second.path);
        let name = first.path.file_name().and_then(|name| name.to_str()).expect("name");
        assert!(name.starts_with("events.out.tfevents.1700000000.") && name.len() > 31, "{name}");
        let golden = include_bytes!("../../tests/golden/events.out.tfevents.1700000000.golden");
        let written = std::fs::read(&second.path).expect("second");
        assert_eq!(written, golden[..written.len()]);
        let step = record(&step_event(&golden_steps()[0]));
        assert!(std::fs::read(&first.path).expect("first").ends_with(&step));
    }
}
