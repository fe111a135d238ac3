"""Kill a run at every write, fsync, rename and removal, and at random instants; resumed, it must be the same run.

python tests/kill_everywhere.py                     # all of both tasks, full and LoRA: some 1,000 kills, many minutes
python tests/kill_everywhere.py --every 53 --first 20 --random 1     # what the tests do

A process that has imported everything forks a child a run, so that a run takes part of a second. Needs POSIX.
"""

import argparse
import contextlib
import csv
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

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sacrebleu.metrics  # noqa: F401 (as torch._dynamo: imported before the forks, not in each)
import torch
import torch._dynamo
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import figures
import lora
import models.gpt2 as gpt2
import models.paraphrase_gpt as paraphrase_gpt
import paraphrase_detection
import runs
import sonnet_generation
from config import GPT2Config, exit_cleanly

VERSE = "From fairest creatures we desire increase,\nThat thereby beauty's rose might never die,\n"
TIMED = {"seconds", "tokens_per_second", "peak_memory_gb", "train_seconds", "seconds_per_epoch"}
SCRIPTS = {"sonnets": sonnet_generation, "paraphrases": paraphrase_detection}
KINDS = [f"{task}-{method}" for task in SCRIPTS for method in ("full", "lora")]


def make_model(path: Path, width: int = 16) -> Path:
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
    torch.manual_seed(0)
    model = gpt2.GPT2Model(GPT2Config(layers=1, width=width, heads=2, vocab_size=300, positions=256))
    model.initialise()
    model.folder = path
    model.save_pretrained(path)
    return path


def make_data(root: Path) -> None:
    """Six sonnets and eight pairs, read as train, dev and test."""
    sonnets = "".join(f"\n{number}\n\nFrom fairest\ncreatures\nwe {number}\ndesire\n" for number in range(1, 7))
    (root / "sonnets.txt").write_text(sonnets, encoding="utf-8")
    rows = "".join(f"p{row}\tthy brow {row}\t{'thy' if row % 2 else 'z'} {row}\t{row % 2}\n" for row in range(8))
    (root / "pairs.csv").write_text("id\tsentence1\tsentence2\tis_duplicate\n" + rows, encoding="utf-8")


def options(root: Path, kind: str, out: Path, *more: str) -> list[str]:
    """The options of a run of two epochs of three or four steps, saved every two steps besides."""
    task, method = kind.split("-")
    if task == "sonnets":
        files = [f"--{name}={root / 'sonnets.txt'}"
                 for name in ("sonnet_path", "dev_sonnet_path", "held_out_sonnet_path")]  # fmt: skip
        files += [f"--sonnet_out={out}.txt", "--max_new_tokens=4"]
    else:
        files = [f"--para_{split}={root / 'pairs.csv'}" for split in ("train", "dev", "test")]
        files += [f"--para_{split}_out={out}-{split}.csv" for split in ("dev", "test")] + ["--pooling=generalized"]
    settings = ["--epochs=2", "--batch_size=2", "--lr=0.01", "--checkpoint_every=2", "--device=cpu", "--dtype=float32"]
    return [*files, *settings, *["--use_lora"] * (method == "lora"), f"--model_size={root / 'model'}",
            f"--out_dir={out}", *more]  # fmt: skip


