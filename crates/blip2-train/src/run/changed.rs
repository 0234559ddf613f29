//! What a run is continued with that it was not begun with.

use std::collections::BTreeMap;
use std::path::Path;

use toml::Value;

/// Settings that name files. They are relative to where the command was started, so only the files' names are compared.
const FILES: [&str; 8] =
    ["output", "features", "encoder", "language_model", "vocabulary", "init", "path", "images"];

/// The settings that differ between two configurations of a run, each as a sentence's end: `run.epochs is 9, was 3`.
///
/// What cannot be read is not compared: a checkpoint is good without its configuration.
pub(super) fn changed_settings(before: &str, now: &str) -> Vec<String> {
    let (Ok(before), Ok(now)) = (before.parse::<toml::Table>(), now.parse::<toml::Table>()) else {
        return Vec::new();
    };
    let [before, now] = [before, now].map(|table| {
        let mut settings = BTreeMap::new();
        flatten("", &Value::Table(table), false, &mut settings);
        settings
    });
    let mut names: Vec<&String> = before.keys().chain(now.keys()).collect();
    names.sort();
    names.dedup();
    let sentence = |name: &String| match (before.get(name), now.get(name)) {
        (before, now) if before == now => None,
        (Some(before), Some(now)) => Some(format!("{name} is {now}, was {before}")),
        (None, Some(now)) => Some(format!("{name} is {now}, was not set")),
        (_, None) => Some(format!("{name} is no longer set")),
    };
    names.into_iter().filter_map(sentence).collect()
}

/// Every value below `value` by its dotted name.
fn flatten(name: &str, value: &Value, is_file: bool, settings: &mut BTreeMap<String, String>) {
    match value {
        Value::Table(table) => {
            for (key, value) in table {
                let own = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
                flatten(&own, value, is_file || FILES.contains(&key.as_str()), settings);
            }
        }
        Value::Array(values) => {
            for (number, value) in values.iter().enumerate() {
                flatten(&format!("{name}[{number}]"), value, is_file, settings);
            }
        }
        Value::String(path) if is_file => {
            let file = Path::new(path).file_name().and_then(|file| file.to_str()).unwrap_or(path);
            settings.insert(name.to_owned(), file.to_owned());
        }
        // What was single precision is written as it was given: 0.1, not 0.10000000149011612.
        Value::Float(value) if f64::from(*value as f32) == *value => {
            settings.insert(name.to_owned(), (*value as f32).to_string());
        }
        other => {
            settings.insert(name.to_owned(), other.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_is_named_and_where_the_command_was_started_does_not_matter() {
        let before = "dropout = 0.10000000149011612\nencoder = \"../frozen/a.pth\"\nold = 1\ninit = { bert = \"x/b\" }\n\
                      [run]\nepochs = 3\n[[data]]\npath = \"a/t.jsonl\"\n";
        assert!(changed_settings(before, before).is_empty());
        let moved = before.replace("../frozen", "/srv").replace("x/b", "b").replace("a/t", "t");
        assert!(changed_settings(before, &moved).is_empty());
        let now = moved
            .replace("0.10000000149011612", "0.2")
            .replace("epochs = 3", "epochs = 9")
            .replace("t.jsonl", "u.jsonl");
        let now = now.replace("old = 1", "new = true");
        let expected = [
            "data[0].path is u.jsonl, was t.jsonl",
            "dropout is 0.2, was 0.1",
            "new is true, was not set",
            "old is no longer set",
            "run.epochs is 9, was 3",
        ];
        assert_eq!(changed_settings(before, &now), expected);
        assert!(changed_settings("no = configuration = at all", &now).is_empty());
    }
}
