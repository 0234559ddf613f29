//! Answers of a prescribed form: whatever a model finds likely, the text is of that form.

use std::path::Path;
use std::time::{Duration, Instant};

use blip2::Error;
use blip2::generate::Constraint;
use blip2::sampling::{SampleRng, draw};
use blip2::text::{AnswerForm, Grammar, Grammars, LanguageTokenizer};
use serde_json::{Value as Json, json};

/// A byte-level tokenizer of 260 tokens; a text ends with the first.
fn grammars() -> (LanguageTokenizer, Grammars) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/blip2_opt");
    let tokenizer = LanguageTokenizer::from_folder(&folder).unwrap();
    let grammars = Grammars::new(&tokenizer, &[2], false).unwrap();
    (tokenizer, grammars)
}

/// A text by a model to which all tokens are alike, but for those of `favoured`.
fn write(tokenizer: &LanguageTokenizer, grammar: &Grammar, seed: u64, favoured: &[u32]) -> String {
    write_until(2, tokenizer, grammar, seed, favoured).trim().to_owned()
}

/// The same with another token that ends the text.
fn write_until(
    end: u32,
    tokenizer: &LanguageTokenizer,
    grammar: &Grammar,
    seed: u64,
    favoured: &[u32],
) -> String {
    let mut rng = SampleRng::new(seed, 0);
    let mut state = grammar.fork();
    let mut tokens = Vec::new();
    loop {
        // The model may have more tokens than the tokenizer.
        let mut scores = vec![0.0; tokenizer.n_tokens() + 4];
        favoured.iter().for_each(|&token| scores[token as usize] = 5.0);
        state.restrict(&mut scores).unwrap();
        let token = draw(&scores, &mut rng).expect("a token may come");
        if token == end {
            return tokenizer.decode(&tokens);
        }
        state.push(token).unwrap();
        tokens.push(token);
        assert!(tokens.len() < 5000, "{}", tokenizer.decode(&tokens));
    }
}

#[test]
fn one_of_the_choices_is_written_whatever_is_in_them() {
    let (tokenizer, grammars) = grammars();
    let choices = ["yes", "no", "no, it isn't", "a+b", r"back\slash/", "[x]", "Straße", "(1|2)", "日本"];
    let form = AnswerForm::Choice(choices.map(String::from).to_vec());
    let grammar = grammars.compile(&form).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..200 {
        let text = write(&tokenizer, &grammar, seed, &[]);
        assert!(choices.contains(&text.as_str()), "{text:?}");
        seen.insert(text);
    }
    assert!(seen.len() >= 6, "{seen:?}");
}

#[test]
fn a_pattern_is_matched_as_a_whole() {
    let (tokenizer, grammars) = grammars();
    for pattern in [r"[A-C]{2}-\d{3}", r"^[A-C]{2}-[0-9]{3}$", r"(?:[A-C]){2}-\d\d\d"] {
        let grammar = grammars.compile(&AnswerForm::Regex(pattern.into())).unwrap();
        for seed in 0..30 {
            let text = write(&tokenizer, &grammar, seed, &[]);
            let (letters, digits) = text.split_once('-').unwrap_or_else(|| panic!("{text:?}"));
            assert!(letters.len() == 2 && letters.bytes().all(|b| b"ABC".contains(&b)), "{text:?}");
            assert!(digits.chars().count() == 3 && digits.chars().all(char::is_numeric), "{text:?}");
        }
    }
    let price = grammars.compile(&AnswerForm::Regex(r"a\$".into())).unwrap();
    assert_eq!(write(&tokenizer, &price, 1, &[]), "a$");
}

#[test]
fn json_fits_its_schema_every_time() {
    let (tokenizer, grammars) = grammars();
    let schema = json!({
        "type": "object",
        "properties": {
            "animal": {"enum": ["cat", "dog", "none"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 12},
            "words": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 3},
            "sure": {"type": "boolean"},
        },
        "required": ["animal", "count", "words", "sure"],
        "additionalProperties": false,
    });
    let grammar = grammars.compile(&AnswerForm::JsonSchema(schema)).unwrap();
    for seed in 0..100 {
        let text = write(&tokenizer, &grammar, seed, &[]);
        let json: Json = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert!(["cat", "dog", "none"].contains(&json["animal"].as_str().unwrap()), "{text}");
        assert!(json["count"].as_u64().is_some_and(|count| count <= 12), "{text}");
        assert!(json["sure"].is_boolean(), "{text}");
        let words = json["words"].as_array().unwrap();
        assert!(words.len() <= 3 && words.iter().all(|w| w.as_str().unwrap().chars().count() <= 6), "{text}");
        assert_eq!(json.as_object().unwrap().len(), 4, "{text}");
        assert!(!text.contains('\n'), "{text}");
    }
    // Any object: a model that likes to close what is open comes to an end.
    let grammar = grammars.compile(&AnswerForm::JsonObject).unwrap();
    let closing: Vec<u32> = ["}", "]", "\"", ":"].map(|text| tokenizer.encode_text(text).unwrap()).concat();
    for seed in 0..50 {
        let text = write(&tokenizer, &grammar, seed, &closing);
        assert!(serde_json::from_str::<Json>(&text).unwrap().is_object(), "{text}");
    }
}

