//! Deals samples in batches, in an order that is a function of seed and epoch.

use std::collections::{HashSet, VecDeque};

use serde::{Deserialize, Serialize};

use super::Dataset;
use crate::random::Random;
use crate::{Error, Result};

/// How samples are dealt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoaderConfig {
    /// Samples a batch.
    pub batch_size: usize,
    /// Seed of every order and pick.
    pub seed: u64,
    /// Leaves out the last, smaller batch of an epoch (the contrastive loss depends on the batch size).
    pub drop_last: bool,
    /// Keeps two samples of one group (one picture, or pictures of the same thing) out of one batch where possible.
    pub distinct_groups: bool,
}

/// One sample as it is dealt: which alternatives of text and picture to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Item {
    /// Index into [`Dataset::samples`].
    pub sample: usize,
    /// Index into [`Dataset::images`].
    pub image: usize,
    /// The group of the picture.
    pub group: u32,
    /// Which caption or answer: over as many epochs as there are, each comes once.
    pub choice: usize,
    /// Which view: 0 is the plain picture; over as many epochs as there are, each comes once.
    pub view: u32,
}

/// A batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The epoch it belongs to, from zero.
    pub epoch: u64,
    /// Its samples.
    pub items: Vec<Item>,
}

/// Where a loader stands: all that a resumed run needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoaderState {
    /// The epoch, from zero.
    pub epoch: u64,
    /// Batches of it that were dealt.
    pub position: usize,
    /// [`Dataset::fingerprint`] and dealing rules: a state is only good for the data it was made with.
    pub data: String,
}

/// Deals batches without end; see [`Loader::batches_per_epoch`].
#[derive(Debug, Clone)]
pub struct Loader {
    config: LoaderConfig,
    data: String,
    /// For each entry its samples and how many of them an epoch deals.
    entries: Vec<(Vec<usize>, usize)>,
    /// For each sample: image, group, number of choices, number of views with the plain one.
    samples: Vec<(usize, u32, usize, u32)>,
    epoch: u64,
    position: usize,
    batches: Vec<Vec<Item>>,
}

/// Streams of random numbers, so that no two purposes share one.
const CYCLE: u64 = 1;
const ORDER: u64 = 2;
const CHOICE: u64 = 3;
const VIEW: u64 = 4;

impl Loader {
    /// Prepares to deal `dataset` from its first epoch.
    ///
    /// # Errors
    /// [`Error::Config`] for an empty batch, [`Error::Training`] when an epoch would have no batch.
    pub fn new(dataset: &Dataset, config: LoaderConfig) -> Result<Self> {
        if config.batch_size == 0 {
            return Err(Error::config("batch_size", "must be at least 1"));
        }
        let mut members = vec![Vec::new(); dataset.entries().len()];
        for (index, sample) in dataset.samples().iter().enumerate() {
            members[sample.entry].push(index);
        }
        let entries: Vec<(Vec<usize>, usize)> = members
            .into_iter()
            .zip(dataset.entries())
            .filter(|(samples, _)| !samples.is_empty())
            .map(|(samples, entry)| {
                let wanted = ((samples.len() as f64 * entry.repeat).round() as usize).max(1);
                let per_epoch = wanted.min(entry.max_per_epoch.unwrap_or(usize::MAX));
                (samples, per_epoch)
            })
            .collect();
        let samples = dataset
            .samples()
            .iter()
            .map(|sample| {
                let image = &dataset.images()[sample.image];
                (sample.image, image.group, sample.text.n_choices(), image.views + 1)
            })
            .collect();
        let data = format!("{} {config:?}", dataset.fingerprint());
        let mut loader = Self { config, data, entries, samples, epoch: 0, position: 0, batches: Vec::new() };
        if loader.batches_per_epoch() == 0 {
            return Err(Error::Training(format!(
                "an epoch has {} samples, fewer than a batch of {}: add data or lower batch_size",
                loader.samples_per_epoch(),
                loader.config.batch_size
            )));
        }
        loader.batches = loader.deal(0);
        Ok(loader)
    }

    /// How many samples an epoch has.
    pub fn samples_per_epoch(&self) -> usize {
        self.entries.iter().map(|(_, per_epoch)| per_epoch).sum()
    }

