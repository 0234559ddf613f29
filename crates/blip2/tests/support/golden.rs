//! Reads a golden file and compares results with it.
//!
//! A golden file is a safetensors file made by a script in `tools/`: inputs and weights under their names, the
//! expected results under theirs, and in the metadata the absolute tolerance of each result.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::{BTreeMap, HashMap};

use blip2::layers::TensorSource;
use candle_core::{Device, Tensor};
use safetensors::{Dtype, SafeTensors};
use serde::de::DeserializeOwned;

/// The contents of a golden file.
pub(crate) struct Golden {
    file: &'static str,
    /// Every f32 tensor: shape and elements. Serves as a checkpoint.
    pub(crate) tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    integers: BTreeMap<String, Vec<i64>>,
    metadata: HashMap<String, String>,
    tolerance: BTreeMap<String, f32>,
}

impl Golden {
    /// Parses `bytes`; `file` names them in messages.
    pub(crate) fn parse(file: &'static str, bytes: &[u8]) -> Self {
        let (_, header) = SafeTensors::read_metadata(bytes).expect("a golden file's header");
        let metadata = header.metadata().clone().expect("a golden file's metadata");
        let (mut tensors, mut integers) = (BTreeMap::new(), BTreeMap::new());
        for (name, view) in SafeTensors::deserialize(bytes).expect("a golden file").tensors() {
            let data = view.data();
            match view.dtype() {
                Dtype::F32 => {
                    let data = data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                    tensors.insert(name, (view.shape().to_vec(), data));
                }
                Dtype::I64 => {
                    integers
                        .insert(name, data.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect());
                }
                other => panic!("{file}: `{name}` is {other:?}"),
            }
        }
        let tolerance = serde_json::from_str(&metadata["tolerance"]).expect("a golden file's tolerances");
        Self { file, tensors, integers, metadata, tolerance }
    }

    /// The metadata entry `key`, parsed as JSON.
    pub(crate) fn metadata<T: DeserializeOwned>(&self, key: &str) -> T {
        serde_json::from_str(&self.metadata[key]).unwrap_or_else(|e| panic!("{}: {key}: {e}", self.file))
    }

    /// An integer tensor.
    pub(crate) fn integers<T: TryFrom<i64>>(&self, name: &str) -> Vec<T> {
        let convert = |&x: &i64| T::try_from(x).ok().expect("an integer in range");
        self.integers[name].iter().map(convert).collect()
    }

    /// A tensor with all but its last dimension flattened: packed rows.
    pub(crate) fn rows(&self, name: &str) -> Tensor {
        let (shape, data) = &self.tensors[name];
        let width = *shape.last().expect("a matrix");
        Tensor::from_slice(data, (data.len() / width, width), &Device::Cpu).expect("a tensor")
    }

    /// A packed list of lists, as `ids` and their lengths.
    pub(crate) fn lists<T: TryFrom<i64> + Clone>(&self, ids: &str, lengths: &str) -> Vec<Vec<T>> {
        let ids = self.integers::<T>(ids);
        let mut rest = &ids[..];
        let mut take = |n: usize| {
            let (list, after) = rest.split_at(n);
            rest = after;
            list.to_vec()
        };
        self.integers::<usize>(lengths).into_iter().map(&mut take).collect()
    }

    /// The names of the expected results.
    pub(crate) fn expected(&self) -> impl Iterator<Item = &str> {
        self.tolerance.keys().map(String::as_str)
    }

    /// Compares results with those in the file.
    pub(crate) fn comparison(&self) -> Comparison<'_> {
        Comparison { golden: self, n_compared: 0, wrong: Vec::new() }
    }
}

/// Collects what differs, in the order of comparison: the first line is where a computation goes wrong.
pub(crate) struct Comparison<'a> {
    golden: &'a Golden,
    n_compared: usize,
    wrong: Vec<String>,
}

impl Comparison<'_> {
    /// Compares a tensor, row by row, with the expected result `name`.
    pub(crate) fn tensor(&mut self, name: &str, found: &Tensor) {
        let found = found.flatten_all().and_then(|x| x.to_vec1::<f32>()).expect("an f32 tensor");
        self.slice(name, &found);
    }

    /// Compares elements with the expected result `name`.
    pub(crate) fn slice(&mut self, name: &str, found: &[f32]) {
        let (_, expected) = &self.golden.tensors[name];
        let tolerance = self.golden.tolerance[name];
        self.n_compared += 1;
        if found.len() != expected.len() {
            self.wrong.push(format!("{name}: {} elements, expected {}", found.len(), expected.len()));
            return;
        }
        // Not a number is infinitely far.
        let distance = |(f, e): (&f32, &f32)| if (f - e).is_nan() { f32::INFINITY } else { (f - e).abs() };
        let distances: Vec<f32> = found.iter().zip(expected).map(distance).collect();
        let n_wrong = distances.iter().filter(|&&d| d > tolerance).count();
        if n_wrong > 0 {
            let worst = (0..found.len()).max_by(|&a, &b| distances[a].total_cmp(&distances[b])).unwrap_or(0);
            self.wrong.push(format!(
                "{name}: {n_wrong} of {} beyond {tolerance:e}; worst [{worst}]: {:e}, expected {:e}",
                found.len(),
                found[worst],
                expected[worst],
            ));
        }
    }

    /// Panics with all that differed, and when fewer than `at_least` results were compared.
    pub(crate) fn finish(self, at_least: usize) {
        assert!(self.wrong.is_empty(), "{} differs:\n{}", self.golden.file, self.wrong.join("\n"));
        assert!(self.n_compared >= at_least, "{} of {at_least} compared", self.n_compared);
    }
}

impl TensorSource for Golden {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.shape(name)
    }

    fn read_f32(&self, name: &str) -> blip2::Result<Vec<f32>> {
        self.tensors.read_f32(name)
    }
}
