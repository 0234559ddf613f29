//! qformer
