//! A whole stage-2 run on a tiny random model, as `blip2 train` makes it: it learns, it resumes bit for bit, and the
//! frozen parts are the same afterwards.

#[path = "../../blip2/tests/support/golden.rs"]
mod golden;
#[path = "support/tiny.rs"]
mod tiny;

use std::ops::ControlFlow;
use std::path::Path;

use blip2::language::LanguageModel;
use blip2::layers::Precision;
use blip2::text::{LanguageTokenizer, PromptFormat};
use blip2_train::checkpoint;
use blip2_train::data::{DataConfig, Dataset};
use blip2_train::features::{Computed, FeatureEncoder, Progress};
use blip2_train::frozen::FrozenProof;
use blip2_train::log;
use blip2_train::optimizer::OptimizerConfig;
use blip2_train::run::stage2::Language;
use blip2_train::run::{Observer, RunPrecision, Stage2Config, train_stage2};
use blip2_train::schedule::Schedule;
use blip2_train::trainer::{LoopConfig, Outcome, Report};
use golden::Golden;
use image::RgbImage;

const STEPS: u64 = 30;

/// An "encoder" whose three tokens are the picture's mean colour, spread over 40 values.
struct MeanColour;

impl FeatureEncoder for MeanColour {
    fn key(&self) -> String {
        "mean colour".into()
    }

    fn n_tokens(&self) -> usize {
        3
    }

    fn width(&self) -> usize {
        40
    }

    fn decode(&self, bytes: &[u8]) -> Result<RgbImage, String> {
        image::load_from_memory(bytes).map(|picture| picture.to_rgb8()).map_err(|e| e.to_string())
    }

    fn encode(&self, pictures: &[RgbImage]) -> blip2_train::Result<Vec<f32>> {
        let mut features = Vec::new();
        for picture in pictures {
            let n = picture.pixels().len() as f32;
            for channel in 0..3 {
                let mean = picture.pixels().map(|p| f32::from(p[channel])).sum::<f32>() / n / 255.0;
                features.extend((0..40).map(|i| (mean * (i + channel + 1) as f32).sin()));
            }
        }
        Ok(features)
    }
}

/// Keeps the losses and stops after a step.
struct Watch {
    losses: Vec<f64>,
    stop_after: u64,
}

impl Observer for Watch {
    fn on_features(&mut self, _: Progress) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn on_data(&mut self, dataset: &Dataset, _: &Computed) {
        assert!(dataset.skipped().is_empty(), "{:?}", dataset.skipped());
    }

