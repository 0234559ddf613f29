//! Flickr8k: photos of everyday scenes with five captions each; the dev split is evaluated on.

use std::path::Path;

use super::{Output, captioned, question_rows};
use crate::Result;
use crate::data::Row;

/// The captions of both splits, and questions made of them by rule.
pub(super) fn write(folder: &Path, seed: u64, output: &mut Output) -> Result<()> {
    for (split, stage) in [("train", "train"), ("dev", "eval")] {
        let rows = captioned(&folder.join(format!("{split}.jsonl")), folder)?;
        let captions: Vec<Row> = rows
            .iter()
            .map(|row| Row {
                image: row.image.clone(),
                captions: Some(row.captions.clone()),
                ..Row::default()
            })
            .collect();
        output.write(&format!("{stage}/flickr8k-captions.jsonl"), &captions)?;
        output.write(&format!("{stage}/flickr8k-questions.jsonl"), &question_rows(&rows, seed))?;
    }
    Ok(())
}
