//! Signs that a training goes wrong while its loss still looks plausible: pure functions of a step's values, and a
//! [`Watch`] over all steps of a run.

mod watch;

use std::fmt;
use std::ops::RangeInclusive;

use blip2::layers::DropoutRng;
use blip2::qformer::QFormer;
use candle_core::Tensor;

use crate::Result;

pub use watch::{Episode, Watch};

/// What is still healthy.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Mean pairwise cosine of a picture's query outputs. Near 1 all queries have become one vector, and the language
    /// model sees one token 32 times.
    pub query_cosine: f64,
    /// The contrastive temperature, which starts at 0.07. Below, the loss hangs on a few hardest pairs and explodes;
    /// above, all pairs look alike and nothing is learned.
    pub temperature: RangeInclusive<f64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { query_cosine: 0.98, temperature: 0.005..=0.5 }
    }
}

/// Something a person should know about a running training. Displayed as one line with what to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Warning {
    /// The query outputs are (nearly) one vector.
    QueriesCollapsed {
        /// Their mean pairwise cosine; not a number when an output is not.
        mean_cosine: f64,
    },
    /// The temperature left the healthy range.
    TemperatureOutOfRange {
        /// Its value.
        temperature: f64,
    },
    /// A loss is infinite or not a number: stop, the last checkpoint is the last good one.
    LossNotFinite {
        /// Which loss.
        name: String,
        /// Its value.
        value: f64,
    },
}

impl Warning {
    /// Whether training on would destroy what was learned.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::LossNotFinite { .. })
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::QueriesCollapsed { mean_cosine } => write!(
                f,
                "the queries are collapsing to one vector (mean pairwise cosine {mean_cosine:.4}); \
                 lower the learning rate or begin again from an earlier checkpoint"
            ),
            Self::TemperatureOutOfRange { temperature } => write!(
                f,
                "the contrastive temperature ran away to {temperature:.5} (it starts at 0.07); \
                 lower the learning rate or use a larger batch"
            ),
            Self::LossNotFinite { name, value } => {
                write!(f, "{name} is {value}; go on from the last checkpoint with a lower learning rate")
            }
        }
    }
}

impl Limits {
    /// Warns when the mean pairwise cosine, as of [`mean_query_cosine`], is above the limit.
    #[must_use]
    pub fn check_queries(&self, mean_cosine: f64) -> Option<Warning> {
        let healthy = mean_cosine <= self.query_cosine; // not so for NaN
        (!healthy).then_some(Warning::QueriesCollapsed { mean_cosine })
    }

    /// Warns when the temperature is outside its range.
    #[must_use]
    pub fn check_temperature(&self, temperature: f64) -> Option<Warning> {
        let healthy = self.temperature.contains(&temperature);
        (!healthy).then_some(Warning::TemperatureOutOfRange { temperature })
    }
}

/// Warns about the first loss that is not finite.
#[must_use]
pub fn check_losses<'a>(losses: impl IntoIterator<Item = (&'a str, f64)>) -> Option<Warning> {
    let (name, value) = losses.into_iter().find(|(_, value)| !value.is_finite())?;
    Some(Warning::LossNotFinite { name: name.to_owned(), value })
}

/// The cosine between two query outputs of the same picture, averaged over all pairs of different queries and over
/// the batch. A zero vector has cosine 0 with all others. 0 when there is no pair.
///
/// # Shapes
/// - `outputs`: `[B * n_queries, width]`, row-major, one picture after the other
///
/// # Panics
/// When the length does not fit, or `width` or `n_queries` is 0.
#[must_use]
pub fn mean_query_cosine(outputs: &[f32], n_queries: usize, width: usize) -> f64 {
    assert_eq!(outputs.len() % (n_queries * width), 0, "outputs are [B * {n_queries}, {width}]");
    let n_pairs = n_queries * (n_queries - 1);
    if outputs.is_empty() || n_pairs == 0 {
        return 0.0;
    }
    let pictures = outputs.chunks_exact(n_queries * width);
    let n_pictures = pictures.len();
    let sum: f64 = pictures.map(|picture| ordered_pair_sum(picture, width)).sum();
    sum / (n_pairs * n_pictures) as f64
}

/// The sum of cosines over all ordered pairs of different rows. With unit rows u that is |sum u|² - sum |u|², which
/// needs one pass instead of a product of all with all.
fn ordered_pair_sum(rows: &[f32], width: usize) -> f64 {
    let mut total = vec![0.0; width];
    let mut own = 0.0;
    for row in rows.chunks_exact(width) {
        let norm = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        if norm == 0.0 {
            continue;
        }
        own += 1.0;
        for (sum, &x) in total.iter_mut().zip(row) {
            *sum += f64::from(x) / norm;
        }
    }
    total.iter().map(|x| x * x).sum::<f64>() - own
}

