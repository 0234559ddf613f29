//! The interface of OpenAI, as its official clients speak it.

pub(crate) mod chat;
pub(crate) mod embeddings;
pub(crate) mod models;
