//! The `blip2` command. Results go to standard output, progress and messages to standard error.
//!
//! Exit status: 0 done, 1 failed, 2 wrong usage.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the one crate that talks to a terminal")]

mod args;
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
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Args::command(), "blip2", &mut std::io::stdout());
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("blip2: {error:#}");
            ExitCode::FAILURE
        }
    }
}
