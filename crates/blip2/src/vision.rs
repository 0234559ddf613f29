//! Frozen image encoders: pixels in, one row a patch out.
//!
//! Flow: [`image`](crate::image) → pixels `[B, S, S, 3]` → [`VisionEncoder::forward`] → image tokens `[B·P, D]` as packed
//! rows → [`qformer`](crate::qformer). Encoders are never trained here: their output may be kept on disk under [`VisionEncoder::fingerprint`].

pub mod efficientnet;
pub mod vit;

use std::path::Path;

use blip2_kernels::awake::awake;
use candle_core::{Device, Tensor};

use self::efficientnet::{EfficientNet, EfficientNetConfig};
use self::vit::Vit;
use crate::image::ImageProcessor;
use crate::layers::MatrixSize;
use crate::weights::RandomWeights;
use crate::weights::sha256;
use crate::weights::torch_pickle::TorchCheckpoint;
use crate::{Error, Result};

/// An image encoder with its weights, whatever its kind.
#[derive(Debug, Clone)]
pub struct VisionEncoder {
    tower: Tower,
    fingerprint: String,
}

#[derive(Debug, Clone)]
enum Tower {
    EfficientNet(EfficientNet),
    Vit(Vit, ImageProcessor),
}

impl VisionEncoder {
    /// Loads EfficientNet-Lite0, the encoder of the default model, from its PyTorch file
    /// (`efficientnet-lite0-57934424.pth`), to see pictures of `image_size` pixels instead of the 224 it was trained with.
    ///
    /// # Errors
    /// When the file cannot be read, is damaged, or holds another network, and when the size is out of bounds.
    pub fn efficientnet_lite0(path: impl AsRef<Path>, image_size: Option<usize>) -> Result<Self> {
        let config = lite0(image_size)?;
        let checkpoint = TorchCheckpoint::open(path)?;
        let fingerprint = sha256(checkpoint.bytes());
        let network = EfficientNet::load(config, &checkpoint)?;
        Ok(Self { tower: Tower::EfficientNet(network), fingerprint })
    }

    /// EfficientNet-Lite0 with weights that are drawn.
    ///
    /// # Errors
    /// Those of the weights.
    pub(crate) fn random_efficientnet_lite0(
        weights: RandomWeights,
        image_size: Option<usize>,
    ) -> Result<Self> {
        let network = EfficientNet::load(lite0(image_size)?, &weights)?;
        Ok(Self { tower: Tower::EfficientNet(network), fingerprint: "random weights".into() })
    }

    /// A vision transformer, with what its pictures are prepared by. `fingerprint` says which weights these are.
    ///
    /// # Errors
    /// [`Error::Config`] when the pictures' side is not the encoder's.
    pub fn vit(vit: Vit, processor: ImageProcessor, fingerprint: String) -> Result<Self> {
        processor.validate()?;
        if processor.image_side != vit.config().image_size {
            let reason = format!("is {}, the encoder's is {}", processor.image_side, vit.config().image_size);
            return Err(Error::Config { field: "image.image_side".into(), reason });
        }
        Ok(Self { tower: Tower::Vit(vit, processor), fingerprint })
    }

    /// SHA-256 of the weights, in hexadecimal (of a vision transformer in a whole model that model's name): together with the
    /// [`processor`](Self::processor)'s settings it says which features this encoder gives.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Whether it is a vision transformer.
    pub fn is_vit(&self) -> bool {
        matches!(self.tower, Tower::Vit(..))
    }

    /// Side of the pictures it sees, in pixels (S).
    pub fn image_side(&self) -> usize {
        match &self.tower {
            Tower::EfficientNet(network) => network.config().image_side,
            Tower::Vit(vit, _) => vit.config().image_size,
        }
    }

    /// Image tokens of a picture (P): 49 for EfficientNet-Lite0 at its 224 pixels.
    pub fn n_tokens(&self) -> usize {
        match &self.tower {
            Tower::EfficientNet(network) => network.n_tokens(),
            Tower::Vit(vit, _) => vit.config().n_tokens(),
        }
    }

    /// Width of an image token (D): 1280 for EfficientNet-Lite0.
    pub fn width(&self) -> usize {
        match &self.tower {
            Tower::EfficientNet(network) => network.config().head_width,
            Tower::Vit(vit, _) => vit.config().hidden_size,
        }
    }

    /// Weights of the encoder, without a classifier's.
    pub fn n_parameters(&self) -> usize {
        match &self.tower {
            Tower::EfficientNet(network) => network.n_parameters(),
            Tower::Vit(vit, _) => vit.config().n_parameters(),
        }
    }

