//! What a run writes down while it trains: every step's values, as JSON lines and for TensorBoard.
//!
//! Both come from one [`StepValues`], so they cannot disagree. The JSON lines (`log.jsonl`) are the record: [`read`]
//! and the loss plot use them; the event files are for looking on.

mod crc32c;
mod jsonl;
mod tensorboard;

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{Error, Result};
use jsonl::JsonLines;
use tensorboard::EventFile;

pub use jsonl::read;

/// The name of the JSON lines file in the run's directory.
pub const FILE_NAME: &str = "log.jsonl";

/// The named values of one optimiser step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepValues {
    /// The optimiser step, counted from 1.
    pub step: u64,
    /// When it was finished, in seconds since 1970.
    pub time: f64,
    /// Names such as `loss/itc` (TensorBoard groups by what is before the slash) and values, in order.
    pub values: Vec<(String, f64)>,
}

impl StepValues {
    /// No values yet, finished now.
    #[must_use]
    pub fn new(step: u64) -> Self {
        // A clock set before 1970 is no reason to stop a training.
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        Self { step, time, values: Vec::new() }
    }

    /// Adds a value.
    ///
    /// # Panics
    /// When the name is `step` or `time`, which the file has already.
    pub fn push(&mut self, name: impl Into<String>, value: impl Into<f64>) {
        let name = name.into();
        assert!(name != "step" && name != "time", "{name:?} is the name of the log's own column");
        self.values.push((name, value.into()));
    }

    /// The value of that name, if there is one.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<f64> {
        self.values.iter().find(|(own, _)| own == name).map(|&(_, value)| value)
    }
}

/// Writes the values of each step to [`FILE_NAME`] and to a TensorBoard event file in the run's directory.
///
/// A step is handed to the operating system whole and at once, so a run that is killed loses nothing it recorded.
#[derive(Debug)]
pub struct TrainingLog {
    lines: JsonLines,
    events: EventFile,
}

impl TrainingLog {
    /// Opens the log of a run that stands at optimiser step `step` (0 for a new run): lines of later steps, which a
    /// killed run left behind its last checkpoint, and a torn last line are dropped, all at once or not at all.
    /// Each call begins a new event file and tells TensorBoard to forget the steps after `step`.
    ///
    /// # Errors
    /// [`Error::Io`] when the directory or the files cannot be written; what was there before stays.
    pub fn open(run_dir: &Path, step: u64) -> Result<Self> {
        std::fs::create_dir_all(run_dir).map_err(Error::io(run_dir))?;
        let lines = JsonLines::open(&run_dir.join(FILE_NAME), step)?;
        let events = EventFile::create(run_dir, StepValues::new(step).time, step)?;
        Ok(Self { lines, events })
    }

    /// Writes one step to both files.
    ///
    /// # Errors
    /// [`Error::Io`], for example when the disk is full.
    pub fn record(&mut self, values: &StepValues) -> Result<()> {
        self.lines.append(values)?;
        self.events.append(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_files_hold_the_same_steps() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut log = TrainingLog::open(dir.path(), 0).expect("log");
        for step in 1..=3 {
            let mut values = StepValues::new(step);
            values.push("loss/itc", 1.0_f32 / step as f32);
            values.push("learning_rate", 1e-4);
            log.record(&values).expect("record");
        }
        let steps = read(&dir.path().join(FILE_NAME)).expect("lines");
        assert_eq!(steps.iter().map(|s| s.step).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(steps[1].get("loss/itc"), Some(0.5));
        let events = std::fs::read_dir(dir.path())
            .expect("directory")
            .map(|entry| entry.expect("entry").path())
            .find(|path| path.to_string_lossy().contains("events.out.tfevents."))
            .expect("an event file");
        let bytes = std::fs::read(events).expect("events");
        assert_eq!(bytes.windows(8).filter(|b| b == b"loss/itc").count(), 3);
    }

    #[test]
    #[should_panic(expected = "log's own column")]
    fn a_value_cannot_be_called_step() {
        StepValues::new(1).push("step", 1.0);
    }
}
