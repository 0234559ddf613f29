//! What the Q-Former of stage 2 does with the language model: captions and answers.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use candle_core::Tensor;

use super::preset::FolderGeneration;
use super::{Blip2, ImageFeatures, ModelConfig, OpenOptions, Stage2Config, image_keys, open_language_model};
use crate::cache::CachedSequence;
use crate::generate::{
    Constraint, Event, FinishReason, Generation, GenerationConfig, Request, Session, StopRules, generate,
    score,
};
use crate::language::LanguageModel;
use crate::layers::{DropoutRng, Linear};
use crate::qformer::{QFormer, TextSide};
use crate::text::{AnswerForm, Grammar, Grammars, LanguageTokenizer, Prompt, PromptFormat, Turn};
use crate::weights::int8::TrainedWeights;
use crate::{Error, Result};

#[derive(Debug)]
pub(super) struct Stage2 {
    qformer: QFormer,
    language_projection: Linear,
    language_model: LanguageModel,
    tokenizer: LanguageTokenizer,
    prompt: PromptFormat,
    caption_prompt: PromptFormat,
    chat_prompt: PromptFormat,
    /// What ends an answer by the prompt's format.
    end_of_answer: Vec<u32>,
    source: Source,
    /// Made when first needed.
    grammars: OnceLock<Grammars>,
}

/// What only a checkpoint of Hugging Face says.
#[derive(Debug, Default)]
pub(super) struct Source {
    /// What stands for each query among the tokens of a prompt.
    pub(super) image_token: Option<u32>,
    /// What ends a text, where that is not what the prompt's format says.
    pub(super) end_tokens: Option<Vec<u32>>,
    /// Its own settings.
    pub(super) generation: FolderGeneration,
}

/// A caption or an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The text, without the prompt.
    pub text: String,
    /// Its tokens, with the end token if it ended with one.
    pub token_ids: Vec<u32>,
    /// The natural logarithm of each token's probability.
    pub log_probs: Vec<f32>,
    /// By which beam search ranks, see [`Generation::score`].
    pub score: f32,
    /// Why it ends where it does.
    pub finish: FinishReason,
}

/// A given answer and how likely it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The answer, as it was given.
    pub answer: String,
    /// The logarithm of its probability after the question, its end included.
    pub log_likelihood: f32,
    /// Its share of the probability of all given answers.
    pub probability: f32,
}

impl Stage2 {
    pub(super) fn open(
        folder: &Path,
        config: &ModelConfig,
        stage2: &Stage2Config,
        language_model: &Path,
        options: &OpenOptions,
    ) -> Result<Self> {
        let paths: Vec<PathBuf> = stage2.weights.iter().map(|file| folder.join(file)).collect();
        let weights = TrainedWeights::open(&paths)?;
        let loader = options.bridge_loader(&weights, options.precision, None);
        let qformer = QFormer::load(&config.qformer, &loader, TextSide::None)?;
        let (language_model, tokenizer) = open_language_model(language_model, options.frozen_format())?;
        let language_projection =
            loader.linear("language_projection", config.qformer.hidden_size, language_model.hidden_size())?;
        weights.finish()?;
        let source = Source::default();
        Self::new(qformer, language_projection, language_model, tokenizer, stage2, source)
    }

    pub(super) fn new(
        qformer: QFormer,
        language_projection: Linear,
        language_model: LanguageModel,
        tokenizer: LanguageTokenizer,
        config: &Stage2Config,
        source: Source,
    ) -> Result<Self> {
        let end_of_answer = end_tokens(&config.prompt, &tokenizer)?;
        let prompt = config.prompt.clone();
        let caption_prompt = config.caption_prompt.clone().unwrap_or_else(|| prompt.clone());
        let chat_prompt = config.chat_prompt.clone().unwrap_or_else(|| prompt.clone());
        Ok(Self {
            qformer,
            language_projection,
            language_model,
            tokenizer,
            prompt,
            caption_prompt,
            chat_prompt,
            end_of_answer,
            source,
            grammars: OnceLock::new(),
        })
    }

