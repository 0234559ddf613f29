//! A training run from its configuration file: what `blip2 train` does.

mod changed;
pub mod stage1;
pub mod stage2;

use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use blip2::layers::Precision;
use blip2::model::qformer_config;
use blip2::qformer::QFormerConfig;
use blip2::weights::write_atomically;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use crate::data::{DataConfig, Dataset, Loader, LoaderConfig};
use crate::features::{Computed, FeatureCache, FeatureEncoder, Progress};
use crate::log::{StepValues, TrainingLog};
use crate::trainer::{self, LoopConfig, Objective, Outcome, Report, Start};
use crate::{Error, Result, checkpoint};

pub use stage1::{Stage1Config, train_stage1};
pub use stage2::{Stage2Config, train_stage2};

/// The configuration of a run, as TOML; its field `stage` says of which.
#[derive(Debug, Clone, PartialEq)]
pub enum RunConfig {
    /// `stage = 1`.
    Stage1(Stage1Config),
    /// `stage = 2`.
    Stage2(Stage2Config),
}

/// Precision of the matrix products in training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunPrecision {
    /// Single precision.
    F32,
    /// Operands rounded to bf16, sums in f32.
    Bf16,
}

impl From<RunPrecision> for Precision {
    fn from(precision: RunPrecision) -> Self {
        match precision {
            RunPrecision::F32 => Self::F32,
            RunPrecision::Bf16 => Self::Bf16,
        }
    }
}

impl RunConfig {
    /// Reads a configuration file and makes its paths relative to the working folder.
    ///
    /// # Errors
    /// [`Error::Manifest`] with the line of an unknown field or a wrong value, [`Error::Config`] for a value that no run can have.
    pub fn read(path: &Path) -> Result<Self> {
        /// What has to be known before the whole is read.
        #[derive(Deserialize)]
        struct Which {
            stage: u32,
            qformer: Option<IgnoredAny>,
            init: Option<toml::Value>,
        }
        let mut text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let Which { stage, qformer, init } =
            toml::from_str(&text).map_err(|e| wrong_line(path, &text, &e))?;
        let base = path.parent().unwrap_or(Path::new(""));
        if let (None, Some(init)) = (qformer, init)
            && let Some(sizes) = qformer_of(&init, base)?
        {
            // At the end, so that the lines of errors stay those of the file.
            let sizes = toml::to_string(&sizes).map_err(|e| Error::file(path, e.to_string()))?;
            text = format!("{text}\n[qformer]\n{sizes}");
        }
        match stage {
            1 => {
                let mut config: Stage1Config =
                    toml::from_str(&text).map_err(|e| wrong_line(path, &text, &e))?;
                config.resolve(base);
                config.validate()?;
                config.run.validate()?;
                Ok(Self::Stage1(config))
            }
            2 => {
                let mut config: Stage2Config =
                    toml::from_str(&text).map_err(|e| wrong_line(path, &text, &e))?;
                config.resolve(base);
                config.validate()?;
                config.run.validate()?;
                Ok(Self::Stage2(config))
            }
            other => Err(Error::file(path, format!("`stage` must be 1 or 2, not {other}"))),
        }
    }
}

/// What is wrong with a configuration, in one line that names its place.
fn wrong_line(path: &Path, text: &str, error: &toml::de::Error) -> Error {
    // What is missing in the file has no place in it.
    let place = error.span().filter(|span| span.end > 0);
    match place.and_then(|span| text.as_bytes().get(..span.start)) {
        Some(before) => Error::Manifest {
            path: path.to_owned(),
            line: 1 + before.iter().filter(|byte| **byte == b'\n').count(),
            reason: error.message().to_owned(),
        },
        None => Error::file(path, error.message()),
    }
}

/// The Q-Former's sizes in the one folder that a run starts from, if it starts from one: `init = ["folder"]`, or in stage 1
/// `init = { weights = ["folder"] }`.
fn qformer_of(init: &toml::Value, base: &Path) -> Result<Option<QFormerConfig>> {
    let paths = init.get("weights").unwrap_or(init).as_array();
    match paths.map(Vec::as_slice) {
        Some([toml::Value::String(path)]) => {
            let path = base.join(path);
            if !path.exists() {
                return Err(Error::config("init", format!("there is no {}", path.display())));
            }
            Ok(qformer_config(path)?)
        }
        _ => Ok(None),
    }
}

fn resolve_data(data: &mut [DataConfig], base: &Path) {
    for entry in data {
        entry.path = base.join(&entry.path);
        entry.images = entry.images.take().map(|images| base.join(images));
    }
}

fn validate_step(batch_size: usize, micro_batch: usize, dropout: f32, tokens_kept: f64) -> Result<()> {
    if !(1..=batch_size).contains(&micro_batch) {
        return Err(Error::config("micro_batch", format!("must be 1 to {batch_size}")));
    }
    if !(0.0..1.0).contains(&dropout) {
        return Err(Error::config("dropout", "must be at least 0 and below 1"));
    }
    validate_kept("image_tokens_kept", tokens_kept)
}

