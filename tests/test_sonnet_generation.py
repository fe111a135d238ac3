"""The user's command: what a run leaves, that it can be repeated, resumed and written from, and what is refused."""

import csv
import json

import pytest

from config import InputError
from sonnet_generation import main, parse_options

SONNETS = "".join(f"\n{number}\n\nFrom fairest\ncreatures\nwe {number}\ndesire\n" for number in range(1, 6))
SUMMARY = {
    "task", "model", "method", "seed", "trainable_parameters", "total_parameters", "epochs", "best_epoch",
    "first_train_loss", "final_train_loss", "best_dev_loss", "train_seconds", "seconds_per_epoch", "tokens_per_second",
    "peak_memory_gb",
}  # fmt: skip


@pytest.fixture
def command(folder, tmp_path):
    """Run the script in this process on the tiny model and five short sonnets; further options may override."""
    path = tmp_path / "sonnets.txt"
    path.write_text(SONNETS)
    files = [f"--{name}={path}" for name in ("sonnet_path", "dev_sonnet_path", "held_out_sonnet_path")]
    common = [f"--model_size={folder}", f"--sonnet_out={tmp_path / 'out.txt'}", "--max_new_tokens=8", "--device=cpu"]

    def run(*options, out="run"):
        main(parse_options([*files, *common, "--epochs=2", "--lr=0.01", f"--out_dir={tmp_path / out}", *options]))
        return tmp_path / out

    return run


def written(path):
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "options", [(), ("--use_lora",), ("--use_lora", "--dtype=bfloat16"), ("--dtype=bfloat16",)], ids=str
)
def test_a_run_leaves_what_it_should(command, tmp_path, options):
    """Every file of the design, and both copies of the predictions with each prompt unchanged."""
    run = command(*options)
    assert {"config.json", "metrics.csv", "summary.json", "curves.png"} <= {path.name for path in run.iterdir()}
    summary = json.loads(written(run / "summary.json"))
    assert summary.keys() >= SUMMARY
    assert summary["epochs"] == 2
    assert summary["base_dev_loss"] > summary["dev_loss"] > 0
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    adapter = "--use_lora" in options
    assert (run / "best" / "adapter_model.safetensors").exists() == adapter
    assert (run / "best" / "model.safetensors").exists() != adapter
    card = written(run / "best" / "README.md")
    assert card.startswith(f"---\nlibrary_name: {'peft' if adapter else 'transformers'}\n")
    assert f"| dev loss | {summary['dev_loss']:.4f} |\n" in card
    texts = written(tmp_path / "out.txt")
    assert texts == written(run / "predictions" / "generated_sonnets.txt")
    assert all(f"\n\n{n}\n\nFrom fairest\ncreatures\nwe {n}\n" in texts for n in range(1, 6))


@pytest.mark.parametrize("method", [(), ("--use_lora",)], ids=["full", "lora"])
def test_the_best_model_writes_the_runs_texts_again(command, folder, tmp_path, method):
    """--generate_only from best/, in float32: the same prompts, options and seed give the same file."""
    best = command(*method, "--dtype=float32") / "best"
    texts = written(tmp_path / "out.txt")
    (tmp_path / "out.txt").unlink()
    path = tmp_path / "sonnets.txt"
    given = [f"--adapter={best}", f"--model_size={folder}"] if method else [f"--model={best}"]
    main(parse_options(["--generate_only", *given, f"--held_out_sonnet_path={path}", "--max_new_tokens=8",
                        f"--sonnet_out={tmp_path / 'out.txt'}", "--device=cpu", "--dtype=float32"]))  # fmt: skip
    assert written(tmp_path / "out.txt") == texts


@pytest.mark.parametrize("method", [(), ("--use_lora",)], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_epochs_evaluate_and_write_with_the_base(command, method, dtype):
    """--epochs 0: the figures before and after are the same, and nothing is kept as the best."""
    run = command(*method, f"--dtype={dtype}", "--epochs=0")
    summary = json.loads(written(run / "summary.json"))
    assert summary["dev_loss"] == summary["base_dev_loss"]
    assert not (run / "best").exists()


def test_a_finished_run_is_not_overwritten(command):
    """Neither run again nor resumed: the folder holds a result."""
    before = written(command() / "summary.json")
    for again in ((), ("--resume",)):
        with pytest.raises(InputError, match="already holds a run"):
            command(*again)
    assert written(command(out="other") / "metrics.csv").count("\n") == 3
    assert json.loads(before)["epochs"] == 2


@pytest.mark.parametrize(("option", "named"), [
    ("--temperature=-1", "temperature"), ("--epochs=-1", "epochs"), ("--lr=0", "lr"), ("--lora_rank=0", "rank"),
    ("--adapter=somewhere", "generate_only"), ("--sonnet_path=absent.csv", r"absent\.csv"), ("--device=tpu", "tpu"),
    ("--model_size=absent", "absent"), ("--dtype=float16", "float16"),
])  # fmt: skip
def test_an_option_that_cannot_be_used_is_named(command, tmp_path, option, named):
    """Before anything is trained or a folder made: nothing falls back silently."""
    with pytest.raises(InputError, match=named):
        command(option)
    assert not (tmp_path / "run").exists()
