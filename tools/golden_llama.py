#!/usr/bin/env python3
"""Golden files of the language model and of generation, from transformers' `LlamaForCausalLM` and `generate`.

    python tools/golden_llama.py                        # needs torch, transformers, safetensors, gguf, numpy
    python tools/golden_llama.py --real FILE.gguf       # SmolLM2-135M-Instruct.Q4_1.gguf; 2 GB of memory

The first writes, all for one tiny random model, into crates/blip2/tests/golden/
  llama_tiny.safetensors      weights under their Hugging Face names, inputs, hidden states, logits, a gradient
  llama_tiny_f32.gguf         the same weights in llama.cpp's order of rows
  llama_tiny_q8_0.gguf        the same, quantised where the rows allow it; its logits are `q8_0.logits` of the first file
  llama_generate.json         what `generate` gives for unequal prompts, one by one, under many configurations
  sampling.json               scores before and after transformers' logits processors and warpers
the second smollm2.json, from the dequantised weights in float32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation import logits_process

from reference import golden

FOLDER = golden.ROOT / "crates/blip2/tests/golden"
CONFIG = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": True,
    "mlp_bias": False,
}
PROMPT_LENGTHS = (5, 1, 9, 3)
END = 1


def tiny_model() -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation="eager")).double().eval()
    generator = torch.Generator().manual_seed(golden.SEED)
    golden.randomise(model, generator)
    head = model.lm_head.weight.data
    head *= 0.5
    # An end token that resembles the tokens this model likes comes up now and then: the stopping rules are exercised.
    likely = {token for prompt in tiny_inputs()[0] for token in run(model, prompt, {"num_beams": 3, "max_new_tokens": 12}, [])[0][0]}
    rows = sorted(likely - {END})
    head[END] = (1.2 * head[rows].sum(0) / len(rows) ** 0.5).float().double()
    return model


def tiny_inputs() -> tuple[tuple[Tensor, ...], Tensor]:
    """The prompts, and a gradient on the logits of all their rows."""
    generator = torch.Generator().manual_seed(golden.SEED + 1)
    embeds = (0.5 * torch.randn(sum(PROMPT_LENGTHS), CONFIG["hidden_size"], generator=generator)).double()
    d_logits = torch.randn(len(embeds), CONFIG["vocab_size"], generator=generator).double()
    return embeds.split(PROMPT_LENGTHS), d_logits


def logits_of(model: LlamaForCausalLM, embeds: Tensor, lengths=PROMPT_LENGTHS) -> tuple[Tensor, Tensor]:
    """Hidden states and logits of packed texts, each text on its own."""
    hidden = [model.model(inputs_embeds=rows[None]).last_hidden_state[0] for rows in embeds.split(lengths)]
    hidden = torch.cat(hidden)
    return hidden, model.lm_head(hidden)


def outputs(model, embeds: Tensor, d_logits: Tensor) -> dict[str, Tensor]:
    dtype = next(model.parameters()).dtype
    embeds = embeds.to(dtype).requires_grad_()
    hidden, logits = logits_of(model, embeds)
    (gradient,) = torch.autograd.grad(logits, embeds, d_logits.to(dtype))
    return {"out.hidden": hidden.detach(), "out.logits": logits.detach(), "grad.embeds": gradient}


# GGUF


def llama_cpp_order(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """As convert_hf_to_gguf.py permutes the rows of the query and key projections."""
    n_heads = rows.shape[0] // head_dim
    return rows.reshape(n_heads, 2, head_dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def gguf_tensors(state: dict[str, Tensor]):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG["num_hidden_layers"])
    for name, tensor in state.items():
        values = tensor.float().numpy()
        if ".q_proj." in name or ".k_proj." in name:
            values = llama_cpp_order(values, CONFIG["head_dim"])
        yield name, names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(values)


def write_gguf(path: Path, state: dict[str, Tensor], quantise: bool) -> dict[str, Tensor]:
    """Returns the weights as a reader of the file sees them, under their Hugging Face names and in that order."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_key_length(CONFIG["head_dim"])
    writer.add_value_length(CONFIG["head_dim"])
    writer.add_rope_dimension_count(CONFIG["head_dim"])
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    seen = {}
    for (name, gguf_name, values), original in zip(gguf_tensors(state), state.values()):
        kind = gguf.GGMLQuantizationType.Q8_0
        if quantise and values.ndim == 2 and values.shape[1] % 32 == 0:
            data = gguf.quants.quantize(values, kind)
            writer.add_tensor(gguf_name, data, raw_dtype=kind)
            # Q8_0 works row by row, so that the order of the rows does not matter.
            seen[name] = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(original.float().numpy(), kind), kind))
        else:
            writer.add_tensor(gguf_name, values)
            seen[name] = original
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{path.relative_to(golden.ROOT)}: {path.stat().st_size} bytes")
    return seen