#[test]
fn an_answer_begins_with_a_blank_where_its_prompt_says_so() {
    let (tokenizer, _) = grammars();
    let grammars = Grammars::new(&tokenizer, &[2], true).unwrap();
    let [blank, yes] = [" ", "y"].map(|text| *tokenizer.encode_text(text).unwrap().last().unwrap());
    for form in [AnswerForm::Choice(vec!["yes".into()]), AnswerForm::Regex("yes".into())] {
        let mut state = grammars.compile(&form).unwrap().fork();
        assert!(state.fork().push(yes).is_err());
        state.push(blank).unwrap();
        state.push(yes).unwrap();
    }
}

#[test]
fn a_fork_goes_its_own_way() {
    let (tokenizer, grammars) = grammars();
    let grammar = grammars.compile(&AnswerForm::Choice(vec!["ab".into(), "ac".into()])).unwrap();
    let [a, b, c] = ["a", "b", "c"].map(|text| *tokenizer.encode_text(text).unwrap().last().unwrap());
    let mut first = grammar.fork();
    first.push(a).unwrap();
    let mut second = first.fork();
    first.push(b).unwrap();
    second.push(c).unwrap();
    for state in [&mut first, &mut second] {
        let mut scores = vec![0.0; 264];
        state.restrict(&mut scores).unwrap();
        assert_eq!(scores.iter().filter(|score| **score == 0.0).count(), 1);
        assert_eq!(scores[2], 0.0, "only the end may come");
    }
    assert!(matches!(grammar.fork().push(b), Err(Error::AnswerForm(_))));
}

#[test]
fn what_makes_no_sense_is_said() {
    let (_, grammars) = grammars();
    let refused = |form: &AnswerForm| match grammars.compile(form) {
        Err(Error::AnswerForm(reason)) => reason,
        other => panic!("{form:?} gave {other:?}"),
    };
    for (form, word) in [
        (AnswerForm::Choice(vec![]), "no answer to choose from"),
        (AnswerForm::Choice(vec!["a".into(), " ".into()]), "one is empty"),
        (AnswerForm::Regex("(".into()), "regular expression"),
        (AnswerForm::Regex(r"(a)\1".into()), "regular expression"),
        (AnswerForm::Regex("a(?=b)".into()), "regular expression"),
        (AnswerForm::JsonSchema(json!([1])), "not an object"),
        (AnswerForm::JsonSchema(json!({"type": "colour"})), "JSON schema"),
        (
            AnswerForm::JsonSchema(json!({"type": "object", "propertyNames": {}, "dependentSchemas": {}})),
            "JSON schema",
        ),
        (AnswerForm::JsonSchema(json!({"type": "string", "pattern": "("})), "JSON schema"),
        (AnswerForm::JsonSchema(json!({"$ref": "#/nowhere"})), "JSON schema"),
        (AnswerForm::JsonSchema(json!({"$ref": "https://example.org/schema.json"})), "outside of it"),
        (
            AnswerForm::JsonSchema(json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})),
            "JSON schema",
        ),
        (
            AnswerForm::JsonSchema(json!({"type": "string", "pattern": "a(?=b)"})),
            "a pattern in it: look-around",
        ),
        (
            AnswerForm::JsonSchema(json!({"oneOf": [
                {"type": "object", "properties": {"a": {"const": 1}}},
                {"type": "object", "properties": {"a": {"const": 2}}},
            ]})),
            "use anyOf",
        ),
        (AnswerForm::JsonSchema(json!({"type": "integer", "minimum": 3, "maximum": 1})), "JSON schema"),
        (AnswerForm::Regex("x".repeat(AnswerForm::MAX_BYTES + 1)), "bytes"),
    ] {
        let reason = refused(&form);
        assert!(reason.contains(word), "{reason}");
        assert!(
            !reason.contains('\n')
                && !reason.contains("panic")
                && !reason.contains("Bias")
                && reason.len() < 400,
            "{reason}"
        );
    }
}

