//! A run that was stopped and resumed ends with the weights of one that was not, bit for bit.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use blip2_train::checkpoint;
use blip2_train::data::{Batch, DataConfig, Dataset, Loader, LoaderConfig};
use blip2_train::gradients::Gradients;
use blip2_train::optimizer::OptimizerConfig;
use blip2_train::schedule::Schedule;
use blip2_train::trainer::{LoopConfig, Objective, Outcome, Start, Value, train};
use blip2_train::{Error, Result};
use candle_core::{Device, Tensor, Var};

/// A loss that depends on the batch and the step: a wrong order, step or moment changes the weights.
struct Toy {
    variables: BTreeMap<String, Var>,
    breaks_at: Option<u64>,
}

impl Toy {
    fn new() -> Self {
        let weight = Tensor::new(&[[0.3f32, -0.2], [0.1, 0.4]], &Device::Cpu).expect("a tensor");
        let variables = [("weight".to_owned(), Var::from_tensor(&weight).expect("a variable"))].into();
        Self { variables, breaks_at: None }
    }

    fn weights(&self) -> Vec<f32> {
        self.variables["weight"].flatten_all().expect("contiguous").to_vec1().expect("f32")
    }
}

impl Objective for Toy {
    fn variables(&self) -> &BTreeMap<String, Var> {
        &self.variables
    }

    fn gradients(&self, batch: &Batch, step: u64) -> Result<(Gradients, Vec<Value>)> {
        let target: f64 = batch.items.iter().map(|item| (item.sample * 3 + item.choice) as f64).sum();
        let weight = self.variables["weight"].as_tensor();
        let loss = weight.affine(1.0, -0.1 * target - 0.01 * step as f64)?.sqr()?.sum_all()?;
        let mut gradients = Gradients::default();
        gradients.backward(&self.variables, &loss)?;
        let loss = if self.breaks_at == Some(step) { f64::NAN } else { f64::from(loss.to_scalar::<f32>()?) };
        Ok((gradients, vec![("loss", loss)]))
    }
}

fn settings() -> LoopConfig {
    LoopConfig {
        epochs: 3,
        max_steps: None,
        learning_rate: Schedule { peak: 0.05, min: 0.001, warmup_steps: 2 },
        optimizer: OptimizerConfig::default(),
        save_every: 1000,
    }
}

fn loader(dir: &Path) -> Loader {
    let mut lines = String::new();
    for i in 0..8 {
        std::fs::write(dir.join(format!("{i}.png")), b"only its name is used").expect("written");
        lines += &format!("{{\"image\": \"{i}.png\", \"captions\": [\"one\", \"two\"]}}\n");
    }
    std::fs::write(dir.join("data.jsonl"), lines).expect("written");
    let dataset = Dataset::load(&[DataConfig::new("data.jsonl")], dir).expect("a data set");
    let config = LoaderConfig { batch_size: 2, seed: 5, drop_last: true, distinct_groups: false };
    Loader::new(&dataset, config).expect("a loader")
}

