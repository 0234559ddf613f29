"""What the golden scripts share: tiny random models and batches, and the files they are written to.

Everything is computed in float64 and stored as float32. The tolerance of a comparison is measured, not
chosen: the same computation runs in float32 as well, and a file stores, per tensor, how far it strayed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from .qformer import QFormerConfig

ROOT = Path(__file__).resolve().parents[2]
SEED = 20230130

PAD, CLS, SEP, DEC = 0, 1, 2, 60
TINY = QFormerConfig(
    vocab_size=61,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=96,
    max_position_embeddings=12,
    encoder_hidden_size=40,
    num_query_tokens=5,
    image_text_hidden_size=16,
)
N_IMAGE_TOKENS = 6
TEXT_LENGTHS = (7, 4, 9, 3, 6)
IMAGE_IDS = (100, 101, 102, 100, 103)
"""The fourth pair is another caption of the first picture, seen through another augmentation."""
NEGATIVE_IMAGES = (2, 0, 4, 1, 3)
NEGATIVE_TEXTS = (4, 2, 3, 1, 1)

# A float32 run in another order of summation strays about as far as PyTorch's own does; ten times that, plus
# a floor of a few units in the last place of the tensor's largest value, holds without hiding a wrong term.
TOLERANCE_FACTOR = 10.0
TOLERANCE_FLOOR = 2e-6
# Adam divides by the root of the squared gradients: an element whose gradients are near zero moves as far as others, in a
# direction that rounding decides.
STEPS_FACTOR = 3.0


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """No parameter keeps a value (zero, one) that would hide a mistake in how it is used."""
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name == "temp":
            value = torch.tensor(0.11)
        elif name == "query_tokens":
            value = 0.5 * noise
        elif name.endswith(("orm.weight", "_layernorm.weight")):
            value = 1 + 0.2 * noise
        elif parameter.dim() == 1:
            value = 0.2 * noise
        elif "embed" in name:
            value = 0.3 * noise
        else:
            value = noise / parameter.shape[1] ** 0.5
        # Rounded to float32, so that both precisions start from the stored values.
        parameter.data = value.float().to(parameter.dtype)


def random_images(n: int, generator: torch.Generator) -> Tensor:
    shape = (n, N_IMAGE_TOKENS, TINY.encoder_hidden_size)
    return (1.5 * torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3).float().double()


def random_texts(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`[CLS] words [SEP]`, padded: ids and mask, [B, T]."""
    ids = torch.full((len(TEXT_LENGTHS), max(TEXT_LENGTHS)), PAD)
    for row, n in zip(ids, TEXT_LENGTHS):
        words = torch.randint(SEP + 1, DEC, (n - 2,), generator=generator)
        row[:n] = torch.cat([torch.tensor([CLS]), words, torch.tensor([SEP])])
    mask = torch.arange(ids.shape[1])[None, :] < torch.tensor(TEXT_LENGTHS)[:, None]
    return ids, mask


def deviation(exact: Tensor, rough: Tensor, factor: float) -> float:
    """The tolerance (absolute, as all here) for comparing a float32 result with `exact`."""
    floor = TOLERANCE_FLOOR * exact.abs().max().item()
    return factor * (TOLERANCE_FACTOR * (exact - rough.double()).abs().max().item() + floor)


def tolerances(exact: dict[str, Tensor], rough: dict[str, Tensor], factor: float = 1.0) -> dict[str, float]:
    return {name: float(f"{deviation(x, rough[name], factor):.1e}") for name, x in exact.items()}


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names and float32 bytes in name order, to see at a glance whether a file changed."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode())
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def write(path: Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    stored = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        stored[name] = (tensor.float() if tensor.is_floating_point() else tensor.to(torch.int64)).contiguous().clone()
    header = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seed": str(SEED),
        "computed_in": "float64, stored as float32",
        "sha256": digest(stored),
    }
    # One JSON value an entry: safetensors metadata holds strings only.
    header |= {k: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for k, v in metadata.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    # safetensors writes metadata in hash order; sorted by hand so that a second run gives the same bytes.
    data = safetensors.torch.save(stored, metadata=header)
    path.write_bytes(sort_header(data))
    size = path.stat().st_size
    assert size < 1_000_000, f"{path.name} has {size} bytes"
    print(f"{path.relative_to(ROOT)}: {len(stored)} tensors, {size} bytes")


def sort_header(data: bytes) -> bytes:
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + n :]


def packed(padded: Tensor, mask: Tensor) -> Tensor:
    """The rows that exist, sample by sample: [B, T, D] -> [sum of lengths, D]."""
    return padded[mask]
