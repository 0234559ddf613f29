//! `blip2 train`.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use blip2::text::BertTokenizer;
use blip2::vision::VisionEncoder;
use blip2::weights::safetensors::Safetensors;
use blip2_train::data::Dataset;
use blip2_train::features::{Computed, Progress};
use blip2_train::health::Limits;
use blip2_train::plot::{Style, plot_log};
use blip2_train::run::{Observer, RunConfig, train_stage1};
use blip2_train::trainer::{Outcome, Report};
use indicatif::{ProgressBar, ProgressStyle};

use crate::args::TrainArgs;

/// Pictures that are named one by one when they cannot be used; the rest is counted.
const N_NAMED: usize = 20;

/// Steps that the strong line of the loss plot averages over.
const SMOOTHED_STEPS: f64 = 20.0;

pub(crate) fn run(args: &TrainArgs) -> anyhow::Result<()> {
    let config = RunConfig::read(&args.config)?;
    let encoder = VisionEncoder::efficientnet_lite0(&config.encoder).context("the image encoder")?;
    let bert = Safetensors::open(&config.bert).context("the BERT checkpoint")?;
    let tokenizer = BertTokenizer::from_vocab(&config.vocabulary).context("the vocabulary")?;
    let tokenize = |text: &str, limit: usize| Ok(tokenizer.encode(text, limit)?);

    let stop = Arc::new(AtomicBool::new(false));
    let asked = stop.clone();
    ctrlc::set_handler(move || asked.store(true, Ordering::Relaxed))
        .context("cannot listen for Ctrl-C and SIGTERM")?;
    let mut terminal = Terminal { bar: ProgressBar::hidden(), stop, batch_size: config.batch_size };
    let outcome = train_stage1(&config, &encoder, &bert, &tokenize, args.resume, &mut terminal)?;
    terminal.bar.finish_and_clear();

    let plot = config.output.join("loss.svg");
    let log = config.output.join(blip2_train::log::FILE_NAME);
    let style = Style {
        title: "Stage 1".into(),
        y_label: "loss".into(),
        log_scale: false,
        smoothing: SMOOTHED_STEPS,
    };
    plot_log(&log, &["loss", "itc", "itm", "itg"], &style, &plot)?;
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

/// Shows a run on standard error and hears Ctrl-C.
struct Terminal {
    bar: ProgressBar,
    stop: Arc<AtomicBool>,
    batch_size: usize,
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
        let skipped = dataset.skipped();
        if !skipped.is_empty() {
            eprintln!("{} pictures cannot be used:", skipped.len());
            skipped.iter().take(N_NAMED).for_each(|picture| eprintln!("  {picture}"));
            if skipped.len() > N_NAMED {
                eprintln!("  and {} more", skipped.len() - N_NAMED);
            }
        }
    }

    fn on_step(&mut self, report: &Report) -> ControlFlow<()> {
        if self.bar.is_finished() || self.bar.length() != Some(report.n_steps) {
            self.start(report.n_steps, "training");
            self.bar.set_position(report.step - 1);
            self.bar.reset_eta();
        }
        let value = |name: &str| report.values.iter().find(|(n, _)| *n == name).map_or(f64::NAN, |(_, v)| *v);
        let pairs_per_second = self.bar.per_sec() * self.batch_size as f64;
        self.bar.set_message(format!(
            "loss {:.3} (itc {:.3} itm {:.3} itg {:.3}) R@1 {:.0} % temp {:.4} lr {:.1e} {pairs_per_second:.0} pairs/s",
            value("loss"),
            value("itc"),
            value("itm"),
            value("itg"),
            100.0 * value("recall_at_1"),
            value("temperature"),
            report.learning_rate,
        ));
        self.bar.set_position(report.step);
        let limits = Limits::default();
        let warnings =
            [limits.check_queries(value("query_cosine")), limits.check_temperature(value("temperature"))];
        // Once in a while is enough: a collapse does not go away by being repeated.
        if report.step.is_multiple_of(100) {
            warnings.iter().flatten().for_each(|warning| self.bar.println(format!("warning: {warning}")));
        }
        self.flow()
    }
}
