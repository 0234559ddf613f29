//! The vision transformers of BLIP-2: EVA-CLIP ViT-g/14 and CLIP ViT-L/14 (BLIP-2 §3.1, "Model pre-training").
//!
//! Both drop the last block of the network they were trained in, and the norm after it: the Q-Former has its own
//! (`vision_layernorm`, LAVIS's `ln_vision`). All tokens go to the Q-Former, the class token first. What differs is
//! configuration: CLIP normalises before the blocks, its patch projection has no bias, its GELU is an approximation.
//!
//! Names are those of Hugging Face's `Blip2VisionModel`; CLIP's norm before the blocks is `pre_layernorm`.

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::layers::{
    Activation, AttentionShape, LayerNorm, Linear, Loader, MatrixSize, Plan, Sequence, Span, attention_joint,
};
use crate::{Error, Result};

/// A vision transformer's sizes (`Blip2VisionConfig`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VitConfig {
    /// Width of a token (D).
    pub hidden_size: usize,
    /// Width of the feed-forward layers.
    pub intermediate_size: usize,
    /// Blocks, without the dropped last one.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Side of a picture, in pixels (S).
    pub image_size: usize,
    /// Side of a patch, in pixels.
    pub patch_size: usize,
    /// Epsilon of the layer norms.
    pub layer_norm_eps: f64,
    /// The nonlinearity of the feed-forward layers.
    pub hidden_act: VitActivation,
    /// Whether there is a norm before the first block (CLIP).
    pub pre_norm: bool,
    /// Whether the patch projection has a bias (EVA).
    pub patch_bias: bool,
    /// Whether queries, keys and values have biases; those of all published encoders have.
    #[serde(default = "yes")]
    pub qkv_bias: bool,
}

fn yes() -> bool {
    true
}

/// A vision transformer's nonlinearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VitActivation {
    /// The exact GELU (EVA).
    Gelu,
    /// `x sigmoid(1.702 x)` (CLIP).
    QuickGelu,
}

impl VitConfig {
    /// EVA-CLIP ViT-g/14 for pictures of this side: 224, or 364 where it was fine-tuned on COCO.
    pub fn eva_clip_g(image_size: usize) -> Self {
        Self {
            hidden_size: 1408,
            intermediate_size: 6144,
            num_hidden_layers: 39,
            num_attention_heads: 16,
            image_size,
            patch_size: 14,
            layer_norm_eps: 1e-6,
            hidden_act: VitActivation::Gelu,
            pre_norm: false,
            patch_bias: true,
            qkv_bias: true,
        }
    }

    /// CLIP ViT-L/14 for pictures of this side.
    pub fn clip_l(image_size: usize) -> Self {
        Self {
            hidden_size: 1024,
            intermediate_size: 4096,
            num_hidden_layers: 23,
            num_attention_heads: 16,
            image_size,
            patch_size: 14,
            layer_norm_eps: 1e-5,
            hidden_act: VitActivation::QuickGelu,
            pre_norm: true,
            patch_bias: false,
            qkv_bias: true,
        }
    }

    /// Patches along a side.
    pub fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Tokens of a picture: its patches, and the class token.
    pub fn n_tokens(&self) -> usize {
        self.grid() * self.grid() + 1
    }

    /// Weights of the encoder, without the norm after the last block. EVA has no biases of the keys: what stands for them in the
    /// layout of Hugging Face is zero, and does not count.
    pub fn n_parameters(&self) -> usize {
        let (d, ffn, patch) =
            (self.hidden_size, self.intermediate_size, 3 * self.patch_size * self.patch_size);
        // CLIP is the one with a norm before the blocks.
        let n_biases = match (self.qkv_bias, self.pre_norm) {
            (false, _) => 0,
            (true, false) => 2 * d,
            (true, true) => 3 * d,
        };
        let qkv = 3 * d * d + n_biases;
        let block = 4 * d + qkv + d * (d + 1) + ffn * (d + 1) + d * (ffn + 1);
        let patches = d * patch + if self.patch_bias { d } else { 0 };
        let pre_norm = if self.pre_norm { 2 * d } else { 0 };
        self.num_hidden_layers * block + patches + pre_norm + d + self.n_tokens() * d
    }

