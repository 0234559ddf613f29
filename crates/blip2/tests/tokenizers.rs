//! Tokenizers of Hugging Face folders against transformers (`tools/golden_tokenizers.py`), from each form of their files.
#![allow(clippy::print_stderr, reason = "a skipped test says so")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use blip2::text::{BertTokenizer, LanguageTokenizer};
use serde::Deserialize;
use tempfile::TempDir;

#[derive(Deserialize)]
struct Golden {
    texts: Vec<String>,
    ids: BTreeMap<String, Vec<Vec<u32>>>,
    /// Texts with marks in them, and their ids where these are marks.
    special: BTreeMap<String, Vec<(String, Vec<u32>)>>,
}

fn golden() -> Golden {
    let text = std::fs::read_to_string(folder("tokenizers.json")).expect("readable");
    serde_json::from_str(&text).expect("JSON")
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// The files of the official models, where they are at hand.
fn shared() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/tokenizers");
    if path.is_dir() {
        return Some(path);
    }
    eprintln!("SKIPPED: the shared tokenizer files are not here");
    None
}

/// A folder with copies of `files`, named anew.
fn copied(from: &Path, files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    for (name, new_name) in files {
        std::fs::copy(from.join(name), dir.path().join(new_name)).expect("copied");
    }
    dir
}

fn open(folder: &Path) -> LanguageTokenizer {
    LanguageTokenizer::from_folder(folder).expect("a tokenizer")
}

/// All texts have the golden ids; marks in a text are marks only where they are asked for.
fn check(golden: &Golden, name: &str, tokenizer: &LanguageTokenizer) {
    let expected = &golden.ids[name];
    assert!(expected.len() == golden.texts.len() && expected.len() > 150, "{}", expected.len());
    for (text, ids) in golden.texts.iter().zip(expected) {
        assert_eq!(&tokenizer.encode_text(text).expect("ids"), ids, "{name}: {text:?}");
    }
    for (text, ids) in &golden.special[name] {
        assert_eq!(&tokenizer.encode_with_controls(text).expect("ids"), ids, "{name}: {text:?} with marks");
        let ids = tokenizer.encode_text(text).expect("ids");
        assert!(
            ids.iter().all(|&id| !tokenizer.is_control(id) || Some(id) == tokenizer.token_id("<unk>")),
            "{text:?}"
        );
    }
}

#[test]
fn both_forms_of_a_byte_level_tokenizer_agree_with_transformers() {
    let golden = golden();
    let json = open(&folder("tiny_bpe"));
    let slow = copied(
        &folder("tiny_bpe"),
        &[
            "vocab.json",
            "merges.txt",
            "special_tokens_map.json",
            "added_tokens.json",
            "tokenizer_config.json",
        ]
        .map(|name| (name, name)),
    );
    let slow = open(slow.path());
    for tokenizer in [&json, &slow] {
        check(&golden, "tiny_bpe", tokenizer);
        assert_eq!((tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()), (Some(2), Some(2), Some(1)));
        assert_eq!(tokenizer.n_tokens(), json.n_tokens());
        assert_eq!(tokenizer.control_id("<image>"), Some(json.n_tokens() as u32 - 1));
        for text in golden.texts.iter().filter(|text| !text.contains('\u{fffd}')) {
            assert_eq!(&tokenizer.decode(&tokenizer.encode_text(text).expect("ids")), text);
        }
    }
    // Nothing but the vocabulary, as LAVIS's users have it.
    let bare = copied(&folder("tiny_bpe"), &[("vocab.json", "vocab.json"), ("merges.txt", "merges.txt")]);
    let bare = open(bare.path());
    assert_eq!((bare.bos_id(), bare.eos_id(), bare.pad_id()), (Some(2), Some(2), Some(1)));
    assert_eq!(bare.control_id("<image>"), None);
}

#[test]
fn both_forms_of_a_sentencepiece_tokenizer_agree_with_transformers() {
    let golden = golden();
    let json = open(&folder("tiny_t5"));
    let slow = copied(&folder("tiny_t5"), &[("spiece.model", "spiece.model")]);
    let with_image = copied(&folder("tiny_t5"), &[("spiece.model", "spiece.model")]);
    let n_tokens = json.n_tokens();
    let added = format!("{{\"<image>\": {n_tokens}}}");
    std::fs::write(with_image.path().join("added_tokens.json"), added).expect("written");
    for tokenizer in [&open(slow.path()), &open(with_image.path()), &json] {
        check(&golden, "tiny_t5", tokenizer);
        let decoded = tokenizer.decode(&tokenizer.encode_text("the License and the Work").expect("ids"));
        assert_eq!(decoded, "the License and the Work");
    }
    let slow = open(slow.path());
    assert_eq!((slow.bos_id(), slow.eos_id(), slow.pad_id()), (None, Some(1), Some(0)));
    assert_eq!((slow.n_tokens(), slow.token_id("<extra_id_0>")), (n_tokens, Some(n_tokens as u32 - 1)));
    assert_eq!(open(with_image.path()).control_id("<image>"), Some(n_tokens as u32));
}

