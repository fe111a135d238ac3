"""Train the tokenizer of the bundled model, data/tiny-gpt2, and write the corpus as token arrays.

    python data/build_tokenizer.py

A GPT-2 tokenizer (byte-level BPE, its pre-tokenizer) with 8,192 tokens, of which "yes" and "no"
are single ones.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from build_corpus import CORPUS, GROUPS
from packages import DATA, write_text
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.trainers import BpeTrainer

FOLDER = DATA / "tiny-gpt2"
END = "<|endoftext|>"
VOCABULARY = 8192
CONTEXT = 512
REPEATS = {"shakespeare": 4, "bible": 1, "modern": 2}
# Old and modern wordings; ten near-copies would crowd out the rest.
BIBLES = {"kjv", "web", "wmth", "ylt"}
ANSWERS = ("yes", "no", " yes", " no")  # single tokens, which the paraphrase task needs
SEED = 0


def texts(name: str) -> Iterator[tuple[str, str]]:
    """(source, text) of the documents of a corpus file.

    Raises FileNotFoundError, with the command that makes the file.
    """
    path = CORPUS / f"{name}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.relative_to(DATA.parent)} not found; python data/build_corpus.py makes it"
        )
    with open(path, encoding="utf-8") as file:
        for line in file:
            document = json.loads(line)
            yield document["source"], document["text"]


def training_text() -> Iterator[str]:
    """The corpus, with more of the texts that the vocabulary should fit best."""
    for group in GROUPS:
        for source, text in texts(group):
            if group != "bible" or source in BIBLES:
                yield from [text] * REPEATS[group]
    # At the start of a line the answers are too rare in books to become tokens.
    yield from ["yes\nno\n"] * 3000


def train() -> Tokenizer:
    """A byte-level BPE tokenizer of exactly 8,192 tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.post_processor = ByteLevelProcessor(trim_offsets=False)
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"trained {tokenizer.get_vocab_size()} tokens instead of {VOCABULARY}")
    for answer in ANSWERS:
        if len(tokenizer.encode(answer).ids) != 1:
            raise ValueError(f"{answer!r} is {tokenizer.encode(answer).tokens}, not one token")
    return tokenizer


def save(tokenizer: Tokenizer) -> None:
    """Write the two files that transformers' AutoTokenizer reads."""
    write_text(FOLDER / "tokenizer.json", tokenizer.to_str(pretty=False))
    settings = {
        "tokenizer_class": "GPT2TokenizerFast",
        "model_max_length": CONTEXT,
        "add_prefix_space": False,
        "bos_token": END,
        "eos_token": END,
        "unk_token": END,
    }
    write_text(FOLDER / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file atomically."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        np.save(file, array)
    os.replace(partial, path)


def write_tokens(tokenizer: Tokenizer, name: str) -> None:
    """Write NAME.npy: the documents in shuffled order, each with the end-of-text token."""
    documents = [text for _, text in texts(name)]
    order = np.random.default_rng(SEED).permutation(len(documents))
    end = tokenizer.token_to_id(END)
    encoded = tokenizer.encode_batch_fast([documents[i] for i in order], add_special_tokens=False)
    runs = [[*encoding.ids, end] for encoding in encoded]
    tokens = np.concatenate([np.array(run, dtype=np.uint16) for run in runs])
    save_array(CORPUS / f"{name}.npy", tokens)
    characters = sum(map(len, documents))
    rate = characters / len(tokens)
    counts = f"{len(documents):7,} documents {len(tokens):11,} tokens"
    print(f"{name:15} {counts} {rate:.3f} characters per token")


def main() -> None:
    """Train and save the tokenizer, and tokenize every file of the corpus."""
    tokenizer = train()
    save(tokenizer)
    print("answers:", {answer: tokenizer.encode(answer).ids[0] for answer in ANSWERS})
    for name in (*GROUPS, "heldout_bible", "heldout_modern"):
        write_tokens(tokenizer, name)


if __name__ == "__main__":
    main()
