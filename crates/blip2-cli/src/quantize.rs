//! `blip2 quantize`: a published model becomes a folder in few bits.

use std::fs;

use blip2::layers::Quantization;
use blip2::model;

use crate::Done;
use crate::args::{QuantizationArg, QuantizeArgs};

pub(crate) fn run(args: &QuantizeArgs) -> anyhow::Result<Done> {
    let quantization = match args.dtype {
        QuantizationArg::Int8 => Quantization::Int8,
        QuantizationArg::Int4 => Quantization::Int4,
    };
    model::quantize(&args.model, &args.out, quantization)?;
    let n_bytes = fs::metadata(args.out.join("model.safetensors"))?.len();
    eprintln!("{}: {:.1} MB of weights", args.out.display(), n_bytes as f64 / 1e6);
    Ok(Done::All)
}
