"""The folder of a run: what a run leaves on disk, and which run can be resumed."""

import ast
import contextlib
import glob
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock, Timeout

import distributed
from config import ROOT, InputError
from files import atomic_write, read_json, restore_folder, write_csv, write_json, write_text
from lora import base_sha256
from models.hugging_face import portable_name

PACKAGES = ("torch", "transformers", "numpy", "pandas", "safetensors", "sacrebleu", "pronouncing")
# A run can be resumed if these are the same, and all options except IGNORED_OPTIONS.
COMPARED = (
    "data_sha256",
    "model_sha256",
    "model_files_sha256",
    "processes",
    "device_type",
    "dtype",
)
OUTPUT_OPTIONS = {"out_dir", "sonnet_out", "para_dev_out", "para_test_out", "resume", "use_gpu"}
IGNORED_OPTIONS = OUTPUT_OPTIONS | {"checkpoint_every", "gradient_checkpointing"}
RUN_FILES = ("config.json", "resume", "best", "summary.json", "metrics.csv")
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef
NOT_HASHED = {"experiments.py", "plots.py", "cli.py", "runs.py", "files.py"}
locks = []  # this process holds them until it ends


class Run:
    """A run's folder: runs/<task>/<name>, or --out_dir; --resume continues an unfinished one."""

    def __init__(self, task, name, options, environment):
        """Open and lock the folder and write config.json.

        Raises InputError for a folder that holds another run or that another process is writing.
        """
        self.config = json.loads(json.dumps({"options": options, **environment}))
        parent = ROOT / "runs" / task
        named = options["out_dir"] and Path(options["out_dir"])
        candidates = [named] if named else parent.glob(f"{glob.escape(name)}*")
        unfinished = list(filter(self.can_resume, candidates)) if options["resume"] else []
        if unfinished:
            self.folder = max(unfinished, key=os.path.getmtime)
            lock(self.folder)
            restore_folder(self.best)
            return
        if named and any((named / part).exists() for part in RUN_FILES):
            raise InputError(
                f"{named} already holds a run; name another --out_dir (--resume only continues an "
                "unfinished run with the same options, data, model, precision and processes)"
            )
        self.folder = named or new_folder(parent, name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            advice = "is a file or inside of one; name a folder"
            raise InputError(f"--out_dir {named} {advice}") from None
        lock(self.folder)
        write_json(self.folder / "config.json", self.config)

    def can_resume(self, folder):
        """Whether `folder` has an unfinished run with the same options, data and model."""
        try:
            same = compared(read_json(folder / "config.json")) == compared(self.config)
        except Exception:  # a missing or broken config.json
            return False
        return same and not (folder / "summary.json").exists()

    @property
    def best(self):
        return self.folder / "best"

    @property
    def best_name(self):
        """The path of the best model, relative to the folder of the code if it is inside."""
        return portable_name(self.best, self.best)

    @property
    def state_path(self):
        return self.folder / "resume" / "state.pt"

    def save_state(self, state):
        (self.folder / "config.json").stat()  # fails if the folder was deleted meanwhile
        with atomic_write(self.state_path) as file:
            torch.save(state, file)

    def load_state(self):
        """The saved state, or None; raises InputError if it cannot be read."""
        if not self.state_path.is_file():
            return None
        try:
            return torch.load(self.state_path, weights_only=True, map_location="cpu")
        except Exception as error:  # unpickling a broken file raises almost anything
            problem = f"cannot be read ({type(error).__name__}); delete it to start over"
            raise InputError(f"{self.state_path} {problem}") from error


def new_folder(parent, name):
    """Make parent/name or, if it exists, the first of name-2, name-3, ... that does not."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = parent / (f"{name}-{number}" if number > 1 else name)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def compared(config):
    """The part of a config.json that must agree to resume a run."""
    options = {k: v for k, v in config["options"].items() if k not in IGNORED_OPTIONS}
    return options, [config.get(name) for name in COMPARED]


def lock(folder):
    """Lock a run until this process ends; raises InputError if another process has the lock."""
    run_lock = FileLock(folder.resolve() / ".lock", is_singleton=True)  # can be locked twice
    try:
        locks.append(run_lock.acquire(timeout=0))
    except Timeout:
        raise InputError(f"{folder} is being written by another process; wait for it") from None


def start_run(task, variant, data, paths, model, options, dtype):
    """Open the run's folder in the main process and print what will be trained."""
    device = next(model.parameters()).device
    name = [Path(options.model_size).name, *variant, options.method, f"seed{options.seed}"]
    settings = environment(device, dtype, paths) | {"model_sha256": base_sha256(model)}
    files = ["config.json", *model.gpt.copied_files]
    settings["model_files_sha256"] = {f: file_sha256(model.gpt.folder / f) for f in files}
    run = distributed.from_main_process(lambda: Run(task, "-".join(name), vars(options), settings))
    method = "full fine-tuning"
    if options.use_lora:
        method = f"LoRA rank {options.lora_rank} on {', '.join(options.lora_targets)}"
    run.title = ", ".join([options.model_size, *variant, method])
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    run.counts = {"trainable_parameters": trainable, "total_parameters": total}
    print(
        f"{task}, {data}: {run.title}\n"
        f"{trainable:,} of {total:,} parameters are trained with learning rate {options.lr:g}\n"
        f"precision {settings['dtype']} on {settings['device']}"
    )
    if options.resume:
        verb = "continues" if run.state_path.exists() else "found no saved state and starts"
        print(f"--resume {verb} {run.folder}")
    return run


def finish_run(run, task, options, progress, metrics, outputs, texts, code, base_loss=None):
    """Write predictions, plots, the model card and, last, summary.json: the run is complete.

    `outputs` maps names in predictions/ to the path of a copy and the text; `texts` maps a split
    to the results of its texts, a frame with their ids as its index. `code` is for the card.
    """
    per_text = pd.concat(texts, names=["split", "id"]).reset_index()
    write_csv(run.folder / "per_text.csv", per_text)
    for name, (path, text) in outputs.items():
        write_text(Path(path), text)
        write_text(run.folder / "predictions" / name, text)
    summary = {"task": task, "model": options.model_size, "method": options.method}
    summary |= {"seed": options.seed} | run.counts | summarize(progress) | metrics
    if progress.epochs:
        from plots import draw_curves  # matplotlib is slow to import

        draw_curves(run.folder, run.title, base_loss)
        write_text(run.best / "README.md", model_card(run, summary, code))
    write_json(run.folder / "summary.json", summary)
    paths = ", ".join(path for path, _ in outputs.values())
    print(f"\n{metrics_table(metrics)}\n\npredictions: {paths}")
    print(f"metrics, plots and best model: {run.folder}")


def metrics_table(metrics):
    """One row per metric and one column per split, base model and baseline, for the screen."""
    table = {}
    for name, value in metrics.items():
        if match := re.fullmatch("(.*(?:dev|test))_(.*)", name):
            shown = f"{value:.3f}" if isinstance(value, float) else str(value)
            column = match[1].replace("gold", "Shakespeare's").replace("random", "random_lines")
            table.setdefault(column.replace("_", " "), {})[match[2]] = shown
    return pd.DataFrame(table).to_string(na_rep="")


def summarize(progress):
    """The training part of summary.json; times are of training without evaluation."""
    epochs = progress.epochs
    if not epochs:
        return {"epochs": 0, "best_epoch": 0, "peak_memory_gb": None}
    seconds = sum(record["seconds"] for record in epochs)
    tokens = sum(record["tokens_per_second"] * record["seconds"] for record in epochs)
    return {
        "epochs": len(epochs),
        "best_epoch": progress.best_epoch,
        "peak_memory_gb": max(record["peak_memory_gb"] or 0 for record in epochs) or None,
        "first_train_loss": epochs[0]["train_loss"],
        "final_train_loss": epochs[-1]["train_loss"],
        "best_dev_loss": epochs[progress.best_epoch - 1]["dev_loss"],
        "train_seconds": round(seconds, 3),
        "seconds_per_epoch": round(seconds / len(epochs), 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "skipped_steps": sum(record["skipped_steps"] for record in epochs),
    }


def model_card(run, summary, code):
    """The README.md of a best model: `code` that uses it, its options and its metrics."""
    options = run.config["options"]
    library, loader = "transformers", "AutoModelForCausalLM"
    if options["use_lora"]:
        library, loader = "peft", "AutoPeftModelForCausalLM"
    names = ("epochs", "lr", "batch_size", "grad_accumulation", "schedule", "seed")
    settings = ", ".join(f"{name} {options[name]}" for name in names)
    metrics = pd.Series(summary, dtype=object, name="value").rename_axis("metric")
    table = metrics.filter(regex="^(trainable|best_epoch|base|dev|test)").to_markdown()
    return (
        f"---\nlibrary_name: {library}\n---\n\n# {run.title}\n\n"
        f"The epoch with the best dev metric. Options: {settings}.\n\n"
        f"In the folder of the code:\n\n```python\n{code}\n```\n\n"
        f"`{library}.{loader}.from_pretrained` loads the language model, too.\n\n{table}\n"
    )


def environment(device, dtype, paths):
    """What a result depends on besides the options."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        "packages": {package: importlib.metadata.version(package) for package in PACKAGES},
        "commit": commit(),
        "code_sha256": code_sha256(),
        "device_type": device.type,
        "device": gpu or platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "dtype": str(dtype).removeprefix("torch."),
        "data_sha256": {str(path): file_sha256(path) for path in paths},
    }


def file_sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def commit():
    """The commit, with a + if tracked code was edited; None without git."""
    if not shutil.which("git"):
        return None
    outputs = []
    for command in ("git rev-parse --verify HEAD", "git diff --name-only HEAD -- *.py"):
        result = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True)
        outputs.append(result.stdout.strip())
    name, edited = outputs
    return f"{name}+" if edited else name or None


def code_sha256():
    """SHA-256 of the code that decides a result, without comments, docstrings and layout."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("mod*/*.py")]):
        if path.name in NOT_HASHED:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node):
                del node.body[0]
        digest.update(f"{path.relative_to(ROOT)}\n{ast.unparse(tree)}\n".encode())
    return digest.hexdigest()


def peak_memory_gb(device):
    """Peak memory in GB: allocated on CUDA, else of this process; None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in kilobytes, on macOS in bytes
    return round(peak / 1e9 * (1 if platform.system() == "Darwin" else 1024), 3)
