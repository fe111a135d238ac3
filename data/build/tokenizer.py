"""Train the tokenizer of the bundled model, data/tiny-gpt2, and write the corpus as token arrays.

    python data/build/tokenizer.py     # after corpus.py

It is a GPT-2 tokenizer (byte-level BPE with GPT-2's pre-tokenizer) of 8,192 tokens. "yes" and "no"
are single tokens.
"""

import json
from collections.abc import Iterable, Iterator

import numpy as np
from corpus import CORPUS, GROUPS, HELD_OUT_GROUPS
from packages import DATA, write_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

FOLDER = DATA / "tiny-gpt2"
END = "<|endoftext|>"
VOCABULARY = 8192
REPEATS = {"shakespeare": 4, "bible": 1, "modern": 2}
# Old and modern wordings; ten near-copies would crowd out the rest.
BIBLES = ("kjv", "web", "wmth", "ylt")
ANSWERS = ("yes", "no", " yes", " no")  # single tokens, which the paraphrase task needs
SETTINGS = {
    "tokenizer_class": "GPT2TokenizerFast",
    "model_max_length": 512,
    "add_prefix_space": False,
    "bos_token": END,
    "eos_token": END,
    "unk_token": END,
}


def read_documents(name: str) -> list[dict[str, str]]:
    """Return the documents of a corpus file, with `source` and `text`."""
    lines = (CORPUS / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def training_texts() -> Iterator[str]:
    """Yield the texts of the corpus, repeating those that the vocabulary should fit best."""
    for group in GROUPS:
        for document in read_documents(group):
            if group != "bible" or document["source"] in BIBLES:
                yield from [document["text"]] * REPEATS[group]
    # At the start of a line the answers are too rare in books to become tokens.
    yield from ["yes\nno\n"] * 3000


def train(texts: Iterable[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer with VOCABULARY tokens, trained on the texts.

    Raises ValueError if the texts give fewer tokens, or if an answer is several tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"trained {tokenizer.get_vocab_size()} tokens instead of {VOCABULARY}")
    for answer in ANSWERS:
        if len(tokenizer.encode(answer)) != 1:
            raise ValueError(f"{answer!r} is {tokenizer.encode(answer).tokens}, not one token")
    return tokenizer


def write_tokens(tokenizer: Tokenizer, name: str) -> None:
    """Write NAME.npy: the documents in shuffled order, each with the end-of-text token."""
    documents = [document["text"] for document in read_documents(name)]
    order = np.random.default_rng(0).permutation(len(documents))
    encodings = tokenizer.encode_batch_fast([documents[index] + END for index in order])
    tokens = np.concatenate([np.array(encoding.ids, dtype=np.uint16) for encoding in encodings])
    np.save(CORPUS / f"{name}.npy", tokens)
    rate = sum(map(len, documents)) / len(tokens)
    counts = f"{len(documents):7,} documents {len(tokens):11,} tokens"
    print(f"{name:15} {counts} {rate:.3f} characters per token")


def main() -> None:
    tokenizer = train(training_texts())
    write_text(FOLDER / "tokenizer.json", tokenizer.to_str())
    write_text(FOLDER / "tokenizer_config.json", json.dumps(SETTINGS, indent=2) + "\n")
    print("answers:", {answer: tokenizer.encode(answer).ids for answer in ANSWERS})
    for name in GROUPS + HELD_OUT_GROUPS:
        write_tokens(tokenizer, name)


if __name__ == "__main__":
    main()
