//! `blip2 eval`.

use std::fmt::Write as _;
use std::io::Write;
use std::path::Path;

use anyhow::Context;
use blip2_train::data::{Row, Skipped, read_rows};
use blip2_train::evaluation::{Evaluated, captions, questions, retrieve};
use blip2_train::metrics::RetrievalScores;
use blip2_train::question_baseline::{Accuracy, BagOfWords, FrequencyPrior, Questions};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::Done;
use crate::args::{EvalArgs, EvalTask};
use crate::model::{Part, generation, open};

pub(crate) fn run(args: &EvalArgs) -> anyhow::Result<Done> {
    let mut rows = read_rows(&args.manifest)?;
    rows.truncate(args.limit.unwrap_or(usize::MAX));
    if args.task == EvalTask::QuestionBaseline {
        return question_baseline(args, &rows);
    }
    if args.task == EvalTask::Retrieval && args.out.is_some() {
        anyhow::bail!("--out writes what the model said; retrieval says nothing");
    }
    let base = args.manifest.parent().unwrap_or(Path::new(""));
    let part = if args.task == EvalTask::Retrieval { Part::Stage1 } else { Part::Stage2 };
    let model = open(&args.model, part)?;
    let config = generation(&model, &args.generation);
    let bar = ProgressBar::new(rows.len() as u64);
    bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} {eta}")?);
    let mut on_progress = |done: usize, total: usize| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    };
    let (json, table, skipped) = match args.task {
        EvalTask::Captions => {
            let evaluated = captions(&model, base, &rows, &config, &mut on_progress)?;
            let scores = evaluated.caption_scores();
            let bleu = scores.bleu.map(|score| 100.0 * score);
            let (rouge_l, cider_d) = (100.0 * scores.rouge_l, 100.0 * scores.cider_d);
            write_predictions(args.out.as_deref(), &evaluated)?;
            let n = evaluated.predictions.len();
            let json = json!({"pictures": n, "bleu": bleu, "rouge_l": rouge_l, "cider_d": cider_d});
            let [b1, b2, b3, b4] = bleu;
            let table = format!(
                "{n} pictures\nBLEU-1 {b1:.1}  BLEU-2 {b2:.1}  BLEU-3 {b3:.1}  BLEU-4 {b4:.1}\n\
                 ROUGE-L {rouge_l:.1}\nCIDEr-D {cider_d:.1}\n"
            );
            (json, table, evaluated.skipped)
        }
        EvalTask::Questions => {
            let evaluated = questions(&model, base, &rows, &config, &mut on_progress)?;
            write_predictions(args.out.as_deref(), &evaluated)?;
            let (accuracy, kinds) = evaluated.accuracy();
            let (n_right, n_groups) = evaluated.groups();
            let n = evaluated.predictions.len();
            let mut table = format!("{n} questions\naccuracy {accuracy:.1} %\n");
            for (kind, (accuracy, n)) in &kinds {
                writeln!(table, "  {accuracy:5.1} %  {kind} ({n})")?;
            }
            if n_groups > 0 {
                writeln!(table, "{n_right} of {n_groups} groups with most of their rows right")?;
            }
            let kinds: serde_json::Map<_, _> = kinds
                .into_iter()
                .map(|(kind, (accuracy, n))| (kind, json!({"accuracy": accuracy, "questions": n})))
                .collect();
            let json = json!({"questions": n, "accuracy": accuracy, "kinds": kinds,
                "groups": n_groups, "groups_right": n_right});
            (json, table, evaluated.skipped)
        }
        EvalTask::Retrieval | EvalTask::QuestionBaseline => {
            let report = retrieve(&model, base, &rows, args.all_captions, args.rerank, &mut on_progress)?;
            let mut table = format!("{} pictures, {} texts\n", report.n_images, report.n_texts);
            table += "            TR@1   @5  @10   IR@1   @5  @10\n";
            writeln!(table, "ITC         {}", recalls(&report.itc))?;
            if let Some(itm) = &report.itm {
                writeln!(table, "ITM of {:<4} {}", args.rerank, recalls(itm))?;
            }
            let json = json!({"pictures": report.n_images, "texts": report.n_texts,
                "itc": recalls_json(&report.itc), "rerank": args.rerank,
                "itm": report.itm.as_ref().map(recalls_json)});
            (json, table, report.skipped)
        }
    };
    bar.finish_and_clear();
    let mut out = std::io::stdout().lock();
    if args.model.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&json)?)?;
    } else {
        write!(out, "{table}")?;
    }
    name_skipped(&skipped);
    Ok(if skipped.is_empty() { Done::All } else { Done::SomeFailed })
}

/// What answers from the question alone reach; the better of two such predictors is what a model has to beat.
fn question_baseline(args: &EvalArgs, rows: &[Row]) -> anyhow::Result<Done> {
    let train = args.train.as_deref().context("--train must name the questions to learn from")?;
    let learned = Questions::from_rows(&read_rows(train)?)?;
    let prior = FrequencyPrior::learn(&learned);
    let classifier = BagOfWords::train(&learned, args.generation.seed.unwrap_or(1));
    let results = [
        ("most frequent answer", Accuracy::of(rows, |question| prior.answer(question))?),
        ("bag of words", Accuracy::of(rows, |question| classifier.answer(question))?),
    ];
    let mut out = std::io::stdout().lock();
    if args.model.json {
        let results: serde_json::Map<_, _> =
            results.into_iter().map(|(name, accuracy)| (name.to_owned(), json!(accuracy.accuracy))).collect();
        writeln!(out, "{}", serde_json::to_string_pretty(&results)?)?;
        return Ok(Done::All);
    }
    for (name, accuracy) in results {
        writeln!(out, "{:5.1} %  {name}", accuracy.accuracy)?;
    }
    Ok(Done::All)
}

fn name_skipped(skipped: &[Skipped]) {
    if !skipped.is_empty() {
        eprintln!("blip2: {} pictures could not be used:", skipped.len());
        skipped.iter().for_each(|picture| eprintln!("  {picture}"));
    }
}

fn recalls(scores: &RetrievalScores) -> String {
    let of = |value: f64| format!("{:5.1}", 100.0 * value);
    let (text, image) = (&scores.text, &scores.image);
    let [a, b, c] = [text.at_1, text.at_5, text.at_10].map(of);
    let [d, e, f] = [image.at_1, image.at_5, image.at_10].map(of);
    format!("{a} {b} {c}  {d} {e} {f}")
}

fn recalls_json(scores: &RetrievalScores) -> serde_json::Value {
    let of = |r: &blip2_train::metrics::Recall| json!({"at_1": r.at_1, "at_5": r.at_5, "at_10": r.at_10});
    json!({"text": of(&scores.text), "image": of(&scores.image)})
}

/// One line a prediction, for looking at what went wrong.
fn write_predictions(path: Option<&Path>, evaluated: &Evaluated) -> anyhow::Result<()> {
    let Some(path) = path else { return Ok(()) };
    Ok(blip2::weights::write_atomically(path, |file| {
        for p in &evaluated.predictions {
            let row = json!({"image": p.image, "question": p.question, "prediction": p.text,
                "references": p.references, "score": p.score, "kind": p.kind});
            writeln!(file, "{row}")?;
        }
        Ok(())
    })?)
}