    /// Checks the values against each other.
    ///
    /// # Errors
    /// [`Error::Config`] with the field to change.
    pub fn validate(&self) -> Result<()> {
        let wrong =
            |field: &str, reason: String| Err(Error::Config { field: format!("vision.{field}"), reason });
        let sizes = [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("image_size", self.image_size),
            ("patch_size", self.patch_size),
        ];
        for (field, value) in sizes {
            if value == 0 || value > 1 << 16 {
                return wrong(field, format!("is {value}, expected 1 to 65536"));
            }
        }
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            let reason =
                format!("is {}, which {} heads do not divide", self.hidden_size, self.num_attention_heads);
            return wrong("hidden_size", reason);
        }
        if self.patch_size > self.image_size || self.grid() > 256 {
            let reason = format!("of {} pixels do not fit {} pixels", self.patch_size, self.image_size);
            return wrong("patch_size", reason);
        }
        if !(self.layer_norm_eps.is_finite() && self.layer_norm_eps > 0.0) {
            return wrong(
                "layer_norm_eps",
                format!("is {}, expected a positive number", self.layer_norm_eps),
            );
        }
        Ok(())
    }
}

/// A frozen vision transformer.
#[derive(Debug, Clone)]
pub struct Vit {
    config: VitConfig,
    /// `[1, D]`, its position added.
    class_token: Tensor,
    /// `[patches, D]`.
    positions: Tensor,
    /// `[D, 3 * patch * patch]`: the convolution as a map of patches, channels first.
    patch_embedding: Linear,
    pre_layernorm: Option<LayerNorm>,
    layers: std::sync::Arc<[Block]>,
}

#[derive(Debug)]
struct Block {
    layer_norm1: LayerNorm,
    qkv: Linear,
    projection: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

/// The two conventions of resizing a grid: whether the corners of both grids are the same points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AlignCorners {
    /// CLIP in LAVIS.
    Yes,
    /// EVA in LAVIS, and transformers.
    No,
}

impl AlignCorners {
    /// How LAVIS resizes the positions of this encoder, known by CLIP's norm before the blocks.
    pub fn of(config: &VitConfig) -> Self {
        if config.pre_norm { Self::Yes } else { Self::No }
    }
}

impl Vit {
    /// Loads the encoder; position embeddings of another number of patches are interpolated to `config.image_size`, as
    /// LAVIS does at load.
    ///
    /// # Errors
    /// When `config` contradicts itself, or a tensor is missing or has another shape.
    pub fn load(config: VitConfig, loader: &Loader<'_>, align: AlignCorners) -> Result<Self> {
        config.validate()?;
        let (d, grid) = (config.hidden_size, config.grid());
        let embeddings = loader.at("embeddings");
        let stored = embeddings.shape("position_embedding").and_then(|shape| shape.get(1).copied());
        // Asked for with the size it should have where it is missing, so that the error has its whole name.
        let n_stored = stored.unwrap_or(config.n_tokens());
        let stored_grid = (n_stored.max(1) - 1).isqrt();
        if stored_grid == 0 || stored_grid * stored_grid + 1 != n_stored {
            return Err(Error::TensorShape {
                name: "embeddings.position_embedding".into(),
                expected: vec![1, config.n_tokens(), d],
                found: vec![1, n_stored, d],
            });
        }
        let all = embeddings.tensor("position_embedding", &[1, n_stored, d])?.reshape((n_stored, d))?;
        let mut positions = all.narrow(0, 1, n_stored - 1)?.contiguous()?;
        if stored_grid != grid {
            let values = positions.flatten_all()?.to_vec1::<f32>()?;
            let resized = resize_grid(&values, d, stored_grid, (grid, grid), align);
            positions = Tensor::from_vec(resized, (grid * grid, d), &Device::Cpu)?;
        }
        let class_token = embeddings.tensor("class_embedding", &[1, 1, d])?.reshape((1, d))?;
        let class_token = (class_token + all.narrow(0, 0, 1)?)?;
        let patch = config.patch_size;
        let projection = embeddings.at("patch_embedding");
        let bias = config.patch_bias.then(|| projection.tensor("bias", &[d])).transpose()?;
        let patch_embedding = Linear::new(projection.frozen_weight("weight", &[d, 3, patch, patch])?, bias);
        let pre_layernorm = config
            .pre_norm
            .then(|| LayerNorm::load(&loader.at("pre_layernorm"), d, config.layer_norm_eps))
            .transpose()?;
        let block = |i: usize| -> Result<Block> {
            let at = loader.at(format!("encoder.layers.{i}"));
            let qkv = at.at("self_attn").at("qkv");
            let bias = config.qkv_bias.then(|| qkv.tensor("bias", &[3 * d])).transpose()?;
            Ok(Block {
                layer_norm1: LayerNorm::load(&at.at("layer_norm1"), d, config.layer_norm_eps)?,
                qkv: Linear::new(qkv.weight("weight", d, 3 * d)?, bias),
                projection: at.at("self_attn").linear("projection", d, d)?,
                layer_norm2: LayerNorm::load(&at.at("layer_norm2"), d, config.layer_norm_eps)?,
                fc1: at.at("mlp").linear("fc1", d, config.intermediate_size)?,
                fc2: at.at("mlp").linear("fc2", config.intermediate_size, d)?,
            })
        };
        let layers = (0..config.num_hidden_layers).map(block).collect::<Result<Vec<_>>>()?.into();
        Ok(Self { config, class_token, positions, patch_embedding, pre_layernorm, layers })
    }

