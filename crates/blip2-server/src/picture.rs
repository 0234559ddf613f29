//! Pictures of requests: from base64 to pixels within limits, unless they were seen before.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use base64::Engine as _;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use blip2::image::{Limits, Pixels, decode};
use blip2::model::{Blip2, ImageFeatures};
use candle_core::Tensor;
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use crate::config::ServerConfig;
use crate::error::ApiError;
use crate::fetch::Fetcher;
use crate::metrics::{Metrics, Stage};
use crate::recent::Recent;

/// With and without padding, as clients send it.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Pictures that are fetched at once.
pub(crate) const FETCHES: usize = 8;

/// What stands for a picture: SHA-256 of its file's bytes and of everything that decides what becomes of them.
pub(crate) type Key = [u8; 32];

/// A picture that a request is about.
#[derive(Debug, Clone)]
pub(crate) enum Picture {
    /// Encoded before.
    Seen(Arc<SeenPicture>),
    /// Ready for the encoder: `[S, S, 3]`.
    New { key: Key, pixels: Arc<Vec<f32>> },
}

impl Picture {
    pub(crate) fn key(&self) -> &Key {
        match self {
            Self::Seen(seen) => &seen.key,
            Self::New { key, .. } => key,
        }
    }

    /// Whether it still has to be encoded.
    pub(crate) fn is_new(&self) -> bool {
        matches!(self, Self::New { .. })
    }
}

/// What the model saw in a picture.
#[derive(Debug)]
pub(crate) struct SeenPicture {
    pub(crate) key: Key,
    pub(crate) features: ImageFeatures,
    /// What the language model reads in its place; made when it is first needed.
    pub(crate) soft_tokens: OnceLock<Tensor>,
}

/// How a picture came.
#[derive(Debug)]
pub(crate) enum Source {
    /// A `data:` URL, or base64 alone.
    Text(String),
    /// The file itself.
    File(Vec<u8>),
}

impl From<String> for Source {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// Makes pictures of what requests send.
#[derive(Debug)]
pub(crate) struct PictureReader {
    model: Arc<Blip2>,
    cache: Arc<Recent<SeenPicture>>,
    metrics: Arc<Metrics>,
    limits: Limits,
    slots: Arc<Semaphore>,
    fetcher: Option<Fetcher>,
    fetches: Arc<Semaphore>,
    /// What besides the file's bytes decides the features: the encoder and how pictures are prepared for it.
    domain: Vec<u8>,
}

impl PictureReader {
    pub(crate) fn new(
        model: &Arc<Blip2>,
        cache: &Arc<Recent<SeenPicture>>,
        metrics: &Arc<Metrics>,
        config: &ServerConfig,
    ) -> Self {
        let limits = &config.limits;
        let mut domain = b"blip2 picture 1\0".to_vec();
        if let Some(vision) = model.vision() {
            domain.extend(vision.fingerprint().as_bytes());
            domain.push(0);
            // `Debug` has every setting, the square's side among them.
            domain.extend(format!("{:?} {:?}\0", vision.processor(), Pixels::AsSeen).as_bytes());
        }
        let picture_limits = Limits {
            max_bytes: limits.picture_bytes,
            max_pixels: limits.picture_pixels,
            ..Limits::default()
        };
        Self {
            model: model.clone(),
            cache: cache.clone(),
            metrics: metrics.clone(),
            limits: picture_limits,
            slots: Arc::new(Semaphore::new(limits.decode_threads)),
            fetcher: (!config.image_domains.is_empty())
                .then(|| Fetcher::new(&config.image_domains, limits.picture_bytes)),
            fetches: Arc::new(Semaphore::new(FETCHES)),
            domain,
        }
    }

    /// A picture, decoded unless it was seen before.
    pub(crate) async fn read(self: &Arc<Self>, source: Source, param: &str) -> Result<Picture, ApiError> {
        if self.model.vision().is_none() {
            return Err(ApiError::part_missing("see pictures"));
        }
        let source = self.fetched(source, param).await?;
        let slot = self.slots.clone().acquire_owned().await.map_err(|_| ApiError::internal())?;
        let (reader, owned) = (self.clone(), param.to_owned());
        let work = move || {
            let _slot = slot;
            reader.read_now(source, &owned)
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| ApiError::internal())?
    }

