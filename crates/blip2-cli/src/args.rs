//! What can be written behind `blip2`; parsing only, nothing is opened here.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// BLIP-2 in Rust: a small trained bridge that lets a frozen language model see.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Train a Q-Former on your pictures and captions (stage 1), from a configuration file.
    Train(TrainArgs),
    /// Print a completion script for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct TrainArgs {
    /// The run's configuration (TOML); paths in it are relative to it.
    pub(crate) config: PathBuf,
    /// Continue from the newest checkpoint of the run's output folder.
    #[arg(long)]
    pub(crate) resume: bool,
}