#[test]
fn stopped_and_resumed_equals_uninterrupted() {
    let dir = tempfile::tempdir().expect("a folder");
    let (whole_dir, parts_dir) = (dir.path().join("whole"), dir.path().join("parts"));
    let settings = settings();

    let whole = Toy::new();
    let start = Start::fresh(&settings, &whole);
    let outcome = train(&whole, &mut loader(dir.path()), &settings, "", &whole_dir, start, &mut |_| {
        ControlFlow::Continue(())
    });
    assert!(matches!(outcome, Ok(Outcome::Finished(_))), "{outcome:?}");

    // Stopped twice, once within an epoch and once at its end; each time everything is made anew.
    let mut toy = Toy::new();
    for (until, is_last) in [(3, false), (8, false), (12, true)] {
        toy = Toy::new();
        let mut loader = loader(dir.path());
        std::fs::create_dir_all(&parts_dir).expect("a folder");
        let start = match checkpoint::newest(&parts_dir).expect("readable") {
            Some(path) => Start::resume(&path, &settings, &toy, &mut loader).expect("a checkpoint"),
            None => Start::fresh(&settings, &toy),
        };
        let outcome = train(&toy, &mut loader, &settings, "", &parts_dir, start, &mut |report| {
            if report.step == until { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!(matches!(outcome, Ok(Outcome::Finished(_))), is_last, "{outcome:?}");
    }
    assert_eq!(toy.weights(), whole.weights());
    assert_ne!(whole.weights(), Toy::new().weights(), "training changes the weights");
}

/// A run may end within an epoch, and its learning rate with it.
#[test]
fn the_most_steps_end_the_run_and_its_schedule() {
    let dir = tempfile::tempdir().expect("a folder");
    let settings = LoopConfig { max_steps: Some(5), ..settings() };
    let mut rates = Vec::new();
    let run = |settings: &LoopConfig, name: &str, rates: &mut Vec<f64>| {
        let toy = Toy::new();
        let start = Start::fresh(settings, &toy);
        train(&toy, &mut loader(dir.path()), settings, "", &dir.path().join(name), start, &mut |report| {
            rates.push(report.learning_rate);
            ControlFlow::Continue(())
        })
    };
    let Ok(Outcome::Finished(checkpoint)) = run(&settings, "short", &mut rates) else {
        panic!("not finished")
    };
    let expected: Vec<f64> = (0..5).map(|step| settings.learning_rate.at(step, 5)).collect();
    assert_eq!(rates, expected);

    let toy = Toy::new();
    let mut loader = loader(dir.path());
    let start = Start::resume(&checkpoint, &settings, &toy, &mut loader).expect("a checkpoint");
    let none = &mut |_: &_| ControlFlow::Continue(());
    let error = train(&toy, &mut loader, &settings, "", dir.path(), start, none).expect_err("nothing to do");
    assert!(error.to_string().contains("max_steps"), "{error}");

    rates.clear();
    let longer = LoopConfig { max_steps: Some(500), ..settings };
    run(&longer, "long", &mut rates).expect("a run");
    assert_eq!(rates.len(), 12, "more than the epochs have changes nothing");
}

#[test]
fn a_loss_that_is_not_a_number_ends_the_run_and_changes_nothing() {
    let dir = tempfile::tempdir().expect("a folder");
    let run_dir = dir.path().join("run");
    let settings = LoopConfig { save_every: 2, ..settings() };
    let toy = Toy { breaks_at: Some(2), ..Toy::new() };
    let start = Start::fresh(&settings, &toy);
    let outcome = train(&toy, &mut loader(dir.path()), &settings, "", &run_dir, start, &mut |_| {
        ControlFlow::Continue(())
    });
    assert!(matches!(outcome, Err(Error::NotFinite { step: 2, .. })), "{outcome:?}");
    let kept = checkpoint::newest(&run_dir).expect("readable").expect("the checkpoint of step 2");
    let (state, model, _) = checkpoint::load(&kept).expect("whole");
    assert_eq!((state.step, &model["weight"].1), (2, &toy.weights()));
}

/// An update that overflows is seen at the next step only; nothing could be continued from weights like that.
#[test]
fn weights_that_are_no_numbers_are_not_saved() {
    let dir = tempfile::tempdir().expect("a folder");
    let settings = LoopConfig { save_every: 1, ..settings() };
    let toy = Toy::new();
    let start = Start::fresh(&settings, &toy);
    let outcome = train(&toy, &mut loader(dir.path()), &settings, "", dir.path(), start, &mut |report| {
        if report.step == 2 {
            let broken = Tensor::full(f32::INFINITY, (2, 2), &Device::Cpu).expect("a tensor");
            toy.variables["weight"].set(&broken).expect("set");
        }
        ControlFlow::Continue(())
    });
    assert!(matches!(outcome, Err(Error::NotFinite { step: 2, .. })), "{outcome:?}");
    let kept = checkpoint::newest(dir.path()).expect("readable").expect("a checkpoint");
    assert_eq!(checkpoint::load(&kept).expect("whole").0.step, 1);
}

/// Two checkpoints are kept: the message says how to get at the other one.
#[test]
fn a_damaged_checkpoint_names_the_way_to_the_one_before() {
    let dir = tempfile::tempdir().expect("a folder");
    let settings = LoopConfig { save_every: 2, max_steps: Some(4), ..settings() };
    let start = || Start::fresh(&settings, &Toy::new());
    let on_step = &mut |_: &_| ControlFlow::Continue(());
    let outcome = train(&Toy::new(), &mut loader(dir.path()), &settings, "", dir.path(), start(), on_step);
    let Ok(Outcome::Finished(newest)) = outcome else { panic!("not finished") };
    let weights = newest.join("model.safetensors");
    let bytes = std::fs::read(&weights).expect("readable");
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).expect("written");
    let resume = |path: &Path| Start::resume(path, &settings, &Toy::new(), &mut loader(dir.path()));
    let error = resume(&newest).expect_err("half a file").to_string();
    assert!(error.contains("model.safetensors") && error.contains("remove "), "{error}");
    std::fs::remove_dir_all(&newest).expect("removed");
    let before = checkpoint::newest(dir.path()).expect("readable").expect("another one");
    assert_eq!(resume(&before).expect("whole").step(), 2);
}
