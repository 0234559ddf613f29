//! Where the layers' tensors come from: a frozen checkpoint, or variables to train.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use blip2_kernels::gemm::Precision;
use blip2_kernels::linear::PackedWeight;
use blip2_kernels::quantized::{Format, QuantizedWeight};
use candle_core::{Device, Tensor, Var};

use super::{FrozenWeight, Linear, Quantization, Weight};
use crate::weights::{TensorRows, is_finite};
use crate::{Error, Result};

/// A checkpoint: named f32 tensors. Implementations note which names were read.
pub trait TensorSource {
    /// The shape of a tensor, if the checkpoint has it.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;

    /// A tensor's elements, row-major, widened to f32.
    ///
    /// # Errors
    /// When the tensor is missing or its data cannot be read.
    fn read_f32(&self, name: &str) -> Result<Vec<f32>>;

    /// Checks that there is a tensor of this name and shape.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] or [`Error::TensorShape`].
    fn check(&self, name: &str, shape: &[usize]) -> Result<()> {
        match self.shape(name) {
            None => Err(Error::MissingTensor { name: name.to_owned() }),
            Some(found) if found != shape => {
                Err(Error::TensorShape { name: name.to_owned(), expected: shape.to_vec(), found })
            }
            Some(_) => Ok(()),
        }
    }

    /// [`read_f32`](Self::read_f32) of a tensor that must have this shape.
    ///
    /// # Errors
    /// As [`check`](Self::check) and [`read_f32`](Self::read_f32).
    fn read_shaped(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.check(name, shape)?;
        self.read_f32(name)
    }

    /// The rows of a tensor that is stored as plain rows, so that it need not be held in f32 on its way; nothing
    /// where the source can only read it whole.
    ///
    /// # Errors
    /// As [`read_f32`](Self::read_f32).
    fn rows(&self, name: &str) -> Result<Option<TensorRows<'_>>> {
        let _ = name;
        Ok(None)
    }

    /// A matrix that is stored in few bits as the kernels read it; nothing where it is stored as numbers.
    ///
    /// # Errors
    /// When its data cannot be read.
    fn quantized(&self, name: &str) -> Result<Option<QuantizedWeight>> {
        let _ = name;
        Ok(None)
    }

    /// Tells the source what a matrix was rounded to, for one that is going to be stored so.
    fn note_quantized(&self, name: &str, weight: &FrozenWeight) {
        let _ = (name, weight);
    }
}

impl TensorSource for BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.get(name).map(|(shape, _)| shape.clone())
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        match self.get(name) {
            Some((_, data)) => Ok(data.clone()),
            None => Err(Error::MissingTensor { name: name.to_owned() }),
        }
    }
}

/// The trainable variables of a model by their checkpoint names.
#[derive(Debug, Default)]
pub struct Trainable {
    variables: RefCell<BTreeMap<String, Var>>,
}

impl Trainable {
    /// Every variable loaded so far, by name.
    pub fn into_variables(self) -> BTreeMap<String, Var> {
        self.variables.into_inner()
    }
}

/// Hands a module its tensors under a name prefix, which mirrors the checkpoint (`loader.at("attention")`).
#[derive(Clone)]
pub struct Loader<'a> {
    source: &'a dyn TensorSource,
    trainable: Option<&'a Trainable>,
    precision: Precision,
    /// The format of frozen linear layers, where it is one of few bits.
    quantized: Option<Format>,
    prefix: String,
}

impl std::fmt::Debug for Loader<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Loader at `{}`", self.prefix)
    }
}

impl<'a> Loader<'a> {
    /// Frozen weights: matrices are packed for the kernels in `precision`.
    pub fn frozen(source: &'a dyn TensorSource, precision: Precision) -> Self {
        Self { source, trainable: None, precision, quantized: None, prefix: String::new() }
    }

    /// Variables registered in `trainable`; f32 master weights whose products are computed in `precision`.
    pub fn trainable(source: &'a dyn TensorSource, trainable: &'a Trainable, precision: Precision) -> Self {
        Self { source, trainable: Some(trainable), precision, quantized: None, prefix: String::new() }
    }

    /// The same loader, whose frozen linear layers are rounded to few bits, as those of a vision transformer are.
    pub fn quantizing(self, quantization: Option<Quantization>) -> Self {
        Self { quantized: quantization.map(Quantization::vision), ..self }
    }

