//! `blip2 train`.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use blip2::layers::Precision;
use blip2::model::{open_encoder, open_language_model, open_trained};
use blip2::text::BertTokenizer;
use blip2_train::data::Dataset;
use blip2_train::features::{Computed, Progress};
use blip2_train::health::Watch;
use blip2_train::plot::{Style, plot_log};
use blip2_train::run::stage1::Stage1Init;
use blip2_train::run::stage2::Language;
use blip2_train::run::{
    Observer, RunConfig, SKIPPED_FILE, Stage1Config, Stage2Config, train_stage1, train_stage2,
};
use blip2_train::trainer::{Outcome, Report};
use indicatif::{ProgressBar, ProgressStyle};

use crate::args::TrainArgs;

/// Pictures that are named one by one when they cannot be used; the rest is counted, and named in a file.
const N_NAMED: usize = 20;

/// What features are computed in, whatever the precision of training: those on disk serve every run with their encoder.
const FEATURES: Precision = Precision::F32;

/// Values of a step that the progress line shows, with their labels and scale.
const SHOWN: [(&str, &str, f64); 7] = [
    ("loss", "loss", 1.0),
    ("itc", "itc", 1.0),
    ("itm", "itm", 1.0),
    ("itm_accuracy", "acc %", 100.0),
    ("itg", "itg", 1.0),
    ("recall_at_1", "R@1 %", 100.0),
    ("temperature", "temp", 1.0),
];

/// Steps that the strong line of the loss plot averages over.
const SMOOTHED_STEPS: f64 = 20.0;

pub(crate) fn run(args: &TrainArgs) -> anyhow::Result<()> {
    let config = RunConfig::read(&args.config)?;
    let stop = Arc::new(AtomicBool::new(false));
    let asked = stop.clone();
    ctrlc::set_handler(move || asked.store(true, Ordering::Relaxed))
        .context("cannot listen for Ctrl-C and SIGTERM")?;
    let (output, title, curves): (_, _, &[&str]) = match &config {
        RunConfig::Stage1(config) => (&config.output, "Stage 1", &["loss", "itc", "itm", "itg"]),
        RunConfig::Stage2(config) => (&config.output, "Stage 2", &["loss"]),
    };
    let mut terminal = Terminal {
        bar: ProgressBar::hidden(),
        stop,
        n_skipped: 0,
        skipped_file: output.join(SKIPPED_FILE),
        health: Watch::default(),
    };
    let outcome = match &config {
        RunConfig::Stage1(config) => run_stage1(config, args.resume, &mut terminal),
        RunConfig::Stage2(config) => run_stage2(config, args.resume, &mut terminal),
    };
    // After a failure too: it may be what was warned of.
    terminal.finish();
    if let Err(error) = &outcome
        && matches!(error.downcast_ref(), Some(blip2_train::Error::Stopped { .. }))
    {
        // As after a step: what is done is kept.
        let resume = if args.resume { " --resume" } else { "" };
        eprintln!("{error}: blip2 train {}{resume}", args.config.display());
        return Ok(());
    }
    let outcome = outcome?;

    let plot = output.join("loss.svg");
    let log = output.join(blip2_train::log::FILE_NAME);
    let style =
        Style { title: title.into(), y_label: "loss".into(), log_scale: false, smoothing: SMOOTHED_STEPS };
    plot_log(&log, curves, &style, &plot)?;
    match outcome {
        Outcome::Finished(path) => {
            eprintln!("finished; the loss is plotted in {}", plot.display());
            println!("{}", path.display());
        }
        Outcome::Stopped(path) => {
            eprintln!("stopped and saved; continue with: blip2 train {} --resume", args.config.display());
            println!("{}", path.display());
        }
    }
    Ok(())
}

fn run_stage1(config: &Stage1Config, resume: bool, terminal: &mut Terminal) -> anyhow::Result<Outcome> {
    let encoder =
        open_encoder(&config.encoder, config.encoder_options(), FEATURES).context("the image encoder")?;
    let init = match &config.init {
        Stage1Init::Bert(file) => open_trained(&[file]).context("the BERT checkpoint")?,
        Stage1Init::Weights(files) => open_trained(files).context("the weights to start from")?,
    };
    let tokenizer = BertTokenizer::from_vocab(&config.vocabulary).context("the vocabulary")?;
    if let Err(reason) = tokenizer.check_rows(config.qformer.vocab_size) {
        bail!("the vocabulary: {} {reason}", config.vocabulary.display());
    }
    let tokenize = |text: &str, limit: usize| Ok(tokenizer.encode(text, limit)?);
    Ok(train_stage1(config, &encoder, &*init, &tokenize, resume, terminal)?)
}

