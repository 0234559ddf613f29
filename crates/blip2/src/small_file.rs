//! Reading the small files of a model's folder whole.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::path::Path;

/// The bytes of a regular file. A pipe or a device in its place is refused: reading it would wait, or never end.
///
/// # Errors
/// The operating system's, and [`ErrorKind::InvalidInput`] for what is no regular file.
pub(crate) fn read(path: impl AsRef<Path>) -> Result<Vec<u8>> {
    // Told before it is opened, where opening a pipe waits.
    if !std::fs::metadata(&path)?.is_file() {
        return Err(Error::new(ErrorKind::InvalidInput, "this is not a regular file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.json");
        std::fs::write(&file, "{}").unwrap();
        assert_eq!(read(&file).unwrap(), b"{}");
        assert_eq!(read(folder.path()).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(read(folder.path().join("absent")).unwrap_err().kind(), ErrorKind::NotFound);
        #[cfg(unix)]
        assert_eq!(read("/dev/zero").unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
