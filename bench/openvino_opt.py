"""OPT as a graph of OpenVINO's operations: int8 weights by output channel, keys and values as its state.

There is a converter from PyTorch, but it holds the model in f32 several times, more than 20 GB at 2.7B; this one takes a tensor at
a time. The form is that of models exported for OpenVINO's own text generation: compressed constants, `beam_idx` before the state,
`ScaledDotProductAttention` with a mask as input. The processor's plugin fuses the rest.
"""

from __future__ import annotations

import numpy as np
import openvino
import openvino.opset13 as op
import torch
from openvino.op.util import Variable, VariableInfo
from torch import Tensor


def numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().numpy()


def weight(tensor: Tensor):
    """Symmetric, a scale for each row."""
    full = numbers(tensor)
    scale = np.maximum(np.abs(full).max(axis=1, keepdims=True), 1e-8) / 127
    whole = op.convert(op.constant(np.rint(full / scale).astype(np.int8)), "f32")
    return op.multiply(whole, op.constant(scale))


def linear(rows, module: torch.nn.Linear):
    product = op.matmul(rows, weight(module.weight), False, True)
    return product if module.bias is None else op.add(product, op.constant(numbers(module.bias)))


def norm(rows, module: torch.nn.LayerNorm):
    centred = op.mvn(rows, op.constant(np.array([-1], np.int64)), True, module.eps, "inside_sqrt")
    return op.add(op.multiply(centred, op.constant(numbers(module.weight))), op.constant(numbers(module.bias)))


def remembered(new, name: str, heads: int, width: int, batch, beams, sinks: list):
    """Of all rows so far, `[B, heads, N, width]`."""
    info = VariableInfo()
    info.data_shape, info.data_type = openvino.PartialShape([-1, heads, -1, width]), openvino.Type.f32
    info.variable_id = name
    variable = Variable(info)
    sizes = op.concat([batch, op.constant(np.array([heads, 0, width], np.int64))], 0)
    before = op.read_value(op.broadcast(op.constant(np.float32(0)), sizes), variable)
    both = op.concat([op.gather(before, beams, op.constant(np.int64(0))), new], 2)
    sinks.append(op.assign(both, variable))
    return both


def graph(model) -> openvino.Model:
    """Of `transformers.OPTForCausalLM` with the norm first: from embeddings `[B, N, W]`, positions `[B, N]` from 0 on and a mask
    `[B, 1, N, M]` that is added, to the scores of the last row `[B, 1, V]`."""
    decoder, heads = model.model.decoder, model.config.num_attention_heads
    width = model.config.hidden_size // heads
    embeds = op.parameter(openvino.PartialShape([-1, -1, heads * width]), openvino.Type.f32, "inputs_embeds")
    positions = op.parameter(openvino.PartialShape([-1, -1]), openvino.Type.i64, "position_ids")
    mask = op.parameter(openvino.PartialShape([-1, 1, -1, -1]), openvino.Type.f32, "mask")
    beams = op.parameter(openvino.PartialShape([-1]), openvino.Type.i32, "beam_idx")
    zero, sinks = op.constant(np.int64(0)), []
    batch = op.gather(op.shape_of(embeds), op.constant(np.array([0], np.int64)), zero)
    apart = op.constant(np.array([0, 0, heads, width], np.int64))
    together = op.constant(np.array([0, 0, heads * width], np.int64))
    order = op.constant(np.array([0, 2, 1, 3], np.int64))

    def split(rows):
        return op.transpose(op.reshape(rows, apart, True), order)

    # The first two of OPT's positions are not used.
    places = op.constant(numbers(decoder.embed_positions.weight[2:]))
    rows = op.add(embeds, op.gather(places, positions, zero))
    for i, layer in enumerate(decoder.layers):
        normed, attention = norm(rows, layer.self_attn_layer_norm), layer.self_attn
        query = split(linear(normed, attention.q_proj))
        key, value = (
            remembered(split(linear(normed, module)), f"{name}.{i}", heads, width, batch, beams, sinks)
            for name, module in (("key", attention.k_proj), ("value", attention.v_proj))
        )
        seen = op.scaled_dot_product_attention(query, key, value, mask)
        seen = op.reshape(op.transpose(seen, order), together, True)
        rows = op.add(rows, linear(seen, attention.out_proj))
        inner = op.relu(linear(norm(rows, layer.final_layer_norm), layer.fc1))
        rows = op.add(rows, linear(inner, layer.fc2))
    last = op.gather(rows, op.constant(np.array([-1], np.int64)), op.constant(np.int64(1)))
    scores = op.result(linear(norm(last, decoder.final_layer_norm), model.lm_head))
    return openvino.Model([scores], sinks, [embeds, positions, mask, beams], "opt")
