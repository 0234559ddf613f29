//! `blip2 convert`: checkpoints from one layout into the other.

use blip2::model::layout::{self, ConvertOptions, Converted, FrozenParts};

use crate::Done;
use crate::args::{ConvertArgs, LayoutArg};
use crate::generation::WrongUsage;

pub(crate) fn run(args: &ConvertArgs) -> anyhow::Result<Done> {
    let options = ConvertOptions { max_shard_bytes: args.max_shard_bytes, allow_unknown: args.allow_unknown };
    let parts = FrozenParts {
        vision: args.vit.clone(),
        language_model: args.language_model.clone(),
        vocabulary: args.vocabulary.clone(),
        config: args.config.clone(),
    };
    let has_parts = [&parts.vision, &parts.language_model, &parts.vocabulary, &parts.config]
        .iter()
        .any(|part| part.is_some());
    let [is_safetensors, is_pth] =
        ["safetensors", "pth"].map(|known| args.out.extension().is_some_and(|e| e == known));
    let by_name = match (is_safetensors, is_pth) {
        (true, _) => LayoutArg::AsIs,
        (_, true) => LayoutArg::Lavis,
        _ => LayoutArg::Hf,
    };
    let to = args.to.unwrap_or(by_name);
    if has_parts && to != LayoutArg::Hf {
        return WrongUsage::end(
            "--vit, --language-model, --vocabulary and --config are for making a Hugging Face folder (--to hf)",
        );
    }
    let out = args.out.display();
    let converted = match to {
        LayoutArg::Hf if is_safetensors || is_pth => {
            return WrongUsage::end(format!("{out} must be a folder: Hugging Face's layout is one"));
        }
        LayoutArg::Lavis if !(is_safetensors || is_pth) => {
            return WrongUsage::end(format!("{out} must end in .pth or .safetensors: it becomes one file"));
        }
        LayoutArg::AsIs if !is_safetensors => {
            return WrongUsage::end(format!("{out} must end in .safetensors: it becomes one such file"));
        }
        LayoutArg::Hf => layout::to_hugging_face(&args.input, &args.out, &parts, &options)?,
        LayoutArg::Lavis => layout::to_lavis(&args.input, &args.out, &options)?,
        LayoutArg::AsIs => layout::copy_tensors(&args.input, &args.out)?,
    };
    say(args, &converted);
    Ok(Done::All)
}

fn say(args: &ConvertArgs, converted: &Converted) {
    let Converted { n_tensors, left_out, has_pretraining_heads } = converted;
    eprintln!("{}: {n_tensors} tensors", args.out.display());
    if !left_out.is_empty() {
        eprintln!("left out, since the model does not have them: {}", left_out.join(", "));
    }
    if *has_pretraining_heads == Some(false) {
        eprintln!(
            "{} has no temperature or no language-modelling head of the Q-Former, which Hugging Face's own conversion drops: \
             it matches, but stage 1 cannot go on from it",
            args.input.display()
        );
    }
}
