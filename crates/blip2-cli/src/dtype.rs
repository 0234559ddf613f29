//! In what a model is computed: what `--dtype` asks for, and what `--dtype auto` chooses.

use std::path::Path;

use blip2::layers::{FrozenFormat, Precision, Quantization};
use blip2::model::{OpenOptions, has_stored_blocks, memory_needed, stored_quantization};
use indicatif::DecimalBytes;

use crate::args::ComputeArg;
use crate::memory;

impl ComputeArg {
    /// The precision of products, and in how few bits large matrices are held; `choose` is asked where it is to be chosen.
    pub(crate) fn format(
        self,
        choose: impl FnOnce() -> anyhow::Result<Quantization>,
    ) -> anyhow::Result<FrozenFormat> {
        let few_bits =
            |quantization| FrozenFormat { precision: Precision::F32, quantization: Some(quantization) };
        Ok(match self {
            Self::F32 => Precision::F32.into(),
            Self::Bf16 => Precision::Bf16.into(),
            Self::Int8 => few_bits(Quantization::Int8),
            Self::Int4 => few_bits(Quantization::Int4),
            Self::Auto => few_bits(choose()?),
        })
    }
}

/// The argument that asks for a format.
pub(crate) fn name(format: FrozenFormat) -> &'static str {
    match (format.quantization, format.precision) {
        (Some(Quantization::Int8), _) => "int8",
        (Some(Quantization::Int4), _) => "int4",
        (None, Precision::F32) => "f32",
        (None, Precision::Bf16) => "bf16",
    }
}

/// The least bits that a weight takes in memory in what is asked for, with its scale.
pub(crate) fn least_bits(asked: Option<ComputeArg>) -> u64 {
    match asked {
        Some(ComputeArg::Int4 | ComputeArg::Auto) => 5,
        Some(ComputeArg::Int8) => 9,
        // Half-precision numbers stay as they are in f32, too.
        Some(ComputeArg::F32 | ComputeArg::Bf16) | None => 16,
    }
}

/// Chooses for the model in a folder, which would be opened with these options, and says what and why.
///
/// # Errors
/// When the folder holds no model, or a file of it is missing or damaged.
pub(crate) fn of_folder(
    folder: &Path,
    options: &OpenOptions,
    say: impl Fn(&str),
) -> anyhow::Result<Quantization> {
    if let Some(stored) = stored_quantization(folder)? {
        let stored_format = FrozenFormat { precision: Precision::F32, quantization: Some(stored) };
        say(&format!("--dtype auto: {}, as the model is stored", name(stored_format)));
        return Ok(stored);
    }
    if options.stage2 && has_stored_blocks(folder, &options.frozen)? {
        say("--dtype auto: int8, and the language model as it is stored");
        return Ok(Quantization::Int8);
    }
    let in_int8 = OpenOptions { quantization: Some(Quantization::Int8), ..options.clone() };
    Ok(fitting(memory_needed(folder, &in_int8)?, say))
}

/// Eight bits where the memory that they need is free, else four; says which and why.
pub(crate) fn fitting(needed_in_int8: u64, say: impl Fn(&str)) -> Quantization {
    let (chosen, why) = choose(needed_in_int8, memory::available());
    say(&why);
    chosen
}

fn choose(needed_in_int8: u64, available: Option<u64>) -> (Quantization, String) {
    let need = format!("about {} of memory", DecimalBytes(needed_in_int8));
    let (chosen, why) = match available.map(|n| (n < needed_in_int8, DecimalBytes(n))) {
        Some((true, free)) => {
            (Quantization::Int4, format!("int4, since int8 needs {need} and {free} are available"))
        }
        Some((false, free)) => {
            (Quantization::Int8, format!("int8, which needs {need}; {free} are available"))
        }
        None => (Quantization::Int8, "int8; how much memory is available is not known".into()),
    };
    (chosen, format!("--dtype auto: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_bits_are_chosen_where_they_fit() {
        for (available, chosen, words) in [
            (Some(4_200_000_000), Quantization::Int8, &["int8", "4.20 GB", "4.20 GB"][..]),
            (
                Some(4_199_999_999),
                Quantization::Int4,
                &["int4, since int8", "4.20 GB of memory", "are available"],
            ),
            (None, Quantization::Int8, &["int8", "not known"]),
        ] {
            let (found, why) = choose(4_200_000_000, available);
            assert_eq!(found, chosen, "{why}");
            assert!(words.iter().all(|word| why.contains(word)) && why.lines().count() == 1, "{why}");
        }
    }

    #[test]
    fn the_name_of_a_format_asks_for_it() {
        let not_asked = || -> anyhow::Result<Quantization> { anyhow::bail!("this is said already") };
        for (asked, expected) in [
            (ComputeArg::F32, "f32"),
            (ComputeArg::Bf16, "bf16"),
            (ComputeArg::Int8, "int8"),
            (ComputeArg::Int4, "int4"),
        ] {
            assert_eq!(name(asked.format(not_asked).unwrap()), expected);
        }
        assert_eq!(name(ComputeArg::Auto.format(|| Ok(Quantization::Int4)).unwrap()), "int4");
        assert!(ComputeArg::Auto.format(not_asked).is_err());
    }
}