    /// How many batches an epoch has.
    pub fn batches_per_epoch(&self) -> usize {
        let n = self.samples_per_epoch();
        if self.config.drop_last { n / self.config.batch_size } else { n.div_ceil(self.config.batch_size) }
    }

    /// Where the loader stands.
    pub fn state(&self) -> LoaderState {
        LoaderState { epoch: self.epoch, position: self.position, data: self.data.clone() }
    }

    /// Continues from a saved state.
    ///
    /// # Errors
    /// [`Error::Training`] when the state was made with other data, seed or batch size.
    pub fn restore(&mut self, state: &LoaderState) -> Result<()> {
        if state.data != self.data || state.position > self.batches_per_epoch() {
            return Err(Error::Training(
                "the data, the seed or the batch size changed since the checkpoint was written: \
                 the order of samples cannot be continued; restore them, or start a new run"
                    .to_owned(),
            ));
        }
        self.epoch = state.epoch;
        self.position = state.position;
        self.batches = self.deal(self.epoch);
        Ok(())
    }

    /// The next batch; after the last one of an epoch the next epoch begins.
    pub fn next_batch(&mut self) -> Batch {
        if self.position == self.batches.len() {
            self.epoch += 1;
            self.position = 0;
            self.batches = self.deal(self.epoch);
        }
        self.position += 1;
        Batch { epoch: self.epoch, items: self.batches[self.position - 1].clone() }
    }

    /// The batches of an epoch.
    fn deal(&self, epoch: u64) -> Vec<Vec<Item>> {
        let mut items = Vec::with_capacity(self.samples_per_epoch());
        for (number, (samples, per_epoch)) in self.entries.iter().enumerate() {
            self.deal_entry(epoch, number as u64, samples, *per_epoch, &mut items);
        }
        Random::new(&[self.config.seed, ORDER, epoch]).shuffle(&mut items);
        let n_batches = self.batches_per_epoch();
        let mut batches: Vec<Vec<Item>> = if self.config.distinct_groups {
            distinct_batches(items, self.config.batch_size)
        } else {
            items.chunks(self.config.batch_size).map(<[Item]>::to_vec).collect()
        };
        batches.truncate(n_batches);
        batches
    }

    /// An entry is an endless row of rounds, each round all its samples in a new order; an epoch takes the next
    /// `per_epoch` of that row. So a capped entry shows everything before it repeats anything.
    fn deal_entry(&self, epoch: u64, entry: u64, samples: &[usize], per_epoch: usize, items: &mut Vec<Item>) {
        let n = samples.len() as u128;
        let begin = u128::from(epoch) * per_epoch as u128;
        let end = begin + per_epoch as u128;
        let mut at = begin;
        while at < end {
            let round = (at / n) as u64;
            let mut order = samples.to_vec();
            Random::new(&[self.config.seed, CYCLE, entry, round]).shuffle(&mut order);
            let from = (at % n) as usize;
            let to = n.min(from as u128 + (end - at)) as usize;
            items.extend(order[from..to].iter().map(|&sample| self.item(sample, round)));
            at += (to - from) as u128;
        }
    }

    fn item(&self, sample: usize, round: u64) -> Item {
        let (image, group, n_choices, n_views) = self.samples[sample];
        let choice = self.pick(CHOICE, sample, round, n_choices);
        let view = self.pick(VIEW, sample, round, n_views as usize) as u32;
        Item { sample, image, group, choice, view }
    }

    /// One of `n` alternatives; `n` rounds in a row pick each once.
    fn pick(&self, purpose: u64, sample: usize, round: u64, n: usize) -> usize {
        let mut order: Vec<usize> = (0..n).collect();
        Random::new(&[self.config.seed, purpose, sample as u64, round / n as u64]).shuffle(&mut order);
        order[(round % n as u64) as usize]
    }
}

