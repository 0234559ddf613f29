//! Times training steps on the weights and the batch that `bench/train_step.py` wrote, and prints JSON: the half of
//! that comparison which runs here.
//!
//! ```text
//! timed_batch STAGE PRECISION BATCH.safetensors N_WARMUP N_STEPS
//! ```
//!
//! A step is what the trainer does with a batch: losses, gradients, clipping, AdamW. The weights are those that
//! the Python script started from, so the losses must agree as well.

#![allow(clippy::print_stdout, reason = "the measurement is this program's result")]

use std::collections::BTreeMap;
use std::error::Error;
use std::time::Instant;

use blip2::language::LanguageModel;
use blip2::layers::{Linear, Loader, Precision, Trainable};
use blip2::qformer::{QFormer, QFormerConfig, TextSide};
use blip2::text::Prompt;
use blip2::weights::safetensors::Safetensors;
use blip2_train::gradients::Gradients;
use blip2_train::losses::HardNegatives;
use blip2_train::optimizer::{Optimizer, OptimizerConfig};
use blip2_train::stage1::{Batch, StepOptions, gradients_with_negatives};
use blip2_train::stage2;
use candle_core::{Device, Tensor, Var};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The learning rate of the Python script's optimiser.
const LEARNING_RATE: f64 = 1e-3;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [stage, precision, batch, n_warmup, n_steps] = &arguments[..] else {
        return Err("usage: timed_batch STAGE PRECISION BATCH.safetensors N_WARMUP N_STEPS".into());
    };
    let precision = match precision.as_str() {
        "f32" => Precision::F32,
        "bf16" => Precision::Bf16,
        other => return Err(format!("no precision `{other}`: f32 or bf16").into()),
    };
    // As `blip2 train` does.
    rayon::ThreadPoolBuilder::new().use_current_thread().build_global()?;
    let file = Safetensors::open(batch)?;
    let (n_warmup, n_steps) = (n_warmup.parse()?, n_steps.parse()?);
    match stage.as_str() {
        "1" => {
            let stage1 = Stage1::load(&file, precision)?;
            measure(&stage1.variables, n_warmup, n_steps, || stage1.gradients())
        }
        "2" => {
            let stage2 = Stage2::load(&file, precision)?;
            measure(&stage2.variables, n_warmup, n_steps, || stage2.gradients())
        }
        other => Err(format!("no stage `{other}`").into()),
    }
}

/// Times `n_steps` steps after `n_warmup` untimed ones and prints the result.
fn measure(
    variables: &BTreeMap<String, Var>,
    n_warmup: usize,
    n_steps: usize,
    gradients: impl Fn() -> Result<(Gradients, f32)>,
) -> Result<()> {
    let mut optimizer = Optimizer::new(OptimizerConfig::default(), variables);
    let (mut seconds, mut losses) = (Vec::new(), Vec::new());
    for _ in 0..n_warmup + n_steps {
        let start = Instant::now();
        let (gradients, loss) = gradients()?;
        optimizer.step(variables, &gradients, &|_| LEARNING_RATE)?;
        seconds.push(start.elapsed().as_secs_f64());
        losses.push(loss);
    }
    let mut timed = seconds.split_off(n_warmup);
    timed.sort_by(f64::total_cmp);
    let (Some(min), Some(max)) = (timed.first(), timed.last()) else {
        return Err("no step to time".into());
    };
    let result = serde_json::json!({
        "steps": n_steps,
        "median_s": (timed[(timed.len() - 1) / 2] + timed[timed.len() / 2]) / 2.0,
        "min_s": min,
        "max_s": max,
        "first_loss": losses.first(),
        "last_loss": losses.last(),
        "peak_memory_mib": peak_memory_mib(),
    });
    println!("{result}");
    Ok(())
}

/// The largest resident size so far, where the system tells.
fn peak_memory_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(kib.trim().trim_end_matches(" kB").parse::<u64>().ok()? / 1024)
}

struct Stage1 {
    qformer: QFormer,
    variables: BTreeMap<String, Var>,
    batch: Batch,
    negatives: HardNegatives,
    options: StepOptions,
}