# Generation


def generation_cases(end: list[int]) -> list[dict]:
    beams = [{"num_beams": n, "length_penalty": p} for n in (3, 5) for p in (0.0, 1.0, 2.0, -1.0)]
    early = [
        {"num_beams": n, "early_stopping": e, "length_penalty": p}
        for n in (3, 5)
        for e in (True, "never")
        for p in (1.0, -1.0)
    ]
    return [
        {},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 6},
        {"max_new_tokens": 1},
        *beams,
        *early,
        {"num_beams": 5, "num_return_sequences": 5},
        {"num_beams": 5, "num_return_sequences": 3, "early_stopping": True},
        {"num_beams": 3, "repetition_penalty": 1.5},
        {"num_beams": 5, "repetition_penalty": 1.15, "length_penalty": 0.0, "min_new_tokens": 8},
        {"num_beams": 5, "no_repeat_ngram_size": 2, "num_return_sequences": 2},
        {"num_beams": 3, "min_new_tokens": 8},
        {"num_beams": 3, "min_new_tokens": 4, "max_new_tokens": 4},
        {"num_beams": 5, "max_new_tokens": 1, "num_return_sequences": 5},
        {"num_beams": 2, "max_new_tokens": 24},
        {"num_beams": 5, "end_tokens": end + [end[0] + 1, end[0] + 2], "num_return_sequences": 2},
        {"num_beams": 5, "end_tokens": []},
        {"num_beams": 20, "num_return_sequences": 4},
    ]


def run(model, embeds: Tensor, settings: dict, end: list[int]) -> tuple[list[list[int]], list[float] | None]:
    config = GenerationConfig(**settings, do_sample=False, eos_token_id=end or None, pad_token_id=0)
    result = model.generate(
        inputs_embeds=embeds[None],
        attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
        generation_config=config,
        return_dict_in_generate=True,
        output_scores=True,
    )
    texts = []
    for ids in result.sequences.tolist():
        ends = [i for i, token in enumerate(ids) if token in end]
        texts.append(ids[: ends[0] + 1] if ends else ids[: settings["max_new_tokens"]])
    return texts, result.sequences_scores.tolist() if settings.get("num_beams", 1) > 1 else None


def generate(model, embeds: Tensor, case: dict, end: list[int]) -> list[dict]:
    settings = {"max_new_tokens": 12} | {k: v for k, v in case.items() if k != "end_tokens"}
    texts, scores = run(model, embeds, settings, case.get("end_tokens", end))
    results = []
    for ids in texts:
        rows = torch.cat([embeds, model.get_input_embeddings()(torch.tensor(ids))])
        logits = model(inputs_embeds=rows[None]).logits[0, len(embeds) - 1 : -1]
        log_probs = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        results.append({"token_ids": ids, "log_probs": [round(x, 6) for x in log_probs.tolist()]})
    for result, score in zip(results, scores or ()):
        result["score"] = round(score, 6)
    return results


# Processors


def sampling_golden() -> dict:
    generator = torch.Generator().manual_seed(golden.SEED)
    rows = (3 * torch.randn(4, 40, generator=generator)).float()
    rows[1, 7] = rows[1].max() + 1
    rows[2, 3:6] = rows[2, 10]  # ties
    history = torch.tensor([[3, 9, 3, 9, 4, 3, 9, 12, 4, 3]]).expand(4, -1)
    cases = []
    for settings in (
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_k": 1},
        {"top_p": 0.8},
        {"top_p": 0.3},
        {"top_p": 0.999},
        {"min_p": 0.1},
        {"min_p": 0.9},
        {"temperature": 1.7, "top_k": 12, "top_p": 0.85, "min_p": 0.07},
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 3},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ):
        build = {
            "repetition_penalty": logits_process.RepetitionPenaltyLogitsProcessor,
            "no_repeat_ngram_size": logits_process.NoRepeatNGramLogitsProcessor,
            "temperature": logits_process.TemperatureLogitsWarper,
            "top_k": logits_process.TopKLogitsWarper,
            "top_p": logits_process.TopPLogitsWarper,
            "min_p": logits_process.MinPLogitsWarper,
        }
        scores = rows.clone()
        for name in build:  # the order in which `generate` applies them
            if name in settings:
                scores = build[name](settings[name])(history, scores)
        kept = [[None if x == float("-inf") else x for x in row] for row in scores.tolist()]
        cases.append({"config": settings, "scores": kept})
    return {"logits": rows.tolist(), "history": history[0].tolist(), "cases": cases}


