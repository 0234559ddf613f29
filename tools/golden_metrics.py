"""Golden values of the caption and VQA metrics, from the reference implementations.

    pip install pycocoevalcap numpy
    git clone https://github.com/salesforce/LAVIS
    git clone https://github.com/GT-Vision-Lab/VQA
    python tools/golden_metrics.py \
        --lavis LAVIS/lavis/common/vqa_tools/vqa_eval.py \
        --official VQA/PythonEvaluationTools/vqaEvaluation/vqaEval.py

writes crates/blip2-train/tests/golden/{captions,vqa}.json. Captions are scored by pycocoevalcap's
Bleu, Rouge and Cider on text that is already tokenised (no Java, no PTBTokenizer); answers by both
VQA evaluators, which are run, not copied.
"""

import argparse
import contextlib
import io
import json
import random
import re
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

GOLDEN = Path(__file__).parent.parent / "crates/blip2-train/tests/golden"
SEED = 7
TOLERANCE = 1e-9  # relative


# --- captions -------------------------------------------------------------------------------

# (candidate, references), already tokenised: words separated by one blank.
EDGE_CASES = [
    ("", ["a dog runs on the beach", "a dog on the sand"]),  # nothing generated
    ("", [""]),  # nothing generated, nothing expected
    ("a dog", [""]),  # an empty reference
    ("a dog", ["", "a dog runs"]),
    ("a dog runs on the beach", ["a dog runs on the beach"]),  # identical
    ("a dog runs on the beach", ["a dog runs on the beach"] * 5),
    ("dog", ["dog"]),  # one word
    ("dog", ["a dog runs on the beach", "cat"]),
    ("xylophone", ["a dog runs on the beach"]),  # not one word shared
    ("the the the the the the the", ["the cat is on the mat", "there is a cat on the mat"]),
    ("dog dog dog dog dog dog", ["dog dog dog dog", "a dog"]),
    ("a a", ["a a a a a a a a a a"]),
    ("a dog " * 12, ["a dog runs", "a dog jumps over a log"]),  # far too long
    ("two dogs play", ["two dogs play in the deep white snow near a small red house today"]),
    ("mat the on is cat the", ["the cat is on the mat"]),  # word order
    ("a b c d", ["a b c", "a b c d e"]),  # two references equally close in length
    ("a man's dog isn't 3 years old", ["the man's dog is 3", "a man's old dog isn't young"]),
]

GRAMMAR = [
    ["a", "the", "two", "a young", "an old", "three small"],
    ["dog", "man", "woman", "boy in a red shirt", "girls", "cyclist", "brown dog"],
    ["runs", "is running", "jumps", "sits", "plays", "is standing", "climbs", "swims"],
    ["on", "in", "over", "near", "through", "beside"],
    ["the beach", "a field of grass", "the street", "a rock wall", "the water", "deep snow"],
    ["", "", "with a ball", "at sunset", "while another dog watches", "in the rain"],
]


def made_up_caption(rng):
    return " ".join(" ".join(rng.choice(choices) for choices in GRAMMAR).split())


def caption_cases():
    rng = random.Random(SEED)
    cases = [(" ".join(c.split()), refs) for c, refs in EDGE_CASES]
    for n_references in [1, 2, 3, 5, 5, 5, 5] * 6 + [5]:
        references = [made_up_caption(rng) for _ in range(n_references)]
        candidate = made_up_caption(rng)
        if rng.random() < 0.5:  # near a reference, as a caption model's output is
            words = rng.choice(references).split()
            del words[rng.randrange(len(words))]
            words.insert(rng.randrange(len(words) + 1), rng.choice(["dog", "red", "the"]))
            candidate = " ".join(words)
        cases.append((candidate, references))
    return cases


def score_captions(cases):
    candidates = {i: [candidate] for i, (candidate, _) in enumerate(cases)}
    references = {i: refs for i, (_, refs) in enumerate(cases)}
    bleu, bleu_each = Bleu(4).compute_score(references, candidates, verbose=0)
    rouge, rouge_each = Rouge().compute_score(references, candidates)
    cider, cider_each = Cider().compute_score(references, candidates)
    return {
        "bleu": bleu,
        "rouge_l": float(rouge),
        "cider_d": float(cider),
        "bleu_each": [list(scores) for scores in zip(*bleu_each)],
        "rouge_l_each": rouge_each.tolist(),
        "cider_d_each": cider_each.tolist(),
    }


def captions():
    cases = caption_cases()
    corpora = {"all": cases, "one image": cases[20:21], "empty answer": cases[:1]}
    corpora["ordinary"] = cases[len(EDGE_CASES) :]
    return {
        "tolerance": TOLERANCE,
        "cases": [{"candidate": c, "references": r} for c, r in cases],
        "corpora": [
            {"name": name, "cases": [cases.index(case) for case in corpus], **score_captions(corpus)}
            for name, corpus in corpora.items()
        ],
    }


# --- VQA ------------------------------------------------------------------------------------

