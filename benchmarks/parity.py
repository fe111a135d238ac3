"""The largest differences from transformers and PEFT, in float32, on Hugging Face GPT-2 folders.

    python benchmarks/parity.py FOLDER [FOLDER ...] [--dtypes float32 bfloat16]

Any GPT-2 folder with a tokenizer will do; random weights show as much as trained ones. For each of
--dtypes, the loss and the greedy text in that precision are compared with those of transformers in
float32, next to transformers in that precision. CUDA is used if there is a GPU. Prints one line per
check and writes benchmarks/results/parity.md, with one column per folder.
"""

import argparse
import functools
import itertools
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import FOLDER, markdown
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2LMHeadModel

from adapters import load_adapter, save_adapter
from config import LoRAConfig
from files import write_text
from lora import apply_lora, base_sha256, merge_lora
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT
from modules.attention import KVCache
from training import autocast, choose_device

PROMPT = "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n"
WIDTH = 48
DEVICE = choose_device("auto")


def largest_difference(one, other):
    return (one - other).abs().max().item()


def load_ours(folder):
    return SonnetGPT(GPT2Model.from_pretrained(folder)).to(DEVICE)


def load_theirs(folder):
    """transformers' model in float32; by default it has the precision of the file."""
    return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval().to(DEVICE)


def random_ids(model, *shape):
    """The same token ids on every device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, shape, generator=generator).to(DEVICE)


def greedy_text(ours):
    """The prompt and at most 100 tokens."""
    return ours.generate([PROMPT], temperature=0, max_new_tokens=100, max_lines=None)[0]


def their_greedy_text(theirs, gpt):
    """The same with transformers' model and our tokenizer."""
    tokens = torch.tensor(gpt.encode([PROMPT]), device=DEVICE)
    end = gpt.end_of_text
    settings = {"do_sample": False, "max_new_tokens": 100, "eos_token_id": end, "pad_token_id": end}
    reply = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
    reply = [token for token in reply[0, tokens.shape[1] :].tolist() if token != end]
    return PROMPT + gpt.decode(reply)


@torch.no_grad()
def check_logits(folder):
    """Logits and greedy text against transformers; padded or cached batches against one text."""
    ours, theirs = load_ours(folder), load_theirs(folder)
    ids = random_ids(ours.gpt, 3, WIDTH)
    yield "logits against transformers", largest_difference(ours(ids), theirs(ids).logits)

    texts = [ids[index, : WIDTH - 10 * index] for index in range(3)]
    single = [ours(text[None])[0] for text in texts]
    batches = {}
    for side in ("right", "left"):
        padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for index, text in enumerate(texts):
            real = slice(len(text)) if side == "right" else slice(WIDTH - len(text), None)
            padded[index, real], mask[index, real] = text, 1
        batches[side] = padded, mask

    def worst(logits, side):
        pairs = zip(logits, single, strict=True)
        return max(
            largest_difference(row[: len(one)] if side == "right" else row[-len(one) :], one)
            for row, one in pairs
        )

    for side, (padded, mask) in batches.items():
        yield f"{side}-padded batch against single texts", worst(ours(padded, mask), side)
    padded, mask = batches["left"]
    cache = KVCache(ours.gpt.config, 3, WIDTH)
    hidden = []
    for start, stop in [(0, 20), (20, 33), *((n, n + 1) for n in range(33, WIDTH))]:
        output = ours.gpt(padded[:, start:stop], mask[:, :stop], cache)
        hidden.append(output["last_hidden_state"])
    logits = ours.gpt.hidden_state_to_token(torch.cat(hidden, 1))
    yield "left-padded and cached against single texts", worst(logits, "left")

    is_equal = greedy_text(ours) == their_greedy_text(theirs, ours.gpt)
    yield "greedy text of at most 100 tokens is equal", is_equal


def common_prefix(one, other):
    """The characters before the first difference of two texts."""
    pairs = zip(one, other, strict=False)
    return list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


