//! `blip2 caption`.

mod destination;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use blip2::generate::GenerationConfig;
use blip2::image::Limits;
use blip2::model::{Answer, Blip2, Given, ImageFeatures};
use indicatif::{ProgressBar, ProgressStyle};

use crate::Done;
use crate::args::CaptionArgs;
use crate::generation::{self, Written, WrongUsage};
use crate::model::{encode_picture, is_stdin, open_to_write, pixels};
use destination::Destination;
pub(crate) use destination::with_log_probs;

/// Pictures that are described at once: the language model reads its weights once for all of them.
const PICTURES_AT_ONCE: usize = 8;

pub(crate) fn run(args: &CaptionArgs) -> anyhow::Result<Done> {
    generation::check(&args.generation)?;
    if args.overwrite && args.sidecar.is_none() && args.out.is_none() {
        return WrongUsage::end("--overwrite is for --sidecar or --out: nothing else is written");
    }
    if args.pictures.iter().filter(|path| is_stdin(path)).count() > 1 {
        return WrongUsage::end("`-` is given more than once: standard input holds one picture");
    }
    let mut pictures = args.pictures.clone();
    for folder in &args.folder {
        let found = blip2_train::data::pictures(folder, args.recursive)
            .with_context(|| format!("cannot list {}", folder.display()))?;
        if found.is_empty() {
            let where_else = if args.recursive { "" } else { " (--recursive looks in the folders below it)" };
            bail!("{} holds no pictures{where_else}", folder.display());
        }
        pictures.extend(found);
    }
    // Everything that can be wrong with where they go is said before a model is loaded.
    let mut destination = Destination::open(args, &pictures)?;
    let n_given = pictures.len();
    pictures.retain(|picture| !destination.has(picture));
    let n_had = n_given - pictures.len();
    let mut n_failed = 0;
    if !pictures.is_empty() {
        let given = args.prompt.as_deref().map(Given::Text);
        let (model, config) =
            open_to_write(&args.model.source, args.preset, Written::Captions, given, &args.generation)?;
        n_failed = describe(&model, &config, &pictures, args, &mut destination)?;
    }
    if destination.is_file() {
        let n_described = pictures.len() - n_failed;
        eprintln!("{n_described} described, {n_had} described already, {n_failed} failed");
    }
    destination.finish()?;
    Ok(Done::of(n_failed, n_given))
}

/// Describes the pictures, a few at a time; gives how many could not be read.
fn describe(
    model: &Blip2,
    config: &GenerationConfig,
    pictures: &[PathBuf],
    args: &CaptionArgs,
    destination: &mut Destination,
) -> anyhow::Result<usize> {
    let bar =
        if destination.is_file() { ProgressBar::new(pictures.len() as u64) } else { ProgressBar::hidden() };
    bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} {per_sec} {eta}")?);
    let mut n_failed = 0;
    for paths in pictures.chunks(PICTURES_AT_ONCE) {
        let captions = caption_pictures(model, paths, args, config)?;
        for error in captions.iter().filter_map(|result| result.as_ref().err()) {
            n_failed += 1;
            bar.suspend(|| eprintln!("blip2: {}", crate::message(error)));
        }
        destination.write(paths, &captions)?;
        bar.inc(paths.len() as u64);
    }
    bar.finish_and_clear();
    Ok(n_failed)
}

/// The captions of some pictures, or why one cannot be read.
fn caption_pictures(
    model: &Blip2,
    paths: &[impl AsRef<Path> + Sync],
    args: &CaptionArgs,
    config: &GenerationConfig,
) -> anyhow::Result<Vec<anyhow::Result<Vec<Answer>>>> {
    let files: Vec<&Path> = paths.iter().map(AsRef::as_ref).filter(|path| !is_stdin(path)).collect();
    let mut of_files = model.encode_files(&files, &Limits::default(), pixels(args.preset))?.into_iter();
    let features: Vec<anyhow::Result<ImageFeatures>> = paths
        .iter()
        .map(|path| match path.as_ref() {
            path if is_stdin(path) => encode_picture(model, path, args.preset),
            _ => Ok(of_files.next().context("a picture got no features")??),
        })
        .collect();
    let readable: Vec<_> = features.iter().flatten().collect();
    let captions = match &args.prompt {
        Some(prompt) => {
            let requests: Vec<_> = readable.iter().map(|features| (*features, prompt.as_str())).collect();
            model.complete(&requests, config)
        }
        None => model.caption(&readable, config),
    };
    let mut captions = captions?.into_iter();
    Ok(features
        .into_iter()
        .map(|features| features.and_then(|_| captions.next().context("a picture got no caption")))
        .collect())
}
