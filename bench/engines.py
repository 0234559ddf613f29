#!/usr/bin/env python3
"""Times the parts of BLIP-2 that other engines can run, there and in this project, and prints a table and JSON.

    cargo build --release -p blip2-cli
    pip install torch transformers Pillow numpy ctranslate2 openvino nncf
    python bench/engines.py                                     # everything
    python bench/engines.py --parts vision --engines openvino   # a part
    python bench/engines.py --size tiny                         # does it run? Such ratios mean nothing

`bench/inference.py` is the same for PyTorch. Weights are random in all engines and nothing is downloaded: the models are made
by PyTorch, converted once by each engine's own converter (OPT for OpenVINO excepted: a graph of its operations, made here) and
kept in `--models FOLDER`, where one is given. Parts:
- vision: EVA-CLIP ViT-g, pixel values to image tokens, one picture and four
- opt: OPT-2.7B, a prompt of 40 rows to the scores of the next token (prefill), and one more token after it, the mean of 20 (decode)
- t5: Flan-T5-XL, 40 rows read by the encoder and 21 tokens written greedily
Engines:
- ctranslate2, for opt and t5: int8 (dynamic scales of activations, as here), and int8_bfloat16 where it supports that on the
  processor. It takes no embeddings: the prompt is as many token ids, which is the same work and the look-up of 40 rows. Prefill is
  the faster of `forward_batch`, which computes the scores behind every row, and of generating one token, which reads the prompt but
  its last row, and then that. Decode is the time between the callbacks of the tokens.
- openvino, for vision: bf16 (f32 where the processor has no bf16), int8 with activation scales fixed by calibration
  (`nncf.quantize`: fastest, but the scales are those of the calibration), and int8 with dynamic scales (`nncf.compress_weights`).
  For opt: int8 weights by channel, with dynamic scales of activations, the prompt as embeddings, keys and values as its state.
Each setting of an engine that may be its fastest is tried (`peer_settings_s` of the JSON) and the fastest counts.

All have the same number of threads, one run to warm up and the same number of timed runs. Engines take turns, each in a process
of its own, never two at once, in `--rounds` rounds; times are the medians of the rounds' medians. `ratio` is the other engine's
time over this project's: above 1 this project is faster. `cosine` is that of the engine's result and PyTorch's with the same
weights: it computes the same. One model is in memory at a time, two copies of it while it is converted: some 12 GB. Nothing
else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch
import transformers
from torch import nn

from inference import N_QUERIES, N_TOKENS, N_WORDS, OPT, ROOT, SIDE, T5, blip2, draw, in_a_process, stage, timed
from inference import without_initialisation
from random_checkpoint import SHAPES, flan_t5, opt


@dataclasses.dataclass(frozen=True)
class Size:
    vision: dict
    opt: transformers.OPTConfig
    t5: transformers.T5Config
    side: int
    n_prompt: int
    shapes: dict[str, str]
    """This project's names of them."""