@torch.no_grad()
def check_precision(folder, dtype):
    """Loss and greedy text in a precision, ours and transformers', against float32."""
    ours, theirs = load_ours(folder), load_theirs(folder)
    ids = random_ids(ours.gpt, 4, WIDTH)
    inputs, labels = ids[:, :-1], ids[:, 1:]

    def their_loss():
        return F.cross_entropy(theirs(inputs).logits.float().flatten(0, 1), labels.flatten())

    loss, text = their_loss(), their_greedy_text(theirs, ours.gpt)
    with autocast(DEVICE, getattr(torch, dtype)):
        losses = {"": ours.loss(inputs, labels), ", transformers": their_loss()}
        texts = greedy_text(ours), their_greedy_text(theirs, ours.gpt)
    for (source, value), own in zip(losses.items(), texts, strict=True):
        yield f"{dtype}{source}: loss against float32", largest_difference(value, loss)
        equal = len(common_prefix(own, text)) - len(PROMPT)
        label = f"{dtype}{source}: first equal characters of greedy text"
        yield label, f"{equal} of {len(text) - len(PROMPT)}"


def check_lora(folder):
    """Counts, frozen weights after 20 steps, merging, and adapters to PEFT and back."""
    torch.manual_seed(0)
    model = apply_lora(load_ours(folder), LoRAConfig())
    trained = [p for p in model.parameters() if p.requires_grad]
    counts = [sum(p.numel() for p in part) for part in (trained, model.parameters())]
    yield "trainable parameters, with all", "{:,} of {:,}".format(*counts)
    before = base_sha256(model)
    ids = random_ids(model.gpt, 2, 16)
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for _ in range(20):
        model.train().loss(ids, ids.roll(-1, 1)).backward()
        optimizer.step()
    base = [p for name, p in model.named_parameters() if ".lora_" not in name]
    yield "base without gradients after 20 steps", all(p.grad is None for p in base)
    yield "base bit-identical after 20 steps", base_sha256(model) == before
    model.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as temporary:
        first, again, merged = (Path(temporary) / name for name in ("first", "again", "merged"))
        save_adapter(model, first)
        size = (first / "adapter_model.safetensors").stat().st_size
        yield "size of the adapter file, bytes", f"{size:,}"
        ours = model(ids)
        theirs = PeftModel.from_pretrained(load_theirs(folder), first).eval().to(DEVICE)
        yield "PEFT with our adapter", largest_difference(theirs(ids).logits, ours)
        save_adapter(load_adapter(load_ours(folder), first), again)
        contents = [{p.name: p.read_bytes() for p in part.iterdir()} for part in (first, again)]
        yield "save, load, save gives the same files", contents[0] == contents[1]
        merge_lora(model)
        yield "merged against unmerged", largest_difference(model(ids), ours)
        model.gpt.save_pretrained(merged)
        theirs = load_theirs(merged)(ids).logits
        yield "transformers with our merged model", largest_difference(theirs, model(ids))


def check_peft_adapter(folder):
    """An adapter that PEFT has trained and saved."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["c_attn", "c_fc"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(load_theirs(folder), config)
    ids = random_ids(peft, 2, 16)
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        peft(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    with torch.no_grad(), tempfile.TemporaryDirectory() as temporary:
        peft.eval().save_pretrained(temporary)
        expected = peft(ids).logits
        ours = load_adapter(load_ours(folder), temporary).eval()(ids)
        yield "ours with PEFT's adapter", largest_difference(ours, expected)
        base = load_ours(folder)(ids)
        yield "change of the logits by PEFT's adapter", largest_difference(base, expected)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    names = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=names)
    path = FOLDER / "results"
    parser.add_argument("--out_dir", type=Path, default=path, help="folder of parity.md")
    options = parser.parse_args()
    table = {}
    for folder in options.folders:
        print(folder)
        precisions = [functools.partial(check_precision, dtype=name) for name in options.dtypes]
        for check in (check_logits, check_lora, check_peft_adapter, *precisions):
            for label, value in check(folder):
                shown = f"{value:.1e}" if isinstance(value, float) else str(value)
                table.setdefault(label, []).append(shown)
                print(f"  {label:<64}{shown}", flush=True)
    names = [Path(folder).resolve().name for folder in options.folders]
    text = markdown(["", *names], [[label, *values] for label, values in table.items()])
    write_text(options.out_dir / "parity.md", text)


if __name__ == "__main__":
    main()