    /// Of what was trained: the query path and the projection.
    pub(super) fn n_parameters(&self) -> usize {
        let config = self.qformer.config();
        config.n_query_parameters() + (config.hidden_size + 1) * self.language_model.hidden_size()
    }

    pub(super) fn qformer(&self) -> &QFormer {
        &self.qformer
    }

    /// How these turns are put; without any, how a caption is asked for.
    pub(super) fn format_of(&self, turns: &[Turn]) -> &PromptFormat {
        match turns {
            [] => &self.caption_prompt,
            [_] => &self.prompt,
            _ => &self.chat_prompt,
        }
    }

    pub(super) fn language_model(&self) -> &LanguageModel {
        &self.language_model
    }

    pub(super) fn tokenizer(&self) -> &LanguageTokenizer {
        &self.tokenizer
    }

    pub(super) fn n_queries(&self) -> usize {
        self.qformer.config().num_query_tokens
    }

    /// What stands for each picture in the language model's input, `[Q, L]` each.
    pub(super) fn soft_tokens(&self, features: &[&ImageFeatures]) -> Result<Vec<Tensor>> {
        let keys = image_keys(&self.qformer, features)?;
        let (queries, _) = self.qformer.encode_queries(&keys, &mut DropoutRng::off())?;
        let rows = self.project(&queries)?;
        let n = self.n_queries();
        (0..features.len()).map(|i| Ok(rows.narrow(0, i * n, n)?)).collect()
    }

    /// Query outputs of whole pictures as the language model reads them.
    pub(super) fn project(&self, queries: &Tensor) -> Result<Tensor> {
        let rows = self.language_projection.forward(queries)?;
        let ((n_rows, found), width) = (rows.dims2()?, self.language_model.hidden_size());
        if found == width {
            return Ok(rows);
        }
        // transformers projects to the width of the layers. Where the embeddings are narrower (as OPT-350m's), its
        // `masked_scatter` fills the image tokens' rows with the first numbers of all.
        let n_queries = self.n_queries();
        let n_pictures = n_rows / n_queries;
        let first = rows.reshape((n_pictures, n_queries * found))?.narrow(1, 0, n_queries * width)?;
        Ok(first.contiguous()?.reshape((n_rows, width))?)
    }

    pub(super) fn folder_generation(&self) -> &FolderGeneration {
        &self.source.generation
    }

    /// The tokens that end an answer by the prompt's format.
    pub(super) fn end_of_answer(&self) -> &[u32] {
        &self.end_of_answer
    }

    /// A prompt that waits for the answer to a question, leaving room for a token of it.
    pub(super) fn question(&self, question: &str) -> Result<Prompt> {
        self.render_question(&self.prompt, &[Turn::open(question)], 1)
    }

    /// A prompt that waits for the answer to the last turn of a conversation, leaving `room` tokens for it.
    pub(super) fn conversation(&self, turns: &[Turn], room: usize) -> Result<Prompt> {
        self.render_question(&self.chat_prompt, turns, room)
    }

    fn render_question(&self, format: &PromptFormat, turns: &[Turn], room: usize) -> Result<Prompt> {
        self.render_as(format, refuse_empty(turns)?, room)
    }

    /// A prompt of the given text and nothing else, but for the marks that begin and end what the model reads.
    pub(super) fn raw(&self, text: &str) -> Result<Prompt> {
        let prompt = self.caption_prompt.raw(&self.tokenizer, text)?;
        let (n_tokens, limit) = (prompt.n_rows(self.n_queries()), self.language_model.context_len() - 1);
        if n_tokens > limit { Err(Error::TextTooLong { n_tokens, limit }) } else { Ok(prompt) }
    }

    /// The prompt that asks for a caption with the model's own words.
    pub(super) fn instruction(&self, instruction: &str) -> Result<Prompt> {
        self.render_as(&self.caption_prompt, &[Turn::open(instruction)], 1)
    }

