//! JSONL manifests: one row, one picture with its text.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Builder, ImageSource, Text, Turn};
use crate::{Error, Result};

/// A row of a manifest. It holds exactly one of captions, a question with answers, or turns; fields that are not
/// listed here (author, licence, …) are ignored.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// The picture, relative to the manifest.
    pub image: String,
    /// One caption.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caption: Option<String>,
    /// Several captions of the same picture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub captions: Option<Vec<String>>,
    /// A question.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub question: Option<String>,
    /// Its answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// Its answers, when several people gave one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answers: Option<Vec<String>>,
    /// A dialogue.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub turns: Option<Vec<Turn>>,
    /// Pictures with the same group show the same thing and are not each other's negatives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Evaluation: an answer that contains one of these names is a recognition.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
    /// What the question is about; evaluation breaks its scores down by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
}

impl Row {
    /// The row's text.
    ///
    /// # Errors
    /// What is missing, doubled or empty, in one sentence.
    pub fn text(&self) -> std::result::Result<Text, String> {
        let n_kinds = usize::from(self.caption.is_some() || self.captions.is_some())
            + usize::from(self.question.is_some() || self.answer.is_some() || self.answers.is_some())
            + usize::from(self.turns.is_some());
        match n_kinds {
            0 => {
                return Err("the row has neither `captions`, nor `question` and `answer`, nor `turns`".into());
            }
            1 => {}
            _ => {
                return Err(
                    "the row has more than one of `captions`, `question`, `turns`: use a row for each".into(),
                );
            }
        }
        if let Some(turns) = &self.turns {
            if turns.is_empty() || turns.iter().any(|turn| blank(&turn.question) || blank(&turn.answer)) {
                return Err("`turns` is empty or has an empty question or answer".into());
            }
            return Ok(Text::Turns(turns.clone()));
        }
        if self.question.is_some() || self.answer.is_some() || self.answers.is_some() {
            let question = self.question.clone().ok_or("the row has an answer but no `question`")?;
            let answers = one_or_many(self.answer.as_ref(), self.answers.as_ref());
            if answers.is_empty() {
                return Err("the row has a question but no `answer`".into());
            }
            if blank(&question) || answers.iter().any(|answer| blank(answer)) {
                return Err("`question` or `answer` is empty".into());
            }
            return Ok(Text::QuestionAnswer { question, answers });
        }
        let captions = one_or_many(self.caption.as_ref(), self.captions.as_ref());
        if captions.is_empty() || captions.iter().any(|caption| blank(caption)) {
            return Err("`captions` is empty or has an empty caption".into());
        }
        Ok(Text::Captions(captions))
    }
}

fn blank(text: &str) -> bool {
    text.trim().is_empty()
}

fn one_or_many(one: Option<&String>, many: Option<&Vec<String>>) -> Vec<String> {
    one.into_iter().chain(many.into_iter().flatten()).cloned().collect()
}

/// Reads the rows of a manifest; empty lines are allowed.
pub(super) fn read(path: &Path, builder: &mut Builder) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new(""));
    for_each_row(path, |row, _| {
        let text = row.text()?;
        let source = ImageSource::File(folder.join(&row.image));
        builder.add(source, row.group, text, row.names);
        Ok(())
    })
}

/// All rows of a manifest, for evaluation and preparation; pictures stay relative to it.
///
/// # Errors
/// [`Error::Manifest`] with file and line for a row that cannot be understood.
pub fn read_rows(path: &Path) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for_each_row(path, |row, _| {
        row.text()?;
        rows.push(row);
        Ok(())
    })?;
    Ok(rows)
}

/// Calls `visit` with each row and its line number (from one); what it complains about gets file and line.
fn for_each_row(
    path: &Path,
    mut visit: impl FnMut(Row, usize) -> std::result::Result<(), String>,
) -> Result<()> {
    let mut reader = BufReader::new(File::open(path).map_err(Error::io(path))?);
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        if reader.read_until(b'\n', &mut bytes).map_err(Error::io(path))? == 0 {
            break;
        }
        let wrong = |reason: String| Error::Manifest { path: path.to_path_buf(), line, reason };
        // A byte order mark is what some editors put before the first line.
        let content =
            bytes.strip_prefix(b"\xef\xbb\xbf").filter(|_| line == 1).unwrap_or(&bytes).trim_ascii();
        if content.is_empty() {
            continue;
        }
        if content[0] != b'{' {
            return Err(wrong("is not a JSON object".into()));
        }
        // serde_json counts the line itself ("at line 1 column 7"): here only the column means something.
        let row: Row = serde_json::from_slice(content)
            .map_err(|error| wrong(error.to_string().replace("at line 1 column", "at column")))?;
        if row.image.is_empty() {
            return Err(wrong("`image` is empty".into()));
        }
        visit(row, line).map_err(wrong)?;
    }
    Ok(())
}
