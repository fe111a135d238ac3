"""Generated inputs: tables are read exactly, and bad files and options raise only InputError.

HYPOTHESIS_EXAMPLES=1500 pytest tests/test_properties.py  # thorough
"""

import contextlib
import csv
import io
import json
import os
import re

import pytest
from helpers import randomise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import paraphrase_detection
import sonnet_generation
from adapters import load_adapter, save_adapter
from cli import from_options
from config import InputError, LoRAConfig, SamplingConfig, TrainConfig
from datasets import continuation, read_pairs, read_sonnets, sonnet_prompt, verse_lines
from lora import apply_lora
from models.gpt2 import GPT2Model
from models.hugging_face import read_config
from models.paraphrase_gpt import ParaphraseGPT

SCRIPTS = {"sonnets": sonnet_generation, "paraphrases": paraphrase_detection}
EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "60"))
generated = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@contextlib.contextmanager
def only_input_errors(name=""):
    """Allow InputError with `name` in its message, and the exit of --help."""
    try:
        yield
    except InputError as error:
        if not str(error) or name not in str(error):
            raise AssertionError(f"{error} does not name {name}") from error
    except SystemExit as stop:
        if stop.code:
            raise AssertionError("exit without an InputError") from stop


COLUMNS = ["id", "sentence1", "sentence2", "is_duplicate"]
PIECES = [
    *("id", "text", *COLUMNS, "\t", ",", "\n", "\r\n", "\r", '"', '""', "0", "1", "1.0", "nan"),
    *("yes", "\0", "\ufeff", " ", "a", "é", "😀", "の", "\u2028", "\x85", "id,text\n"),
    "\t".join(COLUMNS) + "\n",
]
TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=30).map("".join)
ENCODING = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
CONTENT = st.binary(max_size=200) | st.builds(
    lambda text, encoding: text.encode(encoding, "surrogatepass"), TEXT, ENCODING
)


@pytest.mark.parametrize("name", ["file.csv", "file.txt"])
@generated
@given(content=CONTENT)
def test_any_file_of_sonnets(tmp_path, name, content):
    """Whatever a file contains, its sonnets have lines, or it is rejected."""
    path = tmp_path / name
    path.write_bytes(content)
    with only_input_errors(name):
        sonnets = read_sonnets(path)
        assert len(sonnets)
        for text in sonnets["text"]:
            assert sonnet_prompt(text).strip()
            assert len(verse_lines(text)) >= len(continuation(text).splitlines())


@generated
@given(content=CONTENT)
def test_any_file_of_pairs(tmp_path, content):
    """Whatever a file contains, its pairs have ids and valid labels, or it is rejected."""
    path = tmp_path / "pairs.csv"
    path.write_bytes(content)
    with only_input_errors("pairs.csv"):
        pairs = read_pairs(path)
        assert pairs["id"].is_unique
        assert pairs["id"].str.strip().ne("").all()
        assert pairs["label"].dropna().isin([0, 1]).all()


# Characters that some reader treats specially, and texts that it reads as missing or as numbers.
SPECIAL = ['"', '""', " ", ",", "'", "\\", "#", "\x0b", "\x0c", "\x1a", "\x1c", "\x85", "\u2028"]
WORDS_OF_TABLES = ["a", "b c", "NA", "nan", "1.0", "é", "😀", "\ufeff", *SPECIAL]
CHARACTERS = st.characters(exclude_characters="\t\r\n\0", exclude_categories=["Cs"])
LINE = st.lists(
    st.sampled_from(['"', *WORDS_OF_TABLES]) | st.text(CHARACTERS, max_size=3), max_size=6
).map("".join)
LINES = st.lists(LINE, min_size=1, max_size=3).map("\n".join)
TAB_LINE = st.lists(LINE, min_size=1, max_size=3).map("\t".join)
QUOTED = re.compile(r'"(?:[^"]|"")*"')
TWICE_QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')


def table_of(texts):
    """Tables as lists of fields: unique ids, two texts, and a label or none."""
    record = st.tuples(texts, texts, st.sampled_from(["0", "1", "1.0", ""]))
    records = st.lists(record, max_size=6)
    return records.map(lambda rows: [[f"p{n}", *row] for n, row in enumerate(rows)])


def unquote(field):
    return field[1:-1].replace('""', '"')


