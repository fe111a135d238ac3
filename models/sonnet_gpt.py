"""GPT-2 as a language model: loss and sampling."""

import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from adapters import mixed_adapters, select_rows
from config import InputError, SamplingConfig, check_number
from models.gpt2 import to_device
from modules.attention import KVCache
from modules.loss import cross_entropy
from modules.onednn import packed_linears

DRAWS = 16  # per token; after a draw is rejected, about half of the probability remains


class SonnetGPT(nn.Module):
    """A GPT2Model with its tied output embedding."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def forward(self, input_ids, attention_mask=None):
        """Logits (B, T, V) of the token after each position."""
        hidden = self.gpt(input_ids, attention_mask)["last_hidden_state"]
        return self.gpt.hidden_state_to_token(hidden)

    def loss(self, input_ids, labels):
        """Mean cross-entropy in nats per token over labels (B, T) that are not -100.

        Label t is the token after input t. Right padding needs no mask because of causality.
        """
        hidden = self.gpt(input_ids)["last_hidden_state"]
        return cross_entropy(hidden, self.gpt.token_embedding.weight, labels)

    def save_pretrained(self, folder):
        """Write the GPT-2's Hugging Face folder."""
        self.gpt.save_pretrained(folder)

    def encode(self, prompts):
        """Token ids of the prompts; raises InputError if one is empty or leaves no position."""
        ids = self.gpt.encode(prompts)
        longest = max(map(len, ids), default=0)
        limit = self.gpt.config.n_positions
        if not all(ids):
            raise InputError("a prompt is empty: give at least one character")
        if longest >= limit:
            raise InputError(f"a prompt has {longest} tokens; the model has {limit}: shorten it")
        return ids

    @torch.inference_mode()
    def generate(self, prompts, max_lines=14, seed=0, adapters=None, **sampling):
        """Continue all prompts as one batch; returns each prompt with its continuation.

        A text ends at the end-of-text token, with its `max_lines`th line (None: no limit), after
        `max_new_tokens`, or where positions end. `sampling` is as in SamplingConfig. `adapters`
        names a LoRA adapter's folder or None for each prompt. Raises InputError for settings,
        prompts or adapters that cannot be used.
        """
        sampling = SamplingConfig(**sampling)
        if isinstance(prompts, str):
            raise InputError(f"prompts must be a list of texts, not the text {prompts!r}")
        if max_lines is not None:
            check_number("max_lines", max_lines, 1, kind=int)
        if not prompts:
            return []
        if adapters is not None and len(adapters) != len(prompts):
            raise InputError(f"{len(adapters)} adapters for {len(prompts)} prompts")
        was_training = self.gpt.training
        with mixed_adapters(self, adapters), packed_linears(self.gpt, len(prompts)):
            new_tokens = self.sample_tokens(prompts, sampling, max_lines, seed)
        self.gpt.train(was_training)
        texts = []
        for prompt, tokens in zip(prompts, new_tokens, strict=True):
            text = first_lines(prompt + self.gpt.decode(tokens), max_lines)
            texts.append(max(prompt, text, key=len))  # a prompt may have more lines
        return texts

    def sample_tokens(self, prompts, sampling, max_lines, seed):
        """The new tokens of each prompt, without the end-of-text token; see `generate`."""
        gpt = self.gpt.eval()
        device = gpt.token_embedding.weight.device
        # Padded on the left, so that all sequences end at the same position.
        ids = [torch.tensor(row) for row in self.encode(prompts)]
        tokens = pad_sequence(ids, batch_first=True, padding_value=-1, padding_side="left")
        tokens = to_device(tokens, device)
        mask, tokens = tokens >= 0, tokens.clamp(min=0)
        width = tokens.shape[1]
        steps = min(sampling.max_new_tokens, gpt.config.n_positions - width)
        cache = KVCache(gpt.config, len(prompts), width + steps)
        generator = torch.Generator().manual_seed(seed)
        new_tokens = [[] for _ in prompts]
        active = list(range(len(prompts)))  # the prompts that are still being continued
        for _ in tqdm(range(steps), "generating", unit="token", delay=2, leave=False, disable=None):
            unpadded = all(len(ids[prompt]) == width for prompt in active)
            hidden = gpt(tokens, mask, cache, right_padded=unpadded)["last_token"]
            # Numbers for every prompt, so that the end of one does not change the others.
            uniform = torch.rand(len(prompts), DRAWS, generator=generator)[active]
            uniform = to_device(uniform, device)
            tokens = sample(self.next_logits(hidden, sampling), uniform, sampling)
            running = []  # the rows of the batch that continue
            # The only read per token: the host waits for the device.
            for row, (prompt, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
                if token < 0:
                    problem = "the logits are not finite; train or download the model again"
                    raise FloatingPointError(problem)
                if token != gpt.end_of_text:
                    new_tokens[prompt].append(token)
                    if not self.is_complete(prompts[prompt], new_tokens[prompt], max_lines):
                        running.append(row)
            if not running:
                break
            if len(running) < len(active):
                active = [active[row] for row in running]
                rows = to_device(torch.tensor(running), device)
                tokens, mask = tokens[rows], mask[rows]
                cache.select_rows(rows)
                select_rows(gpt, rows)
            tokens = tokens[:, None]
            mask = F.pad(mask, (0, 1), value=True)
        return new_tokens

    def next_logits(self, hidden, sampling):
        """Logits (B, V) in float32; greedy text also multiplies in float32.

        bfloat16 logits around -110 are multiples of 0.5, so that the argmax is often a tie.
        """
        device_type = hidden.device.type
        if sampling.temperature > 0 or not torch.is_autocast_enabled(device_type):
            return self.gpt.hidden_state_to_token(hidden).float()
        with torch.autocast(device_type, enabled=False):
            return F.linear(hidden.float(), self.gpt.token_embedding.weight.float())

    def is_complete(self, prompt, tokens, max_lines):
        """Whether the last token ended the `max_lines`th line; empty lines do not count."""
        if "\n" not in self.gpt.decode(tokens[-1:]):
            return False
        text = prompt + self.gpt.decode(tokens)
        return first_lines(text, max_lines) != text


def sample(logits, uniform, sampling):
    """Next tokens (B,) for logits (B, V) and uniform random numbers (B, DRAWS) in [0, 1).

    Nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751) from the `top_k` most probable tokens
    (0: all): of these, the fewest whose probability reaches `top_p` are kept. Temperature 0 is
    greedy. Nothing is sorted (rejection sampling, as in FlashInfer by Ye et al. 2025): a token is
    drawn and, if it is outside of the nucleus, another one from the more probable tokens only. The
    token of logits that are not finite is -1.
    """
    pending = logits.isfinite().all(-1, keepdim=True)
    tokens = logits.argmax(-1, keepdim=True).where(pending, -1)  # also if all draws are rejected
    if sampling.temperature == 0:
        return tokens.squeeze(1)
    logits = logits - logits.amax(-1, keepdim=True)  # at most 0, so no temperature overflows
    probabilities = (logits / max(sampling.temperature, 1e-30)).softmax(-1)
    vocabulary = torch.arange(logits.shape[-1], device=logits.device)
    if 0 < sampling.top_k < len(vocabulary):
        best = probabilities.topk(sampling.top_k)
        kept = best.values / best.values.sum(-1, keepdim=True)
        probabilities = torch.zeros_like(probabilities).scatter(-1, best.indices, kept)
    candidates = probabilities
    for draw in uniform.split(1, dim=1):
        cdf = candidates.cumsum(-1)
        drawn = torch.searchsorted(cdf, draw * cdf[:, -1:], right=True).clamp(
            max=len(vocabulary) - 1
        )
        own = probabilities.gather(1, drawn)
        preceding = (probabilities > own) | ((probabilities == own) & (vocabulary < drawn))
        candidates = torch.where(preceding, probabilities, 0)  # those that are more probable
        probability = candidates.sum(-1, keepdim=True)
        accepted = (probability < sampling.top_p) & (own > 0)
        tokens = torch.where(pending & accepted, drawn, tokens)
        pending &= ~accepted
        # On a GPU, asking would wait for the device.
        if logits.device.type == "cpu" and not pending.any():
            break
    return tokens.squeeze(1)


def first_lines(text, count):
    """The text up to the end of its `count`th line that is not empty; None: the whole text."""
    ends = [line.end() for line in re.finditer(r"\S.*", text)]
    if count is None or len(ends) < count:
        return text
    return text[: ends[count - 1]]
