use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::data::DataConfig;

/// Features of a picture: its mean red, its size, and its top left red, on 3 tokens of width 2.
struct Fake {
    key: &'static str,
    n_encoded: AtomicUsize,
}

impl Fake {
    fn new(key: &'static str) -> Self {
        Self { key, n_encoded: AtomicUsize::new(0) }
    }

    fn n_encoded(&self) -> usize {
        self.n_encoded.load(Ordering::Relaxed)
    }
}

impl FeatureEncoder for Fake {
    fn key(&self) -> String {
        self.key.to_owned()
    }

    fn n_tokens(&self) -> usize {
        3
    }

    fn width(&self) -> usize {
        2
    }

    fn decode(&self, bytes: &[u8]) -> std::result::Result<RgbImage, String> {
        Ok(image::load_from_memory(bytes).map_err(|error| error.to_string())?.to_rgb8())
    }

    fn encode(&self, pictures: &[RgbImage]) -> Result<Vec<f32>> {
        assert!(pictures.len() <= ENCODE_BATCH);
        self.n_encoded.fetch_add(pictures.len(), Ordering::Relaxed);
        Ok(pictures
            .iter()
            .flat_map(|picture| {
                let sum: u64 = picture.pixels().map(|p| u64::from(p[0])).sum();
                let mean = sum as f32 / (picture.width() * picture.height()) as f32;
                let corner = f32::from(picture.get_pixel(0, 0)[0]);
                [mean, picture.width() as f32, picture.height() as f32, corner, 0.5, -1.0]
            })
            .collect())
    }
}

struct Setup {
    dir: tempfile::TempDir,
    names: Vec<&'static str>,
}

impl Setup {
    /// Pictures of 40×30 whose red is 10·number on the left half and 0 on the right.
    fn new(names: &[&'static str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (number, name) in names.iter().enumerate() {
            let red = 10 * (number as u8 + 1);
            let picture =
                RgbImage::from_fn(40, 30, |x, _| image::Rgb([if x < 20 { red } else { 0 }, number as u8, 0]));
            picture.save(dir.path().join(name)).unwrap();
        }
        Self { dir, names: names.to_vec() }
    }

    fn dataset(&self, views: u32) -> Dataset {
        let rows: String =
            self.names.iter().map(|name| format!("{{\"image\":\"{name}\",\"caption\":\"x\"}}\n")).collect();
        fs::write(self.dir.path().join("rows.jsonl"), rows).unwrap();
        let config = DataConfig { views, ..DataConfig::new("rows.jsonl") };
        Dataset::load(&[config], self.dir.path()).unwrap()
    }

    fn compute(&self, views: u32, encoder: &Fake) -> (FeatureCache, Computed) {
        FeatureCache::compute(&self.cache(), &self.dataset(views), encoder, |_| ControlFlow::Continue(()))
            .unwrap()
    }

    fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    /// The only file of this name below the cache folder.
    fn file(&self, name: &str) -> PathBuf {
        let mut folders = fs::read_dir(self.cache()).unwrap();
        let path = folders.next().unwrap().unwrap().path().join(name);
        assert!(folders.next().is_none());
        path
    }
}

#[test]
fn features_are_computed_once_and_gathered_in_order() {
    let setup = Setup::new(&["a.png", "b.png", "c.png"]);
    let encoder = Fake::new("k");
    let (cache, report) = setup.compute(0, &encoder);
    assert_eq!((report.n_computed, report.n_reused, encoder.n_encoded()), (3, 0, 3));
    let features = cache.gather(&[(2, 0), (0, 0), (2, 7)]).unwrap();
    let of = |red: f32| [red / 2.0, 40.0, 30.0, red, 0.5, -1.0];
    assert_eq!(features, [of(30.0), of(10.0), of(30.0)].concat());

    let (_, report) = setup.compute(0, &encoder);
    assert_eq!((report.n_computed, report.n_reused, encoder.n_encoded()), (0, 3, 3));
    let other = Fake::new("other weights");
    assert_eq!(setup.compute(0, &other).1.n_computed, 3);
}