def read(path):
    """The pairs of a file as lists of fields; a label is 0, 1 or None."""
    pairs = read_pairs(path)
    labels = [None if label != label else label for label in pairs["label"]]
    columns = [pairs[name] for name in COLUMNS[:3]]
    return [list(record) for record in zip(*columns, labels, strict=True)]


def expected(records):
    """What is read for these fields: texts that are still quoted with quotes are unquoted."""
    return [
        [
            name,
            *(unquote(text) if TWICE_QUOTED.fullmatch(text) else text for text in texts),
            float(label) if label else None,
        ]
        for name, *texts, label in records
    ]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL], ids=["minimal", "all"])
@generated
@given(
    records=table_of(LINES) | table_of(TAB_LINE), encoding=st.sampled_from(["utf-8", "utf-8-sig"])
)
def test_csv_tables_are_exact(tmp_path, quoting, records, encoding):
    """What csv writes is read back, also with line breaks; only texts with tabs are rejected."""
    path = tmp_path / "pairs.csv"
    with open(path, "w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n", quoting=quoting)
        writer.writerows([COLUMNS, *records])
    if any("\t" in field for record in records for field in record):
        with pytest.raises(InputError, match=r"pairs\.csv, line \d"):
            read(path)
    else:
        assert read(path) == expected(records)


@generated
@given(records=table_of(LINE), data=st.data())
def test_plain_tables_are_exact(tmp_path, records, data):
    """Without quoting every line is a pair, whatever its quotes, line ends and blank lines.

    Quotes are quoting only if every field that contains one is quoted completely.
    """
    ends = st.lists(st.sampled_from(["\n", "\r\n", "\r"]), min_size=1, max_size=2).map("".join)
    lines = ["\t".join(record) + data.draw(ends) for record in [COLUMNS, *records]]
    path = tmp_path / "pairs.csv"
    path.write_bytes("".join(lines).encode())
    fields = [field for record in records for field in record if '"' in field]
    if all(QUOTED.fullmatch(field) for field in fields):
        records = [[unquote(f) if '"' in f else f for f in record] for record in records]
    assert read(path) == expected(records)


@generated
@given(records=table_of(LINES | TAB_LINE), data=st.data())
def test_damaged_tables_lose_no_character(tmp_path, records, data):
    """A file with stray quotes, tabs and line breaks is read completely, or it is rejected."""
    body = "\n".join("\t".join(record) for record in records)
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(body)))
        body = body[:place] + data.draw(st.sampled_from(['"', "\n", "\t", '"\t"'])) + body[place:]
    path = tmp_path / "pairs.csv"
    path.write_bytes(("\t".join(COLUMNS) + "\n" + body).encode())

    def characters(text):
        return re.sub(r'["\s]', "", text.replace("1.0", "1"))

    with only_input_errors("pairs.csv"):
        fields = ["" if f is None else str(f).replace(".0", "") for row in read(path) for f in row]
        assert characters("".join(fields)) == characters(body)


VERSE_LINE = LINE.map(str.rstrip).filter(lambda line: line and not re.fullmatch(r"\s*\d+", line))
VERSES = st.lists(
    st.lists(VERSE_LINE, min_size=1, max_size=4).map("\n".join), min_size=1, max_size=4
)


@pytest.mark.parametrize("name", ["sonnets.csv", "sonnets.txt"])
@generated
@given(texts=VERSES, end=st.sampled_from(["\n", "\r\n", "\r"]))
def test_sonnets_are_exact(tmp_path, name, texts, end):
    """Both formats are read back with any line ends."""
    file = io.StringIO(newline="")
    if name.endswith(".csv"):
        csv.writer(file, lineterminator="\n").writerows([["id", "text"], *enumerate(texts, 1)])
    else:
        file.write("".join(f"{number}\n\n{text}\n\n" for number, text in enumerate(texts, 1)))
    path = tmp_path / name
    path.write_bytes(file.getvalue().replace("\n", end).encode())
    sonnets = read_sonnets(path)
    assert sonnets["id"].tolist() == list(range(1, len(texts) + 1))
    assert sonnets["text"].tolist() == texts


NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**40, 1e-320, 1e308])
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)

