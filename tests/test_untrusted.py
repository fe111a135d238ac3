"""Files from strangers execute nothing, and neither hub, locale nor file order change a result."""

import ast
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kill_everywhere import SCRIPTS, make_data, make_model, options
from safetensors.torch import load_file

from adapters import save_adapter
from cli import exit_cleanly
from config import LoRAConfig
from lora import apply_lora
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
    gpt = GPT2Model.from_pretrained(root / "model")
    ParaphraseGPT(gpt, "generalized").save_pretrained(root / "classifier")
    save_adapter(apply_lora(gpt, LoRAConfig(rank=2)), root / "adapter")
    return root


def save_raw(thing, path):
    path.write_bytes(pickle.dumps(thing))


DUMPS = pytest.mark.parametrize("dump", [torch.save, save_raw], ids=["torch.save", "pickle"])
GENERATE = "--generate_only --held_out_sonnet_path={root}/sonnets.txt"
ADAPTER = f"{GENERATE} --model={{root}}/model --adapter={{root}}/adapter"
MODEL = f"{GENERATE} --model={{root}}/model"
PREDICT = (
    "--predict_only --para_dev={root}/pairs.csv --para_test={root}/pairs.csv "
    "--model={root}/classifier"
)
TRAIN = (
    "--sonnet_path={root}/sonnets.txt --dev_sonnet_path={root}/sonnets.txt "
    "--held_out_sonnet_path={root}/sonnets.txt --model_size={root}/model"
)
PLACES = {  # file: the command that reads it
    "model/model.safetensors": ("sonnets", MODEL),
    "model/pytorch_model.bin": ("sonnets", MODEL),
    "model/config.json": ("sonnets", MODEL),
    "model/tokenizer.json": ("sonnets", MODEL),
    "adapter/adapter_model.safetensors": ("sonnets", ADAPTER),
    "adapter/adapter_model.bin": ("sonnets", ADAPTER),
    "adapter/adapter_config.json": ("sonnets", ADAPTER),
    "classifier/head.safetensors": ("paraphrases", PREDICT),
    "classifier/model.safetensors": ("paraphrases", PREDICT),
    "sonnets.txt": ("sonnets", TRAIN),
    "pairs.csv": ("paraphrases", PREDICT),
}


@DUMPS
@pytest.mark.parametrize("place", PLACES)
def test_a_malicious_pickle_is_rejected(kit, tmp_path, capsys, place, dump):
    """Exit code 2 and the folder; a .bin file stands alone, without safetensors beside it."""
    root, marker = tmp_path / "copy", tmp_path / "marker"
    shutil.copytree(kit, root)
    path = root / place
    if path.suffix == ".bin":
        next(path.parent.glob("*.safetensors")).unlink()
    dump({"weight": Malicious(marker), "text": Malicious(marker)}, path)
    task, given = PLACES[place]
    with pytest.raises(SystemExit) as stop, exit_cleanly():
        SCRIPTS[task].main(SCRIPTS[task].parse_options(given.format(root=root).split()))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert str(path.parent) in error
    assert "weights_only" not in error  # advice to load the pickle without restriction
    assert not marker.exists()
    path = path.rename(tmp_path / "anything")
    if dump is save_raw:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()  # what an unrestricted reader would have done


