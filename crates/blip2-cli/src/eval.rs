//! `blip2 eval`.

use std::fmt::Write as _;
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::Path;

use anyhow::{Context, bail};
use blip2_train::data::{Row, Skipped, read_rows, read_test_set};
use blip2_train::evaluation::{
    Evaluated, OnProgress, RetrievalConfig, TestSet, captions, matching, questions, retrieve,
};
use blip2_train::metrics::{Rescoring, RetrievalScores};
use blip2_train::question_baseline::{Accuracy, BagOfWords, FrequencyPrior, Questions};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::Done;
use crate::args::{EvalArgs, EvalTask, RerankArg};
use crate::generation::{self, Written, WrongUsage};
use crate::model::{Part, open_as, open_to_write, pixels};
use crate::rows::check_writable;

/// What a task measured.
struct Report {
    json: serde_json::Value,
    table: String,
    skipped: Vec<Skipped>,
}

pub(crate) fn run(args: &EvalArgs) -> anyhow::Result<Done> {
    generation::check(&args.generation)?;
    if args.out.is_some() && matches!(args.task, EvalTask::Retrieval | EvalTask::QuestionBaseline) {
        return WrongUsage::end(
            "--out writes what the model said: it is for captions, questions and matching",
        );
    }
    if let Some(out) = &args.out {
        check_writable(out)?;
    }
    let (mut rows, mut skipped) = read_test_set(&args.manifest)?;
    rows.truncate(args.limit.map_or(usize::MAX, NonZeroUsize::get));
    if rows.is_empty() {
        let reason = skipped.first().map_or("it has no row".to_owned(), ToString::to_string);
        bail!("{}: there is nothing to measure on: {reason}", args.manifest.display());
    }
    let bar = ProgressBar::new(rows.len() as u64);
    bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} {eta}")?);
    let mut on_progress = |done: usize, total: usize| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    };
    let report = match args.task {
        EvalTask::Captions => captions_report(args, &rows, &mut on_progress),
        EvalTask::Questions => questions_report(args, &rows, &mut on_progress),
        EvalTask::Retrieval => retrieval_report(args, &rows, &mut on_progress),
        EvalTask::Matching => matching_report(args, &rows, &mut on_progress),
        EvalTask::QuestionBaseline => question_baseline(args, &rows),
    };
    bar.finish_and_clear();
    let report = report?;
    skipped.extend(report.skipped);
    let mut out = std::io::stdout().lock();
    if args.model.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report.json)?)?;
    } else {
        write!(out, "{}", report.table)?;
    }
    name_skipped(&skipped);
    Ok(if skipped.is_empty() { Done::All } else { Done::SomeFailed })
}

/// The rows, with where the manifest's pictures are and how they are read.
fn test_set<'a>(args: &'a EvalArgs, rows: &'a [Row]) -> TestSet<'a> {
    let base = args.images.as_deref().or(args.manifest.parent()).unwrap_or(Path::new(""));
    TestSet { rows, base, pixels: pixels(args.preset) }
}

fn captions_report(args: &EvalArgs, rows: &[Row], on_progress: OnProgress<'_>) -> anyhow::Result<Report> {
    let (model, config) =
        open_to_write(&args.model.source, args.preset, Written::Captions, None, &args.generation)?;
    let evaluated = captions(&model, test_set(args, rows), &config, on_progress)?;
    write_predictions(args.out.as_deref(), &evaluated)?;
    let scores = evaluated.caption_scores();
    let bleu = scores.bleu.map(|score| 100.0 * score);
    let (rouge_l, cider_d) = (100.0 * scores.rouge_l, 100.0 * scores.cider_d);
    let n = evaluated.predictions.len();
    let [b1, b2, b3, b4] = bleu;
    let table = format!(
        "{n} pictures\nBLEU-1 {b1:.1}  BLEU-2 {b2:.1}  BLEU-3 {b3:.1}  BLEU-4 {b4:.1}\n\
         ROUGE-L {rouge_l:.1}\nCIDEr-D {cider_d:.1}\n"
    );
    let json = json!({"pictures": n, "bleu": bleu, "rouge_l": rouge_l, "cider_d": cider_d});
    Ok(Report { json, table, skipped: evaluated.skipped })
}