    /// The matrices that each image token of a vision transformer passes; nothing for a network of convolutions.
    pub fn matrices(&self) -> Option<MatrixSize> {
        match &self.tower {
            Tower::EfficientNet(_) => None,
            Tower::Vit(vit, _) => Some(vit.matrices()),
        }
    }

    /// How a picture becomes the pixels that this encoder sees.
    pub fn processor(&self) -> ImageProcessor {
        match &self.tower {
            Tower::EfficientNet(network) => ImageProcessor::efficientnet_lite0(network.config().image_side),
            Tower::Vit(_, processor) => processor.clone(),
        }
    }

    /// Encodes a batch of pictures.
    ///
    /// # Shapes
    /// - `pixels`: `[B, S, S, 3]`, as [`ImageProcessor::pixels`] makes them
    /// - returns `[B·P, D]`: the rows of the first picture, left to right and top to bottom, then the second's
    ///
    /// # Errors
    /// [`Error::Request`] when `pixels` has another shape.
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let side = self.image_side();
        if !matches!(pixels.dims(), [_, height, width, 3] if *height == side && *width == side) {
            let reason =
                format!("pixels of shape {:?}, the encoder needs [B, {side}, {side}, 3]", pixels.dims());
            return Err(Error::Request(reason));
        }
        let values = pixels.flatten_all()?.to_vec1::<f32>()?;
        let rows = self.encode(&values)?;
        Ok(Tensor::from_vec(rows, (pixels.dim(0)? * self.n_tokens(), self.width()), &Device::Cpu)?)
    }

    /// [`forward`](Self::forward) on slices: `[B, S, S, 3]` to `[B·P, D]`.
    ///
    /// # Errors
    /// [`Error::Request`] when `pixels` is not a whole number of pictures; those of the tensor engine.
    pub fn encode(&self, pixels: &[f32]) -> Result<Vec<f32>> {
        let n_values = self.image_side() * self.image_side() * 3;
        if !pixels.len().is_multiple_of(n_values) {
            return Err(Error::Request(format!("{} values are no pictures of {n_values}", pixels.len())));
        }
        awake(|| match &self.tower {
            Tower::EfficientNet(network) => Ok(network.forward(pixels)),
            Tower::Vit(vit, _) => Ok(vit.forward(pixels)?.flatten_all()?.to_vec1()?),
        })
    }
}

/// EfficientNet-Lite0 for pictures of this side.
fn lite0(image_size: Option<usize>) -> Result<EfficientNetConfig> {
    let side = image_size.unwrap_or(EfficientNetConfig::LITE0_SIDE);
    ImageProcessor::efficientnet_lite0(side).validate()?;
    Ok(EfficientNetConfig::lite0(side))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::print_stdout)]
    fn the_default_encoder_encodes_a_picture() {
        let Some(folder) = std::env::var_os("BLIP2_FROZEN") else {
            println!("SKIPPED: BLIP2_FROZEN does not name the folder of the frozen models");
            return;
        };
        let path = Path::new(&folder).join("efficientnet-lite0-57934424.pth");
        let encoder = VisionEncoder::efficientnet_lite0(&path, None).unwrap();
        assert_eq!(encoder.fingerprint(), "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db");
        assert_eq!((encoder.n_tokens(), encoder.width(), encoder.image_side()), (49, 1280, 224));
        let picture =
            crate::image::RgbImage::from_fn(40, 30, |x, y| ::image::Rgb([x as u8 * 6, y as u8 * 8, 99]));
        let pixels = encoder.processor().batch(&[picture.clone(), picture]).unwrap();
        let tokens = encoder.forward(&pixels).unwrap();
        assert_eq!(tokens.dims(), [2 * 49, 1280]);
        let rows = tokens.to_vec2::<f32>().unwrap();
        assert_eq!(rows[..49], rows[49..]);
        assert!(rows.iter().flatten().all(|value| (0.0..=6.0).contains(value)));
        let error = encoder.forward(&pixels.permute((0, 3, 1, 2)).unwrap()).unwrap_err();
        assert!(error.to_string().contains("[B, 224, 224, 3]"), "{error}");

        let larger = VisionEncoder::efficientnet_lite0(&path, Some(257)).unwrap();
        assert_eq!((larger.n_tokens(), larger.processor().image_side), (81, 257));
        assert_eq!(larger.fingerprint(), encoder.fingerprint());
    }
}
