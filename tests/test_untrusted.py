"""Files from strangers: a pickle in each place that a run reads is refused, and runs nothing."""

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kill_everywhere import SCRIPTS, make_data, make_model, options

from config import LoRAConfig, exit_cleanly
from lora import apply_lora, save_adapter
from models.gpt2 import GPT2Model
from models.paraphrase_gpt import ParaphraseGPT

ROOT = Path(__file__).resolve().parent.parent


class Malicious:
    """Loaded without restriction, a pickle of this runs a command that makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"echo ran > {self.marker}",)


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    root = tmp_path_factory.mktemp("kit")
    make_model(root / "model")
    make_data(root)
    save_adapter(apply_lora(GPT2Model.from_pretrained(root / "model"), LoRAConfig(rank=2)), root / "adapter")
    ParaphraseGPT(GPT2Model.from_pretrained(root / "model"), "generalized").save_pretrained(root / "judge")
    return root


def raw(thing, path):
    path.write_bytes(pickle.dumps(thing))


WRITE = ["--generate_only", "--held_out_sonnet_path={root}/sonnets.txt"]
JUDGE = ["--predict_only", "--para_dev={root}/pairs.csv", "--para_test={root}/pairs.csv"]
TRAIN = ["--sonnet_path={root}/sonnets.txt", "--dev_sonnet_path={root}/sonnets.txt",
         "--held_out_sonnet_path={root}/sonnets.txt"]  # fmt: skip
PLACES = {  # file: the command that reads it
    "model/model.safetensors": ("sonnets", [*WRITE, "--model={root}/model"]),
    "model/pytorch_model.bin": ("sonnets", [*WRITE, "--model={root}/model"]),
    "model/config.json": ("sonnets", [*WRITE, "--model={root}/model"]),
    "model/tokenizer.json": ("sonnets", [*WRITE, "--model={root}/model"]),
    "adapter/adapter_model.safetensors": ("sonnets", [*WRITE, "--model={root}/model", "--adapter={root}/adapter"]),
    "adapter/adapter_model.bin": ("sonnets", [*WRITE, "--model={root}/model", "--adapter={root}/adapter"]),
    "adapter/adapter_config.json": ("sonnets", [*WRITE, "--model={root}/model", "--adapter={root}/adapter"]),
    "judge/head.safetensors": ("paraphrases", [*JUDGE, "--model={root}/judge"]),
    "judge/model.safetensors": ("paraphrases", [*JUDGE, "--model={root}/judge"]),
    "sonnets.txt": ("sonnets", [*TRAIN, "--model_size={root}/model"]),
    "pairs.csv": ("paraphrases", [*JUDGE, "--model={root}/judge"]),
}


@pytest.mark.parametrize("dump", [torch.save, raw], ids=["torch.save", "pickle"])
@pytest.mark.parametrize("place", PLACES)
def test_a_malicious_pickle_is_refused(kit, tmp_path, capsys, place, dump):
    """Exit code 2 and the file named; of a .bin, beside which the right file is missing, that it is missing."""
    root, marker = tmp_path / "copy", tmp_path / "marker"
    shutil.copytree(kit, root)
    path = root / place
    if path.suffix == ".bin":
        path.with_suffix(".safetensors").unlink(missing_ok=True)
        (path.parent / "model.safetensors").unlink(missing_ok=True)
    dump({"weight": Malicious(marker), "text": Malicious(marker)}, path)
    task, given = PLACES[place]
    given = [option.format(root=root) for option in given]
    with pytest.raises(SystemExit) as stop, exit_cleanly():
        SCRIPTS[task].main(SCRIPTS[task].parse_options(given))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert str(path.parent) in error
    assert not marker.exists()
    path = path.rename(tmp_path / "anything")
    if dump is raw:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()  # what an unrestricted reader would have done


@pytest.mark.parametrize("dump", [torch.save, raw], ids=["torch.save", "pickle"])
def test_a_malicious_resume_state_is_refused(kit, tmp_path, capsys, dump):
    """Of a run that was stopped, by the command that resumes it."""
    marker, run = tmp_path / "marker", tmp_path / "run"
    script = SCRIPTS["sonnets"]
    script.main(script.parse_options(options(kit, "sonnets-lora", run, "--epochs=0")))
    (run / "summary.json").unlink()
    (run / "resume").mkdir()
    dump({"progress": Malicious(marker)}, run / "resume" / "state.pt")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop, exit_cleanly():
        script.main(script.parse_options(options(kit, "sonnets-lora", run, "--epochs=0", "--resume")))
    assert (stop.value.code, "state.pt can't be read" in capsys.readouterr().err) == (2, True)
    assert not marker.exists()


def test_no_code_loads_what_can_run_code():
    """torch.load once, with weights_only=True; no pickle, no remote code, no eval."""
    sources = [path for path in (*ROOT.glob("*.py"), *ROOT.glob("modules/*.py"), *ROOT.glob("models/*.py"))]
    text = {path.name: path.read_text(encoding="utf-8") for path in sources}
    calls = re.findall(r"torch\.load\(.*", "\n".join(text.values()))
    assert len(calls) == 1
    assert "weights_only=True" in calls[0]
    for name, source in text.items():
        tree = ast.parse(source)
        imported = {alias.name.split(".")[0] for node in ast.walk(tree)
                    if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}  # fmt: skip
        imported |= {node.module.split(".")[0] for node in ast.walk(tree)
                     if isinstance(node, ast.ImportFrom) and node.module}  # fmt: skip
        called = {node.func.id for node in ast.walk(tree)
                  if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
        assert not imported & {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}, name
        assert not called & {"eval", "exec", "compile"}, name
        assert "trust_remote_code" not in source, name


HUB = """
import sys, time
from config import InputError
from models.hugging_face import find_model
start = time.perf_counter()
try:
    print(find_model("gpt2"))