    fn on_step(&mut self, report: &Report) -> ControlFlow<()> {
        self.losses.push(report.values[0].1);
        if report.step == self.stop_after { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

struct Setting {
    dir: tempfile::TempDir,
    golden: Golden,
    model: LanguageModel,
    tokenizer: LanguageTokenizer,
    config: Stage2Config,
}

impl Setting {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let path = |name: &str| dir.path().join(name);
        let mut lines = String::new();
        let colours =
            [("red", [250, 10, 10]), ("green", [10, 240, 20]), ("blue", [20, 20, 230]), ("black", [0; 3])];
        for (name, colour) in colours {
            let picture = RgbImage::from_pixel(4, 4, image::Rgb(colour));
            picture.save(path(&format!("{name}.png"))).expect("written");
            lines +=
                &format!("{{\"image\": \"{name}.png\", \"captions\": [\"{name} .\", \"all {name}\"]}}\n");
            lines += &format!(
                "{{\"image\": \"{name}.png\", \"question\": \"What colour?\", \"answer\": \"{name}\"}}\n"
            );
        }
        let turns =
            "[{\"question\": \"Red?\", \"answer\": \"yes\"}, {\"question\": \"Sure?\", \"answer\": \"yes\"}]";
        lines += &format!("{{\"image\": \"red.png\", \"turns\": {turns}}}\n");
        std::fs::write(path("data.jsonl"), lines).expect("written");
        std::fs::write(path("encoder"), b"frozen").expect("written");
        tiny::write_language_model(&path("language"));
        let (model, tokenizer) =
            LanguageModel::open(path("language"), Precision::F32).expect("a language model");
        let golden = Golden::parse("stage2", include_bytes!("golden/stage2.safetensors"));
        let config = Stage2Config {
            stage: 2,
            output: path("run"),
            features: path("features"),
            encoder: path("encoder"),
            image_size: None,
            encoder_heads: None,
            language_model: path("language"),
            init: vec![path("given by the test")],
            seed: 3,
            batch_size: 3,
            micro_batch: 2,
            texts_per_picture: 2,
            max_rows: 128,
            instructions: vec!["Describe it.".into(), "What is it?".into()],
            prompt: PromptFormat::ChatMl,
            caption_prompt: None,
            tidy_captions: true,
            split_captions: false,
            dropout: 0.1,
            image_tokens_kept: 1.0,
            precision: RunPrecision::F32,
            run: LoopConfig {
                epochs: 10,
                max_steps: None,
                learning_rate: Schedule { peak: 1e-2, min: 2e-3, warmup_steps: 2 },
                optimizer: OptimizerConfig::default(),
                save_every: 1000,
            },
            qformer: golden.metadata("config"),
            data: vec![DataConfig::new(path("data.jsonl"))],
        };
        Self { dir, golden, model, tokenizer, config }
    }

    fn train(&self, output: &str, resume: bool, stop_after: u64) -> (Outcome, Vec<f64>) {
        let config = Stage2Config { output: self.dir.path().join(output), ..self.config.clone() };
        let language = Language { model: &self.model, tokenizer: &self.tokenizer };
        let mut watch = Watch { losses: Vec::new(), stop_after };
        let outcome =
            train_stage2(&config, &MeanColour, language, &self.golden, resume, &mut watch).expect("a run");
        (outcome, watch.losses)
    }
}

#[test]
fn a_run_learns_resumes_bit_for_bit_and_leaves_the_frozen_parts_alone() {
    let setting = Setting::new();
    let (whole, losses) = setting.train("whole", false, u64::MAX);
    assert_eq!(losses.len() as u64, STEPS);
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    assert!(mean(&losses[losses.len() - 6..]) < mean(&losses[..6]) - 0.2, "{losses:?}");

    let (first, _) = setting.train("parts", false, 5);
    assert!(matches!(first, Outcome::Stopped(_)));
    let (parts, rest) = setting.train("parts", true, u64::MAX);
    assert_eq!(rest, losses[5..]);
    let (Outcome::Finished(whole), Outcome::Finished(parts)) = (whole, parts) else {
        panic!("both runs reach the end");
    };
    let read = |path: &Path| checkpoint::load(path).expect("whole").1;
    assert_eq!(read(&whole), read(&parts));

    // The resumed run's log has every step once, with the values of the other; only what a clock says may differ.
    let logged = |name: &str| {
        let steps = log::read(&setting.dir.path().join(name).join(log::FILE_NAME)).expect("a log");
        assert!(steps.iter().all(|step| step.get("images_per_second").is_some_and(|rate| rate > 0.0)));
        let values = steps.into_iter().map(|mut step| {
            step.values.retain(|(name, _)| name != "images_per_second");
            (step.step, step.values)
        });
        values.collect::<Vec<_>>()
    };
    assert_eq!(logged("whole"), logged("parts"));
    assert_eq!(logged("whole").len() as u64, STEPS);

    // The proof says so too, and it is no constant: another model or file has another one.
    let proof = |name: &str| -> FrozenProof {
        let path = setting.dir.path().join(name).join(blip2_train::frozen::FILE_NAME);
        serde_json::from_slice(&std::fs::read(path).expect("a proof")).expect("readable")
    };
    assert_eq!(proof("whole"), proof("parts"));
    let (file, language) = (
        setting.dir.path().join("encoder"),
        Language { model: &setting.model, tokenizer: &setting.tokenizer },
    );
    let before = FrozenProof::take(&[&file], language).expect("a proof");
    std::fs::write(&file, b"thawed").expect("written");
    let after = FrozenProof::take(&[&file], language).expect("a proof");
    assert!(before.compare(&after).expect_err("a changed file").to_string().contains("encoder"));
}
