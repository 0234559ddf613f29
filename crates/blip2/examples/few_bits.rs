//! How near a model in few bits is to itself in f32: at a published size with random weights, part by part.
//!
//! `cargo run --release -p blip2 --example few_bits -- [SHAPE] [SEED]`
//!
//! Prints the least cosine of a row: of the image encoder given the same pixels, of the language model given the same 32 rows
//! (the hidden states before its head, and the scores), and of the scores at the end of the whole chain. Both models are in
//! memory, one after the other: 10 GB for `blip2-opt-2.7b`.
#![allow(clippy::print_stdout, reason = "this is a program")]

use blip2::cache::CachedSequence;
use blip2::image::RgbImage;
use blip2::layers::Quantization;
use blip2::model::{Blip2, OpenOptions, RandomModel};
use blip2::{Error, Result};
use candle_core::Tensor;

/// What a model makes of the picture.
struct Outputs {
    vision: Tensor,
    /// What the language model reads.
    rows: Tensor,
    /// Of the whole chain.
    logits: Tensor,
    /// Of the language model by itself.
    hidden: Tensor,
    scores: Tensor,
}

impl Outputs {
    /// The language model by itself reads `rows`, or what this model makes of the picture.
    fn of(model: &Blip2, picture: &RgbImage, rows: Option<&Tensor>) -> Result<Self> {
        let mut stages = model.stages(std::slice::from_ref(picture), Some("4 5 6"), &[])?.into_iter();
        let mut stage = |name: &str| {
            let found = stages.find(|(found, _)| *found == name).map(|(_, output)| output);
            found.ok_or_else(|| Error::Request(format!("the shape has no {name}")))
        };
        let flat = |output: Tensor| -> Result<Tensor> { Ok(output.squeeze(0)?) };
        let vision = flat(stage("vision.out")?)?;
        let own = flat(stage("language_projection.out")?)?;
        let logits = flat(stage("logits")?)?;
        let rows = rows.cloned().unwrap_or(own);
        let language =
            model.language_model().ok_or_else(|| Error::Request("the shape writes nothing".into()))?;
        let (mut cache, mut text) = (language.new_cache(), [CachedSequence::new()]);
        let hidden = if language.reads_prompts_whole() {
            language.read_prompts(&rows, &mut cache, &mut text, &[rows.dim(0)?])?
        } else {
            language.forward_cached(&rows, &mut cache, &mut text, &[rows.dim(0)?])?
        };
        let scores = language.logits(&hidden)?;
        Ok(Self { vision, rows, logits, hidden, scores })
    }
}

fn least_cosine(a: &Tensor, b: &Tensor) -> Result<f64> {
    let rows = |x: &Tensor| Ok::<_, Error>(x.to_vec2::<f32>()?);
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let cosines = rows(a)?.into_iter().zip(rows(b)?);
    Ok(cosines.map(|(a, b)| dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt()).fold(1.0, f64::min))
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let shape = RandomModel::named(&arguments.next().unwrap_or_else(|| "blip2-opt-2.7b".into()))?;
    let seed = match arguments.next().map(|seed| seed.parse()) {
        Some(Ok(seed)) => seed,
        Some(Err(error)) => return Err(Error::Request(format!("the seed is no number: {error}"))),
        None => 1,
    };
    let values = (0..3 * 320 * 240u32).map(|i| (i.wrapping_mul(i / 960 + 7) >> 4) as u8).collect();
    let picture = RgbImage::from_raw(320, 240, values)
        .ok_or_else(|| Error::Request("three values a pixel make a picture".into()))?;
    let expected = Outputs::of(&shape.draw(seed, &OpenOptions::default())?, &picture, None)?;
    println!("least cosine of a row  encoder   language model  scores    whole chain");
    for quantization in [Quantization::Int8, Quantization::Int4] {
        let options = OpenOptions { quantization: Some(quantization), ..OpenOptions::default() };
        let found = Outputs::of(&shape.draw(seed, &options)?, &picture, Some(&expected.rows))?;
        println!(
            "{:22} {:.6}  {:.6}        {:.6}  {:.6}",
            format!("{quantization:?}").to_lowercase(),
            least_cosine(&found.vision, &expected.vision)?,
            least_cosine(&found.hidden, &expected.hidden)?,
            least_cosine(&found.scores, &expected.scores)?,
            least_cosine(&found.logits, &expected.logits)?,
        );
    }
    Ok(())
}
