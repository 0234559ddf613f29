//! What can be written behind `blip2`; parsing only, nothing is opened here.

use std::env;
use std::ffi::OsStr;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::builder::{BoolishValueParser, Resettable};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

/// BLIP-2 in Rust: a small trained bridge that lets a frozen language model see.
#[derive(Debug, Parser)]
#[command(name = "blip2", version, propagate_version = true)]
pub(crate) struct Args {
    /// Threads that compute; without it as many as RAYON_NUM_THREADS says or the machine has.
    #[arg(long, global = true, env = "BLIP2_THREADS", value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Args {
    /// The arguments of this process, and for those that are not given its environment variables. An empty variable is one
    /// that is not set: compose files and scripts empty what they cannot unset.
    pub(crate) fn read() -> Self {
        let matches = without_empty_variables(Self::command()).get_matches();
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.format(&mut Self::command()).exit())
    }
}

fn without_empty_variables(command: clap::Command) -> clap::Command {
    let is_empty = |name: &OsStr| env::var_os(name).is_some_and(|value| value.is_empty());
    command
        .mut_args(|arg| match arg.get_env() {
            Some(name) if is_empty(name) => arg.env(Resettable::Reset),
            _ => arg,
        })
        .mut_subcommands(without_empty_variables)
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Describe pictures.
    ///
    /// Of one picture the caption is printed, of several a line each: the picture's name, a tab and the caption. A name with line
    /// breaks, tabs or other control characters, or that is not UTF-8, is in double quotes with C's escapes (`"a\tb.jpg"`), as
    /// git writes it.
    Caption(CaptionArgs),
    /// Answer a question about a picture.
    Ask(AskArgs),
    /// Talk about a picture, turn by turn, from standard input; `/quit` or its end ends the conversation.
    Chat(ChatArgs),
    /// Say how well texts fit a picture.
    Match(MatchArgs),
    /// Features of pictures and texts for comparing them, as JSON lines.
    Embed(EmbedArgs),
    /// Choose among labels for a picture.
    Classify(ClassifyArgs),
    /// Show where the model looked, as a heat map over the picture.
    Explain(ExplainArgs),
    /// Measure a model on a manifest.
    Eval(EvalArgs),
    /// How fast a model is here, stage by stage, and how near that is to what the machine can do.
    Bench(crate::bench::BenchArgs),
    /// What a model is made of.
    Info(ModelArgs),
    /// Serve the model over HTTP, in the interfaces of OpenAI and Ollama.
    Serve(crate::serve::ServeArgs),
    /// Train the bridge on your pictures and texts (stage 1 or 2), from a configuration file.
    Train(TrainArgs),
    /// Make a model folder of training checkpoints.
    Pack(PackArgs),
    /// Carry a checkpoint from LAVIS's layout to Hugging Face's or back, or from PyTorch's files into safetensors.
    Convert(ConvertArgs),
    /// Make a model folder in few bits: smaller, faster, and opened by mapping its file.
    Quantize(QuantizeArgs),
    /// Fetch a model of the hub, or the frozen parts of the default one, for later use without a network.
    Fetch {
        /// The model's name on the Hugging Face hub.
        #[arg(value_name = "ORGANISATION/NAME[@REVISION]")]
        model: Option<String>,
        /// Instead put what the default model was trained with (image encoder, language model, a BERT) into this folder, where
        /// `configs/` look for it: `frozen`.
        #[arg(long, value_name = "FOLDER", conflicts_with = "model")]
        training: Option<PathBuf>,
    },
    /// Make training data.
    #[command(subcommand)]
    Data(DataCommand),
    /// Print a completion script for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
}

/// Which model, and how to open it.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct SourceArgs {
    /// The model's folder, or its name on the Hugging Face hub (`organisation/name` or `organisation/name@revision`); without
    /// it the default model.
    #[arg(long, env = "BLIP2_MODEL", value_name = "MODEL")]
    pub(crate) model: Option<PathBuf>,
    /// In what to compute: published checkpoints in f32, or as they were quantised, unless this says otherwise; models packed
    /// here in bf16.
    #[arg(long, env = "BLIP2_DTYPE", value_enum, value_name = "TYPE")]
    pub(crate) dtype: Option<ComputeArg>,
    /// With `--dtype int8` or `int4`, round the Q-Former's matrices too, which are otherwise left as they are: to see what it costs.
    #[arg(long, env = "BLIP2_QUANTIZE_QFORMER", value_parser = BoolishValueParser::new(), hide_short_help = true)]
    pub(crate) quantize_qformer: bool,
    /// Let the image encoder see pictures of this side, in pixels, instead of the one the model was trained with.
    #[arg(long, env = "BLIP2_IMAGE_SIZE", value_name = "PIXELS")]
    pub(crate) image_size: Option<usize>,
    /// Load the model even where the memory that it needs is not free.
    #[arg(long, env = "BLIP2_IGNORE_MEMORY", value_parser = BoolishValueParser::new())]
    pub(crate) ignore_memory: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ModelArgs {
    #[command(flatten)]
    pub(crate) source: SourceArgs,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// The numbers that are multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ComputeArg {
    /// The tokens of the reference implementations.
    F32,
    /// Twice as fast or more; a token may differ where two are nearly as likely.
    Bf16,
    /// The matrices of vision transformer and language model in eight bits, the rest in f32.
    Int8,
    /// The language model's layers in four bits, the other large matrices in eight, the rest in f32.
    Int4,
    /// What is stored in few bits as it is stored; other models in int8 where that fits the free memory, else in int4.
    Auto,
}

