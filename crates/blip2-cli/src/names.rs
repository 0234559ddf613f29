//! Names of files as fields of a row: a name may hold line breaks, tabs and whatever a terminal obeys.

use std::borrow::Cow;
use std::path::Path;

/// A file's name as a field of a row. One with control characters, or that is not UTF-8, is in quotes and its characters as in C,
/// as git writes them (`"a\tb"`), and so is one that begins with a quote; every other is as it stands.
pub(crate) fn quoted(path: &Path) -> Cow<'_, str> {
    if let Some(name) = path.to_str()
        && !name.starts_with('"')
        && !name.contains(char::is_control)
    {
        return name.into();
    }
    let mut name = String::from("\"");
    let octal = |name: &mut String, bytes: &[u8]| {
        bytes.iter().for_each(|byte| *name += &format!("\\{byte:03o}"));
    };
    for part in path.as_os_str().as_encoded_bytes().utf8_chunks() {
        for c in part.valid().chars() {
            match c {
                '\n' => name += "\\n",
                '\t' => name += "\\t",
                '\r' => name += "\\r",
                '"' | '\\' => name.extend(['\\', c]),
                c if c.is_control() => octal(&mut name, c.encode_utf8(&mut [0; 4]).as_bytes()),
                c => name.push(c),
            }
        }
        octal(&mut name, part.invalid());
    }
    name.push('"');
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_field_of_one_line() {
        for (name, field) in [
            ("photos/a b.jpg", "photos/a b.jpg"),
            (r"C:\a\b.jpg", r"C:\a\b.jpg"),
            ("it's \"5\".png", "it's \"5\".png"),
            ("é 猫.png", "é 猫.png"),
            ("a\nb\tc\r.png", r#""a\nb\tc\r.png""#),
            ("\"a\".png", r#""\"a\".png""#),
            ("\u{1b}[2J\\\u{85}", r#""\033[2J\\\302\205""#),
        ] {
            assert_eq!(quoted(Path::new(name)), field);
        }
        #[cfg(unix)]
        {
            use std::os::unix::ffi::OsStrExt;
            let name = std::ffi::OsStr::from_bytes(b"a\xffb\xfe");
            assert_eq!(quoted(Path::new(name)), r#""a\377b\376""#);
        }
    }
}
