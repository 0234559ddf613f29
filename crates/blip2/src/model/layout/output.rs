//! What is written: tensors made of those of a state, streamed into files that are whole or absent.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use super::state::{State, positions};
use super::table::{Derived, Entry, Lavis, Table};
use crate::weights::safetensors::{TensorAbout, stream_safetensors};
use crate::weights::torch_pickle::write_torch;
use crate::weights::{Encoding, StoredTensor};
use crate::{Error, Result};

/// A tensor to be written.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) about: TensorAbout,
    made_of: MadeOf,
}

#[derive(Debug)]
enum MadeOf {
    /// The elements of this one.
    Tensor(String),
    /// The biases of queries, keys (zeros where LAVIS has none) and values.
    Biases {
        stem: String,
    },
    /// A third of this one: the biases of queries (0), keys (1) or values (2).
    Third(String, usize),
    Positions(usize),
}

impl Output {
    /// The same tensor under another name, maybe with its elements in another shape.
    pub(super) fn renamed(state: &State<'_>, from: &str, name: &str, shape: &[usize]) -> Result<Self> {
        let about = TensorAbout { name: name.into(), shape: shape.into(), encoding: state.encoding(from)? };
        Ok(Self { about, made_of: MadeOf::Tensor(from.into()) })
    }

    /// The tensor's elements; never more than one tensor is in memory, and most are ranges of a mapped file.
    pub(super) fn bytes<'a>(&self, state: &State<'a>) -> Result<StoredTensor<'a>> {
        match &self.made_of {
            MadeOf::Tensor(name) => state.stored(name),
            MadeOf::Positions(n) => Ok(positions(*n)),
            MadeOf::Third(name, third) => {
                let all = state.stored(name)?;
                let n = all.bytes.len() / 3;
                let bytes = all.bytes[third * n..(third + 1) * n].to_vec();
                Ok(StoredTensor {
                    shape: self.about.shape.clone(),
                    encoding: all.encoding,
                    bytes: bytes.into(),
                })
            }
            MadeOf::Biases { stem } => {
                let part = |part: &str| state.stored(&format!("{stem}.{part}_bias"));
                let (q, v) = (part("q")?, part("v")?);
                let k = if state.contains(&format!("{stem}.k_bias")) {
                    part("k")?.bytes.into_owned()
                } else {
                    vec![0; q.bytes.len()]
                };
                let bytes = [&*q.bytes, &k, &*v.bytes].concat();
                Ok(StoredTensor {
                    shape: self.about.shape.clone(),
                    encoding: q.encoding,
                    bytes: bytes.into(),
                })
            }
        }
    }
}

/// What the names of the Q-Former's language-modelling head begin with.
const HEAD: &str = "Qformer.cls.";

/// The tensors of a Hugging Face folder from a LAVIS state that was checked.
pub(super) fn hugging_face(table: &Table, state: &State<'_>) -> Result<Vec<Output>> {
    let output = |Entry { name, shape, lavis, .. }: &Entry| match lavis {
        Lavis::Same(from, _) => Output::renamed(state, from, name, shape),
        Lavis::QueryValueBias(stem) => {
            let encodings: Vec<_> = ["q", "k", "v"]
                .map(|part| format!("{stem}.{part}_bias"))
                .iter()
                .filter(|name| state.contains(name))
                .map(|name| state.encoding(name))
                .collect::<Result<_>>()?;
            if encodings.iter().any(|encoding| *encoding != encodings[0]) {
                let reason =
                    format!("`{stem}.q_bias` and `.v_bias` are stored in different types: {encodings:?}");
                return Err(Error::Request(reason));
            }
            let about = TensorAbout { name: name.clone(), shape: shape.clone(), encoding: encodings[0] };
            Ok(Output { about, made_of: MadeOf::Biases { stem: stem.clone() } })
        }
    };
    let is_there = |entry: &&Entry| !entry.is_extra || state.contains(entry.lavis_name());
    table.entries.iter().filter(is_there).map(output).collect()
}

