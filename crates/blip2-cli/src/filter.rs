//! `blip2 data filter`.

use std::path::Path;

use anyhow::{Context, bail};
use blip2::generate::GenerationConfig;
use blip2::model::Blip2;
use blip2_train::capfilt::{Filter, best_captions};
use blip2_train::data::{Row, Text, read_rows};
use indicatif::{ProgressBar, ProgressStyle};

use crate::Done;
use crate::args::{FilterArgs, SourceArgs};
use crate::generation::{self, Written, WrongUsage};
use crate::model::{Part, encode_picture, open_source, open_to_write};
use crate::rows::RowsFile;

pub(crate) fn run(args: &FilterArgs) -> anyhow::Result<Done> {
    generation::check(&args.generation)?;
    if args.keep == 0 {
        return WrongUsage::end("--keep 0 would leave nothing: give 1 or more");
    }
    if args.min_score.is_some_and(f32::is_nan) {
        return WrongUsage::end("--min-score is NaN, expected a number: nothing would be left");
    }
    if let Some(beams) = args.generation.num_beams.filter(|beams| (2..args.generate).contains(beams))
        && generation::draws(&args.generation)
    {
        let n = args.generate;
        return WrongUsage::end(format!(
            "--generate {n} is more than a search with --num-beams {beams} gives"
        ));
    }
    if args.out.extension().is_none_or(|extension| extension != "jsonl") {
        return WrongUsage::end(format!(
            "{} must end in .jsonl: it becomes a training manifest",
            args.out.display()
        ));
    }
    let base = args.manifest.parent().unwrap_or(Path::new(""));
    let rows = read_rows(&args.manifest)?;
    let mut out = RowsFile::open(&args.out, args.overwrite)?;
    let mut todo = Vec::new();
    for row in &rows {
        let Ok(Text::Captions(captions)) = row.text() else {
            bail!("the row of {} in {} has no captions", row.image, args.manifest.display());
        };
        let picture = base.join(&row.image);
        if !out.has(&picture) {
            todo.push((row, picture, captions));
        }
    }
    let n_had = rows.len() - todo.len();
    let filter = Filter { by: args.by.into(), n_kept: args.keep, minimum: args.min_score };
    let (mut n_failed, mut n_empty, mut n_written) = (0, 0, 0);
    if !todo.is_empty() {
        let models = Models::open(args)?;
        let bar = ProgressBar::new(todo.len() as u64);
        bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} {per_sec} {eta}")?);
        for (row, picture, captions) in todo {
            match models.filter(row, &picture, captions, filter) {
                Ok(kept) if kept.is_empty() => n_empty += 1,
                Ok(kept) => {
                    n_written += 1;
                    let (captions, scores) = kept.into_iter().unzip();
                    out.push(&picture, captions, scores)?;
                    out.save()?;
                }
                Err(error) => {
                    n_failed += 1;
                    bar.suspend(|| eprintln!("blip2: {}", crate::message(&error)));
                }
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        // Pictures that could not be judged say nothing against what is there.
        if n_empty > 0 {
            out.replace_by_nothing()?;
        }
    }
    eprintln!(
        "{n_written} written, {n_had} there already, {n_empty} without a caption that fits, {n_failed} failed"
    );
    Ok(Done::of(n_failed, rows.len()))
}

/// The model that judges, and the one that writes where captions are to be written.
struct Models {
    matcher: Blip2,
    writer: Option<(Blip2, GenerationConfig)>,
}

impl Models {
    fn open(args: &FilterArgs) -> anyhow::Result<Self> {
        // The writer first: its settings are checked before anything is loaded.
        let writer = if args.generate == 0 {
            None
        } else {
            let (model, mut config) =
                open_to_write(&args.source, None, Written::Captions, None, &args.generation)
                    .context("the model that writes")?;
            if !config.do_sample {
                // Beams differ in a word; captions that are drawn say different things.
                config = GenerationConfig { do_sample: true, num_beams: 1, top_p: 0.9, ..config };
            } else if config.num_beams < args.generate {
                // A folder's own settings may draw among beams, of which these would be more.
                config.num_beams = 1;
            }
            config.num_return_sequences = args.generate;
            Some((model, config))
        };
        let judge = args.matcher.as_ref().or(args.source.model.as_ref()).cloned();
        let source = SourceArgs { model: judge, ..args.source.clone() };
        let say = |message: &str| eprintln!("{message}");
        let matcher = open_source(&source, Part::Stage1, None, say).context("the model that judges")?;
        Ok(Self { matcher, writer })
    }

    fn filter(
        &self,
        row: &Row,
        picture: &Path,
        mut captions: Vec<String>,
        filter: Filter,
    ) -> anyhow::Result<Vec<(String, f32)>> {
        if let Some((model, config)) = &self.writer {
            let features = encode_picture(model, picture, None)?;
            let written = model.caption(&[&features], config)?.concat();
            captions.extend(written.into_iter().map(|answer| answer.text));
        }
        let features = encode_picture(&self.matcher, picture, None)?;
        best_captions(&self.matcher, &features, &captions, filter).with_context(|| row.image.clone())
    }
}
