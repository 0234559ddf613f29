//! `blip2 data`.

use blip2_train::recipe::{prepare_default_data, write_questions};

use crate::Done;
use crate::args::DataCommand;
use crate::filter;

pub(crate) fn run(command: &DataCommand) -> anyhow::Result<Done> {
    let files = match command {
        DataCommand::Filter(args) => return filter::run(args),
        DataCommand::Questions { captions, out, seed } => vec![write_questions(captions, out, *seed)?],
        DataCommand::Prepare { shared, easy_vqa, out, seed } => {
            prepare_default_data(shared, easy_vqa.as_deref(), out, *seed)?
        }
    };
    for file in files {
        println!("{:7} {}", file.n_rows, file.path.display());
    }
    Ok(Done::All)
}
