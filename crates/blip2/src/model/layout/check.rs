//! Tensors by name and shape, compared with a table of what should be there.

use std::collections::BTreeMap;

use super::table::{Entry, Lavis, Table};
use crate::{Error, Result};

/// Collects what is wrong, so that one message says all of it.
#[derive(Debug)]
pub(super) struct Check<'a> {
    tensors: BTreeMap<String, Tensor<'a>>,
    missing: Vec<String>,
    misshapen: Vec<String>,
}

#[derive(Debug)]
struct Tensor<'a> {
    shape: &'a [usize],
    is_known: bool,
}

impl<'a> Check<'a> {
    /// Of these names and shapes.
    pub(super) fn of(tensors: impl Iterator<Item = (String, &'a [usize])>) -> Self {
        let tensors = tensors.map(|(name, shape)| (name, Tensor { shape, is_known: false })).collect();
        Self { tensors, missing: Vec::new(), misshapen: Vec::new() }
    }

    /// Requires the tensors of the table in LAVIS's layout.
    pub(super) fn lavis(&mut self, table: &Table) {
        for entry @ Entry { shape, lavis, .. } in &table.entries {
            if self.does_without(entry, table, Entry::lavis_name) {
                continue;
            }
            match lavis {
                Lavis::Same(name, shape) => self.require(name, shape),
                Lavis::QueryValueBias(stem) => {
                    let third = [shape[0] / 3];
                    self.require(&format!("{stem}.q_bias"), &third);
                    self.require(&format!("{stem}.v_bias"), &third);
                    self.allow(&format!("{stem}.k_bias"), &third);
                }
            }
        }
    }

    /// Requires the tensors of the table in Hugging Face's layout.
    pub(super) fn hugging_face(&mut self, table: &Table) {
        for entry in &table.entries {
            if !self.does_without(entry, table, |entry| &entry.name) {
                self.require(&entry.name, &entry.shape);
            }
        }
    }

    /// Passes over a tensor; gives whether it is there.
    pub(super) fn pass_over(&mut self, name: &str) -> bool {
        let Some(tensor) = self.tensors.get_mut(name) else { return false };
        tensor.is_known = true;
        true
    }

    /// Passes over all tensors for whose names this holds.
    pub(super) fn pass_over_all(&mut self, is_known: impl Fn(&str) -> bool) {
        for (name, tensor) in &mut self.tensors {
            tensor.is_known |= is_known(name);
        }
    }

    /// # Errors
    /// [`Error::TensorNames`] with all that is missing, misshapen or unknown.
    pub(super) fn finish(self) -> Result<()> {
        let unknown: Vec<_> =
            self.tensors.into_iter().filter(|(_, tensor)| !tensor.is_known).map(|(name, _)| name).collect();
        if self.missing.is_empty() && self.misshapen.is_empty() && unknown.is_empty() {
            return Ok(());
        }
        Err(Error::TensorNames { missing: self.missing, misshapen: self.misshapen, unknown })
    }

    fn require(&mut self, name: &str, shape: &[usize]) {
        if !self.allow(name, shape) {
            self.missing.push(name.into());
        }
    }

    /// Whether the tensor is there.
    fn allow(&mut self, name: &str, shape: &[usize]) -> bool {
        let Some(tensor) = self.tensors.get_mut(name) else { return false };
        tensor.is_known = true;
        if tensor.shape != shape {
            self.misshapen.push(format!("{name} is {:?}, expected {shape:?}", tensor.shape));
        }
        true
    }

    /// Whether a tensor belongs to what Hugging Face's conversion leaves out, and nothing of that is here.
    fn does_without(&self, entry: &Entry, table: &Table, name: impl Fn(&Entry) -> &str) -> bool {
        let is_of_it = |other: &&Entry| other.is_extra && other.module() == entry.module();
        entry.is_extra
            && !table.entries.iter().filter(is_of_it).any(|other| self.tensors.contains_key(name(other)))
    }
}
