//! Where captions go: standard output, a file beside each picture, or one file for all.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::bail;
use blip2::model::Answer;
use serde_json::{Value, json};

use crate::args::CaptionArgs;
use crate::generation::WrongUsage;
use crate::model::is_stdin;
use crate::names::quoted;
use crate::rows::RowsFile;

pub(super) enum Destination {
    /// Standard output, as lines, or as one JSON array when all are there.
    Output { array: Option<Vec<Value>>, with_path: bool, log_probs: bool },
    /// A text file beside each picture.
    Sidecars { extension: String, overwrite: bool },
    /// A file of rows.
    Rows(RowsFile),
}

impl Destination {
    /// Prepares to take the captions of `pictures`.
    ///
    /// # Errors
    /// When two pictures would have one file beside them, the one on standard input has no name to write down, or the file of
    /// rows is not one of ours.
    pub(super) fn open(args: &CaptionArgs, pictures: &[PathBuf]) -> anyhow::Result<Self> {
        if (args.out.is_some() || args.sidecar.is_some()) && pictures.iter().any(|path| is_stdin(path)) {
            return WrongUsage::end(
                "the picture on standard input has no name: --out and --sidecar are for files",
            );
        }
        if let Some(path) = &args.out {
            return Ok(Self::Rows(RowsFile::open(path, args.overwrite)?));
        }
        let Some(extension) = &args.sidecar else {
            let array = args.model.json.then(Vec::new);
            let (with_path, log_probs) = (pictures.len() > 1, args.log_probs);
            return Ok(Self::Output { array, with_path, log_probs });
        };
        if extension.is_empty() || extension.contains(['/', '\\', '.']) {
            return WrongUsage::end(format!(
                "--sidecar={extension} is not an extension: give one like txt, without a dot"
            ));
        }
        let mut picture_of = HashMap::new();
        for picture in pictures {
            let sidecar = picture.with_extension(extension);
            if sidecar == *picture {
                bail!("--sidecar={extension} would write over the picture {}", picture.display());
            }
            if let Some(other) = picture_of.insert(sidecar, picture)
                && other != picture
            {
                bail!(
                    "{} and {} would have the same file beside them: rename one, or use --out",
                    other.display(),
                    picture.display()
                );
            }
        }
        Ok(Self::Sidecars { extension: extension.clone(), overwrite: args.overwrite })
    }

    /// Whether a picture has its caption already.
    pub(super) fn has(&self, picture: &Path) -> bool {
        match self {
            Self::Output { .. } => false,
            Self::Sidecars { extension, overwrite } => {
                // An empty file is no caption.
                let file = std::fs::metadata(picture.with_extension(extension));
                !overwrite && file.is_ok_and(|file| file.len() > 0)
            }
            Self::Rows(rows) => rows.has(picture),
        }
    }

    /// Whether the captions go to files, so that standard output stays empty.
    pub(super) fn is_file(&self) -> bool {
        !matches!(self, Self::Output { .. })
    }

    /// Writes the captions of some pictures, in their order; of one that cannot be described the array has the reason.
    ///
    /// # Errors
    /// When they cannot be written.
    pub(super) fn write(
        &mut self,
        pictures: &[PathBuf],
        captions: &[anyhow::Result<Vec<Answer>>],
    ) -> anyhow::Result<()> {
        let results = pictures.iter().zip(captions);
        // Files keep what is there: a picture that cannot be described is tried again the next time.
        let described = results.clone().filter_map(|(path, result)| Some((path, result.as_ref().ok()?)));
        match self {
            Self::Output { array: Some(array), log_probs, .. } => {
                for (path, result) in results {
                    let path = path.display().to_string();
                    match result {
                        Ok(answers) => array.extend(answers.iter().map(|answer| {
                            let row =
                                json!({"path": path, "caption": answer.text, "token_ids": answer.token_ids});
                            with_log_probs(row, answer, *log_probs)
                        })),
                        Err(error) => array.push(json!({"path": path, "error": crate::message(error)})),
                    }
                }
                Ok(())
            }
            Self::Output { array: None, with_path, .. } => {
                let mut out = std::io::stdout().lock();
                for (path, answers) in described {
                    for answer in answers {
                        if *with_path {
                            write!(out, "{}\t", quoted(path))?;
                        }
                        writeln!(out, "{}", shown(&answer.text, *with_path || answers.len() > 1))?;
                    }
                }
                Ok(out.flush()?)
            }
            Self::Sidecars { extension, .. } => {
                for (path, answers) in described {
                    blip2::weights::write_atomically(path.with_extension(&*extension), |file| {
                        answers.iter().try_for_each(|answer| writeln!(file, "{}", one_line(&answer.text)))
                    })?;
                }
                Ok(())
            }
            Self::Rows(rows) => {
                for (path, answers) in described {
                    rows.push(
                        path,
                        answers.iter().map(|answer| one_line(&answer.text)).collect(),
                        Vec::new(),
                    )?;
                }
                rows.save()
            }
        }
    }

    /// Ends the output.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn finish(self) -> anyhow::Result<()> {
        if let Self::Output { array: Some(array), .. } = self {
            writeln!(std::io::stdout().lock(), "{}", serde_json::to_string_pretty(&array)?)?;
        }
        Ok(())
    }
}

/// A row of JSON with how likely each token was, where that is wanted.
pub(crate) fn with_log_probs(mut row: Value, answer: &Answer, wanted: bool) -> Value {
    if wanted {
        row["log_probs"] = json!(answer.log_probs);
    }
    row
}

/// A caption among others is one of as many lines; alone it is shown as it was written.
fn shown(text: &str, is_among_others: bool) -> Cow<'_, str> {
    if is_among_others { one_line(text).into() } else { text.into() }
}

/// A caption is a line of a file.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::shown;

    #[test]
    fn a_caption_among_others_is_one_line() {
        let text = "A cat.\n\n- A\tB";
        assert_eq!(shown(text, true), "A cat. - A B");
        assert_eq!(shown(text, false), text);
    }
}