class Faults:
    """Counts the instants at which a run's files change, and does something at one of them."""

    def __init__(self, root: Path, at: int | None, event):
        self.root, self.at, self.event, self.count, self.names = str(root), at, event, 0, []

    def point(self, name: str) -> None:
        self.names.append(name)
        self.count += 1
        if self.count == self.at:
            self.event()

    def install(self) -> None:
        """Only in a forked child: nothing is ever put back."""

        def audit(name, arguments):
            # fires before the call
            path = str(arguments[0]) if arguments else ""
            if name in ("os.mkdir", "os.remove", "os.rmdir", "shutil.copyfile") and path.startswith(self.root):
                self.point(f"{name} {path}")

        sys.addaudithook(audit)
        for module, name in ((os, "replace"), (os, "fsync"), (runs.torch, "save")):
            setattr(module, name, self.around(name, getattr(module, name)))
        for module in (gpt2, lora, paraphrase_gpt):
            module.save_file = self.halved("save_file", module.save_file, lambda tensors, path, **_: path)
        pathlib.Path.write_text = self.halved("write_text", pathlib.Path.write_text, lambda path, *_, **__: path)
        runs.open = self.open

    def around(self, name, call):
        def wrapped(*arguments, **settings):
            self.point(f"before {name}")
            result = call(*arguments, **settings)
            self.point(f"after {name}")
            return result

        return wrapped

    def halved(self, name, call, path_of):
        """Before, in the middle, where half of the file is there, and after."""

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
        """The builtin, with a point before opening to write and in the middle of each write that the system gets."""
        if "w" not in mode:
            return open(path, mode, **settings)
        self.point(f"before open {path}")
        faults = self

        class Raw(io.FileIO):
            def write(self, data):
                data = bytes(data)
                half = super().write(data[: len(data) // 2])
                faults.point(f"in write {path}")
                return half + super().write(data[len(data) // 2 :])

        return io.BufferedWriter(Raw(path, "wb"))


def drawn(path: Path, *_) -> None:
    """In place of the figures, which take longer than all the rest."""
    runs.write_bytes(path, b"drawn")


def child(root: Path, arguments: list[str], kind: str, at: int | None, event, log: Path) -> int:
    """Fork a process that runs the command, with a fault at the `at`th point; returns its id."""
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
        figures.draw_curves = figures.draw_attention = drawn
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
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def finish(pid: int) -> int:
    """Wait; returns the exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def left_behind(out: Path) -> dict:
    """Everything of a run but its times, its configuration (which names its folder) and the resume state."""
    files = {}
    for path in sorted([*out.rglob("*"), *out.parent.glob(f"{out.name}[.-]*")]):
        name = str(path.relative_to(out.parent)).removeprefix(out.name)
        if path.is_file() and name not in ("/config.json", "/resume/state.pt"):
            files[name] = path.read_bytes()
    with open(out / "metrics.csv", newline="", encoding="utf-8") as file:
        files["/metrics.csv"] = [{k: v for k, v in row.items() if k not in TIMED} for row in csv.DictReader(file)]
    figures = json.loads(files["/summary.json"])
    files["/summary.json"] = {name: value for name, value in figures.items() if name not in TIMED}
    return files


class Bench:
    """A model, data and the uninterrupted runs, in a folder that goes with it."""

    def __init__(self, root: Path):
        torch.set_num_threads(1)
        self.root = root
        make_model(root / "model")
        make_data(root)

    def run(self, kind: str, name: str, *more: str, at=None, event=kill, wait=True) -> int:
        """A run's exit code, or the child's id."""
        (self.root / name).mkdir(exist_ok=True)
        out = self.root / name / "run"
        arguments = options(self.root, kind, out, *more)
        pid = child(self.root, arguments, kind, at, event, self.root / f"{name}.log")
        return finish(pid) if wait else pid

    def log(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text(encoding="utf-8")

    def whole(self, kind: str) -> tuple[dict, list[str], float]:
        """What the uninterrupted run leaves, its points, and its seconds."""
        start = time.perf_counter()
        assert self.run(kind, f"{kind}-whole") == 0, self.log(f"{kind}-whole")
        seconds = time.perf_counter() - start
        points = (self.root / f"{kind}-whole.log.points").read_text(encoding="utf-8").split("\n")
        return left_behind(self.root / f"{kind}-whole" / "run"), points, seconds

    def resumed(self, kind: str, name: str) -> dict:
        """What is left once --resume has ended the run that was killed; a finished one is as it is."""
        out = self.root / name / "run"
        if not (out / "summary.json").exists():
            code = self.run(kind, name, "--resume")
            assert code == 0, f"{kind} {name}: exit code {code}: {self.log(name)}"
        files = left_behind(out)
        shutil.rmtree(out.parent)
        return files


def differences(one: dict, other: dict) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def kill_everywhere(bench: Bench, kind: str, every: int, first: int, instants: int, seed: int) -> dict:
    """Kill at each `every`th point and at random instants, and resume; returns what was counted."""
    whole, points, seconds = bench.whole(kind)
    found = {"kind": kind, "points": len(points), "seconds": round(seconds, 2), "kills": 0, "equal": 0, "random": 0,
             "random_equal": 0, "unequal": []}  # fmt: skip
    for at in range(first, len(points) + 1, every):
        code = bench.run(kind, "cut", at=at)
        assert code == -signal.SIGKILL, (at, points[at - 1], code, bench.log("cut"))
        wrong = differences(bench.resumed(kind, "cut"), whole)
        found["kills"] += 1
        found["equal"] += not wrong
        found["unequal"] += [[points[at - 1], wrong]] * bool(wrong)
    generator = random.Random(seed)
    while found["random"] < instants:
        pid = bench.run(kind, "cut", wait=False)
        time.sleep(generator.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        if finish(pid) != -signal.SIGKILL:  # it had ended
            shutil.rmtree(bench.root / "cut")
            seconds *= 0.9  # the machine is less busy than when the whole run was timed
            continue
        wrong = differences(bench.resumed(kind, "cut"), whole)
        found["random"] += 1
        found["random_equal"] += not wrong
        found["unequal"] += [["a random instant", wrong]] * bool(wrong)
    return found


def limit_files(size: int):
    """An event: from now on no file can grow beyond `size`, as on a disk that is full."""

    def event():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    return event


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="kill at each n-th point only")
    parser.add_argument("--first", type=int, default=1, help="and begin with this one")
    parser.add_argument("--random", type=int, default=40, help="random instants besides, for each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(Path(root).resolve())
        for kind in given.only:
            print(json.dumps(kill_everywhere(bench, kind, given.every, given.first, given.random, given.seed)),
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
