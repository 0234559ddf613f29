//! EfficientNet-Lite (arXiv:1905.11946 without squeeze-and-excitation and with ReLU6), channels last.
//!
//! A convolutional network, used as an image encoder by taking the feature map in front of its global pooling: one token a
//! position. Channels last turns every 1×1 convolution into a matrix product over rows of positions.
//!
//! Two traits of the original TensorFlow training matter: "SAME" padding puts the odd pixel at the bottom and at the
//! right, and the batch norms have epsilon 1e-3. They are folded into the convolutions when the weights are loaded.

use blip2_kernels::activation::Activation;
use blip2_kernels::conv::{ConvDims, depthwise_conv2d, im2col};
use blip2_kernels::linear::{Epilogue, Format, PackedWeight};
use rayon::prelude::*;

use crate::Result;
use crate::layers::TensorSource;

/// Epsilon of the batch norms (TensorFlow's default for this network, not PyTorch's 1e-5).
const BATCH_NORM_EPS: f32 = 1e-3;
/// Channels of a picture.
const RGB: usize = 3;

/// The shape of a network of this family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EfficientNetConfig {
    /// Side of the picture, in pixels (S).
    pub image_side: usize,
    /// Channels after the first convolution, 3×3 with stride 2.
    pub stem_width: usize,
    /// Groups of inverted residual blocks, in order.
    pub stages: Vec<Stage>,
    /// Channels after the last 1×1 convolution: the width of an image token (D).
    pub head_width: usize,
}

/// A group of inverted residual blocks of one shape; only the first one has the stride and the change of width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stage {
    /// Blocks in the group.
    pub repeats: usize,
    /// Side of the depthwise convolution's window.
    pub kernel: usize,
    /// Step of the first block's depthwise convolution.
    pub stride: usize,
    /// How many times wider than its input a block is inside; at 1 there is no expanding convolution.
    pub expansion: usize,
    /// Channels after the block.
    pub width: usize,
}

impl EfficientNetConfig {
    /// Side of the pictures that EfficientNet-Lite0 was trained with: 49 tokens.
    pub const LITE0_SIDE: usize = 224;

    /// EfficientNet-Lite0 for pictures of this side: a token of width 1280 for each 32 × 32 pixels begun, 3.4 million weights.
    pub fn lite0(image_side: usize) -> Self {
        let stage =
            |repeats, kernel, stride, expansion, width| Stage { repeats, kernel, stride, expansion, width };
        Self {
            image_side,
            stem_width: 32,
            stages: vec![
                stage(1, 3, 1, 1, 16),
                stage(2, 3, 2, 6, 24),
                stage(2, 5, 2, 6, 40),
                stage(3, 3, 2, 6, 80),
                stage(3, 5, 1, 6, 112),
                stage(4, 5, 2, 6, 192),
                stage(1, 3, 1, 6, 320),
            ],
            head_width: 1280,
        }
    }
}

/// An EfficientNet-Lite with its weights.
#[derive(Debug, Clone)]
pub struct EfficientNet {
    config: EfficientNetConfig,
    stem: Pointwise,
    blocks: Vec<Block>,
    head: Pointwise,
}

/// A matrix product over the rows of a feature map: a 1×1 convolution, or a larger one after `im2col`.
#[derive(Clone)]
struct Pointwise {
    weight: std::sync::Arc<PackedWeight>,
    bias: Vec<f32>,
    activation: Activation,
}

/// A convolution of each channel with its own window.
#[derive(Debug, Clone)]
struct Depthwise {
    kernel: usize,
    stride: usize,
    /// `[kernel, kernel, C]`
    weight: Vec<f32>,
    bias: Vec<f32>,
}

/// An inverted residual: widen, convolve each channel, narrow, and add the input where the shape is unchanged.
#[derive(Debug, Clone)]
struct Block {
    expand: Option<Pointwise>,
    depthwise: Depthwise,
    project: Pointwise,
    has_skip: bool,
}

/// A picture's feature map, `[side, side, C]` with C fastest.
struct FeatureMap {
    side: usize,
    values: Vec<f32>,
}