    /// A picture that is named by its address, where that is allowed; others as they are.
    async fn fetched(self: &Arc<Self>, source: Source, param: &str) -> Result<Source, ApiError> {
        let url = match source {
            Source::Text(text) if self.fetcher.is_some() && is_remote(&text) => text,
            other => return Ok(other),
        };
        let slot = self.fetches.clone().acquire_owned().await.map_err(|_| ApiError::internal())?;
        let (reader, param) = (self.clone(), param.to_owned());
        let work = move || {
            let _slot = slot;
            let Some(fetcher) = &reader.fetcher else { return Err(ApiError::internal()) };
            fetcher.fetch(url.trim(), &param).map(Source::File)
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| ApiError::internal())?
    }

    fn read_now(&self, source: Source, param: &str) -> Result<Picture, ApiError> {
        let start = Instant::now();
        let bytes = match source {
            Source::Text(text) => self.file(&text, param)?,
            Source::File(bytes) => bytes,
        };
        let key = self.key(&bytes);
        if let Some(seen) = self.cache.get(&key) {
            self.metrics.picture_hits.fetch_add(1, Ordering::Relaxed);
            return Ok(Picture::Seen(seen));
        }
        self.metrics.picture_misses.fetch_add(1, Ordering::Relaxed);
        let Some(vision) = self.model.vision() else { return Err(ApiError::part_missing("see pictures")) };
        let picture =
            decode(&bytes, &self.limits, Pixels::AsSeen).map_err(|error| ApiError::picture(&error, param))?;
        let pixels = vision.processor().pixels(&picture);
        self.metrics.stage(Stage::Decode, start.elapsed());
        Ok(Picture::New { key, pixels: Arc::new(pixels) })
    }

    /// The bytes of a file.
    fn file(&self, text: &str, param: &str) -> Result<Vec<u8>, ApiError> {
        let invalid =
            |message: &str| ApiError { code: "invalid_image_url", ..ApiError::invalid(param, message) };
        let text = text.trim();
        let encoded = match text.split_once(':') {
            None => text,
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("data") => {
                let (kind, data) = rest
                    .split_once(',')
                    .ok_or_else(|| invalid("the data: URL of the picture has no comma"))?;
                if !kind.to_ascii_lowercase().ends_with(";base64") {
                    return Err(invalid("the data: URL of the picture is not in base64"));
                }
                data
            }
            Some((scheme, _))
                if scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https") =>
            {
                let message = "this server fetches no pictures from the network: send the picture itself, as \
                               data:image/jpeg;base64,…";
                return Err(invalid(message));
            }
            Some(_) => {
                return Err(invalid(
                    "the picture is neither a data: URL nor base64: send data:image/jpeg;base64,…",
                ));
            }
        };
        if encoded.is_empty() {
            return Err(ApiError {
                code: "invalid_image",
                ..ApiError::invalid(param, "the picture is empty")
            });
        }
        // Before decoding: three bytes of every four characters.
        if encoded.len() as u64 / 4 * 3 > self.limits.max_bytes.saturating_add(3) {
            let message = format!("the picture's file has more than {} bytes", self.limits.max_bytes);
            return Err(ApiError { code: "image_too_large", ..ApiError::invalid(param, message) });
        }
        let decoded = if encoded.bytes().any(|byte| byte.is_ascii_whitespace()) {
            BASE64.decode(encoded.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect::<Vec<_>>())
        } else {
            BASE64.decode(encoded)
        };
        decoded.map_err(|_| invalid("the picture is not valid base64"))
    }

    fn key(&self, bytes: &[u8]) -> Key {
        let mut hash = Sha256::new();
        hash.update((self.domain.len() as u64).to_le_bytes());
        hash.update(&self.domain);
        hash.update(bytes);
        hash.finalize().into()
    }
}

/// Whether this is the address of something on the network.
fn is_remote(text: &str) -> bool {
    let scheme = text.trim().split_once(':').map(|(scheme, _)| scheme);
    scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https"))
}
