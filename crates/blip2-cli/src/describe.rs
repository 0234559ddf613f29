//! `blip2 caption`, `blip2 ask` and `blip2 chat`.

use std::io::{BufRead, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::Context;
use blip2::generate::GenerationConfig;
use blip2::model::{Answer, Blip2};
use serde_json::json;

use crate::Done;
use crate::args::{AskArgs, CaptionArgs, ChatArgs};
use crate::model::{Part, answering, encode_picture, generation, open};

/// Pictures that are described at once: the language model reads its weights once for all of them.
const PICTURES_AT_ONCE: usize = 8;

pub(crate) fn caption(args: &CaptionArgs) -> anyhow::Result<Done> {
    let model = open(&args.model, Part::Stage2)?;
    let config = generation(&model, args.preset, &args.generation);
    let mut rows = Vec::new();
    let mut n_failed = 0;
    let mut out = std::io::stdout().lock();
    for paths in args.pictures.chunks(PICTURES_AT_ONCE) {
        for (path, result) in paths.iter().zip(caption_pictures(&model, paths, args, &config)?) {
            let path = path.display().to_string();
            match result {
                Ok(answers) if args.model.json => rows.extend(answers.iter().map(
                    |answer| json!({"path": path, "caption": answer.text, "token_ids": answer.token_ids}),
                )),
                Ok(answers) => {
                    for answer in answers {
                        if args.pictures.len() > 1 {
                            write!(out, "{path}\t")?;
                        }
                        writeln!(out, "{}", answer.text)?;
                    }
                }
                Err(error) => {
                    n_failed += 1;
                    let message = crate::message(&error);
                    eprintln!("blip2: {message}");
                    rows.push(json!({"path": path, "error": message}));
                }
            }
        }
        out.flush()?;
    }
    if args.model.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&rows)?)?;
    }
    Ok(if n_failed == 0 { Done::All } else { Done::SomeFailed })
}

/// The captions of some pictures, or why one cannot be read.
fn caption_pictures(
    model: &Blip2,
    paths: &[impl AsRef<Path>],
    args: &CaptionArgs,
    config: &GenerationConfig,
) -> anyhow::Result<Vec<anyhow::Result<Vec<Answer>>>> {
    // One picture at a time: a photo in memory is a thousand times its features.
    let features: Vec<_> =
        paths.iter().map(|path| encode_picture(model, path.as_ref(), args.preset)).collect();
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

pub(crate) fn ask(args: &AskArgs) -> anyhow::Result<Done> {
    if args.question.trim().is_empty() {
        anyhow::bail!("the question is empty: ask something about the picture");
    }
    let model = open(&args.model, Part::Stage2)?;
    let features = encode_picture(&model, &args.picture, args.preset)?;
    let path = args.picture.display().to_string();
    let mut out = std::io::stdout().lock();
    if !args.choices.is_empty() {
        let ranked = model.rank(&features, &args.question, &args.choices)?;
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
    let config = answering(&model, args.preset, &args.generation);
    let answers = model.ask(&[(&features, &args.question)], &config)?.concat();
    if args.model.json {
        let rows: Vec<_> = answers
            .iter()
            .map(|answer| {
                json!({"path": path, "question": args.question, "answer": answer.text,
                    "token_ids": answer.token_ids})
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

pub(crate) fn chat(args: &ChatArgs) -> anyhow::Result<Done> {
    let model = open(&args.model, Part::Stage2)?;
    let features = encode_picture(&model, &args.picture, args.preset)?;
    let mut config = answering(&model, args.preset, &args.generation);
    if args.generation.num_beams.is_none() && args.preset.is_none() {
        // What beams write can still change: without them the answer can be shown as it grows.
        config.num_beams = 1;
    }
    let mut chat = model.chat(&features)?;
    let stdin = std::io::stdin();
    let is_terminal = stdin.is_terminal();
    let mut n_refused = 0;
    let mut out = std::io::stdout().lock();
    if is_terminal {
        eprintln!("Ask about {}; /quit or Ctrl-D ends.", args.picture.display());
    }
    loop {
        if is_terminal {
            eprint!("> ");
        }
        let mut line = String::new();
        let n_bytes = stdin.lock().read_line(&mut line)?;
        let question = line.trim();
        if n_bytes == 0 || question == "/quit" {
            return Ok(if n_refused == 0 { Done::All } else { Done::SomeFailed });
        }
        if question.is_empty() {
            continue;
        }
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
