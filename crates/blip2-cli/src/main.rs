//! The `blip2` command. Results go to standard output, progress and messages to standard error.
//!
//! Exit status: 0 done, 1 failed, 2 wrong usage.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the one crate that talks to a terminal")]

mod args;
mod data;
mod train;

use std::process::ExitCode;

use args::{Args, Command};
use clap::{CommandFactory, Parser};

// Training frees and takes tensors of megabytes at every step; the system's allocator returns each to the kernel.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let result = match Args::parse().command {
        Command::Train(args) => train::run(&args),
        Command::Data(command) => data::run(&command),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Args::command(), "blip2", &mut std::io::stdout());
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("blip2: {}", message(&error));
            ExitCode::FAILURE
        }
    }
}

/// The error and its causes in one line; what a message already ends with is not said twice.
fn message(error: &anyhow::Error) -> String {
    error
        .chain()
        .map(ToString::to_string)
        .reduce(|said, cause| if said.ends_with(&cause) { said } else { format!("{said}: {cause}") })
        .unwrap_or_default()
}
