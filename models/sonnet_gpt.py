"""GPT-2 as a language model of sonnets: the loss to train it by, and sampling to write with it."""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import InputError, check
from lora import keep_rows, mixed_adapters
from models.gpt2 import GPT2Model
from modules.attention import KVCache
from modules.loss import cross_entropy

TRIES = 8  # draws a token: with a nucleus of 0.9, one token in ten million needs its last


class SonnetGPT(nn.Module):
    """A GPT2Model with its tied output embedding."""

    def __init__(self, gpt: GPT2Model):
        super().__init__()
        self.gpt = gpt

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of the token after each."""
        return self.gpt.hidden_state_to_token(self.gpt(input_ids, attention_mask)["last_hidden_state"])

    def loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy, in nats, of the labels (B, T) that are not -100; label t is the token after input t."""
        hidden = self.gpt(input_ids)["last_hidden_state"]  # right padding needs no mask: causality hides it
        return cross_entropy(hidden, self.gpt.token_embedding.weight, labels)

    def encode(self, prompts: list[str]) -> list[list[int]]:
        """The prompts' tokens; raises InputError for an empty prompt, and for one that fills all positions."""
        ids = [self.gpt.tokenizer.encode(prompt).ids for prompt in prompts]
        if not all(ids):
            raise InputError("a prompt is empty: give at least one character to continue")
        if (width := max(map(len, ids))) >= (most := self.gpt.config.positions):
            raise InputError(f"a prompt has {width} tokens; the model has {most} positions: shorten it")
        return ids

    @torch.inference_mode()
    def generate(self, prompts: list[str], temperature: float = 0.9, top_p: float = 0.9, top_k: int = 0,
                 max_new_tokens: int = 200, max_lines: int | None = 14, seed: int = 0,
                 adapters: list | None = None) -> list[str]:  # fmt: skip
        """Continue all prompts as one batch; returns each prompt, unchanged, with its continuation.

        A row ends at end-of-text, once it has `max_lines` lines (None: any number), after `max_new_tokens`, or where
        the model's positions end, counted from the longest prompt. The seed fixes the draws. `adapters` names a LoRA
        adapter's folder for each prompt (None: the base alone). Raises InputError for settings out of range, an empty
        prompt, one that fills all positions, and an adapter that does not fit.
        """
        if adapters is not None:
            if len(adapters) != len(prompts):
                raise InputError(f"{len(adapters)} adapters for {len(prompts)} prompts: name one, or None, for each")
            with mixed_adapters(self, adapters):
                return self.generate(prompts, temperature, top_p, top_k, max_new_tokens, max_lines, seed)
        check_sampling(temperature, top_p, top_k, max_new_tokens)
        if not prompts:
            return []
        gpt, tokenizer = self.gpt.eval(), self.gpt.tokenizer
        ids = self.encode(prompts)
        width = max(map(len, ids))
        length = min(width + max_new_tokens, gpt.config.positions)
        device, dtype = gpt.token_embedding.weight.device, gpt.token_embedding.weight.dtype
        # padded on the left, so that all rows end at the same place
        tokens = torch.tensor([[0] * (width - len(row)) + row for row in ids], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
        cache = KVCache(gpt.config, len(ids), length, dtype, device)
        generator = torch.Generator().manual_seed(seed)
        new = [[] for _ in ids]
        alive = list(range(len(ids)))
        for _ in tqdm(range(length - width), "writing", unit="token", delay=2, leave=False, disable=None):
            logits = gpt.hidden_state_to_token(gpt(tokens, mask, cache)["last_token"]).float()  # (rows alive, V)
            # a draw for every row, ended or not: the end of one moves no other
            draws = torch.rand(len(ids), TRIES, generator=generator)[alive]
            chosen = sample(logits, draws.to(device), temperature, top_p, top_k).tolist()
            going = []
            for index, (row, token) in enumerate(zip(alive, chosen, strict=True)):
                if token == gpt.end_of_text:
                    continue
                new[row].append(token)
                ended_line = max_lines is not None and "\n" in tokenizer.decode([token])
                if not ended_line or _full_lines(prompts[row] + tokenizer.decode(new[row])) < max_lines:
                    going.append(index)
            if not going:
                break
            if len(going) < len(alive):
                alive, rows = [alive[index] for index in going], torch.tensor(going, device=device)
                mask = mask[rows]
                cache.keep(rows)
                keep_rows(gpt, rows)
            tokens = torch.tensor([[chosen[index]] for index in going], device=device)
            mask = torch.cat([mask, mask.new_ones(len(going), 1)], dim=1)
        texts = [prompt + tokenizer.decode(row) for prompt, row in zip(prompts, new, strict=True)]
        if max_lines is None:
            return texts
        pairs = zip(prompts, texts, strict=True)
        return [max(prompt, _first_lines(text, max_lines), key=len) for prompt, text in pairs]


def check_sampling(temperature: float, top_p: float, top_k: int, max_new_tokens: int) -> None:
    """Raise InputError, naming the option, for a setting that no distribution can be drawn with."""
    check("temperature", temperature, 0)
    check("top_k", top_k, 0, kind=int)
    check("max_new_tokens", max_new_tokens, 1, kind=int)
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be above 0 and at most 1, not {top_p}")


def sample(logits: Tensor, draws: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Next tokens (B,) for logits (B, V) and uniform draws (B, tries): greedy at temperature 0.

    Of the `top_k` likeliest tokens (0: all), those are kept whose mass first reaches `top_p` (nucleus sampling,
    Holtzman et al. 2020). A token is drawn from all, and taken if it is one of those kept: nothing is sorted then. Rows
    that all but their last draw refused are sorted, and the last goes through their likeliest tokens first.
    """
    if not logits.isfinite().all():
        raise FloatingPointError("the model's logits are not finite: its weights can't be used; train or copy it again")
    if temperature == 0:
        return logits.argmax(-1)
    # at most 0: no temperature overflows, and one that float32 takes for 0 is none
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    probabilities = logits.softmax(-1)
    tokens = torch.full_like(draws[:, 0], -1, dtype=torch.long)
    if not top_k:
        mass = probabilities.cumsum(-1)
        places = torch.arange(logits.shape[-1], device=logits.device)
        for draw in draws.T[:-1]:
            token = torch.searchsorted(mass, draw[:, None] * mass[:, -1:], right=True).clamp_max(len(places) - 1)
            own = probabilities.gather(1, token)
            likelier = (probabilities > own) | ((probabilities == own) & (places < token))
            kept = ((probabilities * likelier).sum(-1) < top_p) & (own[:, 0] > 0)
            tokens = torch.where((tokens < 0) & kept, token[:, 0], tokens)
            if (tokens >= 0).all():
                return tokens
    refused = tokens < 0
    tokens[refused] = _of_sorted(probabilities[refused], draws[refused, -1], top_p, top_k)
    return tokens


def _of_sorted(probabilities: Tensor, draws: Tensor, top_p: float, top_k: int) -> Tensor:
    """Tokens (B,) by inverse CDF over the kept ones, the likeliest first."""
    probabilities, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_k:
        probabilities = probabilities[:, :top_k] / probabilities[:, :top_k].sum(-1, keepdim=True)
    before = probabilities.cumsum(-1) - probabilities  # the mass of likelier tokens: 0 for the first, always kept
    nucleus = before < max(top_p, 1e-30)
    mass = (probabilities * nucleus).cumsum(-1)
    choice = (mass <= draws[:, None] * mass[:, -1:]).sum(-1, keepdim=True)
    return tokens.gather(1, choice.minimum(nucleus.sum(-1, keepdim=True) - 1)).squeeze(1)


def _full_lines(text: str) -> int:
    """Lines that are not empty and have ended."""
    return sum(bool(line.strip()) for line in text.split("\n")[:-1])


def _first_lines(text: str, count: int) -> str:
    """The text, without what follows its `count`th line that is not empty."""
    lines = text.split("\n")
    filled = [index for index, line in enumerate(lines) if line.strip()]
    return "\n".join(lines[: filled[count - 1] + 1]) if len(filled) >= count else text