# The real model


def model_of_gguf(path: Path) -> LlamaForCausalLM:
    """In float32, from the values of llama.cpp's own `dequantize`."""
    reader = gguf.GGUFReader(path)
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    value = lambda key: reader.fields[f"llama.{key}"].contents()  # noqa: E731
    n_heads = value("attention.head_count")
    config = LlamaConfig(
        vocab_size=len(stored["token_embd.weight"]),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=n_heads,
        num_key_value_heads=value("attention.head_count_kv"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    head_dim = config.hidden_size // n_heads
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = stored.pop(names.get_name(name, try_suffixes=(".weight",)))
            if ".q_proj." in name or ".k_proj." in name:
                pairs = values.reshape(-1, head_dim // 2, 2, values.shape[1])
                values = pairs.swapaxes(1, 2).reshape(values.shape)
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    assert not stored, stored.keys()
    return model.eval()


def real(path: Path) -> dict:
    model = model_of_gguf(path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "<|im_start|>user\nName three animals that live in the sea.<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    logits = model(torch.tensor([ids])).logits[0]
    probes = [0, 1, 2, 11, 260, 1000, 4999, 20000, 33333, 49151]
    best = logits[-1].topk(10)
    generated = {}
    for n in (1, 5):
        config = GenerationConfig(num_beams=n, max_new_tokens=20, do_sample=False, eos_token_id=2, pad_token_id=0)
        out = model.generate(torch.tensor([ids]), generation_config=config)[0, len(ids) :].tolist()
        generated[str(n)] = out[: out.index(2) + 1] if 2 in out else out
        print(n, "beams:", repr(tokenizer.decode(generated[str(n)])))
    return {
        "text": text,
        "ids": ids,
        "probes": probes,
        "logits": [[round(x, 4) for x in row] for row in logits[:, probes].tolist()],
        "log_sum_exp": [round(x, 4) for x in logits.logsumexp(-1).tolist()],
        "best": [[token, round(x, 4)] for token, x in zip(best.indices.tolist(), best.values.tolist())],
        "generated": generated,
    }


def write_json(name: str, value) -> None:
    path = FOLDER / name
    path.write_text(json.dumps(value, separators=(",", ":")) + "\n")
    print(f"{path.relative_to(golden.ROOT)}: {path.stat().st_size} bytes")


@torch.no_grad()
def tiny() -> None:
    model = tiny_model()
    prompts, d_logits = tiny_inputs()
    embeds = torch.cat(prompts)
    state = model.state_dict()
    with torch.enable_grad():
        exact = outputs(model, embeds, d_logits)
        rough = outputs(tiny_model().float(), embeds, d_logits)
    write_gguf(FOLDER / "llama_tiny_f32.gguf", state, quantise=False)
    quantised = tiny_model()
    quantised.load_state_dict(write_gguf(FOLDER / "llama_tiny_q8_0.gguf", state, quantise=True))
    exact["q8_0.logits"] = logits_of(quantised, embeds)[1]
    rough["q8_0.logits"] = logits_of(quantised.float(), embeds.float())[1]
    inputs = {"in.embeds": embeds, "in.d_logits": d_logits}
    metadata = {"config": CONFIG, "lengths": PROMPT_LENGTHS, "tolerance": golden.tolerances(exact, rough)}
    golden.write(FOLDER / "llama_tiny.safetensors", state | inputs | exact, metadata)

    end = [END]
    cases = [
        {"config": {"max_new_tokens": 12} | case, "results": [generate(model, p, case, end) for p in prompts]}
        for case in generation_cases(end)
    ]
    write_json("llama_generate.json", {"end_tokens": end, "cases": cases})
    write_json("sampling.json", sampling_golden())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, metavar="FILE.gguf")
    arguments = parser.parse_args()
    torch.set_num_threads(2 if arguments.real else 1)
    if arguments.real:
        with torch.no_grad():
            write_json("smollm2.json", real(arguments.real.resolve()))
    else:
        tiny()
