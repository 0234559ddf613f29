//! How fast a model is, stage by stage, and how near that is to what the machine can do.
//!
//! [`measure`] times the stages that a picture passes on its way to a text; [`Machine`] measures, on the same threads, the
//! multiply-adds and the memory that the stages are limited by.

mod machine;
mod work;

use std::ops::ControlFlow;
use std::time::Instant;

use candle_core::Tensor;
use serde::Serialize;

pub use machine::Machine;
use work::Work;

use crate::cache::CachedSequence;
use crate::generate::{GenerationConfig, Request, Session, StopRules, generate};
use crate::image::{self, Limits, Pixels, RgbImage};
use crate::layers::FrozenFormat;
use crate::model::{Blip2, ImageFeatures};
use crate::{Error, Result};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Encoded files to pixel values.
    Preprocess,
    /// Pixel values to the frozen encoder's tokens.
    Vision,
    /// The encoder's tokens to queries, projected where a language model reads them.
    Qformer,
    /// Texts compared with a picture that was encoded (ITM and ITC); of models that match.
    Match,
    /// Prompts read by the language model, up to the scores of the first token.
    Prefill,
    /// One more token for every text.
    Decode,
    /// Pictures in memory to texts.
    Caption,
}

impl Stage {
    /// All of them, in the order of a picture's way.
    pub const ALL: [Self; 7] = [
        Self::Preprocess,
        Self::Vision,
        Self::Qformer,
        Self::Match,
        Self::Prefill,
        Self::Decode,
        Self::Caption,
    ];
}

/// What to measure, and on what.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The stages; those that the model does not have are left out.
    pub stages: Vec<Stage>,
    /// Encoded picture files; all are preprocessed together, the other stages take them in turn.
    pub pictures: Vec<Vec<u8>>,
    /// Pictures that pass the stages together.
    pub batch: usize,
    /// Tokens of a prompt besides the picture's.
    pub prompt_tokens: usize,
    /// Tokens of a text.
    pub tokens: usize,
    /// Beams; decoding and captions are measured greedily too.
    pub beams: usize,
    /// Texts that are compared with a picture.
    pub texts: usize,
    /// Runs that are timed, after one that is not.
    pub repeat: usize,
}

/// How long a stage took.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figure {
    /// Which stage.
    pub stage: Stage,
    /// Beams, of stages that have some.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beams: Option<usize>,
    /// The middle one of the runs' times, in seconds.
    pub median_s: f64,
    /// The shortest.
    pub min_s: f64,
    /// The longest.
    pub max_s: f64,
    /// How many pictures, prompts or texts it was for.
    pub items: usize,
    /// Arithmetic operations a second, a multiplication and an addition counted as two; of matrix products and attention.
    pub operations_per_s: Option<f64>,
    /// The share of the machine's multiply-adds in the same numbers at best.
    pub share_of_products: Option<f64>,
    /// Bytes of weights that are read a second.
    pub bytes_per_s: Option<f64>,
    /// The share of the machine's fastest reading.
    pub share_of_reading: Option<f64>,
}

impl Figure {
    fn new(stage: Stage, beams: Option<usize>, items: usize, mut seconds: Vec<f64>, work: Work) -> Self {
        seconds.sort_by(f64::total_cmp);
        let n = seconds.len();
        let median_s = (seconds[(n - 1) / 2] + seconds[n / 2]) / 2.0;
        Self {
            stage,
            beams,
            median_s,
            min_s: seconds[0],
            max_s: seconds[n - 1],
            items,
            operations_per_s: work.operations.map(|n| n / median_s),
            share_of_products: None,
            bytes_per_s: work.bytes.map(|n| n / median_s),
            share_of_reading: None,
        }
    }

    /// Compares the rates with the machine's. Large matrices that are in few bits are multiplied as bytes.
    pub fn compare(&mut self, machine: &Machine, format: FrozenFormat) {
        let in_bytes = format.quantization.is_some() && !matches!(self.stage, Stage::Qformer | Stage::Match);
        let products = machine.products(format.precision, in_bytes);
        self.share_of_products = self.operations_per_s.map(|rate| rate / products);
        self.share_of_reading = self.bytes_per_s.map(|rate| rate / machine.reading);
    }
}

