//! `blip2 info`.

use std::io::Write;

use serde_json::json;

use crate::Done;
use crate::args::ModelArgs;
use crate::memory;
use crate::model::{Part, open};

pub(crate) fn run(args: &ModelArgs) -> anyhow::Result<Done> {
    let model = open(args, Part::Both)?;
    let config = model.config();
    let mut parts = Vec::new();
    if let Some(vision) = model.vision() {
        parts.push(("image encoder (frozen)", vision.n_parameters()));
    }
    if let Some(n) = model.n_matcher_parameters() {
        parts.push(("Q-Former of stage 1", n));
    }
    if let Some(n) = model.n_bridge_parameters() {
        parts.push(("Q-Former of stage 2 with projection", n));
    }
    if let Some(language_model) = model.language_model() {
        parts.push(("language model (frozen)", language_model.n_parameters()));
    }
    let mut out = std::io::stdout().lock();
    if args.json {
        let parts: serde_json::Map<_, _> =
            parts.iter().map(|(name, n)| ((*name).to_owned(), json!(n))).collect();
        let row = json!({"config": config, "parameters": parts, "resident_bytes": memory::resident()});
        writeln!(out, "{}", serde_json::to_string_pretty(&row)?)?;
        return Ok(Done::All);
    }
    writeln!(out, "{}", config.name)?;
    for (name, n) in &parts {
        writeln!(out, "{:>13}  {name}", thousands(*n))?;
    }
    writeln!(out, "{:>13}  parameters in all", thousands(model.n_parameters()))?;
    if let Some(bytes) = memory::resident() {
        writeln!(out, "{:>10} MB  memory of this process with all parts loaded", bytes / 1_000_000)?;
    }
    let verbs = [
        (model.language_model().is_some(), "caption, ask, chat"),
        (model.matcher().is_some(), "match, embed, classify"),
    ];
    let verbs: Vec<_> = verbs.iter().filter(|(has, _)| *has).map(|(_, verbs)| *verbs).collect();
    writeln!(out, "it can: {}", verbs.join(", "))?;
    Ok(Done::All)
}

fn thousands(n: usize) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::thousands;

    #[test]
    fn digits_are_grouped() {
        assert_eq!([thousands(7), thousands(1234), thousands(134_515_008)], ["7", "1,234", "134,515,008"]);
    }
}
