//! Pictures of requests: from base64 to pixels within limits and a memory budget of all, unless they were seen before.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use blip2::image::{Limits, Pixels, decode, memory_to_decode};
use blip2::model::{Blip2, ImageFeatures};
use candle_core::Tensor;
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use crate::body::Budget;
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

/// What a picture's file turned out to be.
enum Read {
    Seen(Arc<SeenPicture>),
    New(NewFile),
}

/// The file of a picture that is to be decoded.
struct NewFile {
    key: Key,
    bytes: Vec<u8>,
    /// What decoding takes, by its header.
    memory: u64,
    /// How long reading it took.
    took: Duration,
}

/// Makes pictures of what requests send.
#[derive(Debug)]
pub(crate) struct PictureReader {
    model: Arc<Blip2>,
    cache: Arc<Recent<SeenPicture>>,
    metrics: Arc<Metrics>,
    limits: Limits,
    slots: Arc<Semaphore>,
    memory: Budget,
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
            memory: Budget::new(limits.decode_bytes),
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
        let owned = param.to_owned();
        let file = match self.on_a_thread(move |reader| reader.read_file(source, &owned)).await? {
            Read::Seen(seen) => return Ok(Picture::Seen(seen)),
            Read::New(file) => file,
        };
        // Between the two threads, so that those who wait for memory keep none of the others waiting.
        let memory = self.memory.take(file.memory).await;
        let owned = param.to_owned();
        self.on_a_thread(move |reader| {
            let _memory = memory;
            reader.decode(&file, &owned)
        })
        .await
    }

    /// Runs on one of the threads for pictures.
    async fn on_a_thread<T: Send + 'static>(
        self: &Arc<Self>,
        run: impl FnOnce(&Self) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let slot = self.slots.clone().acquire_owned().await.map_err(|_| ApiError::internal())?;
        let reader = self.clone();
        let work = move || {
            let _slot = slot;
            run(&reader)
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

    /// Reads a file and its header, unless the picture was seen before.
    fn read_file(&self, source: Source, param: &str) -> Result<Read, ApiError> {
        let start = Instant::now();
        let bytes = match source {
            Source::Text(text) => self.file(&text, param)?,
            Source::File(bytes) => bytes,
        };
        let key = self.key(&bytes);
        if let Some(seen) = self.cache.get(&key) {
            self.metrics.picture_hits.fetch_add(1, Ordering::Relaxed);
            return Ok(Read::Seen(seen));
        }
        self.metrics.picture_misses.fetch_add(1, Ordering::Relaxed);
        let memory =
            memory_to_decode(&bytes, &self.limits).map_err(|error| ApiError::picture(&error, param))?;
        Ok(Read::New(NewFile { key, bytes, memory, took: start.elapsed() }))
    }

    fn decode(&self, file: &NewFile, param: &str) -> Result<Picture, ApiError> {
        let start = Instant::now();
        let Some(vision) = self.model.vision() else { return Err(ApiError::part_missing("see pictures")) };
        let picture = decode(&file.bytes, &self.limits, Pixels::AsSeen)
            .map_err(|error| ApiError::picture(&error, param))?;
        let pixels = vision.processor().pixels(&picture);
        self.metrics.stage(Stage::Decode, file.took + start.elapsed());
        Ok(Picture::New { key: file.key, pixels: Arc::new(pixels) })
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

#[cfg(test)]
mod tests {
    use blip2::image::{RgbImage, png};
    use tokio::time::timeout;

    use super::*;
    use crate::testing::model;

    fn reader(decode_bytes: usize) -> Arc<PictureReader> {
        let mut config = ServerConfig::default();
        config.limits.decode_bytes = decode_bytes;
        let cache = Arc::new(Recent::new(config.picture_cache_bytes));
        Arc::new(PictureReader::new(&model("blip2_opt"), &cache, &Arc::new(Metrics::new()), &config))
    }

    fn file(grey: u8) -> Source {
        Source::File(png(&RgbImage::from_pixel(99, 99, [grey; 3].into())))
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn large_pictures_wait_for_each_other_and_seen_ones_for_nobody() {
        let reader = reader(1 << 20);
        let first = reader.read(file(1), "image").await.expect("a picture");
        let features = reader.model.encode(&[RgbImage::new(9, 9)]).expect("features").remove(0);
        let seen = SeenPicture { key: *first.key(), features, soft_tokens: OnceLock::new() };
        reader.cache.insert(*first.key(), Arc::new(seen), 1);

        let all = reader.memory.take(u64::MAX).await;
        let waits = timeout(Duration::from_millis(100), reader.read(file(2), "image")).await;
        assert!(waits.is_err(), "there is no memory for it");
        assert!(matches!(reader.read(file(1), "image").await, Ok(Picture::Seen(_))));
        let error = reader.read(Source::File(b"none".to_vec()), "image").await.expect_err("no picture");
        assert_eq!(error.code, "invalid_image_format", "known from its beginning");
        drop(all);
        assert!(matches!(reader.read(file(2), "image").await, Ok(Picture::New { .. })));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn pictures_that_need_more_than_all_memory_are_read_one_by_one() {
        let reader = reader(1);
        let read = |grey| {
            let reader = reader.clone();
            tokio::spawn(async move { reader.read(file(grey), "image").await })
        };
        let reading: Vec<_> = (0..20).map(read).collect();
        for reading in reading {
            assert!(matches!(reading.await.expect("not cancelled"), Ok(Picture::New { .. })));
        }
    }
}
