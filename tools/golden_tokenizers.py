#!/usr/bin/env python3
"""Ids of many strings by transformers' tokenizers of OPT, T5 and BERT, and two tokenizers small enough to be committed.

    pip install transformers sentencepiece && python tools/golden_tokenizers.py TOKENIZERS

TOKENIZERS holds `opt/gpt2-vocab.json`, `opt/gpt2-merges.txt`, `t5/spiece.model`, `t5/tokenizer.json` and
`bert-base-uncased/vocab.txt`. Writes crates/blip2/tests/golden/tokenizers.json: for each string the ids without marks around
it, `special` where marks in it are marks; and tiny_bpe/ and tiny_t5/, folders as the hub has them, with the ids they give.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import sentencepiece
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer, T5Tokenizer
from transformers.utils import logging

logging.set_verbosity_error()
warnings.filterwarnings("ignore")

FOLDER = Path(__file__).resolve().parent.parent / "crates/blip2/tests/golden"
SAMPLE = FOLDER.parent.parent.parent.parent / "LICENSE-APACHE"

TEXTS = [
    "", " ", "  ", "\n", "\t", "\r\n", "a", " a", "a ", "  a  b  ", "a\nb", "a\n", "\na", "a\n\nb", "a \n b", "a\u00a0b",
    "a photo of", "a photo of ", " a photo of", "this is a picture of", "a woman sitting on the beach with a dog",
    "Question: which city is this? Answer:", "Question: which city is this? Short answer:",
    "Question: which city is this? Answer: singapore. Question: why? Answer:",
    "Question: what's in the man's hand? Answer: it's a cup.. Question: don't you'd they'll we've I'm ? Answer:",
    "two cats laying on a couch", "marina bay sands, singapore", "ray ban ray ban ray ban",
    "3.14159 + 2024-11-23 = 1,000,000 $5.99 50% #1 @home e-mail@example.com https://example.com/?a=b&c=d",
    "CamelCase snake_case SCREAMING_CASE x86_64 C++ <html> {json: [1, 2]} \\n \\t \"quoted\" 'single' `code`",
    "naïve café Ångström ÉCOLE straße İstanbul ﬁ ﬂ ½ ² Ⅷ ① ℃ ™ ©", "e\u0301 n\u0303 a\u030a \u1e9b\u0323 \u0130 \ufb01",
    "“curly” ‘quotes’ — em–dash … ellipsis • bullet", "Привет, мир! Γειά σου. مرحبا بالعالم שלום नमस्ते ไทย",
    "日本語のテキスト 中文字符 한국어 텍스트 ｆｕｌｌｗｉｄｔｈ ｶﾀｶﾅ", "🐶", "🐶🏽 👨‍👩‍👧 🇫🇷 ❤️ ok", "a🐶b 🐶 c", "\u200b\u200d\ufeff\u00ad",
    "a\u200bb\u2060c\u00add", "\u3000wide\u3000blank\u2003em\u2009thin", "\u0000nul \u0001 \u001f \u007f \ufffd", "▁ ▁▁a ▁b",
    "Ġ Ċ Āa", "xXyYzZ_#@!", "!!!???...,,,;;;", "antidisestablishmentarianism supercalifragilisticexpialidocious",
    "x" * 120, "ab" * 60, "the " * 40, "1234567890" * 5, "I I I", "a.b.c", "A. B. C.", "it's it’s IT'S", "'s 't 're", "##a ##", "[x]",
]
SPECIAL = {
    "opt": ["<image>", "<image><image></s>a photo of", "a</s>b", " </s> ", "<s>", "<pad>a", "<unk> <mask>", "</s></s>", "a <image> b\n"],
    "t5": ["</s>", "a</s>", "a </s> b", "<pad>a photo", "<extra_id_0> dog <extra_id_99>", "<unk>", "a<extra_id_1>b"],
    "bert": [],
}


def strings() -> list[str]:
    """The list above, and random ones of the characters in it."""
    rng = random.Random(7)
    alphabet = sorted(set("".join(TEXTS)))
    words = sorted({word for text in TEXTS for word in text.split(" ") if len(word) < 40})
    mixed = ["".join(rng.choices(alphabet, k=rng.randint(1, 24))) for _ in range(60)]
    phrases = [" ".join(rng.choices(words, k=rng.randint(2, 12))) for _ in range(60)]
    return TEXTS + mixed + phrases


def rows(tokenizer, texts: list[str]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def opt_folder(folder: Path, vocab: Path, merges: Path, n_tokens: int) -> Path:
    """The files that blip2-opt-2.7b has on the hub, without tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(vocab, folder / "vocab.json")
    shutil.copy(merges, folder / "merges.txt")
    marks = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
    write_json(folder / "special_tokens_map.json", marks)
    write_json(folder / "added_tokens.json", {"<image>": n_tokens})
    added = {str(i): {"content": token, "special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
             for i, token in [(1, "<pad>"), (2, "</s>"), (n_tokens, "<image>")]}
    config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": False, "added_tokens_decoder": added}
    write_json(folder / "tokenizer_config.json", config | marks)
    return folder


def main(source: Path) -> None:
    texts = strings()
    scratch = Path(tempfile.mkdtemp())
    opt = opt_folder(scratch / "opt", source / "opt/gpt2-vocab.json", source / "opt/gpt2-merges.txt", 50265)
    (scratch / "t5").mkdir()
    shutil.copy(source / "t5/spiece.model", scratch / "t5")
    fast = T5Tokenizer.from_pretrained(source / "t5")
    made = {
        "opt": GPT2Tokenizer.from_pretrained(opt),
        "t5": T5Tokenizer.from_pretrained(scratch / "t5"),
        "bert": BertTokenizer(str(source / "bert-base-uncased/vocab.txt")),
    }
    assert rows(fast, texts) == rows(made["t5"], texts), "T5's two files disagree"
    golden = {
        "texts": texts,
        "ids": {name: rows(tokenizer, texts) for name, tokenizer in made.items()},
        "special": {name: [[text, *rows(made[name], [text])] for text in SPECIAL[name]] for name in SPECIAL},
    }

    # What is left of an earlier run would be read instead.
    for name in ("tiny_bpe", "tiny_t5"):
        shutil.rmtree(FOLDER / name, ignore_errors=True)

    # Byte-level BPE of some hundred merges, learned from the strings themselves.
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator([SAMPLE.read_text(), *TEXTS], vocab_size=600, special_tokens=["<s>", "<pad>", "</s>", "<unk>"])
    learned.save_model(str(scratch))
    tiny = opt_folder(FOLDER / "tiny_bpe", scratch / "vocab.json", scratch / "merges.txt", learned.get_vocab_size())
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    golden["ids"]["tiny_bpe"] = rows(tokenizer, texts)
    golden["special"]["tiny_bpe"] = [[text, *rows(tokenizer, [text])] for text in SPECIAL["opt"]]
    tokenizer.save_pretrained(scratch / "saved")
    shutil.copy(scratch / "saved/tokenizer.json", tiny)

    # SentencePiece with a normaliser of a few rules, as T5's is one of many.
    rules = scratch / "rules.tsv"
    rules.write_text("FB01\t66 69\nBD\t31 2F 32\nFF46\t66\n2026\t2E 2E 2E\nA0\t20\n3000\t20\nA\t20\n9\t20\nD\t20\n")
    sample = scratch / "sample.txt"
    sample.write_text("\n".join([SAMPLE.read_text()] + TEXTS))
    folder = FOLDER / "tiny_t5"
    folder.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        input=str(sample), model_prefix=str(folder / "spiece"), vocab_size=300, model_type="unigram", character_coverage=0.98,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, normalization_rule_tsv=str(rules), hard_vocab_limit=False, minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    tokenizer = T5Tokenizer.from_pretrained(folder)
    golden["ids"]["tiny_t5"] = rows(tokenizer, texts)
    golden["special"]["tiny_t5"] = [[text, *rows(tokenizer, [text])] for text in SPECIAL["t5"]]
    tokenizer.save_pretrained(scratch / "saved_t5")
    shutil.copy(scratch / "saved_t5/tokenizer.json", folder)

    lines = [f'"texts": {json.dumps(texts)}']
    for key in ("ids", "special"):
        parts = [f"{json.dumps(name)}: {json.dumps(golden[key][name], separators=(',', ':'))}" for name in golden[key]]
        lines.append(f'"{key}": {{\n' + ",\n".join(parts) + "\n}")
    (FOLDER / "tokenizers.json").write_text("{" + ",\n".join(lines) + "}\n")
    for path in [FOLDER / "tokenizers.json", *sorted(tiny.iterdir()), *sorted(folder.iterdir())]:
        print(path.relative_to(FOLDER), path.stat().st_size)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
