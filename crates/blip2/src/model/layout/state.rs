//! Tensors by name, from one or several checkpoints, compared with a table of what should be there.

use std::collections::{BTreeMap, BTreeSet};

use super::table::{Derived, Entry, Lavis, Table};
use crate::weights::{Checkpoint, Encoding, StoredTensor};
use crate::{Error, Result};

/// Names and where their tensors are.
#[derive(Debug, Default)]
pub(super) struct State<'a> {
    tensors: BTreeMap<String, (&'a Checkpoint, String)>,
}

impl<'a> State<'a> {
    /// All tensors of a checkpoint, under the names that `rename` gives them; what it gives none is left out.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub(super) fn of(checkpoint: &'a Checkpoint, rename: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let mut state = Self::default();
        state.add(checkpoint, rename)?;
        Ok(state)
    }

    /// Adds the tensors of another checkpoint. What both hold must be the same.
    ///
    /// # Errors
    /// [`Error::File`] with a tensor that both hold with other elements.
    pub(super) fn add(
        &mut self,
        checkpoint: &'a Checkpoint,
        rename: impl Fn(&str) -> Option<String>,
    ) -> Result<()> {
        for stored_name in checkpoint.names() {
            let Some(name) = rename(stored_name) else { continue };
            if let Some((other, other_name)) = self.tensors.get(&name) {
                if other.stored(other_name)? == checkpoint.stored(stored_name)? {
                    continue;
                }
                let reason = format!(
                    "its tensor `{stored_name}` is another one than `{other_name}` of {}",
                    other.path().display()
                );
                return Err(Error::File { path: checkpoint.path().into(), reason });
            }
            self.tensors.insert(name, (checkpoint, stored_name.to_owned()));
        }
        Ok(())
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.tensors.remove(name);
    }

    /// # Errors
    /// [`Error::MissingTensor`].
    pub(super) fn shape(&self, name: &str) -> Result<&'a [usize]> {
        let (checkpoint, stored_name) = self.place(name)?;
        checkpoint.shape(stored_name).ok_or_else(|| missing(name))
    }

    /// # Errors
    /// [`Error::MissingTensor`], or [`Error::File`] when it holds numbers of a kind that is not read here.
    pub(super) fn encoding(&self, name: &str) -> Result<Encoding> {
        let (checkpoint, stored_name) = self.place(name)?;
        checkpoint.encoding(stored_name)
    }

    /// # Errors
    /// As [`encoding`](Self::encoding).
    pub(super) fn stored(&self, name: &str) -> Result<StoredTensor<'a>> {
        let (checkpoint, stored_name) = self.place(name)?;
        checkpoint.stored(stored_name)
    }

    /// Lets go of the memory behind a tensor that was written.
    pub(super) fn release(&self, name: &str) {
        if let Ok((checkpoint, stored_name)) = self.place(name) {
            checkpoint.release(stored_name);
        }
    }

    fn place(&self, name: &str) -> Result<(&'a Checkpoint, &str)> {
        self.tensors
            .get(name)
            .map(|(checkpoint, name)| (*checkpoint, name.as_str()))
            .ok_or_else(|| missing(name))
    }

    /// Whether these are the tensors of the table in LAVIS's layout.
    ///
    /// # Errors
    /// [`Error::TensorNames`] with all that is missing, misshapen or unknown; [`Error::File`] when a tensor is no copy of
    /// the one that it should be a copy of.
    pub(super) fn check_lavis(&self, table: &Table) -> Result<()> {
        let mut check = Check::new(self);
        for entry @ Entry { shape, lavis, .. } in &table.entries {
            if self.does_without(entry, table, Entry::lavis_name) {
                continue;
            }
            match lavis {
                Lavis::Same(name, shape) => check.require(name, shape),
                Lavis::QueryValueBias(stem) => {
                    let third = [shape[0] / 3];
                    check.require(&format!("{stem}.q_bias"), &third);
                    check.require(&format!("{stem}.v_bias"), &third);
                    check.allow(&format!("{stem}.k_bias"), &third);
                }
            }
        }
        check.derived(&table.derived_lavis)?;
        check.finish()
    }

    /// Whether these are the tensors of the table in Hugging Face's layout.
    ///
    /// # Errors
    /// As [`check_lavis`](Self::check_lavis).
    pub(super) fn check_hugging_face(&self, table: &Table) -> Result<()> {
        let mut check = Check::new(self);
        for entry in &table.entries {
            if !self.does_without(entry, table, |entry| &entry.name) {
                check.require(&entry.name, &entry.shape);
            }
        }
        check.derived(&table.derived_hugging_face)?;
        check.finish()
    }

    /// Whether a tensor belongs to what Hugging Face's conversion leaves out, and nothing of that is here.
    fn does_without(&self, entry: &Entry, table: &Table, name: impl Fn(&Entry) -> &str) -> bool {
        let is_of_it = |other: &&Entry| other.is_extra && other.module() == entry.module();
        entry.is_extra && !table.entries.iter().filter(is_of_it).any(|other| self.contains(name(other)))
    }
}