impl EfficientNet {
    /// Takes the weights of a checkpoint with the names of the PyTorch conversions (`_conv_stem.weight`, `_blocks.0.…`); the
    /// ImageNet classifier, which stands there as `_fc`, is left.
    ///
    /// # Errors
    /// [`crate::Error::MissingTensor`], [`crate::Error::TensorShape`], or why a tensor cannot be read.
    pub fn load(config: EfficientNetConfig, source: &dyn TensorSource) -> Result<Self> {
        let weights = Weights { source };
        let stem =
            weights.convolution("_conv_stem", "_bn0", [config.stem_width, RGB, 3, 3], Activation::Relu6)?;
        let mut blocks = Vec::new();
        let mut width = config.stem_width;
        for stage in &config.stages {
            for repeat in 0..stage.repeats {
                let name = format!("_blocks.{}", blocks.len());
                let stride = if repeat == 0 { stage.stride } else { 1 };
                blocks.push(Block::load(&weights, &name, width, stage, stride)?);
                width = stage.width;
            }
        }
        let head =
            weights.convolution("_conv_head", "_bn1", [config.head_width, width, 1, 1], Activation::Relu6)?;
        Ok(Self { config, stem, blocks, head })
    }

    /// The shape of the network.
    pub fn config(&self) -> &EfficientNetConfig {
        &self.config
    }

    /// Positions of the last feature map (P).
    pub fn n_tokens(&self) -> usize {
        let strides = self.config.stages.iter().map(|stage| stage.stride);
        let side = strides.fold(self.config.image_side.div_ceil(2), usize::div_ceil);
        side * side
    }

    /// Weights of the encoder: without the classifier, the batch norms folded.
    pub fn n_parameters(&self) -> usize {
        let blocks = self.blocks.iter().map(|block| {
            let expand = block.expand.as_ref().map_or(0, Pointwise::n_parameters);
            expand + block.depthwise.weight.len() + block.depthwise.bias.len() + block.project.n_parameters()
        });
        self.stem.n_parameters() + blocks.sum::<usize>() + self.head.n_parameters()
    }

    /// Image tokens: the feature map after the last 1×1 convolution, its batch norm and ReLU6, which is what the
    /// network itself pools and classifies. So tokens are between 0 and 6, and most of their numbers are 0.
    ///
    /// # Shapes
    /// - `pixels`: `[B, S, S, 3]`
    /// - returns `[B·P, D]`, positions of a picture from left to right, then top to bottom
    ///
    /// A picture's rows do not depend on the pictures beside it, bit for bit.
    ///
    /// # Panics
    /// When `pixels` is not a whole number of pictures.
    pub fn forward(&self, pixels: &[f32]) -> Vec<f32> {
        let picture = self.config.image_side * self.config.image_side * RGB;
        assert_eq!(pixels.len() % picture, 0, "the pixels must be a whole number of pictures");
        let tokens: Vec<Vec<f32>> =
            pixels.par_chunks_exact(picture).map(|pixels| self.encode_one(pixels)).collect();
        tokens.concat()
    }

    /// `[S, S, 3]` to `[P, D]`.
    fn encode_one(&self, pixels: &[f32]) -> Vec<f32> {
        let side = self.config.image_side;
        let dims = ConvDims::same(side, side, RGB, 3, 2);
        let side = dims.out_height;
        let mut windows = vec![0.0; side * side * 3 * 3 * RGB];
        im2col(pixels, dims, &mut windows);
        let mut map = FeatureMap { side, values: self.stem.apply(&windows) };
        for block in &self.blocks {
            map = block.forward(map);
        }
        self.head.apply(&map.values)
    }
}

impl Block {
    fn load(weights: &Weights<'_>, name: &str, width: usize, stage: &Stage, stride: usize) -> Result<Self> {
        let inner = width * stage.expansion;
        let part = |part: &str| format!("{name}.{part}");
        let expand = match stage.expansion {
            1 => None,
            _ => {
                let shape = [inner, width, 1, 1];
                Some(weights.convolution(&part("_expand_conv"), &part("_bn0"), shape, Activation::Relu6)?)
            }
        };
        let depthwise =
            weights.depthwise(&part("_depthwise_conv"), &part("_bn1"), inner, stage.kernel, stride)?;
        let shape = [stage.width, inner, 1, 1];
        let project =
            weights.convolution(&part("_project_conv"), &part("_bn2"), shape, Activation::Identity)?;
        Ok(Self { expand, depthwise, project, has_skip: stride == 1 && width == stage.width })
    }

