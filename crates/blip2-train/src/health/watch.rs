//! The warnings of a whole run: told when they begin, remembered for its end.

use std::fmt;
use std::mem::discriminant;

use super::{Limits, Warning};
use crate::trainer::Value;

/// Healthy steps after which a warning of the same kind begins anew. A value at its limit crosses it at every other step.
const QUIET_STEPS: u64 = 20;

/// Looks at every step of a run.
#[derive(Debug, Clone, Default)]
pub struct Watch {
    limits: Limits,
    episodes: Vec<Episode>,
}

/// All warnings of one kind in a run. Displayed as one line.
#[derive(Debug, Clone, PartialEq)]
pub struct Episode {
    /// The last of them.
    pub latest: Warning,
    /// The step of the first one.
    pub first_step: u64,
    /// The step of the last one.
    pub last_step: u64,
    /// How many steps had it.
    pub n_steps: u64,
}

impl fmt::Display for Episode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { latest, first_step, last_step, n_steps } = self;
        if first_step == last_step {
            write!(f, "step {first_step}: {latest}")
        } else {
            write!(f, "{n_steps} of the steps {first_step} to {last_step}: {latest}")
        }
    }
}

impl Watch {
    /// Looks at what a step reports, and gives the warnings that begin with it.
    pub fn step(&mut self, step: u64, values: &[Value]) -> Vec<Warning> {
        let value = |name: &str| values.iter().find(|(own, _)| *own == name).map(|(_, value)| *value);
        let found = [
            value("query_cosine").and_then(|cosine| self.limits.check_queries(cosine)),
            value("temperature").and_then(|temperature| self.limits.check_temperature(temperature)),
        ];
        found.into_iter().flatten().filter(|warning| self.begins(step, warning)).collect()
    }

    /// What was warned of so far, one for each kind.
    #[must_use]
    pub fn episodes(&self) -> &[Episode] {
        &self.episodes
    }

    /// Remembers a warning and says whether it is new.
    fn begins(&mut self, step: u64, warning: &Warning) -> bool {
        let is_same = |episode: &&mut Episode| discriminant(&episode.latest) == discriminant(warning);
        let latest = warning.clone();
        let Some(episode) = self.episodes.iter_mut().find(is_same) else {
            self.episodes.push(Episode { latest, first_step: step, last_step: step, n_steps: 1 });
            return true;
        };
        let was_quiet = step > episode.last_step + QUIET_STEPS;
        (episode.latest, episode.last_step) = (latest, step);
        episode.n_steps += 1;
        was_quiet
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_is_told_when_it_begins_and_kept_for_the_end() {
        let mut watch = Watch::default();
        let cosines = [(1, 0.5), (7, 0.99), (8, 0.5), (9, 0.995), (9 + QUIET_STEPS, 0.985), (60, 0.99)];
        let told: Vec<u64> = cosines
            .into_iter()
            .filter(|(step, cosine)| {
                let warnings = watch.step(*step, &[("loss", 1.0), ("query_cosine", *cosine)]);
                assert!(warnings.iter().all(|w| *w == Warning::QueriesCollapsed { mean_cosine: *cosine }));
                !warnings.is_empty()
            })
            .map(|(step, _)| step)
            .collect();
        assert_eq!(told, [7, 60]);
        let latest = Warning::QueriesCollapsed { mean_cosine: 0.99 };
        assert_eq!(watch.episodes(), [Episode { latest, first_step: 7, last_step: 60, n_steps: 4 }]);
        let line = watch.episodes()[0].to_string();
        assert!(line.starts_with("4 of the steps 7 to 60: the queries are collapsing"), "{line}");
    }

    #[test]
    fn each_kind_begins_by_itself() {
        let mut watch = Watch::default();
        assert_eq!(watch.step(1, &[("query_cosine", 0.99), ("temperature", 0.07)]).len(), 1);
        let new = watch.step(2, &[("query_cosine", 0.99), ("temperature", 0.9)]);
        assert_eq!(new, [Warning::TemperatureOutOfRange { temperature: 0.9 }]);
        assert_eq!(watch.episodes().len(), 2);
        assert!(watch.episodes()[1].to_string().starts_with("step 2: the contrastive temperature"));
        // Stage 2 has no temperature.
        assert!(Watch::default().step(1, &[("loss", 1.0)]).is_empty());
    }
}
