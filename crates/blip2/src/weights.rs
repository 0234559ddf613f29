//! weights

pub mod torch_pickle;
