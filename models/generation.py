"""Sampling: batches of prompts are continued token by token with a key-value cache."""

import re
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange

from config import InputError, SamplingConfig
from models.gpt2 import GPT2Model
from modules.attention import KVCache

DRAWS = 16  # per token; after a draw is rejected, about half of the probability remains


class Continuation(NamedTuple):
    """A prompt with its continuation, and whether this ended before tokens or positions ran out."""

    text: str
    ended: bool


def continue_batch(
    gpt: GPT2Model, prompts: list[str], sampling: SamplingConfig, seeds: list[int]
) -> list[Continuation]:
    """Continue prompts as one batch; the seed of each determines its random numbers.

    Raises InputError for a prompt that is empty or leaves no position, and FloatingPointError for
    logits that are not finite.
    """
    device, limit = gpt.token_embedding.weight.device, gpt.config.n_positions
    ids = [torch.tensor(row, dtype=torch.long) for row in gpt.encode(prompts)]
    for row, prompt in zip(ids, prompts, strict=True):
        if not 1 <= len(row) < limit:
            problem = f"has {len(row)} tokens; 1 to {limit - 1} fit"
            raise InputError(f"the prompt {prompt[:40]!r} {problem}")
    new_tokens = [[] for _ in prompts]
    ended = [first_lines(prompt, sampling.max_lines) != prompt for prompt in prompts]
    limits = [min(sampling.max_new_tokens or limit, limit - len(row)) for row in ids]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    # Padded on the left, so that all sequences end at the same position.
    tokens = pad_sequence(ids, batch_first=True, padding_value=-1, padding_side="left").to(device)
    mask, tokens = tokens >= 0, tokens.clamp(min=0)
    cache = KVCache(gpt.config, len(ids), tokens.shape[1] + max(limits))
    for step in trange(max(limits), desc="generating", unit="token", leave=False, disable=None):
        running = [not end and step < n for end, n in zip(ended, limits, strict=True)]
        if not any(running):
            break
        hidden = gpt(tokens, mask, cache)["last_token"]
        with torch.autocast(device.type, enabled=False):  # bfloat16 logits have many ties
            logits = gpt.hidden_state_to_token(hidden.float()).float()
        uniform = torch.cat([torch.rand(1, DRAWS, generator=g) for g in generators]).to(device)
        tokens = sample(logits, uniform, sampling)[:, None]
        # A finished text stays in the batch as masked padding.
        mask = torch.cat([mask, torch.tensor(running, device=device)[:, None]], 1)
        for i, token in enumerate(tokens[:, 0].tolist()):
            if running[i] and token == gpt.end_of_text:
                ended[i] = True
            elif running[i]:
                new_tokens[i].append(token)
                if "\n" in gpt.decode([token]):
                    text = prompts[i] + gpt.decode(new_tokens[i])
                    ended[i] = first_lines(text, sampling.max_lines) != text
    texts = [p + gpt.decode(new) for p, new in zip(prompts, new_tokens, strict=True)]
    texts = [first_lines(text, sampling.max_lines) for text in texts]
    texts = [max(pair, key=len) for pair in zip(prompts, texts, strict=True)]  # prompts stay whole
    return list(map(Continuation, texts, ended))


def first_lines(text: str, count: int) -> str:
    """The text up to the end of its `count`th line that is not empty (0: the whole text)."""
    ends = [line.end() for line in re.finditer(r"\S.*", text)]
    return text[: ends[count - 1]] if 0 < count <= len(ends) else text


def sample(logits: Tensor, uniform: Tensor, sampling: SamplingConfig) -> Tensor:
    """Next tokens (B,) for logits (B, V) and uniform random numbers (B, DRAWS) in [0, 1).

    Nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751) from the `top_k` most probable tokens
    (0: all): of these, the fewest whose probability reaches `top_p` are kept. Temperature 0 is
    greedy. Nothing is sorted, which would take as long as the model (rejection sampling, as in
    FlashInfer by Ye et al. 2025): a token that is drawn outside of the nucleus is rejected, and
    each draw is from the tokens that are more probable than the one before. Raises
    FloatingPointError for logits that are not finite.
    """
    if not logits.isfinite().all():
        raise FloatingPointError("the logits are not finite; train or download the model again")
    tokens = logits.argmax(-1, keepdim=True)  # also if all draws are rejected
    if sampling.temperature == 0:
        return tokens.squeeze(1)
    logits = logits - logits.amax(-1, keepdim=True)  # at most 0, so no temperature overflows
    probabilities = (logits / max(sampling.temperature, 1e-30)).softmax(-1)
    if 0 < sampling.top_k < logits.shape[-1]:
        likely = probabilities.topk(sampling.top_k)
        share = likely.values / likely.values.sum(-1, keepdim=True)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, likely.indices, share)
    pending, candidates = torch.ones_like(tokens, dtype=torch.bool), probabilities
    for draw in uniform.split(1, dim=1):
        cdf = candidates.cumsum(-1)
        drawn = torch.searchsorted(cdf, draw * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)
        own = probabilities.gather(1, drawn)
        candidates = torch.where(probabilities > own, probabilities, 0)
        accepted = (candidates.sum(-1, keepdim=True) < sampling.top_p) & (own > 0)
        tokens = torch.where(pending & accepted, drawn, tokens)
        pending &= ~accepted
        if logits.device.type == "cpu" and not pending.any():  # a GPU would have to be waited for
            break
    return tokens.squeeze(1)
