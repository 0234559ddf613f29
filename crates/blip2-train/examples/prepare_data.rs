//! Prepares the default model's data: `prepare_data SHARED EASY_VQA OUT`.
#![allow(clippy::print_stdout)]
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [shared, easy_vqa, out] = &args[..] else {
        return Err("usage: prepare_data SHARED EASY_VQA OUT".into());
    };
    let easy_vqa = (easy_vqa != "-").then(|| Path::new(easy_vqa));
    for file in blip2_train::recipe::prepare_default_data(Path::new(shared), easy_vqa, Path::new(out), 1)? {
        println!("{:7} {}", file.n_rows, file.path.display());
    }
    Ok(())
}
