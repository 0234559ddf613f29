//! `blip2 bench` on tiny models with random weights.

use std::process::{Command, Output};

use serde_json::Value as Json;

fn bench(arguments: &[&str]) -> Output {
    let small = ["bench", "--repeat", "1", "--tokens", "2", "--beams", "2", "--threads", "2"];
    Command::new(env!("CARGO_BIN_EXE_blip2"))
        .args(small)
        .args(arguments)
        .env_remove("BLIP2_MODEL")
        .output()
        .expect("the command runs")
}

fn json(arguments: &[&str]) -> Json {
    let output = bench(&[arguments, &["--json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn the_json_has_all_figures() {
    let report = json(&["--shape", "tiny", "--dtype", "int8", "--batch", "2"]);
    assert_eq!(report["model"], "tiny, random weights");
    assert_eq!(report["dtype"], "int8");
    assert_eq!(report["machine"]["threads"], 2);
    for field in ["load_s", "loaded_memory", "peak_memory"] {
        assert!(report[field].as_f64().is_some_and(|n| n > 0.0), "{field}: {report}");
    }
    for field in ["products_f32", "products_bf16", "products_int8", "reading"] {
        assert!(report["machine"][field].as_f64().is_some_and(|n| n > 0.0), "{field}: {report}");
    }
    assert!(report["machine"]["by_kernels"].is_array(), "{report}");
    let stages = report["stages"].as_array().expect("a list");
    let of = |stage: &Json| (stage["stage"].as_str().unwrap_or_default().to_owned(), stage["beams"].as_u64());
    let expected = [
        ("preprocess", None),
        ("vision", None),
        ("qformer", None),
        ("prefill", None),
        ("decode", Some(1)),
        ("decode", Some(2)),
        ("caption", Some(1)),
        ("caption", Some(2)),
    ];
    assert_eq!(stages.iter().map(of).collect::<Vec<_>>(), expected.map(|(name, n)| (name.to_owned(), n)));
    for stage in stages {
        for field in ["median_s", "min_s", "max_s", "items"] {
            assert!(stage[field].as_f64().is_some_and(|n| n > 0.0), "{field}: {stage}");
        }
        let is_product = !matches!(stage["stage"].as_str(), Some("preprocess" | "caption"));
        for field in ["operations_per_s", "share_of_products"] {
            assert_eq!(stage[field].as_f64().is_some(), is_product, "{field}: {stage}");
        }
        let reads = matches!(stage["stage"].as_str(), Some("vision" | "prefill" | "decode"));
        for field in ["bytes_per_s", "share_of_reading"] {
            assert_eq!(stage[field].as_f64().is_some(), reads, "{field}: {stage}");
        }
    }
    assert_eq!(stages[5]["items"], 4, "two pictures with two beams each");
}

/// More threads than cores are allowed; the flag counts more than its variable, and that more than rayon's.
#[test]
fn the_number_of_threads_is_that_of_the_flag_or_of_a_variable() {
    let threads = |before: &[&str], after: &[&str], variables: &[(&str, &str)]| -> Json {
        let output = Command::new(env!("CARGO_BIN_EXE_blip2"))
            .args(before)
            .args(["bench", "--shape", "tiny-itm", "--stages", "preprocess", "--repeat", "1", "--json"])
            .args(after)
            .env_remove("BLIP2_MODEL")
            .env_remove("BLIP2_THREADS")
            .env_remove("RAYON_NUM_THREADS")
            .envs(variables.iter().copied())
            .output()
            .expect("the command runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let report: Json = serde_json::from_slice(&output.stdout).expect("JSON");
        report["machine"]["threads"].clone()
    };
    let rayons = ("RAYON_NUM_THREADS", "3");
    assert_eq!(threads(&["--threads", "5"], &[], &[]), 5);
    assert_eq!(threads(&[], &["--threads", "1"], &[("BLIP2_THREADS", "2"), rayons]), 1);
    assert_eq!(threads(&[], &[], &[("BLIP2_THREADS", "2"), rayons]), 2);
    assert_eq!(threads(&[], &[], &[rayons]), 3);
}

#[test]
fn the_report_says_what_was_chosen() {
    let report = json(&["--shape", "tiny", "--dtype", "auto", "--stages", "vision"]);
    assert_eq!(report["dtype"], "int8");
}

#[test]
fn the_table_names_the_stages_and_the_machine() {
    let output = bench(&["--shape", "tiny-itm", "--dtype", "bf16", "--stages", "vision,match"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success() && text.starts_with("tiny-itm, random weights, bf16, 2 threads\n"),
        "{text}"
    );
    let line = |start: &str| text.lines().find(|line| line.starts_with(start)).map(str::to_owned);
    assert!(line("vision").is_some_and(|line| line.contains("1 picture") && line.contains("ms")), "{text}");
    assert!(line("match").is_some_and(|line| line.contains("4 texts")), "{text}");
    assert!(line("this machine at best").is_some_and(|line| line.contains("GB/s")), "{text}");
    assert!(line("preprocess").is_none() && line("caption").is_none(), "{text}");
}

#[test]
fn mistakes_are_told_with_what_would_do() {
    for (arguments, status, expected) in [
        (&["--shape", "blip3"][..], 1, "known ones are blip2-opt-2.7b"),
        (&["--shape", "tiny", "--quantize-qformer"], 2, "goes with --dtype int8"),
        (&["--shape", "tiny", "--batch", "0"], 1, "must be at least 1"),
        (&["--shape", "tiny", "--threads", "0"], 2, "cannot be used multiple times"),
        (&["--shape", "tiny", "--model", "x"], 2, "cannot be used with"),
        (&["--shape", "tiny", "--stages", "sleep"], 2, "sleep"),
        (&["--shape", "tiny", "--picture", "no.jpg"], 1, "no.jpg"),
    ] {
        let output = bench(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {said}");
        assert!(said.contains(expected), "{arguments:?}: {said}");
    }
}
