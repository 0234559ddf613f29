//! Models of the hub through the real command, against a hub on loopback: transfers, the shared cache, and what is said when
//! something is in the way.

#[path = "support/hub.rs"]
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use blip2::weights::safetensors::{NamedTensor, Safetensors, write_safetensors};
use serde_json::Value as Json;
use support::{COMMIT, Content, Fault, Hub, MODEL, encrypted};

/// Nothing listens there.
const NOBODY: &str = "http://127.0.0.1:1";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../blip2/tests/golden").join(name)
}

/// The command, without anything of this machine's.
fn command(home: &Path, endpoint: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
    command.args(arguments).env_clear().env("HOME", home).env("HF_ENDPOINT", endpoint);
    command
}

fn run(home: &Path, endpoint: &str, arguments: &[&str]) -> Output {
    command(home, endpoint, arguments).output().expect("the command runs")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn succeeded(output: &Output) -> String {
    assert!(output.status.success(), "{}", stderr(output));
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

/// Asserts that it failed with a last line that holds all of `words`.
fn refused(output: &Output, words: &[&str]) {
    let said = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(output.stdout.is_empty() && !said.contains("panicked"), "{said}");
    let last = said.lines().last().expect("a line");
    assert!(last.starts_with("blip2: "), "{said}");
    words.iter().for_each(|word| assert!(last.contains(word), "`{word}` is not in: {said}"));
}

fn cache(home: &Path) -> PathBuf {
    home.join(".cache/huggingface/hub/models--org--tiny-blip2")
}

/// The tokens of a caption of the golden picture.
fn caption(output: &Output) -> Json {
    let rows: Json = serde_json::from_str(&succeeded(output)).expect("JSON");
    let tokens = rows[0]["token_ids"].clone();
    assert!(tokens.as_array().is_some_and(|tokens| !tokens.is_empty()), "{rows}");
    tokens
}

fn caption_arguments<'a>(model: &'a str, picture: &'a str) -> [&'a str; 5] {
    ["caption", "--json", "--model", model, picture]
}

#[test]
fn a_model_is_fetched_once_and_then_works_without_a_network() {
    let home = tempfile::tempdir().expect("a folder");
    let hub = Hub::start(&golden("blip2_opt"));
    let picture = golden("blip2.png");
    let picture = picture.to_str().expect("UTF-8");
    let local = golden("blip2_opt");
    let local = local.to_str().expect("UTF-8");
    let expected = caption(&run(home.path(), NOBODY, &caption_arguments(local, picture)));

    let output = run(home.path(), &hub.address, &caption_arguments(MODEL, picture));
    assert_eq!(caption(&output), expected);
    let said = stderr(&output);
    assert!(said.contains("fetching model.safetensors of org/tiny-blip2"), "{said}");
    assert!(said.contains("the model needs about") && said.contains("of memory"), "{said}");

    // As huggingface_hub lays it out.
    let folder = cache(home.path());
    assert_eq!(fs::read_to_string(folder.join("refs/main")).expect("a branch"), COMMIT);
    let snapshot = folder.join("snapshots").join(COMMIT);
    let names = |folder: &Path| -> Vec<String> {
        let entries =
            fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").file_name());
        let mut names: Vec<_> = entries.map(|name| name.into_string().expect("UTF-8")).collect();
        names.sort();
        names
    };
    assert_eq!(
        names(&snapshot),
        [
            "config.json",
            "model.safetensors",
            "preprocessor_config.json",
            "tokenizer.json",
            "tokenizer_config.json"
        ],
        "only what is needed"
    );
    #[cfg(unix)]
    hub.files(|files| {
        for name in names(&snapshot) {
            let link = fs::read_link(snapshot.join(&name)).expect("a link");
            assert_eq!(link, Path::new("../../blobs").join(&files[&name].etag));
            assert_eq!(fs::read(snapshot.join(&name)).expect("readable"), files[&name].bytes);
        }
    });
    assert!(names(&folder.join("blobs")).iter().all(|name| !name.contains("incomplete")));

    // Once more: one question to the hub, which nothing has changed at.
    hub.take_seen("");
    assert_eq!(caption(&run(home.path(), &hub.address, &caption_arguments(MODEL, picture))), expected);
    let lines: Vec<_> = hub.take_seen("").into_iter().map(|seen| seen.line).collect();
    assert_eq!(lines, [format!("GET /api/models/{MODEL}/revision/main")]);

    // Forbidden to ask, and asking in vain.
    let mut offline = command(home.path(), &hub.address, &caption_arguments(MODEL, picture));
    assert_eq!(caption(&offline.env("HF_HUB_OFFLINE", "1").output().expect("the command runs")), expected);
    assert!(hub.take_seen("").is_empty(), "offline is offline");
    let output = run(home.path(), NOBODY, &caption_arguments(MODEL, picture));
    assert_eq!(caption(&output), expected);
    assert!(
        stderr(&output).contains("as it is in the cache: 127.0.0.1:1 cannot be reached"),
        "{}",
        stderr(&output)
    );

    // A commit needs no question.
    let commit = format!("{MODEL}@{COMMIT}");
    assert_eq!(caption(&run(home.path(), &hub.address, &caption_arguments(&commit, picture))), expected);
    assert!(hub.take_seen("").is_empty());
}

#[test]
fn a_model_is_quantised_by_its_name() {
    let home = tempfile::tempdir().expect("a folder");
    let hub = Hub::start(&golden("blip2_opt"));
    let out = home.path().join("int8");
    let out = out.to_str().expect("UTF-8");
    let output = run(home.path(), &hub.address, &["quantize", MODEL, out, "--dtype", "int8"]);
    succeeded(&output);
    assert!(stderr(&output).contains("the model needs about"), "{}", stderr(&output));
    // It is known by that name still.
    let info = succeeded(&run(home.path(), NOBODY, &["info", "--json", "--model", out]));
    let info: Json = serde_json::from_str(&info).expect("JSON");
    assert_eq!(info["config"]["name"], MODEL);
    refused(
        &run(home.path(), &hub.address, &["quantize", "org/other", out, "--dtype", "int8"]),
        &["the hub has no org/other"],
    );
}

#[test]
fn a_folder_of_that_name_comes_first() {
    let home = tempfile::tempdir().expect("a folder");
    let hub = Hub::start(&golden("blip2_opt"));
    let folder = home.path().join(MODEL);
    fs::create_dir_all(&folder).expect("made");
    let mut command = command(home.path(), &hub.address, &caption_arguments(MODEL, "a.jpg"));
    let output = command.current_dir(home.path()).output().expect("the command runs");
    refused(&output, &["org/tiny-blip2/config.json"]);
    assert!(hub.take_seen("").is_empty());
}

#[test]
fn the_token_is_shown_to_the_hub_alone() {
    let home = tempfile::tempdir().expect("a folder");
    let hub = Hub::start(&golden("blip2_opt"));
    hub.require_token("hf_secret");
    refused(
        &run(home.path(), &hub.address, &["fetch", MODEL]),
        &["gated", "accept its terms", "set HF_TOKEN"],
    );
    let with = |token: &str| {
        let mut command = command(home.path(), &hub.address, &["fetch", MODEL]);
        command.env("HF_TOKEN", token).output().expect("the command runs")
    };
    let output = with("hf_wrong");
    refused(&output, &["the token (HF_TOKEN or its file) may not see it"]);
    assert!(!stderr(&output).contains("hf_wrong"));
    refused(&with("hf \u{7f}"), &["HF_TOKEN", "holds characters that no token has"]);
    assert!(!cache(home.path()).join("refs").exists());
    hub.take_seen("");
    // From the file that `hf auth login` writes.
    fs::create_dir_all(home.path().join(".cache/huggingface")).expect("made");
    fs::write(home.path().join(".cache/huggingface/token"), "hf_secret\n").expect("written");
    let folder = succeeded(&run(home.path(), &hub.address, &["fetch", MODEL]));
    assert_eq!(Path::new(folder.trim_end()), cache(home.path()).join("snapshots").join(COMMIT));
    let seen = hub.take_seen("");
    assert!(seen.iter().any(|seen| !seen.is_at_hub), "another host delivered the weights");
    for seen in seen {
        assert_eq!(seen.authorization.is_some(), seen.is_at_hub, "{seen:?}");
    }
}

/// Only whom the given authority vouches for is believed, and from an encrypted hub nobody is sent to an unencrypted host.
#[test]
fn connections_are_encrypted() {
    let home = tempfile::tempdir().expect("a folder");
    let hub = Hub::start(&golden("blip2_opt"));
    let address = encrypted(&hub.address);
    let fetch = |certificates: Option<&Path>| {
        let mut command = command(home.path(), &address, &["fetch", MODEL]);
        command.envs(certificates.map(|file| ("SSL_CERT_FILE", file)));
        command.output().expect("the command runs")
    };
    refused(&fetch(None), &["127.0.0.1", "certificate"]);
    let authority = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tls/authority.pem");
    refused(&fetch(Some(&authority)), &["redirects to `http://127.0.0.1", "not encrypted"]);
    hub.files(|files| {
        let weights = files.get_mut("model.safetensors").expect("weights");
        *weights = Content::new(weights.bytes.clone(), false);
    });
    succeeded(&fetch(Some(&authority)));
    let none = home.path().join("none.pem");
    refused(&fetch(Some(&none)), &["certificates", "none.pem"]);
    fs::write(&none, "nothing").expect("written");
    refused(&fetch(Some(&none)), &["none.pem", "holds no certificates"]);
}

#[test]
fn a_cut_connection_goes_on_from_its_byte() {
    let home = tempfile::tempdir().expect("a folder");
    let hub = Hub::start(&golden("blip2_opt"));
    hub.fault("GET /signed/model.safetensors", Fault::Cut(100_000));
    hub.fault("GET /signed/model.safetensors", Fault::Cut(50_000));
    let output = run(home.path(), &hub.address, &["fetch", MODEL]);
    succeeded(&output);
    let ranges: Vec<_> =
        hub.take_seen("GET /signed/model.safetensors").into_iter().map(|seen| seen.range).collect();
    assert_eq!(ranges, [None, Some("bytes=100000-".into()), Some("bytes=150000-".into())]);
    assert!(stderr(&output).contains("model.safetensors at byte 100000 of 344392"), "{}", stderr(&output));
}

/// What an earlier process left is used, unless it was damaged; a server that cannot skip sends all.
#[test]
fn what_an_earlier_run_left_is_not_fetched_again() {
    let hub = Hub::start(&golden("blip2_opt"));
    let mut weights = None;
    hub.files(|files| weights = files.get("model.safetensors").cloned());
    let Content { bytes, etag, .. } = weights.expect("weights");
    let mut damaged = bytes[..9000].to_vec();
    damaged[100] ^= 1;
    let longer = [&bytes[..], b"more"].concat();
    for (left, fault, expected) in [
        (&bytes[..9000], None, vec![Some("bytes=9000-")]),
        (&bytes[..], None, vec![]),
        (&damaged, None, vec![Some("bytes=9000-"), None]),
        (&longer, None, vec![None]),
        (&bytes[..9000], Some(Fault::NoRange), vec![Some("bytes=9000-")]),
    ] {
        let home = tempfile::tempdir().expect("a folder");
        let blobs = cache(home.path()).join("blobs");
        fs::create_dir_all(&blobs).expect("made");
        fs::write(blobs.join(format!("{etag}.incomplete")), left).expect("written");
        if let Some(fault) = fault {
            hub.fault("GET /signed/model.safetensors", fault);
        }
        hub.take_seen("");
        succeeded(&run(home.path(), &hub.address, &["fetch", MODEL]));
        let seen = hub.take_seen("GET /signed/model.safetensors");
        let ranges: Vec<_> = seen.iter().map(|seen| seen.range.as_deref()).collect();
        assert_eq!(ranges, expected);
        assert_eq!(fs::read(blobs.join(&etag)).expect("whole"), bytes);
        assert!(!blobs.join(format!("{etag}.incomplete")).exists());
    }
}

#[test]
fn content_of_another_hash_is_refused() {
    for name in ["model.safetensors", "tokenizer.json"] {
        let home = tempfile::tempdir().expect("a folder");
        let hub = Hub::start(&golden("blip2_opt"));
        let mut etag = String::new();
        hub.files(|files| {
            let content = files.get_mut(name).expect("a file");
            content.bytes[1000] ^= 1;
            etag.clone_from(&content.etag);
        });
        refused(
            &run(home.path(), &hub.address, &["fetch", MODEL]),
            &[name, "came damaged", &etag, "nothing of it was kept"],
        );
        for left in [etag.clone(), format!("{etag}.incomplete")] {
            assert!(!cache(home.path()).join("blobs").join(left).exists());
        }
        assert!(!cache(home.path()).join("refs/main").exists(), "a branch in the cache is a whole model");
    }
}

#[test]
fn a_busy_hub_is_asked_again() {
    let home = tempfile::tempdir().expect("a folder");
    let hub = Hub::start(&golden("blip2_opt"));
    hub.fault("GET /api/models", Fault::Status(429, "Retry-After: 0\r\n"));
    hub.fault("GET /api/models", Fault::Status(503, ""));
    hub.fault("HEAD /org/tiny-blip2/resolve", Fault::Status(502, "Retry-After: 0\r\n"));
    hub.fault("GET /signed/model.safetensors", Fault::Status(500, "Retry-After: 0\r\n"));
    // A signed address that has expired: the hub gives another.
    hub.fault("GET /signed/model.safetensors", Fault::Status(403, ""));
    let output = run(home.path(), &hub.address, &["fetch", MODEL]);
    succeeded(&output);
    assert!(
        stderr(&output).contains("the hub is busy (status 429); trying again in 0.0 s"),
        "{}",
        stderr(&output)
    );

    let home = tempfile::tempdir().expect("a folder");
    for _ in 0..3 {
        hub.fault("GET /api/models", Fault::Status(503, "Retry-After: 0\r\n"));
    }
    refused(&run(home.path(), &hub.address, &["fetch", MODEL]), &["the hub is busy (status 503)"]);
}

#[test]
fn refusals_say_what_they_mean() {
    let home = tempfile::tempdir().expect("a folder");
    let hub = Hub::start(&golden("blip2_opt"));
    let fetch = |model: &str| run(home.path(), &hub.address, &["caption", "a.jpg", "--model", model]);
    refused(
        &fetch("org/other"),
        &["there is no folder org/other here", "the hub has no org/other", "HF_TOKEN"],
    );
    refused(&fetch("org/tiny-blip2@v9"), &["org/tiny-blip2 has no branch, tag or commit `v9`"]);
    refused(&fetch("org/tiny-blip2@../../etc"), &["not a branch, tag or commit"]);
    refused(&fetch("no/such/folder"), &["there is no folder no/such/folder", "organisation/name"]);
    hub.fault("GET /api/models", Fault::Status(403, "X-Error-Code: GatedRepo\r\n"));
    refused(&fetch(MODEL), &["gated", "/org/tiny-blip2", "HF_TOKEN"]);
    hub.fault("GET /api/models", Fault::Status(404, "X-Error-Code: RepoNotFound\r\n"));
    refused(&fetch(MODEL), &["the hub has no org/tiny-blip2"]);
    hub.fault("GET /api/models", Fault::Status(451, "X-Error-Message: not here\r\n"));
    refused(&fetch(MODEL), &["status 451"]);
    hub.fault("HEAD", Fault::Status(404, "X-Error-Code: EntryNotFound\r\n"));
    refused(&fetch(MODEL), &["config.json", "not there any more"]);

    let offline = |model: &str| {
        let mut command = command(home.path(), &hub.address, &["caption", "a.jpg", "--model", model]);
        command.env("HF_HUB_OFFLINE", "1").output().expect("the command runs")
    };
    hub.take_seen("");
    refused(
        &offline(MODEL),
        &["there is no folder", "not in the cache", "models--org--tiny-blip2", "HF_HUB_OFFLINE"],
    );
    let snapshot = cache(home.path()).join("snapshots").join(COMMIT);
    fs::create_dir_all(&snapshot).expect("made");
    fs::create_dir_all(cache(home.path()).join("refs")).expect("made");
    fs::write(cache(home.path()).join("refs/main"), COMMIT).expect("written");
    fs::copy(golden("blip2_opt/config.json"), snapshot.join("config.json")).expect("copied");
    refused(&offline(MODEL), &["the cache lacks tokenizer.json, model.safetensors", "HF_HUB_OFFLINE"]);
    assert!(hub.take_seen("").is_empty());
}

/// A hub that nobody should trust: names that lead elsewhere, sizes that are not there, redirects in a circle.
#[test]
fn what_the_hub_says_is_checked() {
    let refused_by = |change: &dyn Fn(&Hub), words: &[&str]| {
        let home = tempfile::tempdir().expect("a folder");
        let hub = Hub::start(&golden("blip2_opt"));
        change(&hub);
        refused(&run(home.path(), &hub.address, &["fetch", MODEL]), words);
        assert!(!home.path().join("escaped").exists());
    };
    let file = |hub: &Hub, name: &str, change: &dyn Fn(&mut Content)| {
        hub.files(|files| change(files.get_mut(name).expect("a file")))
    };
    refused_by(
        &|hub| file(hub, "config.json", &|content| content.etag = "../../../../escaped".into()),
        &["does not tell hash and size of config.json"],
    );
    refused_by(
        &|hub| file(hub, "model.safetensors", &|content| content.size = 1 << 60),
        &["1.15 EB", "are to be fetched and", "are free", "HF_HUB_CACHE"],
    );
    refused_by(
        &|hub| file(hub, "model.safetensors", &|content| content.size = 1000),
        &["more than the 1000 bytes"],
    );
    for location in ["http://127.0.0.1:1/x", "file:///etc/passwd", "/api/models/org/tiny-blip2/revision/main"]
    {
        let redirect: &'static str = format!("Location: {location}\r\n").leak();
        refused_by(
            &|hub| (0..9).for_each(|_| hub.fault("GET /api/models", Fault::Status(302, redirect))),
            &[match location {
                "http://127.0.0.1:1/x" => "cannot be reached",
                "file:///etc/passwd" => "redirects to `file:///etc/passwd`",
                _ => "redirects again and again",
            }],
        );
    }
    refused_by(
        &|hub| hub.files(|files| files.retain(|name, _| name != "tokenizer.json")),
        &["it has no tokenizer"],
    );
    refused_by(
        &|hub| hub.files(|files| files.retain(|name, _| name != "model.safetensors")),
        &["the model org/tiny-blip2", "no weights as safetensors", ".bin", "blip2 convert FOLDER NEW-FOLDER"],
    );
    let index = br#"{"weight_map": {"a": "../../../../escaped"}}"#;
    refused_by(
        &|hub| {
            hub.files(|files| {
                files.remove("model.safetensors");
                files.insert("model.safetensors.index.json".into(), Content::new(index.to_vec(), false));
            });
        },
        &["not a plain file name"],
    );
    let other = br#"{"model_type": "llava"}"#;
    refused_by(
        &|hub| {
            hub.files(|files| drop(files.insert("config.json".into(), Content::new(other.to_vec(), false))))
        },
        &["the model org/tiny-blip2", "`llava`", "blip-2"],
    );
}

/// The golden model in two shards, beside the copy in one file or alone.
#[test]
fn of_two_copies_one_is_fetched() {
    let shards = tempfile::tempdir().expect("a folder");
    let source = Safetensors::open(golden("blip2_opt")).expect("weights");
    let names: Vec<_> = source.names().map(String::from).collect();
    let mut weight_map = BTreeMap::new();
    for (i, names) in names.chunks(names.len().div_ceil(2)).enumerate() {
        let shard = format!("model-0000{}-of-00002.safetensors", i + 1);
        let values: Vec<_> = names.iter().map(|name| source.read_f32(name).expect("values")).collect();
        let tensors: Vec<_> = names
            .iter()
            .zip(&values)
            .map(|(name, values)| NamedTensor::f32(name, source.shape(name).expect("a shape"), values))
            .collect();
        write_safetensors(shards.path().join(&shard), &tensors, &BTreeMap::new()).expect("written");
        weight_map.extend(names.iter().map(|name| (name.clone(), shard.clone())));
    }
    let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": weight_map}).to_string();
    fs::write(shards.path().join("model.safetensors.index.json"), index).expect("written");
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"] {
        fs::copy(golden("blip2_opt").join(name), shards.path().join(name)).expect("copied");
    }
    let picture = golden("blip2.png");
    let arguments = caption_arguments(MODEL, picture.to_str().expect("UTF-8"));

    let home = tempfile::tempdir().expect("a folder");
    let hub = Hub::start(shards.path());
    let sharded = caption(&run(home.path(), &hub.address, &arguments));
    assert_eq!(hub.take_seen("GET /signed/model-0000").len(), 2);

    fs::copy(golden("blip2_opt/model.safetensors"), shards.path().join("model.safetensors")).expect("copied");
    let home = tempfile::tempdir().expect("a folder");
    let hub = Hub::start(shards.path());
    assert_eq!(caption(&run(home.path(), &hub.address, &arguments)), sharded);
    let seen: Vec<_> = hub.take_seen("GET /signed/").into_iter().map(|seen| seen.line).collect();
    assert_eq!(seen, ["GET /signed/model.safetensors?signature=1"]);

    // A shard that the hub does not have is noticed before the others are fetched.
    let home = tempfile::tempdir().expect("a folder");
    hub.files(|files| {
        files.remove("model.safetensors");
        files.remove("model-00002-of-00002.safetensors");
    });
    refused(
        &run(home.path(), &hub.address, &["fetch", MODEL]),
        &["model-00002-of-00002", "the hub does not have"],
    );
    assert!(hub.take_seen("GET /signed/").is_empty());
}

