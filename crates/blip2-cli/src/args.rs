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
    /// Make training data.
    #[command(subcommand)]
    Data(DataCommand),
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

#[derive(Debug, Subcommand)]
pub(crate) enum DataCommand {
    /// Make questions with answers from captions, by rules: objects, numbers, colours, yes or no.
    Questions {
        /// JSON lines with `image` and `captions`.
        captions: PathBuf,
        /// The JSON lines to write.
        out: PathBuf,
        /// Seed of what is drawn at random.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Write the manifests that the default model is trained and measured on.
    Prepare {
        /// The folder with flickr8k, places, paintings and people.
        #[arg(long)]
        shared: PathBuf,
        /// The data folder of the Python package easy-vqa; without it that part is left out.
        #[arg(long)]
        easy_vqa: Option<PathBuf>,
        /// Where to write.
        #[arg(long)]
        out: PathBuf,
        /// Seed of what is set aside and drawn at random.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
}