fn questions_report(args: &EvalArgs, rows: &[Row], on_progress: OnProgress<'_>) -> anyhow::Result<Report> {
    let (model, config) =
        open_to_write(&args.model.source, args.preset, Written::Answers, None, &args.generation)?;
    let evaluated = questions(&model, test_set(args, rows), &config, on_progress)?;
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
    Ok(Report { json, table, skipped: evaluated.skipped })
}

fn retrieval_report(args: &EvalArgs, rows: &[Row], on_progress: OnProgress<'_>) -> anyhow::Result<Report> {
    let model = open_as(&args.model, Part::Stage1, args.preset)?;
    let (name, label, rescoring) = match args.rerank {
        RerankArg::Sum => ("sum", "ITC+ITM", Some(Rescoring::ItmPlusItc)),
        RerankArg::Itm => ("itm", "ITM", Some(Rescoring::Itm)),
        RerankArg::None => ("none", "", None),
    };
    let n_candidates = args.candidates;
    let config = RetrievalConfig { all_captions: args.all_captions, rescoring, n_candidates };
    let scores = retrieve(&model, test_set(args, rows), config, on_progress)?;
    let mut table = format!("{} pictures, {} texts\n", scores.n_images, scores.n_texts);
    table += "            TR@1   @5  @10   IR@1   @5  @10\n";
    writeln!(table, "ITC         {}", recalls(&scores.itc))?;
    if let Some(reranked) = &scores.reranked {
        let label = format!("{label} {n_candidates}");
        writeln!(table, "{label:<11} {}", recalls(reranked))?;
    }
    let json = json!({"pictures": scores.n_images, "texts": scores.n_texts,
        "itc": recalls_json(&scores.itc), "rerank": name,
        "candidates": scores.reranked.map(|_| n_candidates.get()),
        "reranked": scores.reranked.as_ref().map(recalls_json)});
    Ok(Report { json, table, skipped: scores.skipped })
}

fn matching_report(args: &EvalArgs, rows: &[Row], on_progress: OnProgress<'_>) -> anyhow::Result<Report> {
    let model = open_as(&args.model, Part::Stage1, args.preset)?;
    let report = matching(&model, test_set(args, rows), on_progress)?;
    write_lines(
        args.out.as_deref(),
        report.pairs.iter().map(|pair| {
            json!({"image": pair.image, "text": pair.text, "own": pair.is_own,
                "itm_probability": pair.itm_probability})
        }),
    )?;
    let [(own, n_own), (others, n_others)] = report.accuracy();
    let mut table = format!("{n_own} pictures\n{own:5.1} % of their own texts match\n");
    if n_others > 0 {
        writeln!(table, "{others:5.1} % of {n_others} texts of other pictures do not")?;
    }
    let json = json!({"pictures": n_own, "own": own, "others": others, "texts_of_others": n_others});
    Ok(Report { json, table, skipped: report.skipped })
}

/// What answers from the question alone reach; the better of two such predictors is what a model has to beat.
fn question_baseline(args: &EvalArgs, rows: &[Row]) -> anyhow::Result<Report> {
    let train = args.train.as_deref().context("--train must name the questions to learn from")?;
    let learned = Questions::from_rows(&read_rows(train)?)?;
    let prior = FrequencyPrior::learn(&learned);
    let classifier = BagOfWords::train(&learned, args.generation.seed.unwrap_or(1));
    let results = [
        ("most frequent answer", Accuracy::of(rows, |question| prior.answer(question))?),
        ("bag of words", Accuracy::of(rows, |question| classifier.answer(question))?),
    ];
    let mut table = String::new();
    for (name, accuracy) in &results {
        writeln!(table, "{:5.1} %  {name}", accuracy.accuracy)?;
    }
    let json: serde_json::Map<_, _> =
        results.into_iter().map(|(name, accuracy)| (name.to_owned(), json!(accuracy.accuracy))).collect();
    Ok(Report { json: json.into(), table, skipped: Vec::new() })
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
    write_lines(
        path,
        evaluated.predictions.iter().map(|p| {
            json!({"image": p.image, "question": p.question, "prediction": p.text,
                "references": p.references, "score": p.score, "kind": p.kind})
        }),
    )
}

fn write_lines(path: Option<&Path>, rows: impl Iterator<Item = serde_json::Value>) -> anyhow::Result<()> {
    let Some(path) = path else { return Ok(()) };
    Ok(blip2::weights::write_atomically(path, |file| {
        for row in rows {
            writeln!(file, "{row}")?;
        }
        Ok(())
    })?)
}
