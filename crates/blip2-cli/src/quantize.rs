//! `blip2 quantize`: a published model becomes a folder in few bits.

use std::fs;

use blip2::layers::Quantization;
use blip2::model::{self, OpenOptions};

use crate::Done;
use crate::args::{ComputeArg, QuantizationArg, QuantizeArgs};
use crate::memory;
use crate::model::find;

pub(crate) fn run(args: &QuantizeArgs) -> anyhow::Result<Done> {
    let (quantization, asked) = match args.dtype {
        QuantizationArg::Int8 => (Quantization::Int8, ComputeArg::Int8),
        QuantizationArg::Int4 => (Quantization::Int4, ComputeArg::Int4),
    };
    let folder = find(&args.model, Some(asked), args.ignore_memory)?;
    // Other folders are refused for what they are.
    if model::is_hugging_face(&folder)? {
        let options = OpenOptions { quantization: Some(quantization), ..OpenOptions::default() };
        let needed = model::memory_needed(&folder, &options)?;
        eprintln!("{}", memory::check(needed, memory::available(), args.ignore_memory)?);
    }
    model::quantize(&folder, &args.out, quantization)?;
    let n_bytes = fs::metadata(args.out.join("model.safetensors"))?.len();
    eprintln!("{}: {:.1} MB of weights", args.out.display(), n_bytes as f64 / 1e6);
    Ok(Done::All)
}