/// Times the stages of a model.
///
/// # Errors
/// When a picture cannot be read, a number of the settings is 0, or the model fails.
pub fn measure(model: &Blip2, settings: &Settings) -> Result<Vec<Figure>> {
    let Settings { batch, tokens, beams, texts, repeat, .. } = *settings;
    if [batch, tokens, beams, texts, repeat, settings.pictures.len()].contains(&0) {
        return Err(Error::Request("there is nothing to measure: every number must be at least 1".into()));
    }
    let run = Run { model, settings, pictures: pictures(settings)? };
    let mut figures = Vec::new();
    for stage in Stage::ALL.into_iter().filter(|stage| settings.stages.contains(stage)) {
        run.stage(stage, &mut figures)?;
    }
    Ok(figures)
}

/// As many decoded pictures as pass the stages together.
fn pictures(settings: &Settings) -> Result<Vec<RgbImage>> {
    let decode = |bytes: &Vec<u8>| Ok(image::decode(bytes, &Limits::default(), Pixels::AsSeen)?);
    let n = settings.batch.min(settings.pictures.len());
    let decoded = settings.pictures[..n].iter().map(decode).collect::<Result<Vec<_>>>()?;
    Ok(decoded.iter().cycle().take(settings.batch).cloned().collect())
}

struct Run<'a> {
    model: &'a Blip2,
    settings: &'a Settings,
    /// `batch` of them.
    pictures: Vec<RgbImage>,
}

