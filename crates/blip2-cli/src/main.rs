//! The `blip2` command. Results go to standard output, progress and messages to standard error.
//!
//! Exit status: 0 done, 1 failed (of several items all), 2 wrong usage, 3 some of several items failed.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the one crate that talks to a terminal")]

mod args;
mod bench;
mod caption;
mod compare;
mod convert;
mod data;
mod describe;
mod dtype;
mod eval;
mod explain;
mod filter;
mod frozen;
mod generation;
mod hub;
mod info;
mod memory;
mod model;
mod names;
mod pack;
mod process;
mod quantize;
mod rows;
mod serve;
mod train;

use std::io::Write;
use std::num::NonZeroUsize;
use std::process::ExitCode;

use anyhow::Context;
use args::{Args, Command};
use blip2::layers::Isa;
use clap::CommandFactory;

/// How a command ended that did not fail as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Done {
    All,
    /// Of several items some failed; each was named.
    SomeFailed,
    /// All items failed, or the only one; each was named.
    AllFailed,
}

impl Done {
    /// After `n_failed` of `n_items` failed and were named.
    fn of(n_failed: usize, n_items: usize) -> Self {
        match n_failed {
            0 => Self::All,
            n if n == n_items => Self::AllFailed,
            _ => Self::SomeFailed,
        }
    }
}

fn main() -> ExitCode {
    let Args { threads, command } = Args::read();
    if let Err(error) = Isa::from_environment() {
        eprintln!("blip2: {error}");
        return ExitCode::from(2);
    }
    let serves = matches!(command, Command::Serve(_));
    match command {
        Command::Train(_) => process::restart_with(process::for_training(threads)),
        Command::Serve(_) => process::restart_with(process::for_serving()),
        _ => {}
    }
    match start_threads(threads, !serves).and_then(|()| run(command)) {
        Ok(Done::All) => ExitCode::SUCCESS,
        Ok(Done::SomeFailed) => ExitCode::from(3),
        Ok(Done::AllFailed) => ExitCode::FAILURE,
        // Whoever read the output has had enough: not a failure of ours.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("blip2: {}", message(&error));
            if error.is::<generation::WrongUsage>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

/// Starts the threads that compute, as many as are asked for, or as rayon says; the tensor engine computes on the same ones.
/// This thread is one of them where `with_this` says so: else it wakes another for each parallel operation, and sleeps until that
/// one wakes it. A thread that waits for something else must not be one.
fn start_threads(n: Option<NonZeroUsize>, with_this: bool) -> anyhow::Result<()> {
    let mut threads = rayon::ThreadPoolBuilder::new();
    if let Some(n) = n {
        threads = threads.num_threads(n.get());
    }
    if with_this {
        threads = threads.use_current_thread();
    }
    threads.build_global().context("the threads that compute cannot be started")
}

fn run(command: Command) -> anyhow::Result<Done> {
    match command {
        Command::Caption(args) => caption::run(&args),
        Command::Ask(args) => describe::ask(&args),
        Command::Chat(args) => describe::chat(&args),
        Command::Match(args) => compare::match_texts(&args),
        Command::Embed(args) => compare::embed(&args),
        Command::Classify(args) => compare::classify(&args),
        Command::Explain(args) => explain::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Pack(args) => pack::run(&args),
        Command::Convert(args) => convert::run(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::Serve(args) => serve::run(args).map(|()| Done::All),
        Command::Fetch { training: Some(folder), .. } => frozen::for_training(&folder).map(|()| Done::All),
        Command::Fetch { model: None, .. } => frozen::ensure(true).map(|()| Done::All),
        Command::Fetch { model: Some(name), .. } => model::fetch(&name).map(|()| Done::All),
        Command::Train(args) => train::run(&args).map(|()| Done::All),
        Command::Data(args) => data::run(&args),
        Command::Completions { shell } => {
            // It panics where its writer fails: what fails is our own writing.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "blip2", &mut script);
            std::io::stdout().lock().write_all(&script)?;
            Ok(Done::All)
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// The error and its causes in one line; what a message already ends with is not said twice.
fn message(error: &anyhow::Error) -> String {
    error
        .chain()
        .map(ToString::to_string)
        .reduce(|said, cause| if said.ends_with(&cause) { said } else { format!("{said}: {cause}") })
        .map(|said| blip2_train::one_line(&said).into_owned())
        .unwrap_or_default()
}