def test_weights_in_a_harmless_pickle_are_read(kit, tmp_path):
    """pytorch_model.bin through the restricted unpickler gives the weights of the safetensors."""
    shutil.copytree(kit / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    before = GPT2Model.from_pretrained(tmp_path / "model").state_dict()
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()
    after = GPT2Model.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@DUMPS
def test_a_malicious_resume_state_is_rejected(kit, tmp_path, capsys, dump):
    """Of a run that was stopped, by the command that resumes it."""
    marker, run = tmp_path / "marker", tmp_path / "run"
    script = SCRIPTS["sonnets"]
    given = options(kit, "sonnets-lora", run, "--epochs=0")
    script.main(script.parse_options(given))
    (run / "summary.json").unlink()
    state = run / "resume" / "state.pt"
    state.parent.mkdir(exist_ok=True)
    dump({"progress": Malicious(marker)}, state)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop, exit_cleanly():
        script.main(script.parse_options([*given, "--resume"]))
    assert stop.value.code == 2
    assert "state.pt cannot be read" in capsys.readouterr().err
    assert not marker.exists()


def names_of(tree):
    """The modules that a file imports and the plain functions that it calls."""
    imported, called = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called.add(node.func.id)
    return imported, called


def test_no_code_loads_what_can_run_code():
    """torch.load once, with weights_only=True; no pickle, no remote code, no eval."""
    patterns = ("*.py", "modules/*.py", "models/*.py")
    sources = [path for pattern in patterns for path in ROOT.glob(pattern)]
    text = {path.name: path.read_text(encoding="utf-8") for path in sources}
    calls = re.findall(r"torch\.load\(.*", "\n".join(text.values()))
    assert len(calls) == 1
    assert "weights_only=True" in calls[0]
    pickles = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
    for name, source in text.items():
        imported, called = names_of(ast.parse(source))
        assert not imported & pickles, name
        assert not called & {"eval", "exec", "compile"}, name
        assert "trust_remote_code" not in source.replace("trust_remote_code=False", ""), name


HUB = """
import sys, time
from config import InputError
from models.hugging_face import find_model
for name in sys.argv[1:]:
    started = time.perf_counter()
    try:
        print(find_model(name), end="|")
    except InputError as error:
        print("rejected:", error, end="|")
    print(time.perf_counter() - started)
"""
NAMES = ("gpt2", "openai-community/gpt2")


def hub(tmp_path, *names, **environment):
    """find_model(name) in a process of its own: for each name, its result and its seconds."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    kept |= {"HF_HOME": str(tmp_path / "home"), **environment}
    command = [sys.executable, "-c", HUB, *names]
    result = subprocess.run(
        command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=300
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    lines = [line.split("|") for line in result.stdout.splitlines()]
    return [(text, float(seconds)) for text, seconds in lines]


def fill_cache(tmp_path, model, name):
    """A cache as huggingface_hub makes it, holding the small model under `name`."""
    place = tmp_path / "home" / "hub" / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(model, place / "snapshots" / ("0" * 40))
    return place / "snapshots" / ("0" * 40)


@pytest.fixture
def silent_hub():
    """The environment of a hub that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        yield {"HF_ENDPOINT": address, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


@pytest.mark.parametrize("cached", NAMES)
def test_a_cache_serves_both_names_of_a_model(kit, tmp_path, silent_hub, cached):
    """Without asking the hub: neither offline nor with a hub that hangs."""
    folder = fill_cache(tmp_path, kit / "model", cached)
    for environment in ({"HF_HUB_OFFLINE": "1"}, silent_hub):
        for found, seconds in hub(tmp_path, *NAMES, **environment):
            assert Path(found).resolve() == folder.resolve()
            assert seconds < 5


def test_an_incomplete_cache_is_not_used(kit, tmp_path):
    """A download that was cut off: one line with the ways out."""
    folder = fill_cache(tmp_path, kit / "model", "gpt2")
    (folder / "model.safetensors").unlink()
    [(found, _)] = hub(tmp_path, "gpt2", HF_HUB_OFFLINE="1")
    assert "rejected: gpt2 is not in the local cache" in found
    assert all(way in found for way in ("--model_size tiny", "folder", "HF_HOME"))


def test_a_complete_cache_is_preferred_to_an_incomplete_one(kit, tmp_path):
    """The other name of the model may have been downloaded completely."""
    (fill_cache(tmp_path, kit / "model", "gpt2") / "model.safetensors").unlink()
    folder = fill_cache(tmp_path, kit / "model", "openai-community/gpt2")
    [(found, _)] = hub(tmp_path, "gpt2", HF_HUB_OFFLINE="1")
    assert Path(found).resolve() == folder.resolve()


def test_an_unreachable_hub_ends_soon(tmp_path, silent_hub):
    """One line within about ten seconds if it hangs, at once if it refuses the connection."""
    [(found, seconds)] = hub(tmp_path, "gpt2", **silent_hub)
    assert found.startswith("rejected: gpt2 is not in the local cache and cannot be downloaded")
    assert seconds < 15
    [(found, seconds)] = hub(tmp_path, "gpt2", **silent_hub | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert found.startswith("rejected: gpt2 is not in the local cache and cannot be downloaded")
    assert seconds < 10


OTHER = {"TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
OTHER |= {"PYTHONHASHSEED": "7"}
OUTCOMES = """
import sys, hashlib, pathlib
sys.path[:0] = ["tests", "."]
import kill_everywhere as k
root, out = map(pathlib.Path, sys.argv[1:])
k.plots.draw_attention = k.plots.draw_curves = k.draw
with k.exit_cleanly():
    for task, script in k.SCRIPTS.items():
        script.main(script.parse_options(k.options(root, f"{task}-lora", out / task)))
outcomes = {task: k.outcome(out / task) for task in k.SCRIPTS}
print(hashlib.sha256(repr(outcomes).encode()).hexdigest())
"""


def test_locale_time_zone_and_hashes_change_nothing(kit, tmp_path):
    """The same options and seed give the same files, whatever the environment says."""

    def digest(name, environment):
        kept = {k: v for k, v in os.environ.items() if k not in ("LC_ALL", "LANG", "TZ")}
        (tmp_path / name).mkdir()
        command = [sys.executable, "-c", OUTCOMES, str(kit), str(tmp_path / name)]
        kept["OMP_NUM_THREADS"] = "1"  # sums of several threads may differ in their last bit
        settings = {"cwd": ROOT, "capture_output": True, "env": kept | environment}
        result = subprocess.run(command, **settings)
        assert result.returncode == 0, result.stderr
        return result.stdout.split()[-1]

    assert digest("plain", {}) == digest("other", OTHER)


def test_the_order_of_files_in_a_folder_changes_nothing(kit, tmp_path):
    """A model folder with its files made in another order is the same model."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in sorted((kit / "model").iterdir(), reverse=True):
        shutil.copy(path, copy / path.name)
    one, other = (GPT2Model.from_pretrained(path).state_dict() for path in (kit / "model", copy))
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
