//! Checkpoints that hold everything a run needs to continue, and are never half-written.
//!
//! A checkpoint is a directory. It is written under another name, synced and renamed, so that a directory of
//! the final name is always whole, whatever killed the run.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use blip2::weights::safetensors::{NamedTensor, Safetensors, write_safetensors};
use candle_core::Var;
use serde::{Deserialize, Serialize};

use crate::data::LoaderState;
use crate::initialize::Tensors;
use crate::optimizer::{Moments, Optimizer};
use crate::{Error, Result};

/// Where a run stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Optimiser steps made.
    pub step: u64,
    /// Where the loader stands.
    pub loader: LoaderState,
    /// The run's configuration, as TOML.
    pub config: String,
}

/// The file by which a folder is known as a checkpoint.
const STATE_NAME: &str = "state.json";

/// How many checkpoints a run keeps: the newest, and one to fall back on.
const N_KEPT: usize = 2;

/// Writes checkpoint `step-…` into `run_dir` and removes the oldest beyond two.
///
/// # Errors
/// When the disk is full or not writable, or a weight is not finite; what was there before stays.
pub fn save(
    run_dir: &Path,
    state: &State,
    variables: &BTreeMap<String, Var>,
    optimizer: &Optimizer,
) -> Result<PathBuf> {
    let name = format!("step-{:08}", state.step);
    let (partial, path) = (run_dir.join(format!(".{name}.partial")), run_dir.join(&name));
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(Error::io(&partial))?;
    }
    fs::create_dir_all(&partial).map_err(Error::io(&partial))?;
    let written = write_parts(&partial, state, variables, optimizer).and_then(|()| {
        if path.exists() {
            fs::remove_dir_all(&path).map_err(Error::io(&path))?;
        }
        fs::rename(&partial, &path).map_err(Error::io(&path))?;
        sync(run_dir)
    });
    if let Err(error) = written {
        // The error of the write is the one to report.
        let _ = fs::remove_dir_all(&partial);
        return Err(match error {
            Error::Io { path, source } | Error::Model(blip2::Error::Io { path, source }) => {
                let remedy =
                    "the checkpoints before it are kept: make room for it and continue with --resume";
                Error::file(&path, format!("{source}; {remedy}"))
            }
            error => error,
        });
    }
    let mut all = list(run_dir)?;
    all.truncate(all.len().saturating_sub(N_KEPT));
    for old in all {
        fs::remove_dir_all(&old).map_err(Error::io(&old))?;
    }
    Ok(path)
}

fn write_parts(
    dir: &Path,
    state: &State,
    variables: &BTreeMap<String, Var>,
    optimizer: &Optimizer,
) -> Result<()> {
    let mut model = Tensors::new();
    for (name, variable) in variables {
        let data = variable.flatten_all()?.to_vec1::<f32>()?;
        // A last update may have overflowed: nothing could go on from here, but from the checkpoint before.
        if !data.iter().all(|value| value.is_finite()) {
            return Err(Error::NotFinite { step: state.step, what: format!("`{name}`") });
        }
        model.insert(name.clone(), (variable.dims().to_vec(), data));
    }
    write_tensors(&dir.join("model.safetensors"), &model)?;
    let mut moments = Tensors::new();
    for (name, Moments { m, v }) in optimizer.moments() {
        moments.insert(format!("m.{name}"), (vec![m.len()], m.clone()));
        moments.insert(format!("v.{name}"), (vec![v.len()], v.clone()));
    }
    write_tensors(&dir.join("optimizer.safetensors"), &moments)?;
    let path = dir.join(STATE_NAME);
    let json = serde_json::to_vec_pretty(state).map_err(|e| invalid(&path, &e))?;
    fs::write(&path, json).map_err(Error::io(&path))?;
    sync(&path)?;
    sync(dir)
}

/// The newest whole checkpoint of a run.
///
/// # Errors
/// When the directory cannot be read.
pub fn newest(run_dir: &Path) -> Result<Option<PathBuf>> {
    Ok(list(run_dir)?.pop())
}

