//! The pictures of a folder.

use std::path::{Path, PathBuf};

use anyhow::Context;
use blip2_train::data::is_picture;

/// Adds the pictures of a folder in the order of their names, those of the folders below it after them where asked for;
/// links to folders are not followed.
pub(super) fn find(folder: &Path, recursive: bool, pictures: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let cannot = || format!("cannot list {}", folder.display());
    let (mut files, mut folders) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(folder).with_context(cannot)? {
        let entry = entry.with_context(cannot)?;
        let path = entry.path();
        if entry.file_type().with_context(cannot)?.is_dir() {
            folders.push(path);
        } else if is_picture(&path) {
            files.push(path);
        }
    }
    files.sort();
    folders.sort();
    pictures.extend(files);
    if recursive {
        folders.iter().try_for_each(|folder| find(folder, true, pictures))?;
    }
    Ok(())
}