TEXTS = [
    "", " ", "yes", "Yes", "yes.", "YES!", "a dog", "The Dog", "an umbrella", "two", "Two dogs", "none", "ten",
    "eleven", "3.5", "3.", ".5", "1,000", "1,000 people, maybe", "10,5", "a,b", "a, b", "red/blue", "red / blue",
    "black-and-white", "t-shirt", "t -shirt", "dont", "don't", "isnt it", "hes", "whats up", "whatre", "oclock",
    "5 oclock", "yall'd've", "y'alld've", "let's go", "somebody'd", "ow's'at", "'ow'sat", "twas", "Im here", "Ive",
    "couldnt've", "(left)", "left (of it)", "[a]", "{b}", "\"quoted\"", "back\\slash", "under_score", "a=b", "a + b",
    "<tag>", "me@home", "`tick`", "what?", "what ?", "wow!", "semi;colon", "semi; colon", "multiple   spaces",
    "tab\tinside", "line\nbreak", " padded ", "a", "the", "a the an", "U.S.A.", "St. Louis", "mr.smith", "<=5.",
    "." * 40, "x" + "." * 33 + "y", "caf\u00e9", "\u00c9cole", "it's 7:30", "7:30 pm", "don't know", "20%", "$5.00",
    "one hundred", "zero-g", "three,four", "3,four", "blue , white", "and/or", "n/a", "'s", "o'clock", "whos that",
]  # fmt: skip

ANNOTATIONS = [
    ("yes", ["yes"] * 10),
    ("Yes", ["yes"] * 10),  # unanimous: the official rule compares the raw text
    ("yes", ["yes"] * 9 + ["no"]),
    ("Yes.", ["yes"] * 9 + ["no"]),
    ("no", ["yes"] * 9 + ["no"]),
    ("no", ["yes"] * 8 + ["no"] * 2),
    ("no", ["yes"] * 7 + ["no"] * 3),
    ("no", ["yes"] * 6 + ["no"] * 4),
    ("two", ["2"] * 5 + ["two"] * 3 + ["3"] * 2),
    ("2", ["two"] * 10),
    ("two", ["two"] * 10),
    ("a dog", ["dog"] * 4 + ["the dog"] * 2 + ["puppy"] * 4),
    ("dog", ["a dog"] * 4 + ["cat"]),
    ("dont know", ["don't know"] * 3 + ["dont know", "unknown"]),
    ("red/blue", ["red and blue", "red blue", "red/blue", "red / blue"]),
    ("", ["yes", "no", ""]),
    (" blue\n", ["blue", " blue", "blue ", "bl ue"]),
    ("t-shirt", ["t-shirt", "t shirt", "tshirt", "shirt"]),
    ("yes", ["yes"]),
    ("yes", ["yes", "yes"]),
    ("1,000", ["1000"] * 3 + ["1,000"] * 2 + ["many"]),
]


def load_evaluator(path):
    """The class VQAEval of the file, whose print statements may be Python 2's."""
    source = re.sub(r'print "(.*)"', r'print("\1")', Path(path).read_text())
    namespace = {}
    exec(compile(source, str(path), "exec"), namespace)
    return namespace["VQAEval"]


class Annotations:
    """The part of the VQA API which the evaluators call."""

    def __init__(self, qa):
        self.qa = qa

    def getQuesIds(self):
        return list(self.qa)


def accuracies(evaluator):
    truths = {
        i: {
            "question_type": "",
            "answer_type": "",
            "answers": [{"answer": text, "answer_id": n} for n, text in enumerate(texts)],
        }
        for i, (_, texts) in enumerate(ANNOTATIONS)
    }
    answers = {i: {"answer": answer} for i, (answer, _) in enumerate(ANNOTATIONS)}
    evaluation = evaluator(Annotations(truths), Annotations(answers), n=10)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
    return [evaluation.evalQA[i] for i in range(len(ANNOTATIONS))]


def vqa(lavis_path, official_path):
    lavis, official = load_evaluator(lavis_path), load_evaluator(official_path)

    class Normaliser(official):
        def __init__(self):
            super().__init__(Annotations({}), Annotations({}))

    normaliser, lavis_normaliser = Normaliser(), lavis()
    texts = TEXTS + [w for word in sorted(lavis_normaliser.contractions) for w in (word, word.capitalize())]
    normalised = []
    for text in texts:
        punctuation = normaliser.processPunctuation(text)
        both = normaliser.processDigitArticle(punctuation)
        assert punctuation == lavis_normaliser.processPunctuation(text)
        assert both == lavis_normaliser.processDigitArticle(punctuation)
        normalised.append({"text": text, "punctuation": punctuation, "all": both})
    return {
        "normalised": normalised,
        "annotations": [
            {"answer": answer, "truths": truths, "official": official_accuracy, "lavis": lavis_accuracy}
            for (answer, truths), official_accuracy, lavis_accuracy in zip(
                ANNOTATIONS, accuracies(official), accuracies(lavis)
            )
        ],
    }


def write(name, value):
    path = GOLDEN / name
    path.write_text(json.dumps(value, indent=1, ensure_ascii=True) + "\n")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lavis", required=True, help="LAVIS's vqa_eval.py")
    parser.add_argument("--official", required=True, help="the VQA API's vqaEval.py")
    arguments = parser.parse_args()
    write("captions.json", captions())
    write("vqa.json", vqa(arguments.lavis, arguments.official))
