//! What a text may be, beyond what the model finds likely.

use std::fmt::Debug;

use crate::Result;

/// Says which tokens may come next in a text; each text that grows has its own. See [`Grammar`](crate::text::Grammar).
pub trait Constraint: Debug + Send {
    /// Makes every token impossible that may not come next (`-inf`), an end token where the text may not end. At least one
    /// is left as it is.
    ///
    /// # Errors
    /// When nothing can come next, or finding out takes too long.
    fn restrict(&mut self, scores: &mut [f32]) -> Result<()>;

    /// The text goes on with `token`.
    ///
    /// # Errors
    /// When it may not.
    fn push(&mut self, token: u32) -> Result<()>;

    /// The same for a text that parts from this one.
    fn fork(&self) -> Box<dyn Constraint>;
}

impl Clone for Box<dyn Constraint> {
    fn clone(&self) -> Self {
        self.fork()
    }
}

/// Restricts `scores`, to which all other rules were applied. What the text has to be goes before what those forbid: where
/// they leave nothing of it, the scores are the model's own again, `row` less `norm`.
pub(super) fn restrict(
    constraint: Option<&mut Box<dyn Constraint>>,
    row: &[f32],
    norm: f32,
    scores: &mut [f32],
) -> Result<()> {
    let Some(constraint) = constraint else { return Ok(()) };
    constraint.restrict(scores)?;
    if scores.iter().all(|&score| score == f32::NEG_INFINITY) {
        scores.iter_mut().zip(row).for_each(|(score, own)| *score = own - norm);
        constraint.restrict(scores)?;
    }
    Ok(())
}

/// Tells a text's constraint of its new token.
pub(super) fn push(constraint: Option<&mut Box<dyn Constraint>>, token: u32) -> Result<()> {
    constraint.map_or(Ok(()), |constraint| constraint.push(token))
}
