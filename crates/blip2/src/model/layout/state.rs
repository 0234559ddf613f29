//! Tensors by name, from one or several checkpoints.

use std::collections::BTreeMap;

use super::check::Check;
use super::table::{Derived, Table};
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
        let mut check = self.check();
        check.lavis(table);
        self.pass_over_derived(&mut check, &table.derived_lavis)?;
        check.finish()
    }

    /// Whether these are the tensors of the table in Hugging Face's layout.
    ///
    /// # Errors
    /// As [`check_lavis`](Self::check_lavis).
    pub(super) fn check_hugging_face(&self, table: &Table) -> Result<()> {
        let mut check = self.check();
        check.hugging_face(table);
        self.pass_over_derived(&mut check, &table.derived_hugging_face)?;
        check.finish()
    }

    fn check(&self) -> Check<'a> {
        Check::of(self.names().filter_map(|name| Some((name.to_owned(), self.shape(name).ok()?))))
    }

    /// Passes over tensors that say nothing new, which is looked at.
    fn pass_over_derived(&self, check: &mut Check<'_>, derived: &[(String, Derived)]) -> Result<()> {
        for (name, derived) in derived {
            if !check.pass_over(name) {
                continue;
            }
            let stored = self.stored(name)?;
            let is_right = match derived {
                // What it is a copy of may be missing, which is said elsewhere.
                Derived::CopyOf(of) => self.stored(of).is_ok_and(|original| original == stored),
                Derived::Positions(n) => stored == positions(*n),
            };
            if !is_right {
                let (checkpoint, stored_name) = self.place(name)?;
                let what = match derived {
                    Derived::CopyOf(of) if !self.contains(of) => continue,
                    Derived::CopyOf(of) => format!("no copy of `{of}`, with which BLIP-2 ties it"),
                    Derived::Positions(n) => format!("not the numbers from 0 to {}", n.saturating_sub(1)),
                };
                let reason = format!("its tensor `{stored_name}` is {what}");
                return Err(Error::File { path: checkpoint.path().into(), reason });
            }
        }
        Ok(())
    }
}

fn missing(name: &str) -> Error {
    Error::MissingTensor { name: name.into() }
}

/// The numbers from 0 as `[1, n]`.
pub(super) fn positions(n: usize) -> StoredTensor<'static> {
    let bytes: Vec<u8> = (0..n as i64).flat_map(i64::to_le_bytes).collect();
    StoredTensor { shape: vec![1, n], encoding: Encoding::I64, bytes: bytes.into() }
}
