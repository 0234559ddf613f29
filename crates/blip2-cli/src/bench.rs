//! `blip2 bench`.

mod table;

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use blip2::benchmark::{Figure, Machine, Settings, Stage, measure};
use blip2::image::{RgbImage, png};
use blip2::layers::{FrozenFormat, Precision, Quantization};
use blip2::model::{Blip2, OpenOptions, RandomModel};
use serde::Serialize;

use crate::Done;
use crate::args::SourceArgs;
use crate::model::{Part, check_quantize_qformer, open_with_format};
use crate::{dtype, memory};

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Times are medians. What is read counts weights only, rates are compared with the best that this \
    machine's threads did in the same run: multiply-adds of registers alone in the same numbers, and a sum over memory."
)]
pub(crate) struct BenchArgs {
    /// Measure a model of this size with random weights instead, without any file: blip2-opt-2.7b, blip2-opt-6.7b,
    /// blip2-flan-t5-xl, blip2-flan-t5-xxl, blip2-itm-vit-g, default, tiny, tiny-flan-t5 or tiny-itm.
    #[arg(long, value_name = "NAME", conflicts_with = "model")]
    shape: Option<String>,
    #[command(flatten)]
    source: SourceArgs,
    /// Only these stages.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "STAGE,…")]
    stages: Vec<StageArg>,
    /// A picture's file, may be given several times: preprocessing takes all of them at once. Without it, one of 640 by 480
    /// pixels is drawn.
    #[arg(long, value_name = "FILE")]
    picture: Vec<PathBuf>,
    /// Pictures that pass the stages together.
    #[arg(long, default_value_t = 1, value_name = "N")]
    batch: usize,
    /// Tokens that the prompt has besides the picture's queries; a caption has the model's own prompt.
    #[arg(long, default_value_t = 8, value_name = "N")]
    prompt_tokens: usize,
    /// Tokens that are written.
    #[arg(long, default_value_t = 20, value_name = "N")]
    tokens: usize,
    /// Beams that texts are written with, besides greedily.
    #[arg(long, default_value_t = 5, value_name = "N")]
    beams: usize,
    /// Texts that a picture is matched with.
    #[arg(long, default_value_t = 4, value_name = "N")]
    texts: usize,
    /// Runs that are timed, after one that is not.
    #[arg(long, default_value_t = 3, value_name = "N")]
    repeat: usize,
    /// Seed of random weights.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum StageArg {
    /// Picture files to pixel values.
    Preprocess,
    /// Pixel values to image tokens.
    Vision,
    /// Image tokens to queries.
    Qformer,
    /// Texts compared with a picture.
    Match,
    /// Prompts read.
    Prefill,
    /// A token written.
    Decode,
    /// Pictures in memory to texts.
    Caption,
}

impl From<StageArg> for Stage {
    fn from(stage: StageArg) -> Self {
        match stage {
            StageArg::Preprocess => Self::Preprocess,
            StageArg::Vision => Self::Vision,
            StageArg::Qformer => Self::Qformer,
            StageArg::Match => Self::Match,
            StageArg::Prefill => Self::Prefill,
            StageArg::Decode => Self::Decode,
            StageArg::Caption => Self::Caption,
        }
    }
}

/// All that was measured.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    dtype: &'static str,
    batch: usize,
    prompt_tokens: usize,
    tokens: usize,
    repeat: usize,
    /// Seconds until the model was open, or drawn.
    load_s: f64,
    /// Bytes that the process held then.
    loaded_memory: Option<u64>,
    /// The most that it held, the machine's own measurement left out.
    peak_memory: Option<u64>,
    stages: Vec<Figure>,
    machine: Machine,
}

pub(crate) fn run(args: &BenchArgs) -> anyhow::Result<Done> {
    let settings = settings(args)?;
    let start = Instant::now();
    let (model, format) = open(args, &settings.stages)?;
    let (load_s, loaded_memory) = (start.elapsed().as_secs_f64(), memory::resident());
    let mut stages = measure(&model, &settings)?;
    // The machine's products take memory of their own, so they come last.
    let peak_memory = memory::peak();
    let machine = Machine::measure();
    stages.iter_mut().for_each(|figure| figure.compare(&machine, format));
    let report = Report {
        model: model.config().name.clone(),
        dtype: dtype::name(format),
        batch: args.batch,
        prompt_tokens: args.prompt_tokens,
        tokens: args.tokens,
        repeat: args.repeat,
        load_s,
        loaded_memory,
        peak_memory,
        stages,
        machine,
    };
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        write!(out, "{}", table::render(&report))?;
    }
    Ok(Done::All)
}

fn settings(args: &BenchArgs) -> anyhow::Result<Settings> {
    let read = |path: &PathBuf| std::fs::read(path).with_context(|| path.display().to_string());
    let mut pictures = args.picture.iter().map(read).collect::<anyhow::Result<Vec<_>>>()?;
    if pictures.is_empty() {
        pictures.push(png(&RgbImage::from_fn(640, 480, |x, y| [x as u8, y as u8, (x * y) as u8].into())));
    }
    let stages = match &args.stages[..] {
        [] => Stage::ALL.to_vec(),
        some => some.iter().map(|stage| (*stage).into()).collect(),
    };
    let BenchArgs { batch, prompt_tokens, tokens, beams, texts, repeat, .. } = *args;
    Ok(Settings { stages, pictures, batch, prompt_tokens, tokens, beams, texts, repeat })
}

/// The model, with the parts that the stages need.
fn open(args: &BenchArgs, stages: &[Stage]) -> anyhow::Result<(Blip2, FrozenFormat)> {
    let say = |message: &str| eprintln!("{message}");
    let needs = |some: &[Stage]| some.iter().any(|stage| stages.contains(stage));
    let matches = needs(&[Stage::Match, Stage::Qformer]);
    let writes = needs(&[Stage::Qformer, Stage::Prefill, Stage::Decode, Stage::Caption]);
    let Some(shape) = &args.shape else {
        let part = match (matches, writes) {
            (true, true) => Part::Both,
            (true, false) => Part::Stage1,
            (false, _) => Part::Stage2,
        };
        return open_with_format(&args.source, part, None, say);
    };
    let model = RandomModel::named(shape)?;
    let mut options = OpenOptions {
        image_size: args.source.image_size,
        quantize_qformer: args.source.quantize_qformer,
        stage1: matches,
        stage2: writes,
        ..OpenOptions::default()
    };
    let in_int8 = OpenOptions { quantization: Some(Quantization::Int8), ..options.clone() };
    let format = match args.source.dtype {
        Some(asked) => asked.format(|| Ok(dtype::fitting(model.memory_needed(&in_int8), say)))?,
        // As the default model is opened, and as published ones are.
        None if shape == "default" => Precision::Bf16.into(),
        None => Precision::F32.into(),
    };
    check_quantize_qformer(&args.source, format.quantization)?;
    (options.precision, options.quantization) = (format.precision, format.quantization);
    let needed = model.memory_needed(&options);
    say(&memory::check(needed, memory::available(), args.source.ignore_memory)?);
    Ok((model.draw(args.seed, &options)?, format))
}
