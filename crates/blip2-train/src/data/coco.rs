//! COCO caption annotations: `images` with names, `annotations` with captions that refer to them.

use std::collections::HashMap;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use serde::Deserialize;

use super::{Builder, ImageSource, Row, Skipped, Text};
use crate::{Error, Result};

#[derive(Deserialize)]
struct CaptionFile {
    images: Vec<Picture>,
    annotations: Vec<Annotation>,
}

#[derive(Deserialize)]
struct Picture {
    id: u64,
    file_name: String,
}

#[derive(Deserialize)]
struct Annotation {
    image_id: u64,
    caption: String,
}

/// Why a picture is left out that no annotation refers to.
const NO_CAPTION: &str = "has no caption";

/// Reads a caption file; the pictures are in `folder`.
pub(super) fn read(path: &Path, folder: &Path, builder: &mut Builder) -> Result<()> {
    for (name, captions) in captions_by_picture(path)? {
        let source = folder.join(name);
        if captions.is_empty() {
            builder.skip(source.display().to_string(), NO_CAPTION);
        } else {
            builder.add(ImageSource::File(source), None, Text::Captions(captions), Vec::new());
        }
    }
    Ok(())
}

/// The rows of a caption file, with the pictures as it names them, and the pictures that have no caption.
pub(super) fn rows(path: &Path) -> Result<(Vec<Row>, Vec<Skipped>)> {
    let (mut rows, mut skipped) = (Vec::new(), Vec::new());
    for (image, captions) in captions_by_picture(path)? {
        if captions.is_empty() {
            skipped.push(Skipped { name: image, reason: NO_CAPTION.into() });
        } else {
            rows.push(Row { image, captions: Some(captions), ..Row::default() });
        }
    }
    Ok((rows, skipped))
}

/// The names of all pictures, each with its captions; both keep the file's order.
fn captions_by_picture(path: &Path) -> Result<Vec<(String, Vec<String>)>> {
    let file = File::open(path).map_err(Error::io(path))?;
    let content: CaptionFile = serde_json::from_reader(BufReader::new(file))
        .map_err(|error| Error::file(path, format!("is not a COCO caption file: {error}")))?;
    let mut captions: HashMap<u64, Vec<String>> =
        content.images.iter().map(|picture| (picture.id, Vec::new())).collect();
    for annotation in content.annotations {
        let Some(of_picture) = captions.get_mut(&annotation.image_id) else {
            let reason =
                format!("an annotation refers to image_id {}, which `images` lacks", annotation.image_id);
            return Err(Error::file(path, reason));
        };
        let caption = annotation.caption.trim();
        if !caption.is_empty() {
            of_picture.push(caption.to_owned());
        }
    }
    let of_picture = |Picture { id, file_name }| -> Result<(String, Vec<String>)> {
        let twice = || Error::file(path, format!("`images` has id {id} twice"));
        Ok((file_name, captions.remove(&id).ok_or_else(twice)?))
    };
    content.images.into_iter().map(of_picture).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{DataConfig, Dataset, Row, Text, read_test_set};
    use std::fs;

    #[test]
    fn captions_are_gathered_by_picture() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("val")).unwrap();
        fs::write(dir.path().join("val/1.jpg"), "1").unwrap();
        fs::write(dir.path().join("val/2.jpg"), "2").unwrap();
        let write = |content: &str| fs::write(dir.path().join("c.json"), content).unwrap();
        let config = || DataConfig { images: Some("val".into()), ..DataConfig::new("c.json") };
        let load = || Dataset::load(&[config()], dir.path());

        write(
            r#"{"info":{},"images":[{"id":7,"file_name":"1.jpg","width":3},{"id":9,"file_name":"2.jpg"},
            {"id":4,"file_name":"gone.jpg"}],"annotations":[{"id":1,"image_id":9,"caption":"nine"},
            {"id":2,"image_id":7,"caption":" seven\n"},{"id":3,"image_id":9,"caption":"again"},
            {"id":5,"image_id":4,"caption":"gone"}]}"#,
        );
        let dataset = load().unwrap();
        assert_eq!(dataset.samples().len(), 2);
        assert_eq!(dataset.samples()[0].text, Text::Captions(vec!["seven".into()]));
        assert_eq!(dataset.samples()[1].text, Text::Captions(vec!["nine".into(), "again".into()]));
        assert_eq!(dataset.skipped().len(), 1);
        // For measuring, the same captions; whether a picture is there shows when it is read.
        let (rows, skipped) = read_test_set(&dir.path().join("c.json")).unwrap();
        let captions =
            |row: &Row| (row.image.clone(), row.captions.as_ref().map(|captions| captions.join("|")));
        let expected = [("1.jpg", "seven"), ("2.jpg", "nine|again"), ("gone.jpg", "gone")];
        let expected = expected.map(|(image, captions)| (image.to_owned(), Some(captions.to_owned())));
        assert_eq!(rows.iter().map(captions).collect::<Vec<_>>(), expected);
        assert!(skipped.is_empty());
        write(
            r#"{"images":[{"id":7,"file_name":"1.jpg"},{"id":9,"file_name":"2.jpg"}],
            "annotations":[{"image_id":9,"caption":"nine"},{"image_id":7,"caption":" "}]}"#,
        );
        let (rows, skipped) = read_test_set(&dir.path().join("c.json")).unwrap();
        assert_eq!((rows.len(), rows[0].image.as_str()), (1, "2.jpg"));
        assert_eq!(skipped[0].to_string(), "1.jpg: has no caption");

        for (content, says) in [
            (r#"{"images":[],"annotations":[{"image_id":1,"caption":"x"}]}"#, "image_id 1"),
            (r#"{"images":[]"#, "line 1"),
            (
                r#"{"images":[{"id":1,"file_name":"1.jpg"},{"id":1,"file_name":"2.jpg"}],
                "annotations":[{"image_id":1,"caption":"x"}]}"#,
                "id 1 twice",
            ),
        ] {
            write(content);
            let message = load().unwrap_err().to_string();
            assert!(message.contains("c.json") && message.contains(says), "{message}");
            assert_eq!(read_test_set(&dir.path().join("c.json")).unwrap_err().to_string(), message);
        }
    }
}