#[test]
fn forms_that_explode_are_refused_soon() {
    let (_, grammars) = grammars();
    let nested = |depth: usize, inner: Json, outer: &dyn Fn(Json) -> Json| {
        (0..depth).fold(inner, |json, _| outer(json))
    };
    let property = |i: usize| (format!("p{i}"), json!({"type": "string", "pattern": format!("^(a|b{i})*$")}));
    let many: serde_json::Map<String, Json> = (0..800).map(property).collect();
    let forms = [
        AnswerForm::Regex("(a{500}){500}".into()),
        AnswerForm::Regex("((((a{99}){99}){99}){99}){99}".into()),
        AnswerForm::Regex("(a|b)*a(a|b){60}".into()),
        AnswerForm::Regex("(".repeat(20_000) + &")".repeat(20_000)),
        AnswerForm::Regex("(?:a|".repeat(8_000) + "b" + &")".repeat(8_000)),
        AnswerForm::Regex("[".repeat(30_000)),
        AnswerForm::Regex(r"[\p{L}\p{N}]{1000}x[\p{L}]{1000}".into()),
        AnswerForm::Choice((0..9_000).map(|i| format!("{i}")).collect()),
        AnswerForm::JsonSchema(
            json!({"type": "array", "items": {}, "minItems": 1_000_000_000, "maxItems": 2_000_000_000}),
        ),
        AnswerForm::JsonSchema(json!({"type": "string", "minLength": 1_000_000, "maxLength": 2_000_000_000})),
        AnswerForm::JsonSchema(json!({"type": "string", "pattern": "(a{1000}){1000}"})),
        AnswerForm::JsonSchema(json!({"type": "object", "properties": many})),
        AnswerForm::JsonSchema(nested(
            100,
            json!({}),
            &|json| json!({"anyOf": [json, {"type": "null"}, {"type": "array"}]}),
        )),
        AnswerForm::JsonSchema(nested(12, json!({"type": "string"}), &|json| json!({"allOf": [json, json]}))),
        AnswerForm::JsonSchema(json!({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"})),
        AnswerForm::JsonSchema(
            json!({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "object"}]}}, "$ref": "#/$defs/a"}),
        ),
        AnswerForm::JsonSchema(
            json!({"type": "number", "multipleOf": 1e-300, "minimum": 0.1, "maximum": 1e300}),
        ),
        AnswerForm::JsonSchema(json!({"type": "integer", "multipleOf": 99_999_989})),
        AnswerForm::JsonSchema(
            json!({"allOf": [{"type": "integer", "multipleOf": 9973}, {"multipleOf": 9967}]}),
        ),
        AnswerForm::JsonSchema(json!({"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 9})),
        AnswerForm::JsonSchema(json!({"type": "integer", "multipleOf": 9973})),
        AnswerForm::JsonSchema(json!({"type": "string", "allOf": [
            {"pattern": "^(a|b)*a(a|b){20}$"}, {"pattern": "^(a|b)*b(a|b){21}$"}, {"maxLength": 500}]})),
    ];
    for form in forms {
        let start = Instant::now();
        let result = grammars.compile(&form);
        let took = start.elapsed();
        let short: String = format!("{form:?}").chars().take(120).collect();
        // A second at most; machines may be busy.
        assert!(took < Duration::from_secs(20), "{took:?} for {short}");
        // What is accepted has to be bounded in its steps too.
        let Ok(grammar) = result else { continue };
        let mut state = grammar.fork();
        let mut rng = SampleRng::new(1, 0);
        for _ in 0..40 {
            let start = Instant::now();
            let mut scores = vec![0.0; 264];
            let Ok(()) = state.restrict(&mut scores) else { break };
            let token = draw(&scores, &mut rng).expect("a token");
            if token == 2 || state.push(token).is_err() {
                break;
            }
            assert!(start.elapsed() < Duration::from_secs(5), "{:?} a step for {short}", start.elapsed());
        }
    }
}

/// T5's tokenizers: every text begins with a blank that is no part of it, `</s>` ends it, and characters are missing.
fn t5(folder: &Path) -> (LanguageTokenizer, Grammars) {
    let tokenizer = LanguageTokenizer::from_folder(folder).unwrap();
    let grammars = Grammars::new(&tokenizer, &[1], false).unwrap();
    (tokenizer, grammars)
}

/// All that is written within a form, by models that like other tokens.
fn written(t5: &(LanguageTokenizer, Grammars), form: &AnswerForm) -> std::collections::BTreeSet<String> {
    let grammar = t5.1.compile(form).unwrap_or_else(|error| panic!("{form:?}: {error}"));
    (0..300).map(|seed| write_until(1, &t5.0, &grammar, seed, &[])).collect()
}

#[test]
fn a_sentencepiece_vocabulary_keeps_to_a_form() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny_t5");
    let t5 = t5(&golden);
    let strings = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
    let choices = strings(&["yes", "no", "a dog", "the license, or not"]);
    assert_eq!(written(&t5, &AnswerForm::Choice(choices.clone())), choices.into_iter().collect());

    // What cannot be written is no way to begin: no text ends in the middle.
    let texts = written(&t5, &AnswerForm::Regex(r"(?:[a-c{]{1,2}|a\{b|x) (?:d|\})".into()));
    assert!(texts.len() > 3, "{texts:?}");
    for text in texts {
        let start = text.strip_suffix(" d").unwrap_or_else(|| panic!("{text:?}"));
        assert!(start == "x" || (start.len() <= 2 && start.bytes().all(|b| b"abc".contains(&b))), "{text:?}");
    }

    for (schema, expected) in [
        (json!({"enum": ["yes", "{no", 12]}), &["\"yes\"", "12"][..]),
        (json!({"anyOf": [{"type": "object"}, {"type": "boolean"}]}), &["true", "false"]),
        (json!({"type": ["array", "null"], "minItems": 1}), &["null"]),
        (json!({"type": "string", "pattern": r"^(a|\{)b$"}), &["\"ab\""]),
        (json!({"type": "integer", "minimum": 10, "maximum": 12}), &["10", "11", "12"]),
    ] {
        let texts = written(&t5, &AnswerForm::JsonSchema(schema));
        assert_eq!(texts, strings(expected).into_iter().collect());
    }
}

#[test]
fn a_form_that_a_vocabulary_cannot_write_is_refused_with_the_reason() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny_t5");
    let (_, grammars) = t5(&golden);
    let object = json!({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]});
    for (form, missing) in [
        (AnswerForm::JsonObject, '{'),
        (AnswerForm::JsonSchema(object.clone()), '{'),
        (AnswerForm::JsonSchema(json!({"$defs": {"a": object}, "$ref": "#/$defs/a"})), '{'),
        (AnswerForm::JsonSchema(json!({"type": "array"})), '['),
        (AnswerForm::JsonSchema(json!({"const": "a{b"})), '{'),
        (AnswerForm::JsonSchema(json!({"type": "string", "pattern": r"^a\{$"})), '{'),
        (AnswerForm::Choice(vec!["yes".into(), "a{b".into()]), '{'),
        (AnswerForm::Regex(r"[ab]+(?:\{a)+".into()), '{'),
        (AnswerForm::Regex("(a日|日b)".into()), '日'),
    ] {
        let reason = grammars.compile(&form).unwrap_err().to_string();
        assert!(reason.contains(&format!("tokenizer cannot write `{missing}`")), "{form:?}: {reason}");
        assert!(!reason.contains('\n') && reason.len() < 400, "{reason}");
    }
}