    /// As [`render`](Self::render), but nothing is left out; without turns, the prompt for a caption.
    pub(super) fn render_whole(&self, turns: &[Turn], instruction: &str) -> Result<Prompt> {
        let caption = [Turn::open(instruction)];
        let asked = if turns.is_empty() { &caption } else { refuse_empty(turns)? };
        let prompt = self.format_of(turns).render(&self.tokenizer, asked, true)?;
        // An answer has at least one token.
        let (n_tokens, limit) = (prompt.n_rows(self.n_queries()) + 1, self.language_model.context_len());
        if n_tokens > limit { Err(Error::TextTooLong { n_tokens, limit }) } else { Ok(prompt) }
    }

    pub(super) fn render_as(&self, format: &PromptFormat, turns: &[Turn], room: usize) -> Result<Prompt> {
        let limit = self.language_model.context_len().saturating_sub(room);
        format.render_within(&self.tokenizer, turns, Some(self.n_queries()), limit)
    }

    /// The rows of a prompt.
    pub(super) fn embed(&self, prompt: &Prompt, soft_tokens: &Tensor) -> Result<Tensor> {
        let (before, after) = (prompt.before_image(), prompt.after_image());
        let mut pieces = Vec::new();
        if !before.is_empty() {
            pieces.push(self.language_model.embed(before)?);
        }
        pieces.push(soft_tokens.clone());
        if !after.is_empty() {
            pieces.push(self.language_model.embed(after)?);
        }
        Ok(Tensor::cat(&pieces, 0)?)
    }

    /// The scores of the next token after every row of a prompt, `[N, V]`; of an encoder-decoder model after the decoder's first,
    /// `[1, V]`.
    pub(super) fn prompt_logits(&self, prompt: &Prompt, soft_tokens: &Tensor) -> Result<Tensor> {
        let rows = self.embed(prompt, soft_tokens)?;
        let lengths = [rows.dim(0)?];
        let hidden = if self.language_model.reads_prompts_whole() {
            let (mut cache, mut sequences) = (self.language_model.new_cache(), [CachedSequence::new()]);
            self.language_model.read_prompts(&rows, &mut cache, &mut sequences, &lengths)?
        } else {
            self.language_model.forward(&rows, &lengths)?
        };
        self.language_model.logits(&hidden)
    }

    /// Continues a prompt about each picture.
    fn continue_all(
        &self,
        features: &[&ImageFeatures],
        prompts: &[Prompt],
        generation: &GenerationConfig,
        constraint: Option<&dyn Constraint>,
    ) -> Result<Vec<Vec<Answer>>> {
        if features.is_empty() {
            return Ok(Vec::new());
        }
        let rows = prompts
            .iter()
            .zip(self.soft_tokens(features)?)
            .map(|(prompt, soft_tokens)| Ok((CachedSequence::new(), self.embed(prompt, &soft_tokens)?)))
            .collect::<Result<Vec<_>>>()?;
        let mut cache = self.language_model.new_cache();
        let mut session = Session::new(&self.language_model, &mut cache, rows)?;
        let on_event = &mut |_: Event<'_>| std::ops::ControlFlow::Continue(());
        self.continue_prompts(&mut session, prompts, generation, constraint, on_event)
    }

