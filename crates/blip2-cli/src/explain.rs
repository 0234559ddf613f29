//! `blip2 explain`.

use std::io::Write;

use anyhow::bail;
use blip2::model::Word;
use blip2::weights::write_atomically;
use serde_json::json;

use crate::Done;
use crate::args::ExplainArgs;
use crate::model::{Part, open, open_picture};

pub(crate) fn run(args: &ExplainArgs) -> anyhow::Result<Done> {
    let is_written = args.caption || args.question.is_some();
    if args.word.is_some() && !is_written {
        bail!("--word is a part of a caption or an answer: add --caption or --question");
    }
    let picture = open_picture(&args.picture, None)?;
    let model = open(&args.model, if is_written { Part::Stage2 } else { Part::Stage1 })?;
    let features = model.encode(std::slice::from_ref(&picture))?.remove(0);
    let map = if is_written {
        let word = args.word.as_deref().map(Word::from);
        model.explain_answer(&features, args.question.as_deref(), &args.text, word)?
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