    fn forward(&self, input: FeatureMap) -> FeatureMap {
        let widened = match &self.expand {
            Some(expand) => &FeatureMap { side: input.side, values: expand.apply(&input.values) },
            None => &input,
        };
        let convolved = self.depthwise.forward(widened);
        let mut output = FeatureMap { side: convolved.side, values: self.project.apply(&convolved.values) };
        if self.has_skip {
            output.values.iter_mut().zip(&input.values).for_each(|(out, skipped)| *out += skipped);
        }
        output
    }
}

impl Depthwise {
    fn forward(&self, input: &FeatureMap) -> FeatureMap {
        let n_channels = self.bias.len();
        let dims = ConvDims::same(input.side, input.side, n_channels, self.kernel, self.stride);
        let side = dims.out_height;
        let mut values = vec![0.0; side * side * n_channels];
        depthwise_conv2d(&input.values, dims, &self.weight, &self.bias, Activation::Relu6, &mut values);
        FeatureMap { side, values }
    }
}

impl Pointwise {
    /// `[N, in]` to `[N, out]`.
    fn apply(&self, rows: &[f32]) -> Vec<f32> {
        let n_rows = rows.len() / self.weight.in_features();
        let epilogue = Epilogue { activation: self.activation, ..Epilogue::bias(Some(&self.bias)) };
        self.weight.forward(rows, n_rows, epilogue)
    }

    fn n_parameters(&self) -> usize {
        (self.weight.in_features() + 1) * self.weight.out_features()
    }
}

impl std::fmt::Debug for Pointwise {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (n_in, n_out) = (self.weight.in_features(), self.weight.out_features());
        write!(f, "Pointwise({n_in} → {n_out}, {:?})", self.activation)
    }
}

/// Reads convolutions and folds the batch norm that follows each into them.
struct Weights<'a> {
    source: &'a dyn TensorSource,
}

