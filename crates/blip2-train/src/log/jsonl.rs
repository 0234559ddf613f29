//! One JSON object per step: `{"step":1,"time":1700000000.5,"loss":2.25}`. A value that is not finite is `null`,
//! as JSON has no word for it.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::StepValues;
use crate::{Error, Result};

/// The file being appended to.
#[derive(Debug)]
pub(super) struct JsonLines {
    file: File,
    path: PathBuf,
}

impl JsonLines {
    /// Opens the file for appending, after dropping all but the readable lines up to step `last`.
    pub(super) fn open(path: &Path, last: u64) -> Result<Self> {
        keep_up_to(path, last).map_err(Error::io(path))?;
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(Error::io(path))?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// Writes one line, in one call, so that no reader and no kill sees half of it.
    pub(super) fn append(&mut self, values: &StepValues) -> Result<()> {
        let mut line = to_json(values);
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(Error::io(&self.path))
    }
}

/// Replaces the file by its lines up to step `last`; a crash leaves the old or the new one. Nothing is written when
/// all lines stay.
fn keep_up_to(path: &Path, last: u64) -> std::io::Result<()> {
    let old = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    // A torn line (no line feed, or rubbish after a power failure) is not worth refusing to resume for.
    let is_kept =
        |line: &&[u8]| line.ends_with(b"\n") && from_json(line).is_ok_and(|values| values.step <= last);
    let kept: Vec<u8> =
        old.split_inclusive(|&byte| byte == b'\n').filter(is_kept).flatten().copied().collect();
    if kept == old {
        return Ok(());
    }
    let partial = path.with_extension("jsonl.partial");
    let mut file = File::create(&partial)?;
    file.write_all(&kept)?;
    file.sync_all()?;
    fs::rename(&partial, path)
}

/// Reads the steps a run recorded, in the order of the file.
///
/// # Errors
/// [`Error::Io`], or [`Error::File`] naming the line that is not a step. A last line without its end, as a run being
/// killed (or still running) leaves, is not an error and not returned.
pub fn read(path: &Path) -> Result<Vec<StepValues>> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    let lines = bytes.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n"));
    let steps = lines.enumerate().map(|(i, line)| {
        from_json(line).map_err(|reason| Error::File {
            path: path.to_owned(),
            reason: format!("line {} is not a step of a training log: {reason}", i + 1),
        })
    });
    steps.collect()
}

fn to_json(values: &StepValues) -> String {
    let entries = values
        .values
        .iter()
        .map(|(name, value)| format!(",{}:{}", Value::from(&**name), Value::from(*value)));
    let entries: String = entries.collect();
    format!("{{\"step\":{},\"time\":{}{entries}}}", values.step, Value::from(values.time))
}

fn from_json(line: &[u8]) -> std::result::Result<StepValues, String> {
    let mut object: Map<String, Value> = serde_json::from_slice(line).map_err(|e| e.to_string())?;
    let step = object.remove("step").and_then(|step| step.as_u64()).ok_or("it has no step")?;
    let time = object.remove("time").and_then(|time| time.as_f64()).ok_or("it has no time")?;
    let mut values = Vec::with_capacity(object.len());
    for (name, value) in object {
        let value = match value {
            Value::Null => f64::NAN,
            Value::Number(number) => number.as_f64().ok_or("a number is out of range")?,
            _ => return Err(format!("{name:?} is not a number")),
        };
        values.push((name, value));
    }
    Ok(StepValues { step, time, values })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64) -> StepValues {
        StepValues { step, time: 1.7e9 + 0.25, values: vec![("loss".to_owned(), 1.0 / step as f64)] }
    }

    fn write_steps(path: &Path, from: u64, to: u64) {
        let mut lines = JsonLines::open(path, from - 1).expect("open");
        for n in from..=to {
            lines.append(&step(n)).expect("append");
        }
    }

    #[test]
    fn lines_read_back_as_written() {
        let mut values = step(7);
        values.push("a \"quoted\" name/é", 0.1_f32);
        values.push("tiny", f64::MIN_POSITIVE);
        values.push("whole", 3.0);
        let back = from_json(to_json(&values).as_bytes()).expect("line");
        assert_eq!((back.step, back.time), (7, values.time));
        for (name, value) in &values.values {
            assert_eq!(back.get(name), Some(*value), "{name}");
        }
        values.push("nan", f64::NAN);
        values.push("infinite", f64::INFINITY);
        let back = from_json(to_json(&values).as_bytes()).expect("line");
        assert!(back.get("nan").is_some_and(f64::is_nan) && back.get("infinite").is_some_and(f64::is_nan));
    }

    #[test]
    fn the_line_is_what_the_documentation_says() {
        let mut values = StepValues { step: 1, time: 1_700_000_000.5, values: vec![] };
        values.push("loss", 2.25);
        values.push("grad_norm", f64::NAN);
        assert_eq!(to_json(&values), r#"{"step":1,"time":1700000000.5,"loss":2.25,"grad_norm":null}"#);
    }

    #[test]
    fn a_resumed_log_equals_an_uninterrupted_one() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (whole, resumed) = (dir.path().join("whole.jsonl"), dir.path().join("resumed.jsonl"));
        write_steps(&whole, 1, 9);
        write_steps(&resumed, 1, 7); // killed at step 7, the last checkpoint being of step 5
        let mut file = OpenOptions::new().append(true).open(&resumed).expect("open");
        file.write_all(b"{\"step\":8,\"ti").expect("half a line");
        write_steps(&resumed, 6, 9);
        assert_eq!(fs::read(&resumed).expect("resumed"), fs::read(&whole).expect("whole"));
        assert_eq!(fs::read_dir(dir.path()).expect("directory").count(), 2, "nothing temporary is left");
    }

    #[test]
    fn a_new_run_does_not_keep_an_old_log() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("log.jsonl");
        write_steps(&path, 1, 5);
        write_steps(&path, 1, 2);
        assert_eq!(read(&path).expect("log"), [step(1), step(2)]);
    }

    #[test]
    fn a_torn_last_line_is_overlooked_and_a_broken_one_named() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("log.jsonl");
        fs::write(&path, "{\"step\":1,\"time\":2,\"loss\":3}\n{\"step\":2,\"ti").expect("write");
        assert_eq!(read(&path).expect("log").len(), 1);
        for broken in ["not json", "[]", "{\"step\":2}", "{\"step\":2,\"time\":1,\"loss\":\"high\"}", "\u{0}"]
        {
            fs::write(&path, format!("{{\"step\":1,\"time\":2}}\n{broken}\n")).expect("write");
            let error = read(&path).expect_err(broken).to_string();
            assert!(error.contains("log.jsonl") && error.contains("line 2"), "{error}");
            JsonLines::open(&path, 9).expect("resuming drops it");
            assert_eq!(read(&path).expect("log").len(), 1);
        }
    }

    #[test]
    fn a_directory_in_the_way_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let error = JsonLines::open(dir.path(), 0).expect_err("a directory").to_string();
        assert!(error.contains(&*dir.path().to_string_lossy()), "{error}");
        assert!(read(&dir.path().join("absent")).is_err());
    }
}