fn validate_kept(field: &str, kept: f64) -> Result<()> {
    if 0.0 < kept && kept <= 1.0 {
        Ok(())
    } else {
        Err(Error::config(field, "must be above 0 and at most 1"))
    }
}

/// Refuses a Q-Former that reads tokens of another width than the encoder's.
fn check_width(qformer: &QFormerConfig, encoder_width: usize) -> Result<()> {
    if encoder_width != qformer.encoder_hidden_size {
        let reason = format!("must be the image encoder's {encoder_width}");
        return Err(Error::config("qformer.encoder_hidden_size", reason));
    }
    Ok(())
}

/// Stream of random numbers: which of a picture's tokens a step sees.
const IMAGE_TOKENS: u64 = 0x70e5;

/// Serde's default of what is on unless it is switched off.
fn yes() -> bool {
    true
}

/// Serde's default of `image_tokens_kept` and `text_tokens_kept`.
fn all_tokens() -> f64 {
    1.0
}

/// What a run tells its caller while it goes on; any answer but `Continue` ends it after the step, saved.
pub trait Observer {
    /// Features are being computed.
    fn on_features(&mut self, progress: Progress) -> ControlFlow<()>;
    /// Features are ready.
    fn on_data(&mut self, dataset: &Dataset, computed: &Computed);
    /// The run goes on from the checkpoint of `step`, with these of its settings changed since.
    fn on_resume(&mut self, _step: u64, _changed: &[String]) {}
    /// A step was made.
    fn on_step(&mut self, report: &Report) -> ControlFlow<()>;
}

/// The checkpoint that a run continues from: the newest of `output` when `resume` is set, none in a new folder.
///
/// # Errors
/// When there is a checkpoint and `resume` is not set: nothing is overwritten.
fn open_output(output: &Path, resume: bool) -> Result<Option<PathBuf>> {
    std::fs::create_dir_all(output).map_err(Error::io(output))?;
    let checkpoint = checkpoint::newest(output)?;
    if let (Some(path), false) = (&checkpoint, resume) {
        return Err(Error::file(
            path,
            "is there already: continue with --resume, or choose another `output`",
        ));
    }
    Ok(checkpoint)
}

/// The name of the file in a run's folder that lists what could not be used of its data, one a line; there is none when all
/// could.
pub const SKIPPED_FILE: &str = "skipped.txt";

/// Reads the data, lets `check` refuse it, and makes sure that the frozen encoder's features of all pictures are on disk. What
/// cannot be used is listed in the run's folder, `output`; copies of a picture are of one group.
fn open_data(
    output: &Path,
    data: &[DataConfig],
    features: &Path,
    encoder: &dyn FeatureEncoder,
    check: impl FnOnce(&Dataset) -> Result<()>,
    observer: &mut dyn Observer,
) -> Result<(Dataset, FeatureCache)> {
    let mut dataset = Dataset::load(data, Path::new(""))?;
    // The features may take hours.
    check(&dataset)?;
    let (features, computed) =
        FeatureCache::compute(features, &dataset, encoder, |progress| observer.on_features(progress))?;
    dataset.skip_images(&computed.unusable);
    dataset.join_groups(&computed.copies);
    write_skipped(&output.join(SKIPPED_FILE), &dataset)?;
    observer.on_data(&dataset, &computed);
    Ok((dataset, features))
}

fn write_skipped(path: &Path, dataset: &Dataset) -> Result<()> {
    let lines: String = dataset.skipped().iter().map(|skipped| format!("{skipped}\n")).collect();
    if !lines.is_empty() {
        return Ok(write_atomically(path, |file| file.write_all(lines.as_bytes()))?);
    }
    // An earlier start of this run may have left one.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path)(error)),
        _ => Ok(()),
    }
}

/// How either stage is dealt its samples: in whole batches, two of one group apart where possible.
fn loader_config(batch_size: usize, seed: u64) -> LoaderConfig {
    LoaderConfig { batch_size, seed, drop_last: true, distinct_groups: true }
}

/// A run whose parts are ready.
struct Run<'a> {
    output: &'a Path,
    settings: &'a LoopConfig,
    /// The whole configuration as text, for the checkpoints.
    config: String,
    loader: LoaderConfig,
    checkpoint: Option<PathBuf>,
}