#[test]
fn views_are_added_to_what_is_there_and_are_reproducible() {
    let setup = Setup::new(&["a.png", "b.png"]);
    let encoder = Fake::new("k");
    setup.compute(0, &encoder);
    let (cache, report) = setup.compute(20, &encoder);
    assert_eq!((report.n_computed, report.n_reused), (40, 2));
    let all: Vec<(usize, u32)> = (0..=20).map(|view| (0, view)).collect();
    let features = cache.gather(&all).unwrap();
    let areas: Vec<f32> = features.chunks(6).map(|f| f[1] * f[2] / 1200.0).collect();
    assert_eq!(areas[0], 1.0);
    assert!(areas[1..].iter().all(|&area| (0.45..=1.0).contains(&area)), "{areas:?}");
    assert!(areas[1..].iter().any(|&area| area < 0.9), "{areas:?}");
    // About half of the views are mirrored: their top left is dark.
    let n_mirrored = features.chunks(6).filter(|f| f[3] == 0.0).count();
    assert!((4..=16).contains(&n_mirrored), "{n_mirrored}");

    fs::remove_dir_all(setup.cache()).unwrap();
    assert_eq!(setup.compute(20, &encoder).0.gather(&all).unwrap(), features);
}

/// The fake encoder's tokens: 6 numbers in 3 tokens of 2.
#[test]
fn some_tokens_of_a_picture_are_drawn_anew_for_each_and_in_order() {
    let setup = Setup::new(&["a.png", "b.png"]);
    let (cache, _) = setup.compute(0, &Fake::new("k"));
    let (n_tokens, width) = (cache.n_tokens(), cache.width());
    let views: Vec<(usize, u32)> = (0..40).map(|number| (number % 2, 0)).collect();
    let all = cache.gather(&views).unwrap();
    assert_eq!(cache.gather_some(&views, 1.0, &[1]).unwrap(), all);

    let some = cache.gather_some(&views, 0.67, &[1]).unwrap();
    assert_eq!(some, cache.gather_some(&views, 0.67, &[1]).unwrap(), "a function of the seed");
    assert_ne!(some, cache.gather_some(&views, 0.67, &[2]).unwrap());
    let n_kept = some.len() / views.len() / width;
    assert_eq!((n_tokens, n_kept), (3, 2));
    let mut drawn = std::collections::BTreeSet::new();
    for (picture, kept) in all.chunks(n_tokens * width).zip(some.chunks(n_kept * width)) {
        let places: Vec<_> = kept
            .chunks(width)
            .map(|token| picture.chunks(width).position(|own| own == token).expect("a token of the picture"))
            .collect();
        assert!(places.is_sorted() && places[0] != places[1], "{places:?}");
        drawn.insert(places);
    }
    assert_eq!(drawn.len(), 3, "each pair of three comes in forty draws");
    assert_eq!(cache.gather_some(&views, 0.01, &[1]).unwrap().len(), views.len() * width, "one at least");
}

#[test]
fn equal_pictures_share_and_unusable_ones_are_reported() {
    let mut setup = Setup::new(&["a.png", "b.png"]);
    fs::copy(setup.dir.path().join("a.png"), setup.dir.path().join("copy.png")).unwrap();
    fs::write(setup.dir.path().join("bad.png"), "not a picture").unwrap();
    fs::write(setup.dir.path().join("bad2.png"), "not a picture").unwrap();
    setup.names = vec!["a.png", "bad.png", "copy.png", "b.png", "bad2.png"];
    let encoder = Fake::new("k");
    let (cache, report) = setup.compute(0, &encoder);
    assert_eq!((report.n_computed, encoder.n_encoded()), (2, 2));
    assert_eq!(report.unusable.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [1, 4]);
    assert_eq!(cache.gather(&[(0, 0)]).unwrap(), cache.gather(&[(2, 0)]).unwrap());
    assert!(cache.gather(&[(1, 0)]).unwrap_err().to_string().contains("skipped"));
    let mut dataset = setup.dataset(0);
    dataset.skip_images(&report.unusable);
    assert_eq!(dataset.samples().len(), 3);
    assert_eq!(dataset.skipped().len(), 2);
    // One picture's texts are no negatives of each other, whatever its files are called.
    assert_eq!(report.copies, [(2, 0), (4, 1)]);
    dataset.join_groups(&report.copies);
    let groups: Vec<u32> = dataset.images().iter().map(|image| image.group).collect();
    assert_eq!(groups, [0, 1, 0, 3, 1]);
    assert_eq!(setup.compute(2, &encoder).1.copies, report.copies, "with more views and from disk");
}