def sizes() -> dict[str, Size]:
    tiny_opt, tiny_t5 = opt(32, 2, 4), flan_t5(32, 48, 2, 4)
    tiny_opt.vocab_size = tiny_t5.vocab_size = 100
    tiny_opt.eos_token_id = 2
    return {
        "full": Size({}, SHAPES[OPT][0], SHAPES[T5][0], SIDE, N_QUERIES + N_WORDS, {"vision": OPT, "opt": OPT, "t5": T5}),
        "tiny": Size(
            {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28},
            tiny_opt, tiny_t5, 28, 4 + N_WORDS, {"vision": "tiny", "opt": "tiny", "t5": "tiny-flan-t5"},
        ),
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Peer:
    engine: str
    part: str
    dtype: str
    ours: str
    """The type in which this project computes beside it."""
    settings: list[dict[str, str]]
    """Each is tried: of the environment for CTranslate2, of the compiled model for OpenVINO."""
    prepare: Callable[[Size, Path, str], None]
    """Writes the model of a type into a folder."""
    measure: Callable[[Size, Path, str, dict, int, int], dict]
    """Seconds of each work, and `cosine`; given the type, setting, threads and runs."""

    @property
    def folder(self) -> str:
        return f"{self.part}-{self.engine}-{self.dtype.replace(' ', '-')}"


ENGINES, PARTS = ("openvino", "ctranslate2"), ("vision", "opt", "t5")
VISION = {1: "ViT-g, 1 picture", 4: "ViT-g, 4 pictures"}
PREFILL, DECODE, TEXT = "OPT-2.7B, prompt of 40 rows", "OPT-2.7B, one more token", "Flan-T5-XL, 40 rows read, 21 tokens written"
REFERENCE = "reference.npy"


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def make(kind: Callable, config) -> nn.Module:
    """In bf16."""
    with without_initialisation():
        model = kind(config).eval()
    draw(model)
    return model


# --- CTranslate2


def prompt_ids(size: Size) -> list[int]:
    return list(range(10, 10 + size.n_prompt))


def save_ctranslate2(spec, register: list[str], vocabulary_size: int, dtype: str, out: Path) -> None:
    """Token `i` is the word `i`; those of the settings are any, none is searched for."""
    words = [str(i) for i in range(vocabulary_size)]
    for name in register:
        getattr(spec, name)(words)
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = "2", "1", "3"
    if hasattr(spec.config, "decoder_start_token"):
        spec.config.decoder_start_token = "0"
    spec.validate()
    spec.optimize(quantization=dtype)
    spec.save(str(out))


def prepare_ctranslate2_opt(size: Size, out: Path, dtype: str) -> None:
    from ctranslate2.converters.transformers import OPTLoader

    model = make(transformers.OPTForCausalLM, size.opt)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt_ids(size)])).logits[0, -1]
    np.save(out / REFERENCE, logits.float().numpy())
    save_ctranslate2(OPTLoader().get_model_spec(model), ["register_vocabulary"], size.opt.vocab_size, dtype, out)


def prepare_ctranslate2_t5(size: Size, out: Path, dtype: str) -> None:
    from ctranslate2.converters.transformers import T5Loader

    spec = T5Loader().get_model_spec(make(transformers.T5ForConditionalGeneration, size.t5))
    register = ["register_source_vocabulary", "register_target_vocabulary"]
    save_ctranslate2(spec, register, size.t5.vocab_size, dtype, out)


def per_token(write: Callable[[Callable], object]) -> float:
    """Seconds of a token after the first, where `write` is given what to call after each."""
    stamps = []

    def called(_) -> bool:
        stamps.append(time.perf_counter())
        return False

    write(called)
    assert len(stamps) == N_TOKENS + 1, stamps
    return (stamps[-1] - stamps[0]) / N_TOKENS


def measure_ctranslate2_opt(size: Size, folder: Path, dtype: str, _: dict, n_threads: int, n_runs: int) -> dict:
    import ctranslate2

    model = ctranslate2.Generator(str(folder), device="cpu", compute_type=dtype, inter_threads=1, intra_threads=n_threads)
    ids = prompt_ids(size)
    words = [[str(i) for i in ids]]

    def generate(n: int, callback: Callable | None = None) -> None:
        model.generate_batch(
            words, min_length=n, max_length=n, include_prompt_in_result=False, end_token=[], callback=callback
        )

    scores = [timed(lambda: model.forward_batch([ids]), 1, n_runs), timed(lambda: generate(1), 1, n_runs)]
    decode = [per_token(lambda callback: generate(N_TOKENS + 1, callback)) for _ in range(1 + n_runs)][1:]
    near = cosine(np.array(model.forward_batch([ids]))[0, -1], np.load(folder / REFERENCE))
    return {"seconds": {PREFILL: min(scores, key=statistics.median), DECODE: decode}, "cosine": near}


