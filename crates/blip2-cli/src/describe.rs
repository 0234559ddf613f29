//! `blip2 ask` and `blip2 chat`.

use std::io::{BufRead, IsTerminal, Write};
use std::ops::ControlFlow;

use anyhow::Context;
use blip2::generate::FinishReason;
use blip2::model::Given;
use blip2::text::AnswerForm;
use serde_json::json;

use crate::Done;
use crate::args::{AskArgs, ChatArgs};
use crate::caption::with_log_probs;
use crate::compare::distinct;
use crate::generation::{Written, WrongUsage};
use crate::model::{encode_picture, is_stdin, open_to_write};

pub(crate) fn ask(args: &AskArgs) -> anyhow::Result<Done> {
    if args.question.trim().is_empty() {
        return WrongUsage::end("the question is empty: ask something about the picture");
    }
    let choices = distinct(&args.choices);
    if choices.iter().any(|choice| choice.is_empty()) {
        return WrongUsage::end("--choices has an empty answer: give them like `yes,no`");
    }
    let form = form(args)?;
    let given = Given::Question(&args.question);
    let (model, config) =
        open_to_write(&args.model.source, args.preset, Written::Answers, Some(given), &args.generation)?;
    let features = encode_picture(&model, &args.picture, args.preset)?;
    let path = args.picture.display().to_string();
    let mut out = std::io::stdout().lock();
    if !choices.is_empty() {
        let ranked = model.rank(&features, &args.question, &choices)?;
        if args.model.json {
            let rows: Vec<_> = ranked
                .iter()
                .map(|choice| {
                    json!({"path": path, "question": args.question, "answer": choice.answer,
                        "probability": choice.probability, "log_likelihood": choice.log_likelihood})
                })
                .collect();
            writeln!(out, "{}", serde_json::to_string_pretty(&rows)?)?;
        } else {
            for choice in ranked {
                writeln!(out, "{:.3}\t{}", choice.probability, choice.answer)?;
            }
        }
        return Ok(Done::All);
    }
    let form = form.map(|form| model.grammar(&form, &config)).transpose()?;
    let answers = model.ask_for(&[(&features, &args.question)], &config, form.as_ref())?.concat();
    if form.is_some() && answers.iter().any(|answer| is_cut(answer.finish)) {
        eprintln!(
            "blip2: the answer was cut off before it had its form: try --max-new-tokens {}",
            2 * config.max_new_tokens
        );
    }
    if args.model.json {
        let rows: Vec<_> = answers
            .iter()
            .map(|answer| {
                let row = json!({"path": path, "question": args.question, "answer": answer.text,
                    "token_ids": answer.token_ids});
                with_log_probs(row, answer, args.log_probs)
            })
            .collect();
        writeln!(out, "{}", serde_json::to_string_pretty(&rows)?)?;
    } else {
        for answer in answers {
            writeln!(out, "{}", answer.text)?;
        }
    }
    Ok(Done::All)
}

/// What the answer has to be, if something was prescribed.
fn form(args: &AskArgs) -> anyhow::Result<Option<AnswerForm>> {
    if let Some(pattern) = &args.regex {
        let form = AnswerForm::Regex(pattern.clone());
        form.check().map_err(|error| WrongUsage(format!("--regex: {error}")))?;
        return Ok(Some(form));
    }
    let Some(path) = &args.json_schema else { return Ok(None) };
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let schema = serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))?;
    Ok(Some(AnswerForm::JsonSchema(schema)))
}

fn is_cut(finish: FinishReason) -> bool {
    matches!(finish, FinishReason::MaxNewTokens | FinishReason::ContextFull)
}

pub(crate) fn chat(args: &ChatArgs) -> anyhow::Result<Done> {
    let mut generation = args.generation.clone();
    if is_stdin(&args.picture) {
        return WrongUsage::end("the questions come from standard input: give the picture as a file");
    }
    if let Some(n) = generation.num_captions.filter(|n| *n != 1) {
        return WrongUsage::end(format!(
            "`--num-captions` is {n}, expected 1: a conversation goes on with one answer"
        ));
    }
    if args.preset.is_none() {
        // What beams write can still change: without them the answer can be shown as it grows.
        generation.num_beams = generation.num_beams.or(Some(1));
    }
    let (model, config) =
        open_to_write(&args.model.source, args.preset, Written::Answers, None, &generation)?;
    let features = encode_picture(&model, &args.picture, args.preset)?;
    let mut chat = model.chat(&features)?;
    let stdin = std::io::stdin();
    let is_terminal = stdin.is_terminal();
    let (mut n_asked, mut n_refused) = (0, 0);
    let mut out = std::io::stdout().lock();
    if is_terminal {
        eprintln!("Ask about {}; /quit or Ctrl-D ends.", args.picture.display());
    }
    loop {
        if is_terminal {
            eprint!("> ");
        }
        let mut line = Vec::new();
        let n_bytes = stdin.lock().read_until(b'\n', &mut line)?;
        let question = std::str::from_utf8(line.trim_ascii());
        if n_bytes == 0 || question == Ok("/quit") {
            return Ok(Done::of(n_refused, n_asked));
        }
        if question.is_ok_and(|question| question.trim().is_empty()) {
            continue;
        }
        n_asked += 1;
        let Ok(question) = question.map(str::trim) else {
            n_refused += 1;
            eprintln!("blip2: a question is not text in UTF-8: ask it again");
            continue;
        };
        let mut broken = None;
        let mut write = |text: &str| match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                broken = Some(error);
                ControlFlow::Break(())
            }
        };
        let show: &mut dyn FnMut(&str) -> ControlFlow<()> =
            if args.model.json { &mut |_| ControlFlow::Continue(()) } else { &mut write };
        let answer = chat.ask(question, &config, show);
        if let Some(error) = broken {
            return Err(error.into());
        }
        let answer = match answer {
            Ok(answer) => answer,
            // The conversation is as it was: the next question may be a better one.
            Err(error) => {
                n_refused += 1;
                eprintln!("blip2: {error}");
                continue;
            }
        };
        if args.model.json {
            let row = json!({"question": question, "answer": answer.text, "token_ids": answer.token_ids});
            writeln!(out, "{row}")?;
        } else {
            writeln!(out)?;
        }
    }
}
