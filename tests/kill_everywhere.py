"""Kill a run at every write, fsync, rename and removal, and resume it: it must be the same run.

python tests/kill_everywhere.py                                   # about 1,000 kills, many minutes
python tests/kill_everywhere.py --every 97 --first 20 --random 1  # what the tests do

The parent has imported everything and forks a child per run, so that a run takes less than a
second. Needs POSIX.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

if __name__ == "__main__":  # before torch is imported
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
import torch
import torch._dynamo  # (imported before the forks, not in each)
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import adapters
import files
import models.hugging_face as hugging_face
import models.paraphrase_gpt as paraphrase_gpt
import paraphrase_detection
import plots
import runs
import sonnet_generation
from cli import exit_cleanly

VERSE = "From fairest creatures we desire increase,\nThat thereby beauty's rose might never die,\n"
TIMED = ["seconds", "tokens_per_second", "peak_memory_gb", "train_seconds", "seconds_per_epoch"]
SCRIPTS = {"sonnets": sonnet_generation, "paraphrases": paraphrase_detection}
KINDS = [f"{task}-{method}" for task in SCRIPTS for method in ("full", "lora")]


def make_model(path, width=16):
    """A Hugging Face folder of one random layer, with dropout, and a tokenizer of single bytes."""
    path.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=299, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([VERSE], trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    shape = {"n_layer": 1, "n_embd": width, "n_head": 2, "vocab_size": 300, "n_positions": 256}
    config = transformers.GPT2Config(**shape, bos_token_id=end, eos_token_id=end)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


def make_data(root):
    """Six sonnets and eight pairs, read as train, dev and test."""
    lines = "From fairest\ncreatures\nwe {0}\ndesire"
    sonnets = "".join(f"\n{number}\n\n{lines.format(number)}\n" for number in range(1, 7))
    (root / "sonnets.txt").write_text(sonnets, encoding="utf-8")
    pairs = [
        f"p{index}\tthy brow {index}\t{'thy' if index % 2 else 'z'} {index}\t{index % 2}\n"
        for index in range(8)
    ]
    header = "id\tsentence1\tsentence2\tis_duplicate\n"
    (root / "pairs.csv").write_text(header + "".join(pairs), encoding="utf-8")


def options(root, kind, out, *more):
    """The options of a run of two epochs of three or four steps, also saved every two steps."""
    task, method = kind.split("-")
    if task == "sonnets":
        names = ("sonnet_path", "dev_sonnet_path", "held_out_sonnet_path")
        given = [f"--{name}={root / 'sonnets.txt'}" for name in names]
        given += [f"--sonnet_out={out}.txt", "--max_new_tokens=4"]
    else:
        given = [f"--para_{split}={root / 'pairs.csv'}" for split in ("train", "dev", "test")]
        given += [f"--para_{split}_out={out}-{split}.csv" for split in ("dev", "test")]
        given += ["--pooling=generalized", "--pair_encoding=joint"]
    if method == "lora":
        given.append("--use_lora")
    given += ["--epochs=2", "--batch_size=2", "--lr=0.01", "--checkpoint_every=2"]
    given += ["--device=cpu", "--dtype=float32", f"--model_size={root / 'model'}"]
    return [*given, f"--out_dir={out}", *more]


class Faults:
    """Counts the instants at which a run's files change, and calls `event` at one of them."""

    def __init__(self, root, at, event):
        self.root, self.at, self.event = str(root), at, event
        self.names = []

    def point(self, name):
        self.names.append(name)
        if len(self.names) == self.at:
            self.event()

    def install(self):
        """Only in a forked child: nothing is restored."""

        def audit(name, arguments):  # called before the operation
            path = str(arguments[0]) if arguments else ""
            changes = ("os.mkdir", "os.remove", "os.rmdir", "shutil.copyfile")
            if name in changes and path.startswith(self.root):
                self.point(f"{name} {path}")

        sys.addaudithook(audit)
        for module, name in ((os, "replace"), (os, "fsync"), (torch, "save")):
            setattr(module, name, self.around(name, getattr(module, name)))
        for module in (hugging_face, adapters, paraphrase_gpt):
            module.save_file = self.halved(
                "save_file", module.save_file, lambda _, path, **__: path
            )
        write_text = self.halved("write_text", Path.write_text, lambda path, *_, **__: path)
        pathlib.Path.write_text = write_text
        files.open = runs.open = self.open

    def around(self, name, call):
        def wrapped(*arguments, **settings):
            self.point(f"before {name}")
            result = call(*arguments, **settings)
            self.point(f"after {name}")
            return result

        return wrapped

    def halved(self, name, call, path_of):
        """Points before, after, and in the middle, where half of the file is there."""

        def wrapped(*arguments, **settings):
            self.point(f"before {name}")
            result = call(*arguments, **settings)
            path = Path(path_of(*arguments, **settings))
            content = path.read_bytes()
            os.truncate(path, len(content) // 2)
            self.point(f"in {name}")
            path.write_bytes(content)
            self.point(f"after {name}")
            return result

        return wrapped

    def open(self, path, mode="r", **settings):
        """The builtin, with points around opening to write and in the middle of each write."""
        if mode[0] not in "wa":
            return open(path, mode, **settings)
        self.point(f"before open {path}")
        point = self.point

        class Raw(io.FileIO):
            def write(self, data):
                data = bytes(data)
                half = super().write(data[: len(data) // 2])
                point(f"in write {path}")
                return half + super().write(data[len(data) // 2 :])

        file = io.BufferedWriter(Raw(path, mode[0] + "b"))
        self.point(f"after open {path}")
        return file if "b" in mode else io.TextIOWrapper(file, **settings)


def draw(path, *_):
    """Replaces the plots, which take longer than all the rest."""
    path = path / "curves.png" if path.is_dir() else path
    files.write_text(path, "drawn")


def fork(root, arguments, kind, at, event, log):
    """Start a process that runs the command, with a fault at the `at`th point; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        with open(log, "w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        faults = Faults(root, at, event)
        faults.install()
        plots.draw_curves = plots.draw_attention = draw
        script = SCRIPTS[kind.split("-")[0]]
        try:
            with exit_cleanly():
                script.main(script.parse_options(arguments))
            code = 0
        except SystemExit as stop:
            code = stop.code
        if at is None:
            Path(f"{log}.points").write_bytes("\n".join(faults.names).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait_for(pid):
    """The exit code of a process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def untimed(path):
    """metrics.csv without the columns that are times or memory."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    return table.drop(columns=TIMED, errors="ignore").to_dict("records")


def outcome(out):
    """All files of a run except its lock, its resume state and its times.

    config.json is left out as well, because it names the folder.
    """
    contents = {}
    for path in sorted([*out.rglob("*"), *out.parent.glob(f"{out.name}[.-]*")]):
        name = str(path.relative_to(out.parent)).removeprefix(out.name)
        if path.is_file() and name not in ("/config.json", "/resume/state.pt", "/.lock"):
            contents[name] = path.read_bytes()
    contents["/metrics.csv"] = untimed(out / "metrics.csv")
    summary = json.loads(contents["/summary.json"])
    contents["/summary.json"] = {k: v for k, v in summary.items() if k not in TIMED}
    card = contents["/best/README.md"].decode()
    contents["/best/README.md"] = card.replace(str(out), "RUN")
    return contents


class Bench:
    """A model, data and runs in one folder."""

    def __init__(self, root):
        torch.set_num_threads(1)
        self.root = root
        make_model(root / "model")
        make_data(root)

    def run(self, kind, name, *more, at=None, event=kill, wait=True):
        """A run's exit code or, without `wait`, the id of its process."""
        (self.root / name).mkdir(exist_ok=True)
        out = self.root / name / "run"
        arguments = options(self.root, kind, out, *more)
        pid = fork(self.root, arguments, kind, at, event, self.root / f"{name}.log")
        return wait_for(pid) if wait else pid

    def log(self, name):
        return (self.root / f"{name}.log").read_text(encoding="utf-8")

    def whole(self, kind):
        """The outcome of the uninterrupted run, its points, and its seconds."""
        started = time.perf_counter()
        assert self.run(kind, f"{kind}-whole") == 0, self.log(f"{kind}-whole")
        seconds = time.perf_counter() - started
        points = (self.root / f"{kind}-whole.log.points").read_text(encoding="utf-8").split("\n")
        return outcome(self.root / f"{kind}-whole" / "run"), points, seconds

    def resumed(self, kind, name):
        """The outcome once --resume has completed a killed run; a finished one stays as it is."""
        out = self.root / name / "run"
        if not (out / "summary.json").exists():
            code = self.run(kind, name, "--resume")
            assert code == 0, f"{kind} {name}: exit code {code}: {self.log(name)}"
        contents = outcome(out)
        shutil.rmtree(out.parent)
        return contents


def differences(one, other):
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def kill_everywhere(bench, kind, every, first, instants, seed):
    """Kill at each `every`th point and at random instants, and resume; returns the counts."""
    whole, points, seconds = bench.whole(kind)
    counts = {"kind": kind, "points": len(points), "seconds": round(seconds, 2)}
    counts |= {"kills": 0, "equal": 0, "random": 0, "random_equal": 0, "unequal": []}

    def count(kills, equal, place):
        wrong = differences(bench.resumed(kind, "cut"), whole)
        counts[kills] += 1
        counts[equal] += not wrong
        if wrong:
            counts["unequal"].append([place, wrong])

    for at in range(first, len(points) + 1, every):
        code = bench.run(kind, "cut", at=at)
        assert code == -signal.SIGKILL, (at, points[at - 1], code, bench.log("cut"))
        count("kills", "equal", points[at - 1])
    generator = random.Random(seed)
    while counts["random"] < instants:
        pid = bench.run(kind, "cut", wait=False)
        time.sleep(generator.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        if wait_for(pid) != -signal.SIGKILL:  # it had ended
            shutil.rmtree(bench.root / "cut")
            seconds *= 0.9  # the machine is less busy than when the whole run was timed
            continue
        count("random", "random_equal", "a random instant")
    return counts


def limit_files(size):
    """An event: from now on no file can grow beyond `size`, as on a full disk."""

    def event():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )

    return event


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--every", type=int, default=1, help="kill at each n-th point only")
    add("--first", type=int, default=1, help="the first of these points")
    add("--random", type=int, default=40, help="also kill at this many random instants per kind")
    add("--seed", type=int, default=0)
    add("--only", choices=KINDS, nargs="+", default=KINDS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(Path(root).resolve())
        for kind in given.only:
            counts = kill_everywhere(
                bench, kind, given.every, given.first, given.random, given.seed
            )
            print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main()
