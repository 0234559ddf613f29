//! `blip2 explain`.

use std::io::Write;
use std::path::Path;

use blip2::model::Word;
use blip2::text::Turn;
use blip2::weights::write_atomically;
use serde_json::json;

use crate::Done;
use crate::args::ExplainArgs;
use crate::generation::WrongUsage;
use crate::model::{Part, open, open_picture};

pub(crate) fn run(args: &ExplainArgs) -> anyhow::Result<Done> {
    let is_written = args.caption || !args.question.is_empty();
    if args.word.is_some() && !is_written {
        return WrongUsage::end("--word is a part of a caption or an answer: add --caption or --question");
    }
    if args.text.trim().is_empty() {
        return WrongUsage::end("the text to explain is empty");
    }
    let turns = turns(&args.question, &args.answer)?;
    if let Some(path) = args.output.as_deref().filter(|path| names_another_format(path)) {
        return WrongUsage::end(format!(
            "--output {}: the heat map is a PNG, so its name has to end in .png",
            path.display()
        ));
    }
    let picture = open_picture(&args.picture, None)?;
    let model = open(&args.model, if is_written { Part::Stage2 } else { Part::Stage1 })?;
    let features = model.encode(std::slice::from_ref(&picture))?.remove(0);
    let map = if is_written {
        let word = args.word.as_deref().map(Word::from);
        model.explain_answer(&features, &turns, &args.text, word)?
    } else {
        model.explain_match(&features, &args.text)?
    };
    if let Some(path) = &args.output {
        let png = blip2::image::png(&map.over(&picture));
        write_atomically(path, |file| file.write_all(&png))?;
    }
    if args.model.json {
        let rows: Vec<&[f32]> = map.values.chunks_exact(map.side).collect();
        let row = json!({"path": args.picture.display().to_string(), "text": args.text, "heat": rows});
        writeln!(std::io::stdout().lock(), "{}", serde_json::to_string_pretty(&row)?)?;
    }
    Ok(Done::All)
}

/// Whether a file's name says that it is a picture, but none of PNG.
fn names_another_format(path: &Path) -> bool {
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase());
    let others = ["jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff"];
    extension.is_some_and(|extension| others.contains(&extension.as_str()))
}

/// The conversation: all questions but the last are answered.
fn turns(questions: &[String], answers: &[String]) -> anyhow::Result<Vec<Turn>> {
    let n_earlier = questions.len().saturating_sub(1);
    if answers.len() != n_earlier {
        return WrongUsage::end(format!(
            "the text answers the last --question, and every earlier one needs its --answer: there are {} and not {n_earlier}",
            answers.len()
        ));
    }
    let earlier = questions.iter().zip(answers).map(|(question, answer)| Turn::answered(question, answer));
    Ok(earlier.chain(questions.last().map(Turn::open)).collect())
}