impl Weights<'_> {
    /// A dense convolution `[out, in, kh, kw]` with its batch norm, as a matrix over windows `[kh, kw, in]`.
    fn convolution(
        &self,
        name: &str,
        norm: &str,
        shape: [usize; 4],
        activation: Activation,
    ) -> Result<Pointwise> {
        let [n_out, n_in, height, width] = shape;
        let weight = self.read(&format!("{name}.weight"), &shape)?;
        let (scale, bias) = self.batch_norm(norm, n_out)?;
        let window = height * width;
        let row = |output: usize, row: &mut [f32]| {
            for (input, taps) in
                weight[output * n_in * window..][..n_in * window].chunks_exact(window).enumerate()
            {
                for (tap, value) in taps.iter().enumerate() {
                    row[tap * n_in + input] = value * scale[output]; // [in, kh, kw] → [kh, kw, in]
                }
            }
        };
        let weight = PackedWeight::pack(n_out, n_in * window, Format::F32, &row);
        Ok(Pointwise { weight: weight.into(), bias, activation })
    }

    /// A depthwise convolution `[C, 1, k, k]` with its batch norm.
    fn depthwise(
        &self,
        name: &str,
        norm: &str,
        n_channels: usize,
        kernel: usize,
        stride: usize,
    ) -> Result<Depthwise> {
        let taps = self.read(&format!("{name}.weight"), &[n_channels, 1, kernel, kernel])?;
        let (scale, bias) = self.batch_norm(norm, n_channels)?;
        let window = kernel * kernel;
        let mut weight = vec![0.0; taps.len()];
        for (index, value) in taps.iter().enumerate() {
            let (channel, tap) = (index / window, index % window);
            weight[tap * n_channels + channel] = value * scale[channel]; // [C, k, k] → [k, k, C]
        }
        Ok(Depthwise { kernel, stride, weight, bias })
    }

    /// `(x - mean) / √(variance + ε) · weight + bias` as a factor and a summand for each channel.
    fn batch_norm(&self, name: &str, n_channels: usize) -> Result<(Vec<f32>, Vec<f32>)> {
        let read = |part: &str| self.read(&format!("{name}.{part}"), &[n_channels]);
        let (weight, bias) = (read("weight")?, read("bias")?);
        let (mean, variance) = (read("running_mean")?, read("running_var")?);
        let scale: Vec<f32> =
            weight.iter().zip(&variance).map(|(w, v)| w / (v + BATCH_NORM_EPS).sqrt()).collect();
        let shift = bias.iter().zip(&mean).zip(&scale).map(|((b, m), s)| b - m * s).collect();
        Ok((scale, shift))
    }

    fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.source.read_shaped(name, shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::splitmix::{GAMMA, mix};
    use crate::weights::torch_pickle::TorchCheckpoint;

    /// Numbers from −1 to 1: the top 24 bits of splitmix64, as in `tools/golden_efficientnet.py`.
    fn draw(seed: u64, n: usize) -> Vec<f32> {
        let numbers = (1..=n as u64).map(|index| {
            let bits = mix(seed.wrapping_add(index.wrapping_mul(GAMMA)));
            (bits >> 40) as f32 / (1 << 23) as f32 - 1.0
        });
        numbers.collect()
    }

    /// Weights drawn from their own names, for a network of any shape.
    struct DrawnWeights(std::collections::BTreeMap<String, Vec<usize>>);

    impl DrawnWeights {
        fn new(config: &EfficientNetConfig) -> Self {
            let mut shapes = std::collections::BTreeMap::new();
            let mut convolution = |name: String, norm: String, shape: [usize; 4]| {
                for part in ["weight", "bias", "running_mean", "running_var"] {
                    shapes.insert(format!("{norm}.{part}"), vec![shape[0]]);
                }
                shapes.insert(format!("{name}.weight"), shape.to_vec());
            };
            convolution("_conv_stem".into(), "_bn0".into(), [config.stem_width, 3, 3, 3]);
            let (mut width, mut index) = (config.stem_width, 0);
            for stage in &config.stages {
                for _ in 0..stage.repeats {
                    let block = format!("_blocks.{index}");
                    let inner = width * stage.expansion;
                    if stage.expansion != 1 {
                        convolution(
                            format!("{block}._expand_conv"),
                            format!("{block}._bn0"),
                            [inner, width, 1, 1],
                        );
                    }
                    let window = [inner, 1, stage.kernel, stage.kernel];
                    convolution(format!("{block}._depthwise_conv"), format!("{block}._bn1"), window);
                    convolution(
                        format!("{block}._project_conv"),
                        format!("{block}._bn2"),
                        [stage.width, inner, 1, 1],
                    );
                    (width, index) = (stage.width, index + 1);
                }
            }
            convolution("_conv_head".into(), "_bn1".into(), [config.head_width, width, 1, 1]);
            shapes.insert("_fc.weight".into(), vec![TINY_CLASSES, config.head_width]);
            shapes.insert("_fc.bias".into(), vec![TINY_CLASSES]);
            Self(shapes)
        }
    }

    impl TensorSource for DrawnWeights {
        fn shape(&self, name: &str) -> Option<Vec<usize>> {
            self.0.get(name).cloned()
        }

        fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
            let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3);
            let mut values =
                draw(name.bytes().fold(0xCBF2_9CE4_8422_2325, fnv), self.0[name].iter().product());
            if name.ends_with("running_var") {
                values.iter_mut().for_each(|value| *value = value.abs() + 0.5);
            }
            Ok(values)
        }
    }

    /// Classes of the tiny network of the golden file.
    const TINY_CLASSES: usize = 5;

    fn tiny() -> EfficientNetConfig {
        let stage =
            |repeats, kernel, stride, expansion, width| Stage { repeats, kernel, stride, expansion, width };
        EfficientNetConfig {
            image_side: 17,
            stem_width: 8,
            stages: vec![stage(1, 3, 1, 1, 4), stage(2, 5, 2, 6, 8), stage(2, 3, 2, 2, 12)],
            head_width: 16,
        }
    }

    fn golden(part: &str) -> serde_json::Value {
        let file = include_str!("../../tests/golden/efficientnet.json");
        serde_json::from_str::<serde_json::Value>(file).unwrap()[part].clone()
    }

    /// The classifier of a checkpoint on the mean token of each picture: tokens that are right but for their order or their
    /// scale would be classified wrongly.
    fn classify(network: &EfficientNet, source: &dyn TensorSource, tokens: &[f32]) -> Vec<f32> {
        let (weight, bias) = (source.read_f32("_fc.weight").unwrap(), source.read_f32("_fc.bias").unwrap());
        let (n_tokens, width) = (network.n_tokens(), network.config().head_width);
        let pictures = tokens.chunks_exact(n_tokens * width);
        let logits = pictures.flat_map(|tokens| {
            let sum = |i: usize| tokens.chunks_exact(width).map(|token| f64::from(token[i])).sum::<f64>();
            let mean: Vec<f64> = (0..width).map(|i| sum(i) / n_tokens as f64).collect();
            let score = |(row, bias): (&[f32], &f32)| {
                let products = row.iter().zip(&mean).map(|(weight, x)| f64::from(*weight) * x);
                (products.sum::<f64>() + f64::from(*bias)) as f32
            };
            weight.chunks_exact(width).zip(&bias).map(score).collect::<Vec<_>>()
        });
        logits.collect()
    }

    /// Compares with `[[index, value], …]`, relative to the largest expected value.
    fn assert_close(found: &[f32], expected: &serde_json::Value, what: &str) {
        let expected: Vec<(usize, f32)> = serde_json::from_value(expected.clone()).unwrap();
        assert!(
            expected.len() > 9 && expected.last().unwrap().0 < found.len(),
            "{what}: {} values",
            found.len()
        );
        let largest = expected.iter().map(|(_, value)| value.abs()).fold(0.0, f32::max);
        let difference = |&(index, value): &(usize, f32)| (found[index] - value).abs() / largest;
        let worst = expected.iter().map(difference).fold(0.0, f32::max);
        assert!(worst < 2e-5, "{what}: off by {worst:e} of the largest value");
    }

    #[test]
    fn tiny_network_equals_pytorch() {
        let weights = DrawnWeights::new(&tiny());
        let network = EfficientNet::load(tiny(), &weights).unwrap();
        let tokens = network.forward(&draw(1, 2 * 17 * 17 * 3));
        assert_eq!(tokens.len(), 2 * network.n_tokens() * 16);
        assert_close(&tokens, &golden("tiny")["tokens"], "tokens");
        assert_close(&classify(&network, &weights, &tokens), &golden("tiny")["logits"], "logits");
    }

    #[test]
    fn a_batch_equals_its_pictures() {
        let network = EfficientNet::load(tiny(), &DrawnWeights::new(&tiny())).unwrap();
        let pixels = draw(3, 3 * 17 * 17 * 3);
        let singles: Vec<f32> =
            pixels.chunks(17 * 17 * 3).flat_map(|picture| network.forward(picture)).collect();
        assert_eq!(network.forward(&pixels), singles);
    }

    #[test]
    fn lite0_has_49_tokens_and_its_weights_are_counted() {
        let config = EfficientNetConfig::lite0(EfficientNetConfig::LITE0_SIDE);
        let network = EfficientNet::load(config.clone(), &DrawnWeights::new(&config)).unwrap();
        assert_eq!(network.n_tokens(), 49);
        // 4,652,008 trained weights, less the classifier's 1,281,000 and one of the two numbers of each of the 21,008
        // channels' batch norms.
        assert_eq!(network.n_parameters(), 4_652_008 - 1_281_000 - 21_008);
    }

    #[test]
    fn a_missing_or_misshapen_tensor_is_named() {
        let mut weights = DrawnWeights::new(&tiny());
        weights.0.insert("_blocks.1._bn1.bias".into(), vec![7]);
        let error = EfficientNet::load(tiny(), &weights).unwrap_err().to_string();
        assert!(error.contains("_blocks.1._bn1.bias") && error.contains("[7]"), "{error}");
        weights.0.remove("_blocks.1._bn1.bias");
        assert!(
            EfficientNet::load(tiny(), &weights).unwrap_err().to_string().contains("_blocks.1._bn1.bias")
        );
    }

    #[test]
    #[allow(clippy::print_stdout)]
    fn lite0_with_its_imagenet_weights_equals_pytorch() {
        let Some(folder) = std::env::var_os("BLIP2_FROZEN") else {
            println!("SKIPPED: BLIP2_FROZEN does not name the folder of the frozen models");
            return;
        };
        let path = std::path::Path::new(&folder).join("efficientnet-lite0-57934424.pth");
        let checkpoint = TorchCheckpoint::open(path).unwrap();
        let network =
            EfficientNet::load(EfficientNetConfig::lite0(EfficientNetConfig::LITE0_SIDE), &checkpoint)
                .unwrap();
        let pixels = draw(2, 224 * 224 * 3);
        let tokens = network.forward(&pixels);
        assert_close(&tokens, &golden("lite0")["tokens"], "tokens");
        assert_close(&classify(&network, &checkpoint, &tokens), &golden("lite0")["logits"], "logits");
        let started = std::time::Instant::now();
        for _ in 0..10 {
            std::hint::black_box(network.forward(&pixels));
        }
        println!("a picture takes {:.1} ms", started.elapsed().as_secs_f64() * 100.0);
    }
}
