//! A training that is killed, whatever it is doing, and resumed ends with the weights of one that was not, to the byte; one that
//! is asked to stop finishes its step and saves it first.
#![cfg(unix)]

#[path = "support/training.rs"]
mod support;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value as Json;
use support::{OPT_PROMPTS, Work, command, done, golden, stage1, stage2};

const SIGKILL: i32 = 9;

/// How often a training may be too quick to be caught before the test gives up.
const ATTEMPTS: usize = 20;

/// A training that runs.
struct Training(Child);

/// How it ended.
struct Ended {
    status: ExitStatus,
    said: String,
    messages: String,
}

impl Ended {
    /// The checkpoint that it names.
    fn checkpoint(&self) -> PathBuf {
        assert!(self.status.success(), "{}", self.messages);
        PathBuf::from(self.said.trim())
    }
}

impl Training {
    fn start(config: &Path, resume: bool) -> Self {
        let mut command = command(&[&"train", &config]);
        if resume {
            command.arg("--resume");
        }
        Self::spawn(command)
    }

    #[allow(clippy::zombie_processes, reason = "`end` waits for it, and so does a test that fails")]
    fn spawn(mut command: Command) -> Self {
        Self(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("started"))
    }

    /// Waits for something to happen; says whether it did before the training came to its end.
    fn runs_until(&mut self, happens: impl Fn() -> bool) -> bool {
        let end = Instant::now() + Duration::from_secs(300);
        while !happens() {
            if self.0.try_wait().expect("a process").is_some() {
                return false;
            }
            assert!(Instant::now() < end, "nothing happens");
            std::thread::sleep(Duration::from_micros(200));
        }
        true
    }

    fn end(mut self) -> Ended {
        let (mut said, mut messages) = (String::new(), String::new());
        self.0.stdout.take().expect("a pipe").read_to_string(&mut said).expect("text");
        self.0.stderr.take().expect("a pipe").read_to_string(&mut messages).expect("text");
        Ended { status: self.0.wait().expect("it ends"), said, messages }
    }
}

