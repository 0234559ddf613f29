"""Makes crates/blip2/tests/golden/gguf_types.{gguf,safetensors}: one small tensor of each GGUF type, and what the
`gguf` package decodes it to. Also one metadata entry of each type.

    pip install gguf==0.19.0 numpy safetensors && python tools/golden_gguf.py
"""

import pathlib
from importlib.metadata import version

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from safetensors.numpy import save_file

OUT = pathlib.Path(__file__).resolve().parent.parent / "crates/blip2/tests/golden"
ROWS, COLUMNS = 3, 512
rng = np.random.default_rng(20261123)

# Types without a quantiser in the package: random bytes, with the f16 scales (at these byte offsets of a block) set to
# ordinary finite numbers.
K_QUANTS = {T.Q2_K: (80, 82), T.Q3_K: (108,), T.Q4_K: (0, 2), T.Q5_K: (0, 2), T.Q6_K: (208,)}
QUANTS = [T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.BF16]


def random_blocks(kind):
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (ROWS, COLUMNS // values, size), dtype=np.uint8)
    for at in K_QUANTS[kind]:
        scales = rng.normal(0, 0.1, blocks.shape[:2]).astype(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(ROWS, -1)


writer = gguf.GGUFWriter(OUT / "gguf_types.gguf", "golden")
expected = {}
for value, add in [
    (200, writer.add_uint8), (-100, writer.add_int8), (60000, writer.add_uint16), (-30000, writer.add_int16),
    (4_000_000_000, writer.add_uint32), (-2_000_000_000, writer.add_int32), (2**63 + 1, writer.add_uint64),
    (-(2**62), writer.add_int64), (1.5, writer.add_float32), (0.1, writer.add_float64), (True, writer.add_bool),
    ("größer", writer.add_string), (["a", "", "日本"], writer.add_array), ([1, -2, 3], writer.add_array),
    ([0.5, 0.25], writer.add_array), ([[1], [2, 3]], writer.add_array),
]:
    name = add.__name__.removeprefix("add_")
    suffix = {"array": f".{len(writer.kv_data[0])}"}.get(name, "")
    add(f"value.{name}{suffix}", value)

values = rng.normal(0, 1, (ROWS, COLUMNS)).astype(np.float32)
writer.add_tensor("F32", values)
expected["F32"] = values
writer.add_tensor("F16", values.astype(np.float16))
expected["F16"] = values.astype(np.float16).astype(np.float32)
for kind in QUANTS + list(K_QUANTS):
    data = random_blocks(kind) if kind in K_QUANTS else gguf.quantize(values, kind)
    writer.add_tensor(kind.name, data, raw_dtype=kind)
    expected[kind.name] = gguf.dequantize(data, kind)
cube = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)  # tells the order of dimensions
writer.add_tensor("cube", cube)
expected["cube"] = cube
assert all(np.isfinite(x).all() for x in expected.values())
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
save_file(expected, OUT / "gguf_types.safetensors", metadata={"generator": f"tools/golden_gguf.py, gguf {version('gguf')}"})