fn missing(name: &str) -> Error {
    Error::MissingTensor { name: name.into() }
}

/// Collects what is wrong, so that one message says all of it.
struct Check<'a, 's> {
    state: &'s State<'a>,
    unknown: BTreeSet<&'s str>,
    missing: Vec<String>,
    misshapen: Vec<String>,
}

impl<'a, 's> Check<'a, 's> {
    fn new(state: &'s State<'a>) -> Self {
        Self { state, unknown: state.names().collect(), missing: Vec::new(), misshapen: Vec::new() }
    }

    fn require(&mut self, name: &str, shape: &[usize]) {
        if !self.allow(name, shape) {
            self.missing.push(name.into());
        }
    }

    /// Whether the tensor is there.
    fn allow(&mut self, name: &str, shape: &[usize]) -> bool {
        let Ok(found) = self.state.shape(name) else { return false };
        self.unknown.remove(name);
        if found != shape {
            self.misshapen.push(format!("{name} is {found:?}, expected {shape:?}"));
        }
        true
    }

    fn derived(&mut self, derived: &[(String, Derived)]) -> Result<()> {
        for (name, derived) in derived {
            if !self.unknown.remove(name.as_str()) {
                continue;
            }
            let stored = self.state.stored(name)?;
            let is_right = match derived {
                // What it is a copy of may be missing, which is said elsewhere.
                Derived::CopyOf(of) => self.state.stored(of).is_ok_and(|original| original == stored),
                Derived::Positions(n) => stored == positions(*n),
            };
            if !is_right {
                let (checkpoint, stored_name) = self.state.place(name)?;
                let what = match derived {
                    Derived::CopyOf(of) if !self.state.contains(of) => continue,
                    Derived::CopyOf(of) => format!("no copy of `{of}`, with which BLIP-2 ties it"),
                    Derived::Positions(n) => format!("not the numbers from 0 to {}", n.saturating_sub(1)),
                };
                let reason = format!("its tensor `{stored_name}` is {what}");
                return Err(Error::File { path: checkpoint.path().into(), reason });
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<()> {
        if self.missing.is_empty() && self.misshapen.is_empty() && self.unknown.is_empty() {
            return Ok(());
        }
        Err(Error::TensorNames {
            missing: self.missing,
            misshapen: self.misshapen,
            unknown: self.unknown.into_iter().map(str::to_owned).collect(),
        })
    }
}

/// The numbers from 0 as `[1, n]`.
pub(super) fn positions(n: usize) -> StoredTensor<'static> {
    let bytes: Vec<u8> = (0..n as i64).flat_map(i64::to_le_bytes).collect();
    StoredTensor { shape: vec![1, n], encoding: Encoding::I64, bytes: bytes.into() }
}