impl Stage1 {
    fn load(file: &Safetensors, precision: Precision) -> Result<Self> {
        let config: QFormerConfig = serde_json::from_str(&file.metadata()["config"])?;
        let trainable = Trainable::default();
        let qformer =
            QFormer::load(&config, &Loader::trainable(file, &trainable, precision), TextSide::Whole)?;
        let ids = integers(file, "in.text_ids")?;
        let mut rest = &ids[..];
        let texts = integers(file, "in.text_lengths")?.into_iter().map(|n| {
            let (text, after) = rest.split_at(n as usize);
            rest = after;
            text.to_vec()
        });
        let indices =
            |name| Ok::<_, Box<dyn Error>>(integers(file, name)?.iter().map(|&i| i as usize).collect());
        Ok(Self {
            qformer,
            variables: trainable.into_variables(),
            batch: Batch {
                image_embeds: image_embeds(file, &config)?,
                texts: texts.collect(),
                image_ids: integers(file, "in.image_ids")?.into_iter().map(u64::from).collect(),
            },
            negatives: HardNegatives {
                image_for_text: indices("in.negative_images")?,
                text_for_image: indices("in.negative_texts")?,
            },
            options: StepOptions {
                micro_batch: usize::MAX,
                dropout: 0.0,
                seed: 0,
                step: 0,
                decoder_start: serde_json::from_str(&file.metadata()["dec_token_id"])?,
                matching: true,
                captioning: true,
                text_tokens_kept: 1.0,
                hard_negatives: true,
            },
        })
    }

    fn gradients(&self) -> Result<(Gradients, f32)> {
        let (qformer, variables) = (&self.qformer, &self.variables);
        let (gradients, values) =
            gradients_with_negatives(qformer, variables, &self.batch, &self.negatives, self.options)?;
        Ok((gradients, values.loss()))
    }
}

struct Stage2 {
    qformer: QFormer,
    language_projection: Linear,
    language_model: LanguageModel,
    variables: BTreeMap<String, Var>,
    batch: stage2::Batch,
}

impl Stage2 {
    fn load(file: &Safetensors, precision: Precision) -> Result<Self> {
        let config: QFormerConfig = serde_json::from_str(&file.metadata()["config"])?;
        let language_config = serde_json::from_str(&file.metadata()["language_config"])?;
        let language_model =
            LanguageModel::from_safetensors(&language_config, file, "language_model.", precision)?;
        let trainable = Trainable::default();
        let loader = Loader::trainable(file, &trainable, precision);
        let qformer = QFormer::load(&config, &loader, TextSide::None)?;
        let width = language_model.hidden_size();
        let language_projection = loader.linear("language_projection", config.hidden_size, width)?;
        let ids = file.read_f32("in.ids")?;
        let is_target = integers(file, "in.is_target")?;
        let mut start = 0;
        let prompts = integers(file, "in.lengths")?.into_iter().map(|n| {
            let rows = start..start + n as usize;
            start = rows.end;
            vec![prompt(&ids[rows.clone()], &is_target[rows])]
        });
        let prompts: Vec<_> = prompts.collect();
        let weights = vec![1.0; prompts.len()];
        Ok(Self {
            batch: stage2::Batch { image_embeds: image_embeds(file, &config)?, prompts, weights },
            qformer,
            language_projection,
            language_model,
            variables: trainable.into_variables(),
        })
    }

    fn gradients(&self) -> Result<(Gradients, f32)> {
        let bridge = stage2::Bridge {
            qformer: &self.qformer,
            language_projection: &self.language_projection,
            language_model: &self.language_model,
        };
        let options = stage2::StepOptions { micro_batch: usize::MAX, dropout: 0.0, seed: 0, step: 0 };
        let (gradients, values) = stage2::gradients(&bridge, &self.variables, &self.batch, options)?;
        Ok((gradients, values.loss))
    }
}

/// The other engine's rows, in which a negative number is the place of a query.
fn prompt(ids: &[f32], is_target: &[u32]) -> Prompt {
    let words = || ids.iter().zip(is_target).filter(|(id, _)| **id >= 0.0);
    let targets = words().enumerate().filter(|(_, (_, target))| **target == 1);
    Prompt {
        image_at: ids.iter().position(|id| *id < 0.0),
        answers: targets.map(|(idx, _)| idx..idx + 1).collect(),
        ids: words().map(|(id, _)| *id as u32).collect(),
    }
}

/// The picture tokens, `[B * P, encoder_hidden_size]`.
fn image_embeds(file: &Safetensors, config: &QFormerConfig) -> Result<Tensor> {
    let data = file.read_f32("in.image_embeds")?;
    let width = config.encoder_hidden_size;
    let shape = (data.len() / width, width);
    Ok(Tensor::from_vec(data, shape, &Device::Cpu)?)
}

/// Small integers, which the file holds as f32.
fn integers(file: &Safetensors, name: &str) -> Result<Vec<u32>> {
    Ok(file.read_f32(name)?.into_iter().map(|x| x as u32).collect())
}
