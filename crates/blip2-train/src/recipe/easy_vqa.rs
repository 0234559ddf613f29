//! easy-VQA: questions about drawn shapes.

use std::fs;
use std::path::Path;

use super::{Output, absolute, text_path};
use crate::data::Row;
use crate::{Error, Result};

/// The questions of easy-VQA, `[question, answer, picture number]` in `questions.json` of each split.
pub(super) fn write(folder: &Path, output: &mut Output) -> Result<()> {
    let inner = folder.join("data");
    let folder = absolute(if inner.is_dir() { &inner } else { folder })?;
    for (split, stage) in [("train", "train"), ("test", "eval")] {
        let path = folder.join(split).join("questions.json");
        let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
        let questions: Vec<(String, String, u64)> = serde_json::from_str(&text)
            .map_err(|error| Error::file(&path, format!("is not the question file of easy-VQA: {error}")))?;
        let rows: Vec<Row> = questions
            .into_iter()
            .map(|(question, answer, number)| {
                let image = text_path(&folder.join(split).join("images").join(format!("{number}.png")))?;
                let kind = if answer == "yes" || answer == "no" { "yes/no" } else { "shape or color" };
                Ok(Row {
                    image,
                    question: Some(question),
                    answer: Some(answer),
                    kind: Some(kind.to_owned()),
                    ..Row::default()
                })
            })
            .collect::<Result<_>>()?;
        output.write(&format!("{stage}/easy-vqa.jsonl"), &rows)?;
    }
    Ok(())
}