def measure_ctranslate2_t5(size: Size, folder: Path, dtype: str, _: dict, n_threads: int, n_runs: int) -> dict:
    import ctranslate2

    model = ctranslate2.Translator(str(folder), device="cpu", compute_type=dtype, inter_threads=1, intra_threads=n_threads)
    words, n = [[str(i) for i in prompt_ids(size)]], N_TOKENS + 1
    write = lambda: model.translate_batch(  # noqa: E731
        words, beam_size=1, min_decoding_length=n, max_decoding_length=n, end_token=[]
    )
    assert len(write()[0].hypotheses[0]) == n
    return {"seconds": {TEXT: timed(write, 0, n_runs)}, "cosine": None}


# --- OpenVINO


class Vision(nn.Module):
    """Of its several results the image tokens."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        return self.model(pixel_values=pixels, return_dict=False)[0]


def pixels(size: Size, n: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((n, 3, size.side, size.side), dtype=np.float32)


def prepare_openvino_vision(size: Size, out: Path, dtype: str) -> None:
    import openvino

    plain = out.parent / "vision-openvino"
    if not plain.exists():
        convert_openvino_vision(size, plain)
    shutil.copy(plain / REFERENCE, out)
    model = openvino.Core().read_model(plain / "plain.xml")
    if dtype == "int8":
        import nncf

        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    elif dtype == "int8 calibrated":
        import nncf

        # The time does not depend on which pictures they are.
        model = nncf.quantize(model, nncf.Dataset([pixels(size, 1)]), subset_size=1, model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(model, out / "model.xml", compress_to_fp16="int8" not in dtype)


def convert_openvino_vision(size: Size, out: Path) -> None:
    import openvino

    config = transformers.Blip2VisionConfig(hidden_act="gelu", layer_norm_eps=1e-6, **size.vision)
    model = Vision(make(transformers.Blip2VisionModel, config).float())
    example = torch.from_numpy(pixels(size, 1))
    with in_place(out) as folder:
        with torch.inference_mode():
            np.save(folder / REFERENCE, model(example).numpy())
        shape = openvino.PartialShape([-1, 3, size.side, size.side])
        converted = openvino.convert_model(model, example_input=example, input=[shape])
        openvino.save_model(converted, folder / "plain.xml", compress_to_fp16=True)


def compiled(model, setting: dict, n_threads: int):
    import openvino

    options = {"INFERENCE_NUM_THREADS": n_threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", **setting}
    return openvino.Core().compile_model(model, "CPU", options).create_infer_request()


def measure_openvino_vision(size: Size, folder: Path, _: str, setting: dict, n_threads: int, n_runs: int) -> dict:
    import openvino

    seconds, near = {}, None
    for n, name in VISION.items():
        model = openvino.Core().read_model(folder / "model.xml")
        model.reshape([n, 3, size.side, size.side])
        request, inputs = compiled(model, setting, n_threads), {0: pixels(size, n)}
        seconds[name] = timed(lambda: request.infer(inputs), 1, n_runs)
        near = near or cosine(request.get_output_tensor(0).data, np.load(folder / REFERENCE))
        del model, request
    return {"seconds": seconds, "cosine": near}


def prompt_rows(size: Size) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((1, size.n_prompt, size.opt.hidden_size), dtype=np.float32)


def prepare_openvino_opt(size: Size, out: Path, _: str) -> None:
    import openvino

    from openvino_opt import graph

    model = make(transformers.OPTForCausalLM, size.opt)
    with torch.inference_mode():
        rows = torch.from_numpy(prompt_rows(size)).to(torch.bfloat16)
        np.save(out / REFERENCE, model(inputs_embeds=rows).logits[0, -1].float().numpy())
    openvino.save_model(graph(model), out / "model.xml", compress_to_fp16=False)


def measure_openvino_opt(size: Size, folder: Path, _: str, setting: dict, n_threads: int, n_runs: int) -> dict:
    import openvino

    request = compiled(openvino.Core().read_model(folder / "model.xml"), setting, n_threads)
    prompt = prompt_rows(size)
    n_prompt = size.n_prompt

    def read(rows: np.ndarray, n_before: int) -> np.ndarray:
        n = rows.shape[1]
        mask = np.triu(np.full((n, n_before + n), -1e9, np.float32), n_before + 1)
        places = np.arange(n_before, n_before + n)
        request.infer({0: rows, 1: places[None], 2: mask[None, None], 3: np.zeros(1, np.int32)})
        return request.get_output_tensor(0).data.ravel()

    def prefill() -> np.ndarray:
        request.reset_state()
        return read(prompt, 0)

    def decode() -> float:
        prefill().argmax()
        start = time.perf_counter()
        for i in range(N_TOKENS):
            # In place of the embedding of the token found: the same work.
            read(prompt[:, i % n_prompt, None], n_prompt + i).argmax()
        return (time.perf_counter() - start) / N_TOKENS

    seconds = {PREFILL: timed(prefill, 1, n_runs), DECODE: [decode() for _ in range(1 + n_runs)][1:]}
    return {"seconds": seconds, "cosine": cosine(prefill(), np.load(folder / REFERENCE))}


# --- what is compared


def peers(engines: list[str], parts: list[str]) -> list[Peer]:
    found = []
    if "openvino" in engines:
        import openvino

        has_bf16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        half = "bf16" if has_bf16 else "f32"
        settings = [{"INFERENCE_PRECISION_HINT": precision} for precision in dict.fromkeys([half, "f32"])]
        for dtype, ours, tried in ((half, half, settings[:1]), ("int8 calibrated", "int8", settings), ("int8", "int8", settings)):
            found.append(Peer("openvino", "vision", dtype, ours, tried, prepare_openvino_vision, measure_openvino_vision))
        found.append(Peer("openvino", "opt", "int8", "int8", settings, prepare_openvino_opt, measure_openvino_opt))
    if "ctranslate2" in engines:
        import ctranslate2

        supported = ctranslate2.get_supported_compute_types("cpu")
        # By itself it takes oneDNN and AVX2 on processors of AMD.
        settings = [{}, {"CT2_USE_MKL": "1", "CT2_FORCE_CPU_ISA": "AVX512"}]
        if "AVX512" not in torch.backends.cpu.get_cpu_capability():
            settings = [{}, {"CT2_USE_MKL": "1"}]
        for dtype in [dtype for dtype in ("int8", "int8_bfloat16") if dtype in supported]:
            found.append(Peer("ctranslate2", "opt", dtype, "int8", settings, prepare_ctranslate2_opt, measure_ctranslate2_opt))
            found.append(Peer("ctranslate2", "t5", dtype, "int8", settings, prepare_ctranslate2_t5, measure_ctranslate2_t5))
    return [peer for peer in found if peer.part in parts]


@contextlib.contextmanager
def in_place(folder: Path) -> Iterator[Path]:
    """A folder that has its name only once it is whole."""
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    beside.rename(folder)


def prepare(peer: Peer, size: Size, out: Path, n_threads: int) -> None:
    os.dup2(2, 1)  # The converters talk on standard output, which is for the report.
    torch.set_num_threads(n_threads)
    with in_place(out) as folder:
        peer.prepare(size, folder, peer.dtype)


def measure(peer: Peer, size: Size, folder: Path, setting: dict, n_threads: int, n_runs: int) -> dict:
    os.dup2(2, 1)
    return peer.measure(size, folder, peer.dtype, setting, n_threads, n_runs)


@contextlib.contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def our_seconds(part: str, dtype: str, size: Size, arguments: argparse.Namespace) -> dict[str, float]:
    model = ["--shape", size.shapes[part], "--dtype", dtype, "--ignore-memory"]
    if part == "vision":
        return {
            name: stage(blip2(arguments, *model, "--stages", "vision", "--batch", str(n)), "vision")
            for n, name in VISION.items()
        }
    report = blip2(arguments, *model, "--stages", "prefill,decode", "--beams", "1")
    prefill, decode = stage(report, "prefill"), stage(report, "decode", 1)
    return {PREFILL: prefill, DECODE: decode} if part == "opt" else {TEXT: prefill + N_TOKENS * decode}


def compare(part: str, some: list[Peer], size: Size, models: Path, arguments: argparse.Namespace) -> list[dict]:
    theirs, ours, near = {}, {}, {}
    for i in range(arguments.rounds):
        print(f"{part}, round {i + 1} of {arguments.rounds}", file=sys.stderr)
        for peer in some:
            for setting in peer.settings:
                with environment(setting if peer.engine == "ctranslate2" else {}):
                    result = in_a_process(
                        measure, peer, size, models / peer.folder, setting, arguments.threads, arguments.repeat
                    )
                said = " ".join(f"{key}={value}" for key, value in setting.items())
                near.setdefault((peer.folder, said), result["cosine"])
                for work, seconds in result["seconds"].items():
                    by_setting = theirs.setdefault((peer.folder, work), {})
                    by_setting.setdefault(said, []).append(statistics.median(seconds))
        for dtype in dict.fromkeys(peer.ours for peer in some):
            for work, seconds in our_seconds(part, dtype, size, arguments).items():
                ours.setdefault((dtype, work), []).append(seconds)
    rows = []
    for peer in some:
        for work in [work for folder, work in theirs if folder == peer.folder]:
            medians = {said: statistics.median(times) for said, times in theirs[peer.folder, work].items()}
            best = min(medians, key=medians.get)
            mine = statistics.median(ours[peer.ours, work])
            rows.append({
                "work": work, "engine": peer.engine, "dtype": peer.dtype, "setting": best, "blip2_dtype": peer.ours,
                "peer_median_s": medians[best], "blip2_median_s": mine, "ratio": medians[best] / mine,
                "cosine": near[peer.folder, best], "peer_settings_s": medians,
            })  # fmt: skip
    return rows


def table(rows: list[dict]) -> str:
    lines = ["| work | engine | its type | its time | blip2 | time | ratio | its cosine |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        near = "" if row["cosine"] is None else f"{row['cosine']:.4f}"
        lines.append(
            f"| {row['work']} | {row['engine']} | {row['dtype']} | {row['peer_median_s']:.4g} s | {row['blip2_dtype']} "
            f"| {row['blip2_median_s']:.4g} s | {row['ratio']:.2f}× | {near} |"
        )
    return "\n".join(lines)


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", *ENGINES, "nncf"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def some_of(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"no {', '.join(sorted(unknown))} here; there are {', '.join(known)}")
        return names

    return parse


def main() -> int:
    parser = argparse.ArgumentParser(description="Time parts of BLIP-2 in other engines and here.")
    parser.add_argument("--engines", type=some_of(ENGINES), default=list(ENGINES), help=f"some of {', '.join(ENGINES)}")
    parser.add_argument("--parts", type=some_of(PARTS), default=list(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--size", choices=["full", "tiny"], default="full")
    parser.add_argument("--models", type=Path, help="where to keep converted models, 15 GB; without it they are deleted")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each engine has (default 3)")
    parser.add_argument("--repeat", type=int, default=3, help="timed runs in each turn (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/blip2")
    arguments = parser.parse_args()
    load, size, rows = os.getloadavg()[0], sizes()[arguments.size], []
    found = peers(arguments.engines, arguments.parts)
    if not found:
        # Rather than an empty table.
        parser.error("none of these engines runs any of these parts")
    with tempfile.TemporaryDirectory() as temporary:
        models = (arguments.models or Path(temporary)) / arguments.size
        for part in arguments.parts:
            some = [peer for peer in found if peer.part == part]
            for peer in some:
                if not (models / peer.folder).exists():
                    print(f"makes {peer.folder}", file=sys.stderr)
                    in_a_process(prepare, peer, size, models / peer.folder, arguments.threads)
            rows += compare(part, some, size, models, arguments) if some else []
    if arguments.size == "tiny":
        print("tiny sizes, in spite of the names: these ratios mean nothing", file=sys.stderr)
    print(table(rows), file=sys.stderr)
    report = {
        "versions": versions(), "size": arguments.size, "threads": arguments.threads, "rounds": arguments.rounds,
        "repeat": arguments.repeat, "machine": platform.machine(), "load_before": round(load, 2), "results": rows,
    }  # fmt: skip
    json.dump(report, sys.stdout, indent=2)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
