//! BLIP-2 in Rust: a frozen image encoder and a frozen language model, and the small trained bridge between them.
//!
//! # How a picture becomes words
//!
//! 1. [`image`] decodes a file within limits and makes it pixels, JPEGs decoded and all resized as Pillow does, to the byte.
//! 2. [`vision`], frozen, turns the pixels into image tokens, one row a patch: [`model::ImageFeatures`].
//! 3. [`qformer`] lets 32 learned queries look at these tokens through cross-attention.
//! 4. Stage 1 compares the queries with texts ([`model::Blip2::match_texts`], [`model::Blip2::classify`]); stage 2 projects
//!    them to the width of the language model's embeddings.
//! 5. [`language`], frozen, reads them in a prompt ([`text`]) as if they were words, and [`generate`] writes the answer.
//!
//! [`model::Blip2`] is all of it, opened from a folder; the modules below it can be used alone. Training is the crate
//! `blip2-train`.
//!
//! Shapes are written in these letters: B pictures, S their side in pixels, P image tokens a picture, Q queries a picture, N rows
//! of packed sequences (see [`layers`]), D the width of what is described, V the size of a vocabulary.
//!
//! # A caption
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let Ok(frozen) = std::env::var("BLIP2_FROZEN") else {
//! #     println!("SKIPPED: BLIP2_FROZEN names no folder of frozen parts");
//! #     return Ok(());
//! # };
//! # std::env::set_current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))?;
//! use blip2::image::{self, Limits, Pixels};
//! use blip2::model::{Blip2, OpenOptions};
//!
//! // `frozen` is the folder with the frozen parts; `blip2 fetch` fills one.
//! let options = OpenOptions { frozen: vec![frozen.into()], ..OpenOptions::default() };
//! let model = Blip2::open("assets/default-model", &options)?;
//! let picture = image::open("assets/pictures/cat.jpg", &Limits::default(), Pixels::AsSeen)?;
//! let features = model.encode(&[picture])?;
//! let stage2 = model.config().stage2.as_ref().ok_or("a model that only matches")?;
//! let captions = model.caption(&[&features[0]], &stage2.generation)?;
//! println!("{}", captions[0][0].text);
//! # assert!(!captions[0][0].text.is_empty());
//! # Ok(())
//! # }
//! ```

pub mod benchmark;
pub mod cache;
pub mod error;
pub mod generate;
pub mod image;
pub mod language;
pub mod layers;
pub mod model;
pub mod qformer;
pub mod sampling;
mod small_file;
pub mod splitmix;
pub mod text;
pub mod vision;
pub mod weights;

pub use error::{Error, Result};