fn list(run_dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(run_dir).map_err(Error::io(run_dir))? {
        let path = entry.map_err(Error::io(run_dir))?.path();
        let is_checkpoint = path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("step-"));
        if is_checkpoint && path.join(STATE_NAME).is_file() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Reads a checkpoint: its state, the model's tensors, and the optimiser's moments.
///
/// # Errors
/// When a file is missing or is not what [`save`] wrote. Of a run's folder and of a model's it is said what they are.
pub fn load(path: &Path) -> Result<(State, Tensors, BTreeMap<String, Moments>)> {
    let state_path = path.join(STATE_NAME);
    if !state_path.exists()
        && let Some(what) = no_checkpoint(path)?
    {
        return Err(Error::file(path, what));
    }
    let json = fs::read(&state_path).map_err(Error::io(&state_path))?;
    let state = serde_json::from_slice(&json).map_err(|e| invalid(&state_path, &e))?;
    let model = read_tensors(&path.join("model.safetensors"))?;
    let moments_path = path.join("optimizer.safetensors");
    let mut flat = read_tensors(&moments_path)?;
    let mut moments = BTreeMap::new();
    for name in model.keys() {
        match (flat.remove(&format!("m.{name}")), flat.remove(&format!("v.{name}"))) {
            (Some((_, m)), Some((_, v))) => moments.insert(name.clone(), Moments { m, v }),
            _ => return Err(invalid(&moments_path, &format!("has no moments of `{name}`"))),
        };
    }
    Ok((state, model, moments))
}

/// What people hold that is no checkpoint; nothing where that cannot be told.
fn no_checkpoint(path: &Path) -> Result<Option<String>> {
    const IS: &str = "a checkpoint is a folder `step-…` in the folder of a run";
    if !path.exists() {
        return Ok(Some(format!("there is no such folder: {IS}")));
    }
    if !path.is_dir() {
        return Ok(Some(format!("is a file: {IS}, which holds weights, optimiser and settings")));
    }
    let inside = list(path)?;
    if !inside.is_empty() {
        let inside: Vec<_> = inside.iter().map(|checkpoint| checkpoint.display().to_string()).collect();
        return Ok(Some(format!(
            "is the folder of a run, not one of its checkpoints: give {}",
            inside.join(" or ")
        )));
    }
    let is_model = path.join(blip2::model::FILE_NAME).is_file();
    Ok(is_model.then(|| format!("is the folder of a model that is packed already, not a checkpoint: {IS}")))
}

fn write_tensors(path: &Path, tensors: &Tensors) -> Result<()> {
    let named: Vec<NamedTensor<'_>> =
        tensors.iter().map(|(name, (shape, data))| NamedTensor::f32(name, shape.as_slice(), data)).collect();
    Ok(write_safetensors(path, &named, &BTreeMap::new())?)
}

fn read_tensors(path: &Path) -> Result<Tensors> {
    let file = Safetensors::open(path)?;
    let read = |name: &str| Ok((name.to_owned(), (file.shape(name)?.to_vec(), file.read_f32(name)?)));
    file.names().map(read).collect()
}

fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(Error::io(path))
}

fn invalid(path: &Path, reason: &dyn std::fmt::Display) -> Error {
    Error::file(path, reason.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_checkpoint_is_told_what_it_is() {
        let dir = tempfile::tempdir().expect("a folder");
        let refused = |path: &Path| load(path).expect_err("no checkpoint").to_string();
        let [run, model, file] = ["run", "model", "weights.safetensors"].map(|name| dir.path().join(name));
        assert!(refused(&run).contains("run: there is no such folder"), "{}", refused(&run));
        let steps = ["step-00000100", "step-00000200"].map(|name| run.join(name));
        for step in &steps {
            fs::create_dir_all(step).expect("made");
            fs::write(step.join(STATE_NAME), "{}").expect("written");
        }
        fs::create_dir(run.join("step-00000300")).expect("made");
        let [one, other] = steps.map(|step| step.display().to_string());
        let expected =
            format!("run: is the folder of a run, not one of its checkpoints: give {one} or {other}");
        assert!(refused(&run).ends_with(&expected), "{}", refused(&run));
        fs::create_dir(&model).expect("made");
        // Nothing can be told of an empty folder but what is not in it.
        assert!(refused(&model).contains(STATE_NAME), "{}", refused(&model));
        fs::write(model.join(blip2::model::FILE_NAME), "{}").expect("written");
        assert!(refused(&model).contains("model: is the folder of a model"), "{}", refused(&model));
        fs::write(&file, "x").expect("written");
        assert!(refused(&file).contains("weights.safetensors: is a file"), "{}", refused(&file));
    }
}