    /// The configuration it was loaded with.
    pub fn config(&self) -> &VitConfig {
        &self.config
    }

    /// The matrices that a patch passes.
    pub(super) fn matrices(&self) -> MatrixSize {
        let blocks =
            self.layers.iter().flat_map(|block| [&block.qkv, &block.projection, &block.fc1, &block.fc2]);
        blocks.chain([&self.patch_embedding]).map(Linear::matrix).sum()
    }

    /// Encodes pictures.
    ///
    /// # Shapes
    /// - `pixels`: `[B, S, S, 3]`, row by row, channels last
    /// - returns `[B·P, D]`: for each picture the class token, then its patches, left to right and top to bottom
    ///
    /// # Errors
    /// When `pixels` is not a whole number of pictures; those of the tensor engine.
    pub fn forward(&self, pixels: &[f32]) -> Result<Tensor> {
        let VitConfig { hidden_size: d, num_attention_heads: n_heads, image_size: side, .. } = self.config;
        let n_values = side * side * 3;
        if pixels.is_empty() || !pixels.len().is_multiple_of(n_values) {
            return Err(Error::Request(format!("{} values are no pictures of {side} pixels", pixels.len())));
        }
        let n = pixels.len() / n_values;
        let n_patches = self.config.n_tokens() - 1;
        let rows: Vec<f32> =
            pixels.chunks_exact(n_values).flat_map(|picture| self.patches(picture)).collect();
        let width = rows.len() / (n * n_patches);
        let patches =
            self.patch_embedding.forward(&Tensor::from_vec(rows, (n * n_patches, width), &Device::Cpu)?)?;
        let patches = patches.reshape((n, n_patches, d))?.broadcast_add(&self.positions)?;
        let class_tokens = self.class_token.unsqueeze(0)?.broadcast_as((n, 1, d))?;
        let tokens = n_patches + 1;
        let mut x = Tensor::cat(&[&class_tokens.contiguous()?, &patches], 1)?.reshape((n * tokens, d))?;
        if let Some(norm) = &self.pre_layernorm {
            x = norm.forward(&x)?;
        }
        let shape = AttentionShape::multi_head(n_heads, d / n_heads);
        let plan: Plan =
            (0..n).map(|i| Sequence::mutual(vec![Span { start: i * tokens, len: tokens }])).collect();
        let activation = match self.config.hidden_act {
            VitActivation::Gelu => Activation::GeluErf,
            VitActivation::QuickGelu => Activation::QuickGelu,
        };
        for block in self.layers.iter() {
            let qkv = block.qkv.forward(&block.layer_norm1.forward(&x)?)?;
            let attended = attention_joint(&qkv, &plan, shape, block.qkv.precision())?;
            x = block.projection.forward_then(&attended, Activation::Identity, Some(&x))?;
            let inner = block.fc1.forward_then(&block.layer_norm2.forward(&x)?, activation, None)?;
            x = block.fc2.forward_then(&inner, Activation::Identity, Some(&x))?;
        }
        Ok(x)
    }