/// How to generate; what is not given is the model's own setting.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Generation")]
pub(crate) struct GenerationArgs {
    /// Beams of the beam search; 1 for greedy search. What is not given here or below is the model's own setting; of the default
    /// model 5 beams, in `chat` 1.
    #[arg(long, alias = "beams", value_name = "N")]
    pub(crate) num_beams: Option<usize>,
    /// The longest text, in tokens; 30 with the default model.
    #[arg(long)]
    pub(crate) max_new_tokens: Option<usize>,
    /// The shortest text, in tokens.
    #[arg(long)]
    pub(crate) min_new_tokens: Option<usize>,
    /// Above 0 favours long texts, below 0 short ones.
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) length_penalty: Option<f32>,
    /// Above 1, tokens that already occurred become less likely.
    #[arg(long)]
    pub(crate) repetition_penalty: Option<f32>,
    /// No sequence of this many tokens occurs twice.
    #[arg(long, alias = "no-repeat-ngram-size", value_name = "N")]
    pub(crate) no_repeat_ngram: Option<usize>,
    /// When a beam search with all its texts finished ends: false, true or never.
    #[arg(long, value_enum)]
    pub(crate) early_stopping: Option<EarlyStoppingArg>,
    /// Draw at random, at this temperature; so do the three below. With --num-beams, among the continuations of the beams.
    #[arg(long)]
    pub(crate) temperature: Option<f32>,
    /// Draw among this many best tokens.
    #[arg(long)]
    pub(crate) top_k: Option<usize>,
    /// Draw among the likeliest tokens that together have this probability.
    #[arg(long)]
    pub(crate) top_p: Option<f32>,
    /// Draw among tokens at least this fraction as likely as the best.
    #[arg(long)]
    pub(crate) min_p: Option<f32>,
    /// Decides all draws.
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Texts a picture: the best beams, or as many draws.
    #[arg(long, alias = "num-return-sequences", value_name = "N")]
    pub(crate) num_captions: Option<usize>,
    /// End a text when this appears in it; may be given several times.
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
}

/// Whose results are to be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum PresetArg {
    /// transformers: greedy, 20 tokens, the folder's generation_config.json; penalties see the prompt. Texts are compared as
    /// they are given.
    Hf,
    /// LAVIS: 5 beams, 30 tokens, nucleus 0.9; penalties see what is written only. Texts are compared as its caption processor
    /// cleans them.
    Lavis,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum EarlyStoppingArg {
    /// When the best unfinished text is no better than the worst finished one.
    False,
    /// At once.
    True,
    /// When no unfinished text can become better.
    Never,
}

