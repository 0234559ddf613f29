//! How texts are generated: a model's own settings, or those of a preset, with what the arguments change of them. What cannot be
//! is said before a weight is read, in the words of the arguments.

use std::fmt;
use std::path::Path;

use blip2::generate::{EarlyStopping, GenerationConfig};
use blip2::model::{Blip2, GenerationDefaults, Preset};

use crate::args::{EarlyStoppingArg, GenerationArgs, PresetArg};

/// A mistake in the arguments that parsing alone does not see: the command ends as with any wrong usage.
#[derive(Debug)]
pub(crate) struct WrongUsage(pub(crate) String);

impl WrongUsage {
    /// Ends a command with this message.
    pub(crate) fn end<T>(message: impl Into<String>) -> anyhow::Result<T> {
        Err(Self(message.into()).into())
    }
}

impl fmt::Display for WrongUsage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for WrongUsage {}

/// What is written, for each of which a model has settings of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Written {
    Captions,
    Answers,
}

impl Written {
    /// Refuses what contradicts the settings of the model in `folder`, before that is opened.
    ///
    /// # Errors
    /// [`WrongUsage`], or why the folder's small files cannot be read.
    pub(crate) fn check(
        self,
        folder: &Path,
        preset: Option<PresetArg>,
        args: &GenerationArgs,
    ) -> anyhow::Result<()> {
        let defaults = GenerationDefaults::read(folder, preset.map(Preset::from))?;
        let own = match self {
            Self::Captions => defaults.captions,
            Self::Answers => defaults.answers,
        };
        validate(&changed(own, args))
    }

    /// The model's own settings, or those of the preset, with what the arguments change.
    pub(crate) fn settings(
        self,
        model: &Blip2,
        preset: Option<PresetArg>,
        args: &GenerationArgs,
    ) -> GenerationConfig {
        let preset = preset.map(Preset::from);
        let own = match self {
            Self::Captions => model.generation(preset),
            Self::Answers => model.answering(preset),
        };
        changed(own, args)
    }
}

/// Refuses what no model could be asked for, before one is looked for or fetched.
///
/// # Errors
/// [`WrongUsage`].
pub(crate) fn check(args: &GenerationArgs) -> anyhow::Result<()> {
    // A model that contradicts nothing: it draws unless beams are wanted, which bound the number of texts, and writes texts of
    // any length.
    let any = GenerationConfig {
        do_sample: args.num_beams.is_none_or(|n| n < 2),
        max_new_tokens: usize::MAX,
        ..GenerationConfig::default()
    };
    validate(&changed(any, args))
}

/// The settings of the library and the flags that change them, in an order in which no flag is taken for a setting.
const FLAGS: [(&str, &str); 12] = [
    ("num_beams", "--num-beams"),
    ("max_new_tokens", "--max-new-tokens"),
    ("min_new_tokens", "--min-new-tokens"),
    ("length_penalty", "--length-penalty"),
    ("repetition_penalty", "--repetition-penalty"),
    ("top_k", "--top-k"),
    ("top_p", "--top-p"),
    ("min_p", "--min-p"),
    ("temperature", "--temperature"),
    ("do_sample", "--temperature"),
    ("num_return_sequences", "--num-captions"),
    ("stop_strings", "--stop"),
];

fn validate(config: &GenerationConfig) -> anyhow::Result<()> {
    match config.validate() {
        Ok(()) => Ok(()),
        Err(blip2::Error::Config { field, reason }) => Err(in_flags(&field, &reason).into()),
        Err(error) => Err(error.into()),
    }
}

fn in_flags(field: &str, reason: &str) -> WrongUsage {
    let field = field.strip_prefix("generation.").unwrap_or(field);
    let of_library = format!("`{field}` {reason}");
    WrongUsage(FLAGS.iter().fold(of_library, |message, (field, flag)| message.replace(field, flag)))
}

/// Whether the arguments ask for draws.
pub(crate) fn draws(args: &GenerationArgs) -> bool {
    args.temperature.is_some() || args.top_k.is_some() || args.top_p.is_some() || args.min_p.is_some()
}

fn changed(mut config: GenerationConfig, args: &GenerationArgs) -> GenerationConfig {
    if draws(args) {
        config.do_sample = true;
        config.num_beams = 1;
    }
    let GenerationArgs {
        num_beams,
        max_new_tokens,
        min_new_tokens,
        length_penalty,
        repetition_penalty,
        no_repeat_ngram,
        early_stopping,
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        num_captions,
        stop,
    } = args;
    set(&mut config.num_beams, *num_beams);
    set(&mut config.max_new_tokens, *max_new_tokens);
    // What counts new tokens holds instead of what counts the prompt too.
    if max_new_tokens.is_some() {
        config.max_length = None;
    }
    if min_new_tokens.is_some() {
        config.min_length = 0;
    }
    set(&mut config.min_new_tokens, *min_new_tokens);
    set(&mut config.length_penalty, *length_penalty);
    set(&mut config.repetition_penalty, *repetition_penalty);
    set(&mut config.no_repeat_ngram_size, *no_repeat_ngram);
    let early_stopping = early_stopping.map(|given| match given {
        EarlyStoppingArg::False => EarlyStopping::Heuristic,
        EarlyStoppingArg::True => EarlyStopping::Immediate,
        EarlyStoppingArg::Never => EarlyStopping::Never,
    });
    set(&mut config.early_stopping, early_stopping);
    set(&mut config.temperature, *temperature);
    set(&mut config.top_k, *top_k);
    set(&mut config.top_p, *top_p);
    set(&mut config.min_p, *min_p);
    set(&mut config.seed, *seed);
    set(&mut config.num_return_sequences, *num_captions);
    if !stop.is_empty() {
        config.stop_strings.clone_from(stop);
    }
    config
}

fn set<T>(field: &mut T, given: Option<T>) {
    if let Some(value) = given {
        *field = value;
    }
}