#[test]
fn ids_of_the_official_vocabularies_are_those_of_transformers() {
    let (golden, Some(shared)) = (golden(), shared()) else { return };
    let opt =
        copied(&shared.join("opt"), &[("gpt2-vocab.json", "vocab.json"), ("gpt2-merges.txt", "merges.txt")]);
    assert_eq!(open(opt.path()).n_tokens(), 50265);
    // What the revisions with an image token have beside it.
    std::fs::write(opt.path().join("added_tokens.json"), r#"{"<image>": 50265}"#).expect("written");
    let roles = r#"{"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}"#;
    std::fs::write(opt.path().join("special_tokens_map.json"), roles).expect("written");
    let opt = open(opt.path());
    check(&golden, "opt", &opt);
    assert_eq!((opt.n_tokens(), opt.control_id("<image>"), opt.bos_id()), (50266, Some(50265), Some(2)));
    assert_eq!(opt.encode_text("\n").expect("ids"), [50118]);

    let slow = copied(&shared.join("t5"), &[("spiece.model", "spiece.model")]);
    for tokenizer in [&open(slow.path()), &open(&shared.join("t5"))] {
        check(&golden, "t5", tokenizer);
        assert_eq!((tokenizer.n_tokens(), tokenizer.eos_id(), tokenizer.pad_id()), (32100, Some(1), Some(0)));
        assert_eq!(tokenizer.token_id("<extra_id_0>"), Some(32099));
    }

    let bert = shared.join("bert-base-uncased");
    let json = copied(&bert, &[("tokenizer-minilm.json", "tokenizer.json")]);
    for folder in [bert.as_path(), json.path()] {
        let bert = BertTokenizer::from_folder(folder).expect("a vocabulary");
        for (text, ids) in golden.texts.iter().zip(&golden.ids["bert"]) {
            let found = bert.encode(text, usize::MAX).expect("ids");
            assert_eq!(&found[1..found.len() - 1], ids, "{text:?}");
        }
        assert_eq!(bert.dec_id(), 30522);
    }
}

#[test]
fn folders_that_contradict_themselves_are_refused_by_file_and_reason() {
    let bpe = folder("tiny_bpe");
    let message =
        |dir: &TempDir| LanguageTokenizer::from_folder(dir.path()).expect_err("refused").to_string();
    let empty = tempfile::tempdir().expect("a folder");
    assert!(message(&empty).contains("neither tokenizer.json"), "{}", message(&empty));
    for (file, content, expected) in [
        ("merges.txt", &b"#version: 0.2\nab\n"[..], "without a blank"),
        ("merges.txt", b"#version: 0.2\na \xff\n", "UTF-8"),
        ("merges.txt", b"th zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz\n", "not in its vocabulary"),
        ("vocab.json", b"[1, 2]", "table of tokens"),
        ("added_tokens.json", b"{\"<image>\": 9999}", "`<image>` should be 9999"),
        ("added_tokens.json", b"{\"\": 600}", "no text"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json"),
    ] {
        let dir = copied(&bpe, &[("vocab.json", "vocab.json"), ("merges.txt", "merges.txt")]);
        std::fs::write(dir.path().join(file), content).expect("written");
        assert!(message(&dir).contains(expected), "{expected}: {}", message(&dir));
    }
    let spiece = std::fs::read(folder("tiny_t5/spiece.model")).expect("readable");
    let dir = tempfile::tempdir().expect("a folder");
    for length in (0..spiece.len()).step_by(7) {
        std::fs::write(dir.path().join("spiece.model"), &spiece[..length]).expect("written");
        // A cut between two pieces leaves a shorter vocabulary; nothing may panic.
        if let Ok(tokenizer) = LanguageTokenizer::from_folder(dir.path()) {
            assert!(tokenizer.n_tokens() < 420, "{length}");
        }
    }
    for at in (0..spiece.len()).step_by(5) {
        let mut damaged = spiece.clone();
        damaged[at] ^= 0x55;
        std::fs::write(dir.path().join("spiece.model"), damaged).expect("written");
        if let Ok(tokenizer) = LanguageTokenizer::from_folder(dir.path()) {
            let _ = tokenizer.encode_text("ﬁne… ½ words"); // ids or an error
        }
    }
}