    /// A picture's patches, one a row, each `[3, patch, patch]` as the convolution's weight has it. Pixels beyond the last
    /// whole patch are left out, as a strided convolution does.
    fn patches(&self, picture: &[f32]) -> Vec<f32> {
        let (side, patch, grid) = (self.config.image_size, self.config.patch_size, self.config.grid());
        let mut rows = Vec::with_capacity(grid * grid * 3 * patch * patch);
        for (top, left) in (0..grid).flat_map(|y| (0..grid).map(move |x| (y * patch, x * patch))) {
            for channel in 0..3 {
                for y in top..top + patch {
                    rows.extend((left..left + patch).map(|x| picture[(y * side + x) * 3 + channel]));
                }
            }
        }
        rows
    }
}

/// Resizes a square grid of vectors by bicubic interpolation, as PyTorch's `interpolate(mode="bicubic")` without
/// antialiasing: Keys' kernel with a = -0.75, points outside taken from the edge.
///
/// # Shapes
/// - `values`: `[side, side, width]`
/// - returns `[height, width_out, width]` for `to = (height, width_out)`
pub(crate) fn resize_grid(
    values: &[f32],
    width: usize,
    side: usize,
    to: (usize, usize),
    align: AlignCorners,
) -> Vec<f32> {
    let (rows, columns) = (taps(side, to.0, align), taps(side, to.1, align));
    let mut out = vec![0.0; to.0 * to.1 * width];
    let mut cells = out.chunks_exact_mut(width);
    for row in &rows {
        for (column, cell) in columns.iter().zip(&mut cells) {
            // PyTorch sums along a row first.
            for (y, wy) in row {
                let mut sums = vec![0.0; width];
                for (x, wx) in column {
                    let from = &values[(y * side + x) * width..][..width];
                    sums.iter_mut().zip(from).for_each(|(sum, value)| *sum += wx * value);
                }
                cell.iter_mut().zip(&sums).for_each(|(cell, sum)| *cell += wy * sum);
            }
        }
    }
    out
}

/// For each output place the four input places it is made of, and their weights.
fn taps(from: usize, to: usize, align: AlignCorners) -> Vec<[(usize, f32); 4]> {
    const A: f32 = -0.75;
    let near = |x: f32| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f32| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    (0..to)
        .map(|i| {
            let at = match align {
                AlignCorners::Yes if to > 1 => i as f32 * ((from - 1) as f32 / (to - 1) as f32),
                AlignCorners::Yes => 0.0,
                AlignCorners::No => (i as f32 + 0.5) * (from as f32 / to as f32) - 0.5,
            };
            let first = at.floor();
            let t = at - first;
            let weights = [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)];
            std::array::from_fn(|k| {
                let place = (first as isize + k as isize - 1).clamp(0, from as isize - 1) as usize;
                (place, weights[k])
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::safetensors::Safetensors;

    #[test]
    fn grids_are_resized_as_pytorch_does() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/vit_tiny.safetensors");
        let file = Safetensors::open(path).unwrap();
        let grids: Vec<(usize, usize)> = serde_json::from_str(&file.metadata()["grids"]).unwrap();
        for (side, to) in grids {
            let grid = file.read_f32(&format!("in.grid.{side}.{to}")).unwrap();
            for (name, align) in [("corners", AlignCorners::Yes), ("centres", AlignCorners::No)] {
                let expected = file.read_f32(&format!("resized.{side}.{to}.{name}")).unwrap();
                let found = resize_grid(&grid, 6, side, (to, to), align);
                assert_eq!(found.len(), expected.len());
                let largest = found.iter().zip(&expected).map(|(f, e)| (f - e).abs()).fold(0.0, f32::max);
                assert!(largest < 2e-6, "{side} to {to}, {name}: {largest}");
            }
        }
    }
}