impl Run<'_> {
    /// Runs the loop with its log.
    fn train(
        self,
        objective: &impl Objective,
        dataset: &Dataset,
        observer: &mut dyn Observer,
    ) -> Result<Outcome> {
        let mut loader = Loader::new(dataset, self.loader)?;
        let start = match &self.checkpoint {
            Some(path) => Start::resume(path, self.settings, objective, &mut loader)?,
            None => Start::fresh(self.settings, objective),
        };
        if let Some(before) = start.settings() {
            observer.on_resume(start.step(), &changed::changed_settings(before, &self.config));
        }
        let n_steps = self.settings.n_steps(loader.batches_per_epoch());
        // To continue what is done is no mistake: whoever trains in slices need not know which one is the last.
        if let Some(path) = self.checkpoint.filter(|_| start.step() >= n_steps) {
            return Ok(Outcome::Finished(path));
        }
        let mut log = TrainingLog::open(self.output, start.step())?;
        let mut log_error = None;
        let outcome = trainer::train(
            objective,
            &mut loader,
            self.settings,
            &self.config,
            self.output,
            start,
            &mut |report| {
                let mut values = StepValues::new(report.step);
                report.values.iter().for_each(|(name, value)| values.push(*name, *value));
                values.push("learning_rate", report.learning_rate);
                values.push("gradient_norm", report.gradient_norm);
                values.push("images_per_second", report.images_per_second);
                if let Err(error) = log.record(&values) {
                    log_error = Some(error);
                    return ControlFlow::Break(());
                }
                observer.on_step(report)
            },
        )?;
        match log_error {
            Some(error) => Err(error),
            None => Ok(outcome),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> String {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("run.toml");
        std::fs::write(&path, text).expect("written");
        RunConfig::read(&path).expect_err("a wrong file").to_string()
    }

    #[test]
    fn unknown_settings_are_refused_with_their_name() {
        for stage in [1, 2] {
            let error = read(&format!("stage = {stage}\noutptu = \"x\"\n"));
            assert!(error.contains("run.toml:2: unknown field `outptu`"), "{error}");
        }
        let error = read("stage = 2\nseed = \"x\"\n");
        assert!(error.contains("run.toml:2: invalid type: string \"x\""), "{error}");
        let error = read("stage = 2\n\nseed = = 1\n");
        assert!(error.contains("run.toml:3: ") && !error.contains('\n'), "{error}");
        let error = read("output = \"x\"\n");
        assert!(error.ends_with("run.toml: missing field `stage`"), "{error}");
    }

    #[test]
    fn settings_that_no_run_can_have_are_refused_with_their_name() {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
        for stage in ["stage1.toml", "stage2.toml"] {
            let text = std::fs::read_to_string(root.join("configs").join(stage)).expect("readable");
            for (field, value) in [
                ("epochs", "0"),
                ("save_every", "0"),
                ("peak", "-3e-4"),
                ("peak", "nan"),
                ("min", "inf"),
                ("min", "1.0"),
                ("beta2", "1.0"),
                ("eps", "0.0"),
                ("weight_decay", "-0.05"),
                ("clip_norm", "nan"),
            ] {
                let is_field = |line: &&str| line.starts_with(&format!("{field} = "));
                let line = text.lines().find(is_field).expect(field);
                let error = read(&text.replace(line, &format!("{field} = {value}")));
                assert!(error.contains("`run.") && error.contains(&format!("{field}` must be")), "{error}");
            }
        }
    }

    #[test]
    fn the_stage_must_be_one_that_exists() {
        assert!(read("stage = 3\n").contains("1 or 2"));
        assert!(read("output = \"x\"\n").contains("stage"));
    }

    #[test]
    fn what_was_skipped_is_listed_and_an_old_list_taken_away() {
        let dir = tempfile::tempdir().expect("a folder");
        let (rows, list) = (dir.path().join("rows.jsonl"), dir.path().join(SKIPPED_FILE));
        let row = |name: &str| format!("{{\"image\": \"{name}\", \"caption\": \"x\"}}\n");
        std::fs::write(dir.path().join("a.png"), "only its name is used").expect("written");
        let load = |names: &[&str]| {
            std::fs::write(&rows, names.iter().map(|name| row(name)).collect::<String>()).expect("written");
            let dataset = Dataset::load(&[DataConfig::new(&rows)], Path::new("")).expect("a data set");
            write_skipped(&list, &dataset).expect("written");
        };
        load(&["a.png", "b.png", "c.png"]);
        let listed = std::fs::read_to_string(&list).expect("a list");
        let lines: Vec<&str> = listed.lines().collect();
        assert!(matches!(lines[..], [b, c] if b.contains("b.png: ") && c.contains("c.png: ")), "{listed}");
        load(&["a.png"]);
        assert!(!list.exists());
        load(&["a.png"]);
    }

    #[test]
    fn the_example_of_fine_tuning_is_valid_and_its_sizes_are_those_of_its_folder() {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
        let text = std::fs::read_to_string(root.join("configs/finetune.toml")).expect("readable");
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("run.toml");
        let missing = read(&text);
        assert!(missing.contains("`init`") && missing.contains("blip2-flan-t5-xl"), "{missing}");
        let folder = root.join("crates/blip2/tests/golden/blip2_t5").canonicalize().expect("a folder");
        let text = text.replace("../blip2-flan-t5-xl", folder.to_str().expect("UTF-8"));
        std::fs::write(&path, text).expect("written");
        let RunConfig::Stage2(config) = RunConfig::read(&path).expect("valid") else { panic!("stage 2") };
        assert_eq!((config.qformer.hidden_size, config.qformer.encoder_hidden_size), (32, 24));
    }

    #[test]
    fn the_files_of_the_default_model_are_valid() {
        let configs = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs"));
        for (name, stage) in [("stage1.toml", 1), ("stage2.toml", 2)] {
            let found = match RunConfig::read(&configs.join(name)).expect(name) {
                RunConfig::Stage1(_) => 1,
                RunConfig::Stage2(_) => 2,
            };
            assert_eq!(found, stage);
        }
    }
}