impl Run<'_> {
    fn stage(&self, stage: Stage, figures: &mut Vec<Figure>) -> Result<()> {
        let (model, batch) = (self.model, self.settings.batch);
        let Some(vision) = model.vision() else { return Ok(()) };
        let has_language = model.language_model().is_some();
        let work = || Work::of(model, stage, self.settings);
        match stage {
            Stage::Preprocess => {
                let processor = vision.processor();
                let n = self.settings.pictures.len();
                let seconds = self.times(|| {
                    let decode = |file: &Vec<u8>| image::decode(file, &Limits::default(), Pixels::AsSeen);
                    let pixels = processor.pixels_of_all(&self.settings.pictures, decode);
                    pixels.into_iter().collect::<std::result::Result<Vec<_>, _>>()?;
                    Ok(1)
                })?;
                figures.push(Figure::new(stage, None, n, seconds, work()));
            }
            Stage::Vision => {
                let processor = vision.processor();
                let pixels: Vec<f32> =
                    self.pictures.iter().flat_map(|picture| processor.pixels(picture)).collect();
                let seconds = self.times(|| vision.encode(&pixels).map(|_| 1))?;
                figures.push(Figure::new(stage, None, batch, seconds, work()));
            }
            Stage::Qformer if has_language || model.matcher().is_some() => {
                let features = self.features()?;
                let features: Vec<_> = features.iter().collect();
                let seconds = self.times(|| {
                    if has_language {
                        model.soft_tokens(&features)?;
                    } else {
                        model.embed_images(&features)?;
                    }
                    Ok(1)
                })?;
                figures.push(Figure::new(stage, None, batch, seconds, work()));
            }
            Stage::Match if model.matcher().is_some() => {
                let features = self.features()?;
                let text = ["a photo of two dogs in the snow"].repeat(self.settings.texts);
                let seconds = self.times(|| model.match_texts(&features[0], &text).map(|_| 1))?;
                figures.push(Figure::new(stage, None, self.settings.texts, seconds, work()));
            }
            Stage::Prefill if has_language => {
                let prompts = self.prompts()?;
                let seconds = self.times(|| self.session(&prompts, |_| Ok(1)))?;
                figures.push(Figure::new(stage, None, batch, seconds, work()));
            }
            Stage::Decode if has_language => {
                let prompts = self.prompts()?;
                for beams in self.beams() {
                    // The first token follows from the prompt alone.
                    let config = self.generation(beams, self.settings.tokens + 1);
                    let request =
                        Request { config: &config, stop: &StopRules::default(), seen: &[], constraint: None };
                    let seconds = self.session(&prompts, |session| {
                        self.times(|| {
                            generate(session, request, &mut |_| ControlFlow::Continue(()))?;
                            Ok(self.settings.tokens)
                        })
                    })?;
                    let work = work().times(beams);
                    figures.push(Figure::new(stage, Some(beams), batch * beams, seconds, work));
                }
            }
            Stage::Caption if has_language => {
                for beams in self.beams() {
                    let config = self.generation(beams, self.settings.tokens);
                    let seconds = self.times(|| {
                        let features = model.encode(&self.pictures)?;
                        model.caption(&features.iter().collect::<Vec<_>>(), &config)?;
                        Ok(1)
                    })?;
                    figures.push(Figure::new(stage, Some(beams), batch, seconds, Work::default()));
                }
            }
            Stage::Qformer | Stage::Match | Stage::Prefill | Stage::Decode | Stage::Caption => {}
        }
        Ok(())
    }

    /// Seconds of each of the timed runs, divided by what `run` says it did.
    fn times(&self, mut run: impl FnMut() -> Result<usize>) -> Result<Vec<f64>> {
        run()?;
        let timed = (0..self.settings.repeat).map(|_| {
            let start = Instant::now();
            let n = run()?;
            Ok(start.elapsed().as_secs_f64() / n as f64)
        });
        timed.collect()
    }

    /// Greedily, and with beams where some are asked for.
    fn beams(&self) -> Vec<usize> {
        let mut beams = vec![1, self.settings.beams];
        beams.dedup();
        beams
    }

    fn generation(&self, num_beams: usize, n_tokens: usize) -> GenerationConfig {
        GenerationConfig {
            num_beams,
            min_new_tokens: n_tokens,
            max_new_tokens: n_tokens,
            ..GenerationConfig::default()
        }
    }

    fn features(&self) -> Result<Vec<ImageFeatures>> {
        self.model.encode(&self.pictures)
    }

    /// For each picture its queries and some words.
    fn prompts(&self) -> Result<Vec<Tensor>> {
        let Some(language_model) = self.model.language_model() else { return Ok(Vec::new()) };
        let features = self.features()?;
        let soft_tokens = self.model.soft_tokens(&features.iter().collect::<Vec<_>>())?;
        let n_tokens = language_model.vocab_size() as u32;
        let words: Vec<u32> = (0..self.settings.prompt_tokens as u32).map(|i| (10 + i) % n_tokens).collect();
        if words.is_empty() {
            return Ok(soft_tokens);
        }
        let words = language_model.embed(&words)?;
        soft_tokens.iter().map(|queries| Ok(Tensor::cat(&[queries, &words], 0)?)).collect()
    }

    fn session<T>(&self, prompts: &[Tensor], run: impl FnOnce(&mut Session<'_>) -> Result<T>) -> Result<T> {
        let Some(language_model) = self.model.language_model() else {
            return Err(Error::Request("the model has no language model".into()));
        };
        let prompts = prompts.iter().map(|rows| (CachedSequence::new(), rows.clone())).collect();
        let mut cache = language_model.new_cache();
        run(&mut Session::new(language_model, &mut cache, prompts)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{OpenOptions, RandomModel};

    #[test]
    fn every_stage_of_every_kind_has_its_figures() {
        let mut png = std::io::Cursor::new(Vec::new());
        RgbImage::from_pixel(9, 7, ::image::Rgb([1, 2, 3]))
            .write_to(&mut png, ::image::ImageFormat::Png)
            .unwrap();
        let settings = Settings {
            stages: Stage::ALL.to_vec(),
            pictures: vec![png.into_inner()],
            batch: 2,
            prompt_tokens: 3,
            tokens: 2,
            beams: 3,
            texts: 2,
            repeat: 2,
        };
        for (name, stages) in [
            (
                "tiny",
                &[
                    Stage::Preprocess,
                    Stage::Vision,
                    Stage::Qformer,
                    Stage::Prefill,
                    Stage::Decode,
                    Stage::Decode,
                    Stage::Caption,
                    Stage::Caption,
                ][..],
            ),
            (
                "tiny-flan-t5",
                &[
                    Stage::Preprocess,
                    Stage::Vision,
                    Stage::Qformer,
                    Stage::Prefill,
                    Stage::Decode,
                    Stage::Decode,
                    Stage::Caption,
                    Stage::Caption,
                ],
            ),
            ("tiny-itm", &[Stage::Preprocess, Stage::Vision, Stage::Qformer, Stage::Match]),
        ] {
            let model = RandomModel::named(name).unwrap().draw(1, &OpenOptions::default()).unwrap();
            let figures = measure(&model, &settings).unwrap();
            assert_eq!(figures.iter().map(|figure| figure.stage).collect::<Vec<_>>(), stages, "{name}");
            for figure in &figures {
                assert!(
                    0.0 < figure.min_s && figure.min_s <= figure.median_s && figure.median_s <= figure.max_s
                );
            }
            let nothing = Settings { tokens: 0, ..settings.clone() };
            assert!(measure(&model, &nothing).is_err());
        }
    }
}