fn run_stage2(config: &Stage2Config, resume: bool, terminal: &mut Terminal) -> anyhow::Result<Outcome> {
    let encoder =
        open_encoder(&config.encoder, config.encoder_options(), FEATURES).context("the image encoder")?;
    let init = open_trained(&config.init).context("the weights to start from")?;
    let (model, tokenizer) = open_language_model(&config.language_model, Precision::from(config.precision))
        .context("the language model")?;
    let language = Language { model: &model, tokenizer: &tokenizer };
    let outcome = train_stage2(config, &encoder, language, &*init, resume, terminal)?;
    eprintln!(
        "the frozen parts are bit for bit what they were: {}",
        config.output.join(blip2_train::frozen::FILE_NAME).display()
    );
    Ok(outcome)
}

/// Shows a run on standard error and hears Ctrl-C.
struct Terminal {
    bar: ProgressBar,
    stop: Arc<AtomicBool>,
    n_skipped: usize,
    /// Where all that was skipped is named.
    skipped_file: PathBuf,
    health: Watch,
}

impl Terminal {
    fn flow(&self) -> ControlFlow<()> {
        if self.stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn start(&mut self, total: u64, what: &str) {
        let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {eta} {msg}");
        self.bar = ProgressBar::new(total).with_prefix(what.to_owned());
        self.bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    }

    /// Repeats what has scrolled away since it was said.
    fn finish(&self) {
        self.bar.finish_and_clear();
        if self.n_skipped > 0 {
            eprintln!("{} pictures could not be used: {}", self.n_skipped, self.skipped_file.display());
        }
        self.health.episodes().iter().for_each(|episode| eprintln!("warning: {episode}"));
    }
}

/// What the progress line says of a step.
fn message(report: &Report) -> String {
    let mut message = String::new();
    for (name, label, scale) in SHOWN {
        if let Some((_, value)) = report.values.iter().find(|(own, _)| *own == name) {
            message += &format!("{label} {:.3} ", value * scale);
        }
    }
    format!("{message}lr {:.1e} {:.1} images/s", report.learning_rate, report.images_per_second)
}

impl Observer for Terminal {
    fn on_features(&mut self, progress: Progress) -> ControlFlow<()> {
        if self.bar.length() != Some(progress.total as u64) {
            self.start(progress.total as u64, "features");
        }
        self.bar.set_position(progress.done as u64);
        self.flow()
    }

    fn on_data(&mut self, dataset: &Dataset, computed: &Computed) {
        self.bar.finish_and_clear();
        eprintln!(
            "{} texts on {} pictures; features: {} computed, {} reused",
            dataset.samples().len(),
            dataset.images().len(),
            computed.n_computed,
            computed.n_reused,
        );
        if !computed.copies.is_empty() {
            let n = computed.copies.len();
            eprintln!("{n} of them have the bytes of another and are one group with it");
        }
        let skipped = dataset.skipped();
        self.n_skipped = skipped.len();
        if !skipped.is_empty() {
            eprintln!("{} pictures cannot be used:", skipped.len());
            skipped.iter().take(N_NAMED).for_each(|picture| eprintln!("  {picture}"));
            if skipped.len() > N_NAMED {
                let (n, file) = (skipped.len() - N_NAMED, self.skipped_file.display());
                eprintln!("  and {n} more, all of them in {file}");
            }
        }
    }

    fn on_resume(&mut self, step: u64, changed: &[String]) {
        eprintln!("continuing after step {step}");
        changed.iter().for_each(|setting| eprintln!("  since its checkpoint {setting}"));
    }

    fn on_step(&mut self, report: &Report) -> ControlFlow<()> {
        if self.bar.is_finished() || self.bar.length() != Some(report.n_steps) {
            self.start(report.n_steps, "training");
            self.bar.set_position(report.step - 1);
            self.bar.reset_eta();
        }
        self.bar.set_message(message(report));
        self.bar.set_position(report.step);
        for warning in self.health.step(report.step, &report.values) {
            // Not the bar's own `println`, which says nothing where there is no terminal.
            self.bar.suspend(|| eprintln!("step {}: warning: {warning}", report.step));
        }
        self.flow()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_progress_line_has_the_values_of_its_stage_and_pictures_a_second() {
        let report = |values: &[(&'static str, f64)]| Report {
            step: 3,
            n_steps: 9,
            epoch: 0,
            values: values.to_vec(),
            learning_rate: 1e-4,
            gradient_norm: 1.0,
            images_per_second: 9.54,
        };
        let stage1 = [("loss", 2.5), ("itm", 0.5), ("itm_accuracy", 0.75), ("query_cosine", 0.1)];
        assert_eq!(message(&report(&stage1)), "loss 2.500 itm 0.500 acc % 75.000 lr 1.0e-4 9.5 images/s");
        assert_eq!(message(&report(&[("loss", 2.5)])), "loss 2.500 lr 1.0e-4 9.5 images/s");
    }
}