WORDS = (
    st.sampled_from(
        [
            "nan",
            "inf",
            "-1",
            "0",
            "1e400",
            "",
            "tiny",
            "report",
            "q_proj",
            "all",
            "joint",
            "--",
            "-",
        ]
    )
    | NUMBERS.map(str)
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
)
FLAGS = ["use_lora", "use_gpu", "resume", "generate_only", "predict_only"]
OPTIONS = [
    *("epochs", "lr", "batch_size", "seed", "schedule", "warmup", "max_grad_norm", "weight_decay"),
    *("patience", "checkpoint_every", "dtype", "device", "lora_rank", "lora_alpha", "lora_dropout"),
    *("lora_targets", "preset", "out_dir", "model_size", "temperature", "top_p", "top_k"),
    *("max_new_tokens", "adapter", "model", "sonnet_path", "sonnet_out", "pooling"),
    *("pair_encoding", "dataset", "para_train", "para_dev", "para_test", "para_dev_out"),
    *("para_test_out", "attention_penalty", "held_out_sonnet_path", *FLAGS),
]
ARGUMENT = st.sampled_from(OPTIONS).flatmap(
    lambda name: (
        st.just([f"--{name}"]) if name in FLAGS else WORDS.map(lambda word: [f"--{name}", word])
    )
)
ARGUMENTS = st.lists(
    ARGUMENT | ARGUMENT | ARGUMENT | WORDS.map(lambda word: [word]), max_size=4
).map(lambda parts: [word for part in parts for word in part])


@pytest.mark.parametrize("task", SCRIPTS)
@generated
@given(arguments=ARGUMENTS)
def test_options(tmp_path, monkeypatch, task, arguments):
    """Options and the settings made from them are valid or an InputError."""
    monkeypatch.chdir(tmp_path)
    with only_input_errors():
        options = SCRIPTS[task].parse_options(arguments)
        from_options(TrainConfig, options)
        from_options(LoRAConfig, options, prefix="lora_")
        if task == "sonnets":
            from_options(SamplingConfig, options)


def changed(settings):
    """The JSON of an object with some values replaced, or of anything at all."""
    values = st.dictionaries(st.sampled_from(sorted(settings)), JSON, max_size=3)
    some = values.map(lambda new: settings | new)
    broken = ["", "{", "[" * 100_000, '{"a":' * 100_000, "NaN", "1e999", "\ufeff{}"]
    return (some | some | JSON).map(json.dumps) | st.sampled_from(broken)


CONFIG = {
    "model_type": "gpt2",
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "n_positions": 256,
    "vocab_size": 300,
    "activation_function": "gelu_new",
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "n_inner": None,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "eos_token_id": 299,
}


@generated
@given(text=changed(CONFIG))
def test_configurations_of_models(tmp_path, text):
    """config.json is read, or the error names it."""
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with only_input_errors("config.json"):
        config, _ = read_config(tmp_path)
        assert config.feed_forward_width > 0


@pytest.fixture(scope="module")
def base(folder):
    """The folders of a model, of its adapter and of its ParaphraseGPT."""
    adapter = apply_lora(GPT2Model.from_pretrained(folder), LoRAConfig(rank=2))
    save_adapter(randomise(adapter), folder / "adapter")
    model = ParaphraseGPT(GPT2Model.from_pretrained(folder), "multihead")
    model.save_pretrained(folder / "paraphrases")
    return folder


ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 16.0,
    "lora_dropout": 0.05,
    "bias": "none",
    "target_modules": [],
    "rank_pattern": {},
    "alpha_pattern": {},
    "init_lora_weights": True,
    "use_dora": False,
}
NOTE = {"targets": ["q_proj", "v_proj", "interm_dense"], "base_sha256": "0"}


@generated
@given(text=changed(ADAPTER), note=changed(NOTE) | st.none())
def test_adapters(base, tmp_path, text, note):
    """adapter_config.json and the metadata of the weights are read, or an InputError."""
    (tmp_path / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    metadata = None if note is None else {"adapter": note.encode("utf-8", "replace").decode()}
    tensors = load_file(base / "adapter" / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata=metadata)
    with only_input_errors():
        load_adapter(GPT2Model.from_pretrained(base), tmp_path)


HEAD = {"pooling": "multihead", "pair_encoding": "joint", "heads": 5, "parameter_penalty": 0.01}


@generated
@given(text=changed(HEAD))
def test_heads(base, text):
    """The settings in the metadata of head.safetensors are used, or an InputError."""
    path = base / "paraphrases" / "head.safetensors"
    metadata = {"settings": text.encode("utf-8", "replace").decode()}
    save_file(load_file(path), path, metadata=metadata)
    with only_input_errors():
        ParaphraseGPT.from_pretrained(path.parent)
