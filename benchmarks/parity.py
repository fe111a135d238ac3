"""Largest differences from transformers and PEFT, in float32, on Hugging Face GPT-2 folders.

    python benchmarks/parity.py FOLDER [FOLDER ...]

Any GPT-2 folder with a tokenizer will do; random weights show as much as trained ones. Prints a line a check, and
writes benchmarks/results/parity.md, a column a folder.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2LMHeadModel

from config import ROOT, LoRAConfig
from lora import apply_lora, fingerprint, load_adapter, merge_lora, save_adapter
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT
from modules.attention import KVCache
from runs import include_tables, parameter_counts, write_text

PROMPT = "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n"


FOUND: dict[str, list[str]] = {}


def show(label: str, value: float | bool | str) -> None:
    FOUND.setdefault(label, []).append(f"{value:.1e}" if isinstance(value, float) else f"{value}")
    print(f"  {label:<44}{FOUND[label][-1]}", flush=True)


def theirs_of(folder: str | Path) -> GPT2LMHeadModel:
    """In float32, as ours is; transformers would take the precision of the file."""
    return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


@torch.no_grad()
def logits(folder: str) -> None:
    """Ours against GPT2LMHeadModel; then padded, batched and cached against single rows; then greedy text."""
    ours, theirs = SonnetGPT(GPT2Model.from_pretrained(folder)), theirs_of(folder).eval()
    ids = torch.randint(0, ours.gpt.config.vocab_size, (3, 48), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids).logits
    show("logits against transformers", largest(ours(ids), expected))
    single = [ours(ids[row : row + 1, : 48 - 10 * row])[0] for row in range(3)]
    right, left = torch.zeros_like(ids), torch.zeros_like(ids)
    masks = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, states in enumerate(single):
        right[row, : len(states)] = left[row, 48 - len(states) :] = ids[row, : len(states)]
        masks[0][row, : len(states)] = masks[1][row, 48 - len(states) :] = 1

    def worst(states: torch.Tensor, left_padded: bool) -> float:
        return max(largest(row[-len(one) :] if left_padded else row[: len(one)], one)
                   for row, one in zip(states, single, strict=True))  # fmt: skip

    show("right-padded batch against single rows", worst(ours(right, masks[0]), False))
    show("left-padded batch against single rows", worst(ours(left, masks[1]), True))
    cache = KVCache(ours.gpt.config, 3, 48, torch.float32, ids.device)
    steps = []
    for start, stop in [(0, 20), (20, 33), *((n, n + 1) for n in range(33, 48))]:
        steps.append(ours.gpt(left[:, start:stop], masks[1][:, :stop], cache)["last_hidden_state"])
    cached = ours.gpt.hidden_state_to_token(torch.cat(steps, 1))
    show("left-padded and cached against single rows", worst(cached, True))
    tokens = torch.tensor([ours.gpt.tokenizer.encode(PROMPT).ids])
    end = ours.gpt.end_of_text
    reply = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=100,
                            eos_token_id=end, pad_token_id=end)[0, tokens.shape[1] :].tolist()  # fmt: skip
    text = ours.generate([PROMPT], temperature=0, max_new_tokens=100, max_lines=None)[0]
    expected = PROMPT + ours.gpt.tokenizer.decode([token for token in reply if token != end])
    show("greedy text of at most 100 tokens equal", text == expected)


def lora(folder: str) -> None:
    """Counts, frozen weights after 20 steps, merging, and adapters to PEFT and back."""
    torch.manual_seed(0)
    model = apply_lora(SonnetGPT(GPT2Model.from_pretrained(folder)), LoRAConfig())
    counts, before = parameter_counts(model), fingerprint(model)
    show("trainable, of all with the adapter", f"{counts['trainable_parameters']:,} of {counts['total_parameters']:,}")
    ids = torch.randint(0, model.gpt.config.vocab_size, (2, 16))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(20):
        model.train().loss(ids, ids.roll(-1, 1)).backward()
        optimizer.step()
    untouched = all(p.grad is None for name, p in model.named_parameters() if ".lora_" not in name)
    show("every base gradient None after 20 steps", untouched)
    show("base bit-identical after 20 steps", fingerprint(model) == before)
    model.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as temporary:
        adapter = Path(temporary) / "adapter"
        save_adapter(model, adapter)
        show("adapter file, bytes", f"{(adapter / 'adapter_model.safetensors').stat().st_size:,}")
        ours = model(ids)
        theirs = PeftModel.from_pretrained(theirs_of(folder), adapter).eval()
        show("PEFT with our adapter", largest(theirs(ids).logits, ours))
        again = load_adapter(SonnetGPT(GPT2Model.from_pretrained(folder)), adapter).eval()
        save_adapter(again, Path(temporary) / "again")
        files = [
            (path.read_bytes(), (Path(temporary) / "again" / path.name).read_bytes()) for path in adapter.iterdir()
        ]
        show("save, load, save gives the same files", all(one == other for one, other in files))
        merged = merge_lora(model)
        show("merged against unmerged", largest(merged(ids), ours))
        merged.gpt.save_pretrained(Path(temporary) / "merged")
        theirs = theirs_of(Path(temporary) / "merged").eval()
        show("transformers on our saved merged model", largest(theirs(ids).logits, merged(ids)))
    peft = get_peft_model(theirs_of(folder), LoraConfig(
        r=4, lora_alpha=16, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM"))  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        peft(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    with torch.no_grad(), tempfile.TemporaryDirectory() as temporary:
        peft.eval().save_pretrained(temporary)
        ours = load_adapter(SonnetGPT(GPT2Model.from_pretrained(folder)), temporary).eval()
        base = SonnetGPT(GPT2Model.from_pretrained(folder))(ids)
        show("ours with PEFT's adapter", largest(ours(ids), peft(ids).logits))
        show("by which PEFT's adapter moved the logits", largest(base, peft(ids).logits))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, flush=True)
        logits(name)
        lora(name)
    rows = [["", *(Path(name).resolve().name for name in sys.argv[1:])], ["---"] * len(sys.argv)]
    rows += [[label, *values] for label, values in FOUND.items()]
    text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    write_text(ROOT / "benchmarks" / "results" / "parity.md", text)
    include_tables(ROOT / "RESULTS.md")
