//! An image encoder alone, as LAVIS loads it, under the names that it has in a Hugging Face folder.

use std::collections::BTreeMap;

use super::output::{self, Output};
use super::state::State;
use super::table::Table;
use super::{add_vision, sizes};
use crate::layers::TensorSource;
use crate::vision::vit::VitConfig;
use crate::weights::{Checkpoint, StoredTensor};
use crate::{Error, Result};

/// Its tensors, without those that BLIP-2 drops.
#[derive(Debug)]
pub(in crate::model) struct LavisEncoder<'a> {
    config: VitConfig,
    state: State<'a>,
    outputs: BTreeMap<String, Output>,
}

impl<'a> LavisEncoder<'a> {
    /// Of a checkpoint of this layout; `heads` are the attention heads of an encoder of no published width.
    ///
    /// # Errors
    /// [`Error::TensorNames`] with all tensors that are missing, misshapen or unknown; [`Error::Config`] when the number of
    /// heads is not known.
    pub(in crate::model) fn of(checkpoint: &'a Checkpoint, heads: Option<usize>) -> Result<Self> {
        let mut state = State::default();
        add_vision(&mut state, checkpoint)?;
        let config = sizes::vision(&state, heads)?;
        let table = Table::of_encoder(&config);
        state.check_lavis(&table)?;
        let outputs = output::hugging_face(&table, &state)?;
        let outputs = outputs.into_iter().map(|output| (output.about.name.clone(), output)).collect();
        Ok(Self { config, state, outputs })
    }

    pub(in crate::model) fn config(&self) -> &VitConfig {
        &self.config
    }

    /// Its tensors by name, in the order of these.
    ///
    /// # Errors
    /// Those of the file.
    pub(in crate::model) fn tensors(&self) -> impl Iterator<Item = Result<(&str, StoredTensor<'a>)>> {
        self.outputs.iter().map(|(name, output)| {
            let shape = output.about.shape.clone();
            Ok((name.as_str(), StoredTensor { shape, ..output.bytes(&self.state)? }))
        })
    }
}

impl TensorSource for LavisEncoder<'_> {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.outputs.get(name).map(|output| output.about.shape.clone())
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let output = self.outputs.get(name).ok_or_else(|| Error::MissingTensor { name: name.into() })?;
        let stored = output.bytes(&self.state)?;
        let mut values = vec![0.0; output.about.shape.iter().product()];
        stored.encoding.decode(&stored.bytes, &mut values);
        Ok(values)
    }
}
