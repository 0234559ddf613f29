//! BLIP-2 over HTTP: the interfaces that client libraries already speak, and what only BLIP-2 can do.
//!
//! # The way of a request
//!
//! 1. [`Server`] accepts connections itself: a bounded number, a deadline for headers and for writes, HTTP/1.1.
//! 2. `app` names the request, checks host and key, and finds its handler; every error leaves through one conversion
//!    (`error`), in the shape of the interface that was spoken to.
//! 3. `body` reads within limits and a memory budget of all requests; `picture` decodes within another, on a thread of its
//!    own, and prepares pixels, unless the picture's features are cached; `fetch` gets it from the network, where that is
//!    allowed.
//! 4. `engine` admits the request to a bounded queue. One thread owns the computing: it encodes pictures in batches, lets
//!    answers join and leave between two tokens, and stops those whose client has gone.
//! 5. The handler (`openai`, `ollama`, `tasks`) turns what the engine sends into JSON, or into a stream of it.
//!
//! Batching changes nothing: an answer is the one that its request would get alone. On a signal the server stops being
//! ready, finishes what it accepted and ends; after a deadline it ends what is left with an error.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use blip2::model::{Blip2, OpenOptions};
//! use blip2_server::ServerConfig;
//!
//! let model = Blip2::open("my-model", &OpenOptions::default())?;
//! blip2_server::serve(model, ServerConfig::default())?;
//! # Ok(())
//! # }
//! ```

mod access;
mod answer_form;
mod app;
mod body;
mod config;
mod engine;
mod error;
mod explain;
mod fetch;
mod generation;
mod growing_text;
mod json;
mod listen;
mod metrics;
mod ollama;
mod openai;
mod page;
mod picture;
mod recent;
mod stream;
mod tasks;
#[cfg(test)]
mod testing;
mod wire;

use std::sync::Arc;

pub use access::Keys;
pub use app::ROUTES;
pub use config::{Limits, ServerConfig};
pub use error::StartError;
pub use listen::Server;

use blip2::model::Blip2;

/// Serves a model until the process is told to end (SIGTERM or Ctrl-C), then finishes what was accepted.
///
/// # Errors
/// When the configuration is not safe or contradicts itself, the address cannot be bound, or the model fails its first
/// picture.
pub fn serve(model: Blip2, config: ServerConfig) -> Result<(), StartError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(config.limits.decode_threads + picture::FETCHES + app::FORMS + 4)
        .enable_all()
        .build()
        .map_err(StartError::Runtime)?;
    runtime.block_on(async {
        let server = Server::bind(Arc::new(model), config).await?;
        server.run(listen::signal()?).await;
        Ok(())
    })
}
