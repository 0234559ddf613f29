//! What the tests inside this crate share.

use std::path::Path;
use std::sync::Arc;

use blip2::model::{Blip2, OpenOptions};

/// A tiny model of the library's own tests.
pub(crate) fn model(name: &str) -> Arc<Blip2> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../blip2/tests/golden").join(name);
    Arc::new(Blip2::open(folder, &OpenOptions::default()).expect("a model"))
}