#[test]
fn the_vocabulary_of_t5_writes_lists_and_no_objects() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/tokenizers/t5");
    if !folder.is_dir() {
        eprintln!("SKIPPED: the shared tokenizer files are not here");
        return;
    }
    let t5 = t5(&folder);
    let list = json!({"type": "array", "items": {"enum": ["cat", "a dog"]}, "minItems": 1, "maxItems": 3});
    for text in written(&t5, &AnswerForm::JsonSchema(list)) {
        let list: Vec<String> = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert!(!list.is_empty() && list.iter().all(|animal| animal == "cat" || animal == "a dog"), "{text}");
    }
    let objects = json!({"type": "array", "items": {"type": "object"}, "minItems": 1});
    let reason = t5.1.compile(&AnswerForm::JsonSchema(objects.clone())).unwrap_err().to_string();
    assert!(reason.contains("tokenizer cannot write `{`"), "{reason}");
    let texts = written(&t5, &AnswerForm::JsonSchema(json!({"anyOf": [objects, {"type": "boolean"}]})));
    assert_eq!(texts, ["true", "false"].map(String::from).into());
    let choices = ["yes", "no", "café"].map(String::from);
    assert_eq!(written(&t5, &AnswerForm::Choice(choices.to_vec())), choices.into());
}