    /// Continues the prompts that a session has read.
    pub(super) fn continue_prompts(
        &self,
        session: &mut Session<'_>,
        prompts: &[Prompt],
        generation: &GenerationConfig,
        constraint: Option<&dyn Constraint>,
        on_event: &mut dyn FnMut(Event<'_>) -> std::ops::ControlFlow<()>,
    ) -> Result<Vec<Vec<Answer>>> {
        let decode = |ids: &[u32]| Ok(self.tokenizer.decode(ids));
        let end_tokens = self.end_tokens(&generation.eos_token_id);
        let stop = StopRules::new(end_tokens).with_text(&decode);
        let seen: Vec<_> = prompts.iter().map(|prompt| self.seen(prompt, generation)).collect();
        let request = Request { config: generation, stop: &stop, seen: &seen, constraint };
        let generated = generate(session, request, on_event)?;
        let answer = |generation: Generation| self.answer(generation, end_tokens);
        Ok(generated.into_iter().map(|of_prompt| of_prompt.into_iter().map(answer).collect()).collect())
    }

    /// What ends a text: the named tokens, or without any the model's own.
    pub(super) fn end_tokens<'a>(&'a self, named: &'a [u32]) -> &'a [u32] {
        match named {
            [] => self.source.end_tokens.as_deref().unwrap_or(&self.end_of_answer),
            named => named,
        }
    }

    /// What the rules of generation see before the first generated token. A decoder always sees what it begins with.
    pub(super) fn seen(&self, prompt: &Prompt, generation: &GenerationConfig) -> Vec<u32> {
        if let Some(start) = self.language_model.decoder_start() {
            return vec![start];
        }
        if !generation.sees_prompt {
            return Vec::new();
        }
        let n_image = self.source.image_token.map_or(0, |_| self.n_queries());
        let image = vec![self.source.image_token.unwrap_or_default(); n_image];
        [prompt.before_image(), &image, prompt.after_image()].concat()
    }

    pub(super) fn answer(&self, generation: Generation, end_tokens: &[u32]) -> Answer {
        let Generation { token_ids, log_probs, score, finish } = generation;
        let words = match token_ids.split_last() {
            Some((last, words)) if end_tokens.contains(last) => words,
            _ => &token_ids[..],
        };
        let text = self.tokenizer.decode(words).trim().to_owned();
        Answer { text, token_ids, log_probs, score, finish }
    }
}

fn refuse_empty(turns: &[Turn]) -> Result<&[Turn]> {
    if turns.last().is_some_and(|turn| turn.question.trim().is_empty()) {
        return Err(Error::Request("the question is empty: ask something about the picture".into()));
    }
    Ok(turns)
}

/// The tokens that end an answer: those of the prompt's format, and the model's own end of text.
fn end_tokens(prompt: &PromptFormat, tokenizer: &LanguageTokenizer) -> Result<Vec<u32>> {
    let end = prompt.end_of_answer(tokenizer)?;
    let [token] = end[..] else {
        return Err(Error::Config {
            field: "stage2.prompt.end_of_answer".into(),
            reason: format!("must be one token of the language model, it is {}", end.len()),
        });
    };
    let mut tokens = vec![token];
    // A model that writes another end than its file's (OPT in BLIP-2: a line break) is not stopped by that one.
    if *prompt == PromptFormat::ChatMl {
        tokens.extend(tokenizer.eos_id().filter(|eos| *eos != token));
    }
    Ok(tokens)
}

impl Blip2 {
    /// Describes pictures: for each the best texts, as many as `generation` asks for.
    ///
    /// # Errors
    /// When the model has no stage-2 part or `generation` contradicts itself.
    pub fn caption(
        &self,
        features: &[&ImageFeatures],
        generation: &GenerationConfig,
    ) -> Result<Vec<Vec<Answer>>> {
        let stage2 = self.stage2()?;
        let prompt = stage2.instruction(self.instruction())?;
        stage2.continue_all(features, &vec![prompt; features.len()], generation, None)
    }

    /// What is asked for a caption.
    pub(super) fn instruction(&self) -> &str {
        self.config.stage2.as_ref().map_or("", |stage2| &stage2.instruction)
    }

    /// Goes on from a text about each picture, which is read as it stands: no question is made of it, no blank is left out.
    /// A model that is spoken to in turns reads it as what the user says. The results are those that each would get alone.
    ///
    /// # Errors
    /// When the model has no stage-2 part, a text is too long, or `generation` contradicts itself.
    pub fn complete(
        &self,
        requests: &[(&ImageFeatures, &str)],
        generation: &GenerationConfig,
    ) -> Result<Vec<Vec<Answer>>> {
        let stage2 = self.stage2()?;
        let features: Vec<_> = requests.iter().map(|(features, _)| *features).collect();
        let prompts = requests.iter().map(|(_, text)| stage2.raw(text)).collect::<Result<Vec<_>>>()?;
        stage2.continue_all(&features, &prompts, generation, None)
    }

    /// Answers a question about each picture; the answers are those that each would get alone.
    ///
    /// # Errors
    /// When the model has no stage-2 part, a question is empty or too long, or `generation` contradicts itself.
    pub fn ask(
        &self,
        requests: &[(&ImageFeatures, &str)],
        generation: &GenerationConfig,
    ) -> Result<Vec<Vec<Answer>>> {
        self.ask_for(requests, generation, None)
    }