    /// The same loader, whose frozen linear layers are rounded as those of a Q-Former are.
    pub(crate) fn quantizing_bridge(self, quantization: Option<Quantization>) -> Self {
        Self { quantized: quantization.map(Quantization::bridge), ..self }
    }

    /// The loader of a submodule.
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        let mut inner = self.clone();
        inner.prefix = self.full_name(&name.to_string());
        inner
    }

    /// Whether the checkpoint has a tensor of this name here.
    pub fn has(&self, name: &str) -> bool {
        self.source.shape(&self.full_name(name)).is_some()
    }

    /// The shape of the tensor `name`, if the checkpoint has it here.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.source.shape(&self.full_name(name))
    }

    /// The tensor `name` of exactly this shape.
    ///
    /// # Errors
    /// When it is missing or has another shape, or holds what is no number.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let full_name = self.full_name(name);
        // A tied weight is asked for twice and must be one variable.
        if let Some(variable) = self.trainable.and_then(|t| t.variables.borrow().get(&full_name).cloned()) {
            return Ok(variable.as_tensor().clone());
        }
        let data = self.read(&full_name, shape)?;
        let tensor = Tensor::from_vec(data, shape, &Device::Cpu)?;
        let Some(trainable) = self.trainable else { return Ok(tensor) };
        let variable = Var::from_tensor(&tensor)?;
        let tensor = variable.as_tensor().clone();
        trainable.variables.borrow_mut().insert(full_name, variable);
        Ok(tensor)
    }

    /// The linear layer of `weight` `[n_out, n_in]` and `bias` `[n_out]` under `name`.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn linear(&self, name: &str, n_in: usize, n_out: usize) -> Result<Linear> {
        let inner = self.at(name);
        let bias = inner.tensor("bias", &[n_out])?;
        Ok(Linear::new(inner.weight("weight", n_in, n_out)?, Some(bias)))
    }

    /// The matrix `name`, `[n_out, n_in]`, in the format of this loader.
    ///
    /// # Errors
    /// When it is missing or has another shape.
    pub fn weight(&self, name: &str, n_in: usize, n_out: usize) -> Result<Weight> {
        if self.trainable.is_some() {
            return Ok(Weight::Dense(self.tensor(name, &[n_out, n_in])?, self.precision));
        }
        let full_name = self.full_name(name);
        self.source.check(&full_name, &[n_out, n_in])?;
        if let Some(stored) = self.source.quantized(&full_name)? {
            return Ok(Weight::Frozen(FrozenWeight::Quantized(Arc::new(stored))));
        }
        let Some(format) = self.quantized else { return self.frozen_weight(name, &[n_out, n_in]) };
        let weight = if let Some(rows) = self.source.rows(&full_name)? {
            FrozenWeight::quantize(&full_name, &rows, format, &|row| row)?
        } else {
            let data = self.read(&full_name, &[n_out, n_in])?;
            let row = |i: usize, out: &mut [f32]| out.copy_from_slice(&data[i * n_in..(i + 1) * n_in]);
            FrozenWeight::Quantized(Arc::new(QuantizedWeight::quantize(n_out, n_in, format, &row)))
        };
        self.source.note_quantized(&full_name, &weight);
        Ok(Weight::Frozen(weight))
    }

    /// The frozen matrix `name` whose rows are stored in further dimensions, `[n_out, …]`, such as the kernel of a
    /// convolution. It is frozen in a trainable model too.
    ///
    /// # Errors
    /// When it is missing or has another shape.
    pub fn frozen_weight(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        let (n_out, n_in) = (shape[0], shape[1..].iter().product());
        let full_name = self.full_name(name);
        self.source.check(&full_name, shape)?;
        let packed = if let Some(rows) = self.source.rows(&full_name)? {
            FrozenWeight::pack(&full_name, &rows.flattened(), self.precision, &|row| row)?
        } else {
            let data = self.read(&full_name, shape)?;
            let row = |i: usize, out: &mut [f32]| out.copy_from_slice(&data[i * n_in..(i + 1) * n_in]);
            FrozenWeight::Packed(Arc::new(PackedWeight::pack(n_out, n_in, self.precision.into(), &row)))
        };
        Ok(Weight::Frozen(packed))
    }

    fn full_name(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }

    fn read(&self, full_name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let values = self.source.read_shaped(full_name, shape)?;
        if is_finite(&values) { Ok(values) } else { Err(Error::NotFinite { name: full_name.to_owned() }) }
    }
}