/// Of how many pictures [`query_cosine`] looks at one, and at how many at most: its pass is to cost little beside the step.
const PICTURES_FOR_ONE: usize = 8;
const PICTURES_LOOKED_AT: usize = 4;

/// [`mean_query_cosine`] of the first pictures of a batch, from a pass of its own without dropout: dropout's noise alone
/// keeps collapsed queries at 0.9.
///
/// # Errors
/// Those of the tensor engine.
pub(crate) fn query_cosine(qformer: &QFormer, image_embeds: &Tensor, n_images: usize) -> Result<f32> {
    let n_tokens = image_embeds.dim(0)? / n_images.max(1);
    let n = n_images.div_ceil(PICTURES_FOR_ONE).min(PICTURES_LOOKED_AT);
    let image = qformer.image_keys(&image_embeds.narrow(0, 0, n * n_tokens)?, n)?;
    let (queries, _) = qformer.encode_queries(&image, &mut DropoutRng::off())?;
    let (_, width) = queries.dims2()?;
    let rows = queries.flatten_all()?.to_vec1::<f32>()?;
    Ok(mean_query_cosine(&rows, qformer.config().num_query_tokens, width) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-6, "{found} instead of {expected}");
    }

    #[test]
    fn cosine_of_all_pairs_equals_the_definition() {
        let (n_queries, width, n_pictures) = (5, 7, 3);
        let outputs: Vec<f32> =
            (0..n_pictures * n_queries * width).map(|i| (i as f32 * 1.7).sin() + 0.2).collect();
        let row = |picture: usize, query: usize| &outputs[(picture * n_queries + query) * width..][..width];
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(x * y)).sum::<f64>();
        let mut sum = 0.0;
        for picture in 0..n_pictures {
            for i in 0..n_queries {
                for j in 0..i {
                    let (a, b) = (row(picture, i), row(picture, j));
                    sum += dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
                }
            }
        }
        let n_pairs = n_pictures * n_queries * (n_queries - 1) / 2;
        close(mean_query_cosine(&outputs, n_queries, width), sum / n_pairs as f64);
    }

    #[test]
    fn cosine_is_known_for_simple_rows() {
        close(mean_query_cosine(&[1.0, 2.0, 10.0, 20.0, 0.1, 0.2], 3, 2), 1.0);
        close(mean_query_cosine(&[1.0, 0.0, 0.0, 3.0], 2, 2), 0.0);
        close(mean_query_cosine(&[1.0, 0.0, -1.0, 0.0], 2, 2), -1.0);
        close(mean_query_cosine(&[1.0, 0.0, 0.0, 0.0], 2, 2), 0.0); // a zero vector
        close(mean_query_cosine(&[1.0, 0.0, 2.0, 0.0, 0.0, 1.0, 1.0, 0.0], 2, 2), 0.5); // two pictures
        close(mean_query_cosine(&[1.0, 2.0], 1, 2), 0.0); // one query has no pair
        close(mean_query_cosine(&[], 2, 2), 0.0);
    }

    #[test]
    fn collapsed_or_broken_queries_are_reported() {
        let limits = Limits::default();
        assert_eq!(limits.check_queries(0.9), None);
        assert_eq!(limits.check_queries(0.99), Some(Warning::QueriesCollapsed { mean_cosine: 0.99 }));
        assert!(limits.check_queries(mean_query_cosine(&[f32::NAN, 1.0, 1.0, 1.0], 2, 2)).is_some());
    }

    #[test]
    fn a_temperature_out_of_range_is_reported() {
        let limits = Limits::default();
        for temperature in [0.005, 0.07, 0.5] {
            assert_eq!(limits.check_temperature(temperature), None);
        }
        for temperature in [0.0049, 0.51, -0.07, 0.0] {
            assert_eq!(
                limits.check_temperature(temperature),
                Some(Warning::TemperatureOutOfRange { temperature })
            );
        }
        assert!(limits.check_temperature(f64::NAN).is_some());
    }

    #[test]
    fn the_first_loss_that_is_not_finite_is_fatal() {
        assert_eq!(check_losses([("itc", 1.0), ("itm", 0.0)]), None);
        let warning =
            check_losses([("itc", 1.0), ("itm", f64::INFINITY), ("itg", f64::NAN)]).expect("a warning");
        assert_eq!(warning, Warning::LossNotFinite { name: "itm".to_owned(), value: f64::INFINITY });
        assert!(warning.is_fatal() && !Warning::QueriesCollapsed { mean_cosine: 1.0 }.is_fatal());
        assert_eq!(
            warning.to_string(),
            "itm is inf; go on from the last checkpoint with a lower learning rate"
        );
    }
}