/// The tensors of a LAVIS state dict from a Hugging Face folder that was checked, those among them that LAVIS holds twice.
pub(super) fn lavis(table: &Table, state: &State<'_>) -> Result<Vec<Output>> {
    let mut outputs = Vec::new();
    let mut sources = BTreeMap::new();
    for Entry { name, lavis, .. } in table.entries.iter().filter(|entry| state.contains(&entry.name)) {
        match lavis {
            Lavis::Same(to, shape) => {
                outputs.push(Output::renamed(state, name, to, shape)?);
                sources.insert(to.as_str(), (name.as_str(), shape.as_slice()));
            }
            Lavis::QueryValueBias(stem) => {
                let all = state.stored(name)?;
                let n = all.bytes.len() / 3;
                // A negative zero is no zero to the bit, and kept.
                let has_key_bias = all.bytes[n..2 * n].iter().any(|byte| *byte != 0);
                let shape = vec![all.shape[0] / 3];
                for (third, part) in ["q", "k", "v"].into_iter().enumerate() {
                    if part == "k" && !has_key_bias {
                        continue;
                    }
                    let about = TensorAbout {
                        name: format!("{stem}.{part}_bias"),
                        shape: shape.clone(),
                        encoding: all.encoding,
                    };
                    outputs.push(Output { about, made_of: MadeOf::Third(name.clone(), third) });
                }
            }
        }
    }
    let has_head = sources.keys().any(|name| name.starts_with(HEAD));
    for (name, derived) in &table.derived_lavis {
        match derived {
            // A part of the head that the public conversion dropped: the rest of it cannot be made anew.
            Derived::CopyOf(_) if name.starts_with(HEAD) && !has_head => {}
            Derived::CopyOf(of) => {
                if let Some((from, shape)) = sources.get(of.as_str()) {
                    outputs.push(Output::renamed(state, from, name, shape)?);
                }
            }
            Derived::Positions(n) => {
                let about = TensorAbout { name: name.clone(), shape: vec![1, *n], encoding: Encoding::I64 };
                outputs.push(Output { about, made_of: MadeOf::Positions(*n) });
            }
        }
    }
    Ok(outputs)
}

/// The name that transformers has for the widest of the number types among floating-point weights.
pub(super) fn widest_dtype(outputs: &[Output]) -> &'static str {
    let has = |encoding: Encoding| outputs.iter().any(|output| output.about.encoding == encoding);
    if has(Encoding::F64) {
        "float64"
    } else if has(Encoding::F32) || (has(Encoding::F16) && has(Encoding::Bf16)) {
        "float32"
    } else if has(Encoding::Bf16) {
        "bfloat16"
    } else {
        "float16"
    }
}

/// Writes a LAVIS state dict: as `torch.save` does where the name ends in `.pth`, as safetensors otherwise.
///
/// # Errors
/// [`Error::Io`], [`Error::File`]; the file is then as it was.
pub(super) fn write_lavis(path: &Path, outputs: &[Output], state: &State<'_>) -> Result<()> {
    if path.extension().is_some_and(|extension| extension == "pth") {
        let about: Vec<_> = outputs.iter().map(|output| output.about.clone()).collect();
        return write_torch(path, "model", &about, |i, file| write_one(&outputs[i], state, file));
    }
    write_safetensors_file(path, outputs, state, "lavis")
}

/// Writes tensors to one safetensors file that says whose names they have.
///
/// # Errors
/// As [`write_lavis`].
pub(super) fn write_safetensors_file(
    path: &Path,
    outputs: &[Output],
    state: &State<'_>,
    layout: &str,
) -> Result<()> {
    let metadata = BTreeMap::from([("format".into(), "pt".into()), ("layout".into(), layout.into())]);
    write_safetensors(path, &outputs.iter().collect::<Vec<_>>(), state, &metadata)
}

/// # Errors
/// As [`write_lavis`].
pub(super) fn write_safetensors(
    path: &Path,
    outputs: &[&Output],
    state: &State<'_>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let about: Vec<_> = outputs.iter().map(|output| output.about.clone()).collect();
    stream_safetensors(path, &about, metadata, |i, file| write_one(outputs[i], state, file))
}

fn write_one(output: &Output, state: &State<'_>, file: &mut dyn Write) -> io::Result<()> {
    let tensor = output.bytes(state).map_err(io::Error::other)?;
    file.write_all(&tensor.bytes)?;
    if let MadeOf::Tensor(name) = &output.made_of {
        state.release(name);
    }
    Ok(())
}