impl Drop for Training {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What is in a folder, hidden or not; nothing where there is none.
fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// The moments to kill at: a checkpoint is there; one is being written.
const MOMENTS: [&str; 2] = ["step-", ".step-"];

/// Trains, killed at each of the [`MOMENTS`] and resumed; gives the last checkpoint, which is named `last`. Nothing where it was
/// too quick to be killed before all was done.
fn train_killed(config: &Path, output: &Path, last: &OsStr) -> Option<PathBuf> {
    let mut was_killed = false;
    for moment in MOMENTS {
        let before = names(output);
        let mut training = Training::start(config, was_killed);
        let is_new = |name: &String| name.starts_with(moment) && !before.contains(name);
        if training.runs_until(|| names(output).iter().any(is_new)) {
            training.0.kill().expect("killed");
        }
        let ended = training.end();
        if ended.status.signal() != Some(SIGKILL) {
            let checkpoint = ended.checkpoint();
            return was_killed.then_some(checkpoint);
        }
        if output.join(last).exists() {
            return None; // killed with nothing left to do but to say so
        }
        was_killed = true;
    }
    Some(Training::start(config, true).end().checkpoint())
}

/// Calls `attempt` until it gives something, with the folder `output` not there.
fn caught<T>(output: &Path, mut attempt: impl FnMut() -> Option<T>) -> T {
    for _ in 0..ATTEMPTS {
        if let Some(found) = attempt() {
            return found;
        }
        fs::remove_dir_all(output).expect("removed");
    }
    panic!("the training was too quick {ATTEMPTS} times")
}

/// The steps of a run's log, without what a clock says.
fn steps(output: &Path) -> Vec<Json> {
    let log = fs::read_to_string(output.join("log.jsonl")).expect("a log");
    let step = |line: &str| {
        let mut step: Json = serde_json::from_str(line).expect("JSON");
        let fields = step.as_object_mut().expect("fields");
        for clock in ["time", "images_per_second"] {
            assert!(fields.remove(clock).is_some(), "{line}");
        }
        step
    };
    log.lines().map(step).collect()
}

/// Asserts that two runs ended alike, to the byte.
fn assert_same(a: &Path, b: &Path) {
    assert_eq!(a.file_name(), b.file_name());
    for file in ["model.safetensors", "optimizer.safetensors"] {
        let [a, b] = [a, b].map(|checkpoint| fs::read(checkpoint.join(file)).expect("readable"));
        assert!(a == b, "{file} differs");
    }
    let [a, b] = [a, b].map(|checkpoint| steps(checkpoint.parent().expect("a folder")));
    assert_eq!(a, b);
}

fn killed_and_resumed_equals_uninterrupted(work: &Work, data: &str, fields: &str, epochs: usize) {
    let fields = format!("dropout = 0.1\n{fields}");
    let run = format!("epochs = {epochs}\nsave_every = 1");
    let whole = done(&[&"train", &work.config("whole", data, &fields, &run)]);
    let whole = Path::new(whole.trim());
    let config = work.config("killed", data, &fields, &run);
    let output = work.path("killed");
    let last = whole.file_name().expect("a name");
    let killed = caught(&output, || train_killed(&config, &output, last));
    assert_same(whole, &killed);
    let left: Vec<_> = names(&output).into_iter().filter(|name| name.starts_with('.')).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn stage_1_killed_and_resumed_equals_uninterrupted() {
    let work = Work::new();
    let fields = stage1(&work.converted_stage1());
    killed_and_resumed_equals_uninterrupted(&work, "captions.jsonl", &fields, 24);
    // Matching was learned all the way: its negatives and its dropout are drawn anew after each start.
    assert!(steps(&work.path("killed")).iter().all(|step| step["itm"].as_f64().is_some_and(|itm| itm > 0.0)));
}

#[test]
fn stage_2_killed_and_resumed_equals_uninterrupted() {
    let work = Work::new();
    let opt = golden("blip2_opt");
    killed_and_resumed_equals_uninterrupted(&work, "both.jsonl", &stage2(&opt, &opt, &opt, OPT_PROMPTS), 12);
}

#[test]
fn a_signal_while_features_are_computed_keeps_them() {
    let work = Work::new();
    let opt = golden("blip2_opt");
    let fields = stage2(&opt, &opt, &opt, OPT_PROMPTS) + "dropout = 0.1\n";
    let config = work.config("early", "both.jsonl", &fields, "epochs = 1\nsave_every = 1");
    // Enough to be caught while they are computed.
    let many = fs::read_to_string(&config).expect("readable") + "views = 700\n";
    fs::write(&config, many).expect("written");
    let features = work.path("features");
    let is_begun = || {
        let index = |folder: &String| fs::metadata(features.join(folder).join("index.bin"));
        names(&features).iter().any(|folder| index(folder).is_ok_and(|index| index.len() > 0))
    };
    let mut training = Training::start(&config, false);
    assert!(training.runs_until(is_begun), "it ended before its features began");
    let id = training.0.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().expect("kill is there").success());
    let ended = training.end();
    assert!(ended.status.success(), "{}", ended.messages);
    assert_eq!(ended.said, "", "there is no checkpoint yet");
    assert!(ended.messages.contains("they are kept"), "{}", ended.messages);
    assert!(ended.messages.contains(&format!("blip2 train {}", config.display())), "{}", ended.messages);
    assert!(names(&work.path("early")).is_empty(), "{:?}", names(&work.path("early")));
    let again = Training::start(&config, false).end();
    again.checkpoint();
    assert!(!again.messages.contains(", 0 reused"), "{}", again.messages);
}

#[test]
fn a_signal_lets_the_step_end_and_saves_it() {
    let work = Work::new();
    let opt = golden("blip2_opt");
    let fields = stage2(&opt, &opt, &opt, OPT_PROMPTS) + "dropout = 0.1\n";
    // No checkpoint but the one of the signal, or of the end.
    let config = |name: &str| work.config(name, "both.jsonl", &fields, "epochs = 30\nsave_every = 100000");
    let whole = done(&[&"train", &config("whole")]);
    for signal in ["INT", "TERM"] {
        let (config, output) = (config(signal), work.path(signal));
        let log = output.join("log.jsonl");
        let stopped = caught(&output, || {
            let mut training = Training::start(&config, false);
            if training.runs_until(|| fs::metadata(&log).is_ok_and(|log| log.len() > 0)) {
                let (signal, id) = (format!("-{signal}"), training.0.id().to_string());
                assert!(Command::new("kill").args([signal, id]).status().expect("kill is there").success());
            }
            let ended = training.end();
            assert!(ended.status.success(), "{}", ended.messages);
            ended.messages.contains("stopped and saved").then_some(ended)
        });
        let checkpoint = stopped.checkpoint();
        assert!(stopped.messages.contains("--resume"), "{}", stopped.messages);
        let last = steps(&output).pop().expect("a step")["step"].as_u64().expect("a number");
        assert_eq!(checkpoint, output.join(format!("step-{last:08}")), "the checkpoint of the last step");
        let resumed = Training::start(&config, true).end().checkpoint();
        assert_same(Path::new(whole.trim()), &resumed);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_training_starts_itself_with_the_environment_that_suits_it() {
    let work = Work::new();
    let opt = golden("blip2_opt");
    let fields = stage2(&opt, &opt, &opt, OPT_PROMPTS) + "dropout = 0.1\n";
    let config = work.config("suited", "both.jsonl", &fields, "epochs = 30\nsave_every = 100000");
    let mut command = command(&[&"train", &config, &"--threads", &"2"]);
    command.env_remove("MIMALLOC_PURGE_DELAY").env("CANDLE_BARRIER_POOL_SPIN_LIMIT", "7");
    let mut training = Training::spawn(command);
    let environment = PathBuf::from(format!("/proc/{}/environ", training.0.id()));
    let has = |variable: &[u8]| {
        let environment = fs::read(&environment).unwrap_or_default();
        environment.split(|&byte| byte == 0).any(|found| found == variable)
    };
    let is_suited = training.runs_until(|| {
        has(b"MIMALLOC_PURGE_DELAY=-1")
            && has(b"CANDLE_NUM_THREADS=2")
            && has(b"CANDLE_BARRIER_POOL_SPIN_LIMIT=7")
    });
    let ended = training.end();
    assert!(is_suited, "{}", ended.messages);
    ended.checkpoint();
}