#[derive(Debug, clap::Args)]
pub(crate) struct CaptionArgs {
    /// The pictures; `-` is the one on standard input.
    #[arg(required_unless_present = "folder")]
    pub(crate) pictures: Vec<PathBuf>,
    /// Describe the pictures in this folder; may be given several times.
    #[arg(long, value_name = "FOLDER", help_heading = "Many pictures")]
    pub(crate) folder: Vec<PathBuf>,
    /// With --folder: those in the folders below it too.
    #[arg(long, requires = "folder", help_heading = "Many pictures")]
    pub(crate) recursive: bool,
    /// Write each caption to a text file beside its picture: `photo.txt`, or of the extension that is given
    /// (`--sidecar=caption`). Pictures that have one are left out.
    #[arg(
        long,
        value_name = "EXTENSION",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "txt",
        conflicts_with_all = ["out", "json"],
        help_heading = "Many pictures"
    )]
    pub(crate) sidecar: Option<String>,
    /// Write the captions to this file: `.jsonl`, which is a manifest to train with, or `.csv`. Rows are added to a file that
    /// exists, for the pictures that it does not have.
    #[arg(long, value_name = "FILE", conflicts_with = "json", help_heading = "Many pictures")]
    pub(crate) out: Option<PathBuf>,
    /// With --sidecar or --out: replace what is there instead of going on from it.
    #[arg(long, help_heading = "Many pictures")]
    pub(crate) overwrite: bool,
    /// With --json: the logarithm of each token's probability too (`log_probs`, beside `token_ids`).
    #[arg(long, requires = "json")]
    pub(crate) log_probs: bool,
    /// Begin the caption with this text, as it stands, instead of the model's own prompt (`--prompt=` for none).
    #[arg(long, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Write what this implementation writes: its defaults for what is not given here, its rules, its reading of pictures.
    #[arg(long, value_enum, help_heading = "Generation")]
    pub(crate) preset: Option<PresetArg>,
    #[command(flatten)]
    pub(crate) generation: GenerationArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct AskArgs {
    /// The picture; `-` reads it from standard input.
    pub(crate) picture: PathBuf,
    /// The question.
    pub(crate) question: String,
    /// Rank these answers by likelihood instead of writing one; spaces around them do not count.
    #[arg(long, value_delimiter = ',', value_name = "A,B,C")]
    pub(crate) choices: Vec<String>,
    /// With --json: the logarithm of each token's probability too (`log_probs`, beside `token_ids`).
    #[arg(long, requires = "json", conflicts_with = "choices")]
    pub(crate) log_probs: bool,
    /// Write only what matches this regular expression as a whole.
    #[arg(long, value_name = "PATTERN", conflicts_with = "choices")]
    pub(crate) regex: Option<String>,
    /// Write only JSON that fits the schema in this file.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["choices", "regex"])]
    pub(crate) json_schema: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Write what this implementation writes: its defaults for what is not given here, its rules, its reading of pictures.
    #[arg(long, value_enum, help_heading = "Generation")]
    pub(crate) preset: Option<PresetArg>,
    #[command(flatten)]
    pub(crate) generation: GenerationArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ChatArgs {
    /// The picture.
    pub(crate) picture: PathBuf,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Write what this implementation writes: its defaults for what is not given here, its rules, its reading of pictures.
    #[arg(long, value_enum, help_heading = "Generation")]
    pub(crate) preset: Option<PresetArg>,
    #[command(flatten)]
    pub(crate) generation: GenerationArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct MatchArgs {
    /// The picture; `-` reads it from standard input.
    pub(crate) picture: PathBuf,
    /// The texts. Where they are cleaned first (models trained here, `--preset lavis`), of each the first 50 words count, as in
    /// training.
    #[arg(required = true)]
    pub(crate) texts: Vec<String>,
    /// Compare as this implementation does: its reading of pictures and texts, its epsilons.
    #[arg(long, value_enum)]
    pub(crate) preset: Option<PresetArg>,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct EmbedArgs {
    /// A picture; may be given several times. `-` is the one on standard input.
    #[arg(long, value_name = "PICTURE", required_unless_present = "text")]
    pub(crate) image: Vec<PathBuf>,
    /// A text; may be given several times.
    #[arg(long)]
    pub(crate) text: Vec<String>,
    /// Write the rows to this file as a NumPy array instead: a picture's queries, or a text's one, each a row.
    #[arg(long, value_name = "FILE")]
    pub(crate) npy: Option<PathBuf>,
    /// Write what every stage makes of the pictures to this safetensors file instead: `pixel_values`, `vision.out`,
    /// `qformer.out`, and of a model that writes `language_projection.out` and the `logits` of the prompt. With texts, of a model
    /// that matches, also `text.out`, a row for each token of all texts, `text.lengths`, the tokens of each text, and
    /// `multimodal.out`, the queries of each picture with each text, picture by picture.
    #[arg(long, value_name = "FILE", requires = "image", conflicts_with = "npy")]
    pub(crate) output: Option<PathBuf>,
    /// With --output: the prompt, instead of the model's own for captions.
    #[arg(long, value_name = "TEXT", requires = "output")]
    pub(crate) prompt: Option<String>,
    /// Compute as this implementation does: its reading of pictures and texts, its epsilons.
    #[arg(long, value_enum)]
    pub(crate) preset: Option<PresetArg>,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ExplainArgs {
    /// The picture; `-` reads it from standard input.
    pub(crate) picture: PathBuf,
    /// What the picture is matched with; with --caption or --question, what is written about it.
    pub(crate) text: String,
    /// Where to write the heat map, as PNG.
    #[arg(short, long, value_name = "PNG", required_unless_present = "json")]
    pub(crate) output: Option<PathBuf>,
    /// Explain the text as a caption that the language model writes, instead of by the matching head.
    #[arg(long, conflicts_with = "question")]
    pub(crate) caption: bool,
    /// Explain the text as the answer to this question; of a conversation all questions in order, the last one's answer being
    /// the text.
    #[arg(long, value_name = "QUESTION")]
    pub(crate) question: Vec<String>,
    /// What was answered to an earlier question of the conversation, in order.
    #[arg(long, value_name = "ANSWER", requires = "question")]
    pub(crate) answer: Vec<String>,
    /// Explain this part of the caption or answer only.
    #[arg(long, value_name = "WORD")]
    pub(crate) word: Option<String>,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ClassifyArgs {
    /// The picture; `-` reads it from standard input.
    pub(crate) picture: PathBuf,
    /// The labels, each of which counts once.
    #[arg(required = true)]
    pub(crate) labels: Vec<String>,
    /// The text that a label is compared as.
    #[arg(long, default_value = "a photo of {label}")]
    pub(crate) template: String,
    /// Compare as this implementation does: its reading of pictures and texts, its epsilons.
    #[arg(long, value_enum)]
    pub(crate) preset: Option<PresetArg>,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct EvalArgs {
    /// What to measure.
    #[arg(value_enum)]
    pub(crate) task: EvalTask,
    /// JSON lines with `image` and `captions`, or `question` and `answer` (or `names` that an answer may contain); or captions as
    /// COCO has them (`.json`).
    pub(crate) manifest: PathBuf,
    /// The folder of the pictures; without it that of the manifest.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) images: Option<PathBuf>,
    /// Only so many rows, from the first.
    #[arg(long)]
    pub(crate) limit: Option<NonZeroUsize>,
    /// Write what the model said, one JSON line a row.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Retrieval: by what the candidates that similarity finds are ordered.
    #[arg(long, value_enum, default_value_t = RerankArg::Sum, value_name = "BY")]
    pub(crate) rerank: RerankArg,
    /// Retrieval: how many candidates of each picture and of each text are re-ranked; LAVIS takes 128.
    #[arg(long, default_value = "16", value_name = "N")]
    pub(crate) candidates: NonZeroUsize,
    /// Question baseline: the manifest to learn from.
    #[arg(long, value_name = "MANIFEST", required_if_eq("task", "question-baseline"))]
    pub(crate) train: Option<PathBuf>,
    /// Retrieval: all captions of a picture, not the first only.
    #[arg(long)]
    pub(crate) all_captions: bool,
    /// Measure what this implementation does: its reading of pictures and texts, its epsilons, and what it writes.
    #[arg(long, value_enum)]
    pub(crate) preset: Option<PresetArg>,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) generation: GenerationArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum EvalTask {
    /// BLEU, ROUGE-L and CIDEr-D of captions.
    Captions,
    /// Accuracy of answers: questions, recognition.
    Questions,
    /// Recall of pictures by texts and of texts by pictures.
    Retrieval,
    /// Whether the matching head tells a picture's own caption from that of the picture before it.
    Matching,
    /// How far answers get that are learned from the questions of `--train` alone, without pictures or model.
    QuestionBaseline,
}

/// By what the candidates of retrieval are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum RerankArg {
    /// The sum of the matching head's logit and the similarity, as LAVIS does.
    Sum,
    /// The matching head's logit alone, as the paper says.
    Itm,
    /// Nothing: they stay in the order of similarity.
    None,
}

#[derive(Debug, clap::Args)]
pub(crate) struct PackArgs {
    /// A checkpoint of stage 1 (`step-…`). Given several times, the mean of their weights: of checkpoints that went on from one
    /// another it is often better than each.
    #[arg(long, value_name = "CHECKPOINT", required_unless_present = "stage2")]
    pub(crate) stage1: Vec<PathBuf>,
    /// A checkpoint of stage 2, or several.
    #[arg(long, value_name = "CHECKPOINT")]
    pub(crate) stage2: Vec<PathBuf>,
    /// The model folder to make.
    #[arg(long)]
    pub(crate) out: PathBuf,
    /// The model's name.
    #[arg(long, default_value = "blip2")]
    pub(crate) name: String,
    /// How the trained weights are stored; f16 without it, in a Hugging Face folder as they were trained.
    #[arg(long, value_enum, conflicts_with = "hugging_face")]
    pub(crate) dtype: Option<StorageArg>,
    /// Make a Hugging Face folder with the frozen parts in it: of one stage, with a vision transformer and for stage 2 with OPT
    /// or T5.
    #[arg(long, conflicts_with = "name")]
    pub(crate) hugging_face: bool,
    /// Split the weights of a Hugging Face folder into files of at most this size.
    #[arg(long, value_name = "BYTES", default_value_t = 5_000_000_000, requires = "hugging_face")]
    pub(crate) max_shard_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum StorageArg {
    /// As they were trained.
    F32,
    /// Half precision.
    F16,
    /// Matrices in eight bits.
    Int8,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ConvertArgs {
    /// A LAVIS checkpoint (.pth), or a Hugging Face folder (safetensors or pytorch_model.bin); any file of tensors with `as-is`.
    pub(crate) input: PathBuf,
    /// The folder to make; for `lavis` a file (.pth or .safetensors), for `as-is` a .safetensors file.
    pub(crate) out: PathBuf,
    /// The layout to make; without it `lavis` for a .pth file, `as-is` for a .safetensors file, `hf` for a folder.
    #[arg(long, value_enum)]
    pub(crate) to: Option<LayoutArg>,
    /// The frozen image encoder that a LAVIS checkpoint was trained with (eva_vit_g.pth, clip_vit_L.pth).
    #[arg(long, value_name = "FILE")]
    pub(crate) vit: Option<PathBuf>,
    /// The language model that a LAVIS checkpoint was trained with, a Hugging Face folder with tokenizer.json; or the folder of
    /// a BLIP-2 model that has it.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) language_model: Option<PathBuf>,
    /// BERT's vocab.txt, for a LAVIS checkpoint of stage 1.
    #[arg(long, value_name = "FILE")]
    pub(crate) vocabulary: Option<PathBuf>,
    /// A config.json that says the numbers of attention heads, for a LAVIS checkpoint of a model of unpublished width.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Leave out tensors that the model does not have instead of refusing the checkpoint.
    #[arg(long)]
    pub(crate) allow_unknown: bool,
    /// Split a folder's weights into files of at most this size.
    #[arg(long, value_name = "BYTES", default_value_t = 5_000_000_000)]
    pub(crate) max_shard_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LayoutArg {
    /// A Hugging Face folder.
    Hf,
    /// A LAVIS state dict.
    Lavis,
    /// The tensors under the names they have, in one safetensors file.
    AsIs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct QuantizeArgs {
    /// A model's folder, as Hugging Face publishes them, or its name on the hub.
    pub(crate) model: PathBuf,
    /// The folder to make.
    pub(crate) out: PathBuf,
    /// How many bits the large matrices get.
    #[arg(long, value_enum)]
    pub(crate) dtype: QuantizationArg,
    /// Try it even where the memory that it needs is not free.
    #[arg(long)]
    pub(crate) ignore_memory: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum QuantizationArg {
    /// Eight bits for the matrices of vision transformer and language model.
    Int8,
    /// Four bits for the language model's layers, eight for the other large matrices.
    Int4,
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
    /// Keep the captions that fit their picture best, of those of a manifest and of some that the model writes (CapFilt).
    Filter(Box<FilterArgs>),
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

#[derive(Debug, clap::Args)]
pub(crate) struct FilterArgs {
    /// JSON lines with `image` and `captions`.
    pub(crate) manifest: PathBuf,
    /// The JSON lines to write, a manifest with `scores`; rows are added for the pictures that it does not have.
    pub(crate) out: PathBuf,
    /// Captions that the model writes of each picture, to stand beside those of the manifest.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) generate: usize,
    /// The most captions that a picture keeps.
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub(crate) keep: usize,
    /// By which score they are compared.
    #[arg(long, value_enum, default_value_t = ScoreArg::Itc)]
    pub(crate) by: ScoreArg,
    /// The least that a caption must score.
    #[arg(long, allow_negative_numbers = true, value_name = "SCORE")]
    pub(crate) min_score: Option<f32>,
    /// The model that judges, where it is another than the one that writes.
    #[arg(long, value_name = "MODEL")]
    pub(crate) matcher: Option<PathBuf>,
    /// Replace the file instead of going on from it.
    #[arg(long)]
    pub(crate) overwrite: bool,
    #[command(flatten)]
    pub(crate) source: SourceArgs,
    #[command(flatten)]
    pub(crate) generation: GenerationArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ScoreArg {
    /// Cosine similarity.
    Itc,
    /// Probability of the matching head.
    Itm,
}

impl From<ScoreArg> for blip2_train::capfilt::Score {
    fn from(score: ScoreArg) -> Self {
        match score {
            ScoreArg::Itc => Self::Similarity,
            ScoreArg::Itm => Self::Matching,
        }
    }
}