#[test]
fn a_stopped_computation_goes_on_from_where_it_was() {
    let names: Vec<&'static str> =
        (0..20).map(|i| &*Box::leak(format!("{i}.png").into_boxed_str())).collect();
    let setup = Setup::new(&names);
    let encoder = Fake::new("k");
    let result = FeatureCache::compute(&setup.cache(), &setup.dataset(0), &encoder, |state| {
        if state.done > 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(result.unwrap_err().to_string().contains("16 of 20"));
    let (_, report) = setup.compute(0, &encoder);
    assert_eq!((report.n_reused, report.n_computed), (16, 4));
}

/// Cuts the files at every byte that a kill can leave behind: everything still readable is right, the rest is
/// computed again.
#[test]
fn a_torn_tail_is_computed_again() {
    let setup = Setup::new(&["a.png", "b.png", "c.png"]);
    let expected = setup.compute(0, &Fake::new("k")).0.gather(&[(0, 0), (1, 0), (2, 0)]).unwrap();
    let (index, data) =
        (fs::read(setup.file("index.bin")).unwrap(), fs::read(setup.file("features.bin")).unwrap());
    let (record, slot) = (index.len() / 3, data.len() / 3);
    for (index_len, data_len, n_lost) in [
        (3 * record - 1, 3 * slot, 1),
        (2 * record, 3 * slot, 1),
        (2 * record, 2 * slot + 5, 1),
        (record + 1, 3 * slot, 2),
        (3 * record, 2 * slot + 1, 1), // the record reached the disk, its slot did not (power loss)
        (0, 0, 3),
        (0, 3 * slot, 3),
    ] {
        fs::write(setup.file("index.bin"), &index[..index_len]).unwrap();
        fs::write(setup.file("features.bin"), &data[..data_len]).unwrap();
        let (cache, report) = setup.compute(0, &Fake::new("k"));
        assert_eq!(report.n_computed, n_lost, "index {index_len} data {data_len}");
        assert_eq!(cache.gather(&[(0, 0), (1, 0), (2, 0)]).unwrap(), expected);
        assert_eq!(setup.compute(0, &Fake::new("k")).1.n_computed, 0);
    }
}

#[test]
fn damaged_bytes_are_found_and_computed_again() {
    let setup = Setup::new(&["a.png", "b.png", "c.png"]);
    let expected = setup.compute(0, &Fake::new("k")).0.gather(&[(0, 0), (1, 0), (2, 0)]).unwrap();
    let whole = ["features.bin", "index.bin"].map(|name| (name, fs::read(setup.file(name)).unwrap()));
    for (name, bytes) in &whole {
        for at in 0..bytes.len() {
            whole.iter().for_each(|(name, bytes)| fs::write(setup.file(name), bytes).unwrap());
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x40;
            fs::write(setup.file(name), &damaged).unwrap();
            let (cache, report) = setup.compute(0, &Fake::new("k"));
            assert_eq!(report.n_computed, 1, "{name} byte {at}");
            assert_eq!(report.n_damaged, usize::from(*name == "features.bin"));
            assert_eq!(cache.gather(&[(0, 0), (1, 0), (2, 0)]).unwrap(), expected);
        }
    }
}

#[test]
fn numbers_that_half_precision_cannot_hold_are_refused() {
    assert!(to_half(&[1.0, 70_000.0], 2).unwrap_err().to_string().contains("half precision"));
    assert!(to_half(&[f32::NAN], 1).is_err());
    assert!(to_half(&[1.0], 2).unwrap_err().to_string().contains("1 numbers where 2"));
}