#[test]
fn two_at_once_fetch_once() {
    let home = tempfile::tempdir().expect("a folder");
    let hub = Hub::start(&golden("blip2_opt"));
    hub.fault("GET /signed/model.safetensors", Fault::Late(Duration::from_secs(3)));
    let spawn = || {
        let mut command = command(home.path(), &hub.address, &["fetch", MODEL]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the command runs")
    };
    let both = [spawn(), spawn()].map(|process| process.wait_with_output().expect("it ends"));
    both.iter().for_each(|output| drop(succeeded(output)));
    let waited =
        both.iter().filter(|output| stderr(output).contains("another process is fetching model.safetensors"));
    assert_eq!(waited.count(), 1, "{} {}", stderr(&both[0]), stderr(&both[1]));
    assert_eq!(hub.take_seen("GET /signed/model.safetensors").len(), 1);
}

/// A process that is killed in mid-file leaves what the next one goes on from.
#[test]
fn a_killed_process_is_continued() {
    let home = tempfile::tempdir().expect("a folder");
    let hub = Hub::start(&golden("blip2_opt"));
    let mut etag = String::new();
    hub.files(|files| etag.clone_from(&files["model.safetensors"].etag));
    let incomplete = cache(home.path()).join("blobs").join(format!("{etag}.incomplete"));
    // Nothing more comes after the cut, so that the process waits when it is killed.
    hub.fault("GET /signed/model.safetensors", Fault::Cut(200_000));
    hub.fault("GET /signed/model.safetensors", Fault::Late(Duration::from_secs(60)));
    let mut process = command(home.path(), &hub.address, &["fetch", MODEL])
        .stderr(Stdio::null())
        .spawn()
        .expect("the command runs");
    while fs::metadata(&incomplete).map_or(0, |about| about.len()) < 200_000 {
        assert!(process.try_wait().expect("a process").is_none(), "it ended too early");
        std::thread::sleep(Duration::from_millis(20));
    }
    process.kill().expect("killed");
    process.wait().expect("ended");
    hub.take_seen("");
    succeeded(&run(home.path(), &hub.address, &["fetch", MODEL]));
    let ranges: Vec<_> =
        hub.take_seen("GET /signed/model.safetensors").into_iter().filter_map(|seen| seen.range).collect();
    assert!(ranges.contains(&"bytes=200000-".to_owned()), "{ranges:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn weights_that_cannot_fit_into_memory_are_not_fetched() {
    let home = tempfile::tempdir().expect("a folder");
    let hub = Hub::start(&golden("blip2_opt"));
    hub.files(|files| files.get_mut("model.safetensors").expect("weights").size = 100 << 40);
    let output = run(home.path(), &hub.address, &["caption", "a.jpg", "--model", MODEL]);
    refused(&output, &["need at least 54.98 TB of memory", "are available", "--ignore-memory"]);
    let output = run(home.path(), &hub.address, &["caption", "a.jpg", "--model", MODEL, "--ignore-memory"]);
    refused(&output, &["109.95 TB are to be fetched"]);
    assert!(hub.take_seen("GET /signed").is_empty());
}

/// A file with a terabyte of zeros takes no room; its header says how much memory it would need.
#[cfg(target_os = "linux")]
#[test]
fn a_model_larger_than_memory_is_refused_before_it_is_loaded() {
    let home = tempfile::tempdir().expect("a folder");
    let folder = home.path().join("model");
    fs::create_dir(&folder).expect("made");
    for name in ["config.json", "tokenizer.json"] {
        fs::copy(golden("blip2_opt").join(name), folder.join(name)).expect("copied");
    }
    let n_rows: u64 = 1 << 39;
    let header =
        format!(r#"{{"huge":{{"dtype":"F16","shape":[{n_rows},1],"data_offsets":[0,{}]}}}}"#, 2 * n_rows);
    let path = folder.join("model.safetensors");
    fs::write(&path, [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()).expect("written");
    let file = fs::File::options().write(true).open(&path).expect("opened");
    file.set_len(8 + header.len() as u64 + 2 * n_rows).expect("a file with holes");
    let model = folder.to_str().expect("UTF-8");
    let arguments = ["caption", "a.jpg", "--model", model];
    let words = ["the model needs about 1.24 TB of memory", "are available", "--ignore-memory"];
    refused(&run(home.path(), NOBODY, &arguments), &words);
    let ignored = run(home.path(), NOBODY, &[&arguments[..], &["--ignore-memory"]].concat());
    refused(&ignored, &["config.json", "the checkpoint has 1 tensors in all"]);
}

/// The cache is that of Python's huggingface_hub: what one fills the other reads.
#[test]
fn the_cache_is_shared_with_python() {
    let Some(python) = std::env::var_os("BLIP2_PYTHON") else {
        println!("SKIPPED: BLIP2_PYTHON names no Python with huggingface_hub");
        return;
    };
    let hub = Hub::start(&golden("blip2_opt"));
    let python = |home: &Path, offline: &str, script: &str| {
        let mut command = Command::new(&python);
        let output = command
            .args(["-c", script])
            .env_clear()
            .envs([
                ("HOME", home.as_os_str()),
                ("HF_ENDPOINT", hub.address.as_ref()),
                ("HF_HUB_OFFLINE", offline.as_ref()),
            ])
            .env("HF_HUB_DISABLE_XET", "1")
            .output();
        succeeded(&output.expect("Python runs"))
    };
    let names = "['config.json', 'model.safetensors', 'preprocessor_config.json', 'tokenizer.json', 'tokenizer_config.json']";
    let script = format!(
        "from huggingface_hub import hf_hub_download\nfor name in {names}: print(hf_hub_download('{MODEL}', name))"
    );
    let snapshot = |home: &Path| cache(home).join("snapshots").join(COMMIT);

    let ours = tempfile::tempdir().expect("a folder");
    succeeded(&run(ours.path(), &hub.address, &["fetch", MODEL]));
    let found = python(ours.path(), "1", &script);
    assert_eq!(found.lines().count(), 5);
    found.lines().for_each(|line| assert_eq!(Path::new(line).parent(), Some(&*snapshot(ours.path()))));

    let theirs = tempfile::tempdir().expect("a folder");
    python(theirs.path(), "0", &script);
    let mut offline = command(theirs.path(), NOBODY, &["fetch", MODEL]);
    let found = succeeded(&offline.env("HF_HUB_OFFLINE", "1").output().expect("the command runs"));
    assert_eq!(Path::new(found.trim_end()), snapshot(theirs.path()));
    hub.take_seen("");
    succeeded(&run(theirs.path(), &hub.address, &["fetch", MODEL]));
    assert_eq!(hub.take_seen("").len(), 1, "nothing of Python's is fetched again");
}