    /// As [`ask`](Self::ask), for answers of a form, from [`grammar`](Self::grammar). One that reaches its number of tokens
    /// is cut off as any other.
    ///
    /// # Errors
    /// As [`ask`](Self::ask), and [`Error::AnswerForm`] when the model cannot keep to the form.
    pub fn ask_for(
        &self,
        requests: &[(&ImageFeatures, &str)],
        generation: &GenerationConfig,
        form: Option<&Grammar>,
    ) -> Result<Vec<Vec<Answer>>> {
        let stage2 = self.stage2()?;
        let features: Vec<_> = requests.iter().map(|(features, _)| *features).collect();
        let prompts =
            requests.iter().map(|(_, question)| stage2.question(question)).collect::<Result<Vec<_>>>()?;
        let constraint = form.map(|form| form as &dyn Constraint);
        stage2.continue_all(&features, &prompts, generation, constraint)
    }

    /// Compiles what an answer has to be, for texts that end as `generation` says.
    ///
    /// # Errors
    /// When the model has no stage-2 part; [`Error::AnswerForm`] when its tokenizer is neither byte-level nor
    /// SentencePiece, or the form is not understood, too large, or in need of a character that the tokenizer cannot write.
    pub fn grammar(&self, form: &AnswerForm, generation: &GenerationConfig) -> Result<Grammar> {
        let stage2 = self.stage2()?;
        let grammars = |end_tokens| {
            Grammars::new(&stage2.tokenizer, end_tokens, stage2.prompt.begins_answers_with_blank())
        };
        let own = stage2.end_tokens(&[]);
        let end_tokens = stage2.end_tokens(&generation.eos_token_id);
        if end_tokens != own {
            return grammars(end_tokens)?.compile(form);
        }
        match stage2.grammars.get() {
            Some(grammars) => grammars.compile(form),
            None => {
                let made = grammars(own)?;
                stage2.grammars.get_or_init(|| made).compile(form)
            }
        }
    }

    /// What the language model reads in a picture's place: for each picture `[Q, L]`, the projected queries.
    ///
    /// # Errors
    /// When the model has no stage-2 part.
    pub fn soft_tokens(&self, features: &[&ImageFeatures]) -> Result<Vec<Tensor>> {
        self.stage2()?.soft_tokens(features)
    }

    /// Ranks given answers to a question by their likelihood, the likeliest first.
    ///
    /// # Errors
    /// When the model has no stage-2 part, the question or an answer is empty, or there is no answer.
    pub fn rank(
        &self,
        features: &ImageFeatures,
        question: &str,
        choices: &[impl AsRef<str>],
    ) -> Result<Vec<Choice>> {
        let stage2 = self.stage2()?;
        if choices.is_empty() || choices.iter().any(|choice| choice.as_ref().trim().is_empty()) {
            return Err(Error::Request("there is no answer to choose from, or one is empty".into()));
        }
        let answers = choices
            .iter()
            .map(|choice| stage2.prompt.answer_ids(&stage2.tokenizer, question, choice.as_ref()))
            .collect::<Result<Vec<_>>>()?;
        let prompt = stage2.question(question)?;
        let soft_tokens = stage2.soft_tokens(&[features])?.remove(0);
        let rows = stage2.embed(&prompt, &soft_tokens)?;
        let mut cache = stage2.language_model.new_cache();
        let mut session =
            Session::new(&stage2.language_model, &mut cache, vec![(CachedSequence::new(), rows)])?;
        let scores: Vec<f32> =
            score(&mut session, &answers)?.iter().map(|answer| answer.log_likelihood()).collect();
        let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = scores.iter().map(|score| (score - largest).exp()).sum();
        let mut ranked: Vec<_> = choices
            .iter()
            .zip(scores)
            .map(|(choice, log_likelihood)| Choice {
                answer: choice.as_ref().to_owned(),
                log_likelihood,
                probability: (log_likelihood - largest).exp() / sum,
            })
            .collect();
        ranked.sort_by(|a, b| b.log_likelihood.total_cmp(&a.log_likelihood));
        Ok(ranked)
    }
}