/// Batches in which no group comes twice, as far as possible: a sample whose group is already in the batch waits for
/// the next one. Batch sizes are those of plain chunks; what still waits at the end goes into the last batches.
fn distinct_batches(items: Vec<Item>, batch_size: usize) -> Vec<Vec<Item>> {
    let sizes: Vec<usize> = items.chunks(batch_size).map(<[Item]>::len).collect();
    let mut waiting: VecDeque<Item> = VecDeque::new();
    let mut fresh = items.into_iter();
    let mut batches = Vec::with_capacity(sizes.len());
    for size in sizes {
        let mut batch = Vec::with_capacity(size);
        let mut groups = HashSet::with_capacity(size);
        let mut still_waiting = VecDeque::new();
        for item in waiting.drain(..) {
            if batch.len() < size && groups.insert(item.group) {
                batch.push(item);
            } else {
                still_waiting.push_back(item);
            }
        }
        while batch.len() < size {
            match fresh.next() {
                Some(item) if groups.insert(item.group) => batch.push(item),
                Some(item) => still_waiting.push_back(item),
                None => break,
            }
        }
        // Nothing fresh is left: a group that comes twice beats a batch that is too small.
        while batch.len() < size
            && let Some(item) = still_waiting.pop_front()
        {
            batch.push(item);
        }
        waiting = still_waiting;
        batches.push(batch);
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::super::{DataConfig, Dataset, Text};
    use super::*;
    use std::collections::HashMap;
    use std::fs;

    /// Entry 0: ten pictures of five captions each, two views. Entry 1: 30 questions on three pictures.
    fn dataset(capped: Option<usize>, repeat: f64) -> Dataset {
        let dir = tempfile::tempdir().unwrap();
        let mut captions = String::new();
        for i in 0..10 {
            fs::write(dir.path().join(format!("{i}.jpg")), "x").unwrap();
            captions += &format!(r#"{{"image":"{i}.jpg","captions":["a{i}","b","c","d","e"]}}"#);
            captions.push('\n');
        }
        let questions: String = (0..30)
            .map(|i| format!("{{\"image\":\"{}.jpg\",\"question\":\"q{i}\",\"answer\":\"r\"}}\n", i % 3))
            .collect();
        fs::write(dir.path().join("c.jsonl"), captions).unwrap();
        fs::write(dir.path().join("q.jsonl"), questions).unwrap();
        let first = DataConfig { views: 1, repeat, ..DataConfig::new("c.jsonl") };
        let second = DataConfig { max_per_epoch: capped, ..DataConfig::new("q.jsonl") };
        Dataset::load(&[first, second], dir.path()).unwrap()
    }

    fn config() -> LoaderConfig {
        LoaderConfig { batch_size: 4, seed: 3, drop_last: false, distinct_groups: false }
    }

    fn epoch(loader: &mut Loader) -> Vec<Item> {
        (0..loader.batches_per_epoch()).flat_map(|_| loader.next_batch().items).collect()
    }

    #[test]
    fn an_epoch_deals_every_sample_once_and_epochs_differ() {
        let mut loader = Loader::new(&dataset(None, 1.0), config()).unwrap();
        assert_eq!((loader.samples_per_epoch(), loader.batches_per_epoch()), (40, 10));
        let (first, second) = (epoch(&mut loader), epoch(&mut loader));
        assert_ne!(first, second);
        for items in [first, second] {
            let mut samples: Vec<usize> = items.iter().map(|item| item.sample).collect();
            samples.sort_unstable();
            assert_eq!(samples, (0..40).collect::<Vec<_>>());
        }
        let other = LoaderConfig { seed: 4, ..config() };
        let mut other = Loader::new(&dataset(None, 1.0), other).unwrap();
        assert_ne!(epoch(&mut other), epoch(&mut Loader::new(&dataset(None, 1.0), config()).unwrap()));
    }

    #[test]
    fn captions_and_views_come_in_turn() {
        let dataset = dataset(None, 1.0);
        let mut loader = Loader::new(&dataset, config()).unwrap();
        let mut choices: HashMap<usize, Vec<usize>> = HashMap::new();
        let mut views: HashMap<usize, Vec<u32>> = HashMap::new();
        for _ in 0..10 {
            for item in epoch(&mut loader) {
                assert!(item.choice < dataset.samples()[item.sample].text.n_choices());
                if matches!(dataset.samples()[item.sample].text, Text::Captions(_)) {
                    choices.entry(item.sample).or_default().push(item.choice);
                    views.entry(item.sample).or_default().push(item.view);
                }
            }
        }
        assert_eq!(choices.len(), 10);
        for picked in choices.values_mut() {
            assert_eq!(picked.len(), 10);
            for five in picked.chunks_mut(5) {
                five.sort_unstable();
                assert_eq!(five, [0, 1, 2, 3, 4]);
            }
        }
        for picked in views.values() {
            assert_eq!(picked.iter().filter(|&&view| view == 1).count(), 5, "{picked:?}");
        }
    }

    #[test]
    fn a_cap_shows_everything_before_it_repeats_and_repeat_multiplies() {
        let dataset = dataset(Some(10), 2.0);
        let mut loader = Loader::new(&dataset, config()).unwrap();
        assert_eq!(loader.samples_per_epoch(), 20 + 10);
        let mut questions = Vec::new();
        for _ in 0..3 {
            let items = epoch(&mut loader);
            let captions: Vec<usize> = items.iter().map(|i| i.sample).filter(|&s| s < 10).collect();
            for sample in 0..10 {
                assert_eq!(captions.iter().filter(|&&s| s == sample).count(), 2);
            }
            questions.extend(items.iter().map(|i| i.sample).filter(|&s| s >= 10));
        }
        questions.sort_unstable();
        assert_eq!(questions, (10..40).collect::<Vec<_>>());
    }

    #[test]
    fn a_restored_loader_continues_as_if_it_had_not_stopped() {
        let dataset = dataset(Some(7), 1.5);
        for stop_after in [0, 1, 5, 6, 11, 13] {
            let mut whole = Loader::new(&dataset, config()).unwrap();
            (0..stop_after).for_each(|_| drop(whole.next_batch()));
            let saved = serde_json::to_string(&whole.state()).unwrap();
            let mut resumed = Loader::new(&dataset, config()).unwrap();
            resumed.restore(&serde_json::from_str(&saved).unwrap()).unwrap();
            for _ in 0..20 {
                assert_eq!(whole.next_batch(), resumed.next_batch());
            }
        }
    }

    #[test]
    fn a_state_of_other_data_is_refused() {
        let state = Loader::new(&dataset(None, 1.0), config()).unwrap().state();
        let mut other = Loader::new(&dataset(Some(5), 1.0), config()).unwrap();
        assert!(other.restore(&state).unwrap_err().to_string().contains("changed"));
        let mut other = Loader::new(&dataset(None, 1.0), LoaderConfig { seed: 9, ..config() }).unwrap();
        assert!(other.restore(&state).is_err());
    }

    #[test]
    fn distinct_groups_stay_apart_where_possible() {
        let dataset = dataset(Some(6), 2.0);
        // 20 caption samples of ten pictures and 6 questions of three: batches of 4 can all be distinct.
        let rules = LoaderConfig { distinct_groups: true, ..config() };
        let mut loader = Loader::new(&dataset, rules).unwrap();
        let mut n_repeats = 0;
        for _ in 0..20 {
            let mut samples = Vec::new();
            for batch in 0..loader.batches_per_epoch() {
                let items = loader.next_batch().items;
                assert_eq!(items.len(), if batch == 6 { 2 } else { 4 });
                let groups: HashSet<u32> = items.iter().map(|item| item.group).collect();
                n_repeats += items.len() - groups.len();
                samples.extend(items.iter().map(|item| item.sample));
            }
            assert_eq!(samples.len(), 26, "nothing is lost by waiting");
        }
        // Without the rule about one pair in every other batch is of one group: some 70 in these 140 batches.
        assert!(n_repeats <= 20, "{n_repeats}");
    }

    #[test]
    fn the_last_batch_can_be_dropped_and_an_empty_epoch_is_an_error() {
        let dataset = dataset(None, 1.0);
        let rules = LoaderConfig { batch_size: 12, drop_last: true, ..config() };
        let mut loader = Loader::new(&dataset, rules.clone()).unwrap();
        assert_eq!(loader.batches_per_epoch(), 3);
        assert_eq!(epoch(&mut loader).len(), 36);
        let message =
            Loader::new(&dataset, LoaderConfig { batch_size: 41, ..rules }).unwrap_err().to_string();
        assert!(message.contains("40 samples"), "{message}");
    }
}