except InputError as error:
    print("refused:", error)
print(time.perf_counter() - start)
"""


def hub(tmp_path, **environment):
    """find_model("gpt2") in a process of its own: what it printed, and its seconds."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    kept |= {"HF_HOME": str(tmp_path / "home"), **environment}
    done = subprocess.run([sys.executable, "-c", HUB], cwd=ROOT, env=kept, capture_output=True, text=True, check=False,
                          timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    *said, seconds = done.stdout.splitlines()
    return "\n".join(said), float(seconds)


def fill_cache(tmp_path, model):
    """A cache as huggingface_hub lays it out, holding our small model under the name gpt2."""
    place = tmp_path / "home" / "hub" / "models--gpt2"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(model, place / "snapshots" / ("0" * 40))
    return place / "snapshots" / ("0" * 40)


def test_the_cache_works_offline(kit, tmp_path):
    """HF_HOME with the model, and no network."""
    folder = fill_cache(tmp_path, kit / "model")
    said, _ = hub(tmp_path, HF_HUB_OFFLINE="1")
    assert Path(said).resolve() == folder.resolve()
    (folder / "model.safetensors").unlink()  # a download that was cut off
    said, _ = hub(tmp_path, HF_HUB_OFFLINE="1")
    assert "refused: gpt2 is not in the local cache" in said
    assert all(way in said for way in ("--model_size tiny", "folder", "HF_HOME"))


def test_a_hub_that_hangs_ends_by_its_time_limit(kit, tmp_path):
    """A server that takes connections and never answers; with the model in the cache it is not even asked."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        silent = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        said, seconds = hub(tmp_path, **silent)
        assert "refused: gpt2 is not in the local cache" in said
        assert 9 < seconds < 60
        fill_cache(tmp_path, kit / "model")
        said, seconds = hub(tmp_path, **silent)
        assert "snapshots" in said


DETERMINED = [
    {"TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONHASHSEED": "7", "LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8"},
]


def test_locale_time_zone_and_hashes_change_nothing(kit, tmp_path):
    """The same options and seed: every file's bytes but the times, whatever the environment says."""
    probe = (
        "import sys, json, hashlib, pathlib; sys.path[:0] = ['tests', '.']\n"
        "import kill_everywhere as k\n"
        "root, out, k.figures.draw_attention = *map(pathlib.Path, sys.argv[1:]), k.drawn\n"
        "k.figures.draw_curves = k.drawn\n"
        "with k.exit_cleanly():\n"
        "    for task, script in k.SCRIPTS.items():\n"
        "        script.main(script.parse_options(k.options(root, f'{task}-lora', out / task)))\n"
        "left = {task: k.left_behind(out / task) for task in k.SCRIPTS}\n"
        "print(hashlib.sha256(repr(left).encode()).hexdigest())\n"
    )

    def digest(name, **environment):
        kept = {key: value for key, value in os.environ.items() if key not in ("LC_ALL", "LANG", "TZ")}
        (tmp_path / name).mkdir()
        done = subprocess.run([sys.executable, "-c", probe, str(kit), str(tmp_path / name)], cwd=ROOT, check=False,
                              env=kept | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    first = digest("plain")
    for index, environment in enumerate(DETERMINED):
        assert digest(str(index), **environment) == first, environment


def test_the_order_of_files_in_a_folder_changes_nothing(kit, tmp_path):
    """A model's folder with its files made in another order is the same model."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in sorted((kit / "model").iterdir(), reverse=True):
        shutil.copy(path, copy / path.name)
    one, other = (GPT2Model.from_pretrained(folder).state_dict() for folder in (kit / "model", copy))
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((copy / "config.json").read_text())["n_layer"] == 1
