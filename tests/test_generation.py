"""Generation: which tokens are sampled, where a text ends, and that a batch changes nothing."""

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from config import GPT2Config, InputError, SamplingConfig
from models import sonnet_gpt
from models.generation import DRAWS, sample
from models.sonnet_gpt import SonnetGPT

PROBABILITIES = torch.tensor([0.1, 0.4, 0.2, 0.3])
LOGITS = PROBABILITIES.log()
COUNT = 40_000
LETTERS = "abc \n$"  # the scripted model's vocabulary; $ ends a text
PROMPTS = ["From", "That thereby beauty's rose might never die", "a", "When forty win"]


def sampled(uniform=None, logits=LOGITS, **settings):
    """The token for each row of random numbers; `logits` are (V,), the same for all, or (B, V)."""
    if uniform is None:
        uniform = torch.rand(COUNT, DRAWS, generator=torch.Generator().manual_seed(0))
    config = SamplingConfig(**{"temperature": 1.0, "top_p": 1.0} | settings)
    return sample(logits.expand(len(uniform), -1), uniform, config)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),  # squares
        ({"temperature": 1e-40}, [0, 1, 0, 0]),
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        ({"top_p": 0.45}, [0, 4 / 7, 0, 3 / 7]),  # the token that crosses p belongs to the set
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 0.5, "top_k": 2}, [0, 1, 0, 0]),  # 4 / 7 reaches 0.5, and 0.4 does not
        ({"top_p": 0.5, "temperature": 0.5}, [0, 1, 0, 0]),  # 16 / 30 does
    ],
    ids=str,
)
def test_shares_are_the_probabilities_by_hand(settings, expected):
    """40,000 samples, each token within four standard deviations of its share."""
    shares = torch.bincount(sampled(**settings), minlength=4) / COUNT
    expected = torch.tensor(expected)
    deviation = (expected * (1 - expected) / COUNT).sqrt()
    assert ((shares - expected).abs() <= 4 * deviation).all()


@pytest.mark.parametrize("top_p", [0.1, 0.9])
def test_the_largest_random_number_gives_a_token_of_the_nucleus(top_p):
    """Also of a nucleus with more than 1,024 of 5,000 tokens, and with rounded sums."""
    logits = torch.randn(200, 5000, generator=torch.Generator().manual_seed(0))
    tokens = sampled(torch.full((200, DRAWS), 1 - 2**-24), logits, top_p=top_p)
    probabilities = logits.softmax(-1)
    chosen = probabilities.gather(1, tokens[:, None])
    preceding = (probabilities * (probabilities > chosen)).sum(-1)
    assert (preceding < top_p + 1e-5).all()


class Scripted(nn.Module):
    """A mock GPT2Model: after each letter, only the given letters are possible."""

    end_of_text = LETTERS.index("$")

    def __init__(self, following, n_positions=100):
        super().__init__()
        size = len(LETTERS)
        self.config = GPT2Config(1, 1, 1, vocab_size=size, n_positions=n_positions)
        self.token_embedding = nn.Embedding.from_pretrained(torch.eye(size))
        self.table = torch.full((size, size), -1e9)
        for letter, others in following.items():
            for other in others:
                self.table[LETTERS.index(letter), LETTERS.index(other)] = 0.0

    def encode(self, texts):
        return [[LETTERS.index(letter) for letter in text] for text in texts]

    def decode(self, ids):
        return "".join(LETTERS[token] for token in ids)

    def forward(self, tokens, mask, cache):
        cache.length += tokens.shape[1]
        assert mask.shape == (len(tokens), cache.length)
        return {"last_token": self.table[tokens[:, -1]]}

    def hidden_state_to_token(self, hidden):
        return hidden @ self.token_embedding.weight.T


def write(following, *prompts, n_positions=100, **settings):
    """(text, ended) for each prompt."""
    model = SonnetGPT(Scripted(following, n_positions))
    return [tuple(text) for text in model.continue_texts(list(prompts), **settings)]


def test_a_text_ends_at_end_of_text():
    """The end-of-text token is not part of the text, and nothing follows it."""
    following = {"a": "b", "b": "c", "c": "$", "$": "a"}
    assert write(following, "a", "c", "aab") == [("abc", True), ("c", True), ("aabc", True)]


def test_a_text_ends_at_a_limit():
    """New tokens count, not all; without a limit each text fills all positions, also in company.

    The last token needs no position of its own.
    """
    assert write({"a": "a"}, "aaa", max_new_tokens=5) == [("a" * 8, False)]
    assert write({"a": "a"}, "aaaaaa", "a", n_positions=8) == [("a" * 8, False)] * 2


LINES = {"a": "\n", "\n": "a"}


def test_a_text_ends_with_its_last_line():
    """The prompt's lines count, empty ones do not, and nothing of the next line remains."""
    assert write(LINES, "a", max_lines=3) == [("a\na\na", True)]
    assert write(LINES, "b\nb\na", max_lines=3) == [("b\nb\na", True)]
    assert write({"a": "\n", "\n": " ", " ": "a"}, "a\n\n", max_lines=3) == [("a\n\n a\n a", True)]
    assert write(LINES, "a", max_lines=0, max_new_tokens=6) == [("a\na\na\na", False)]


@pytest.mark.parametrize("prompt", ["a\nb\n", "a\nb\nc\n", "\na\nb\n\n ", "a\nb\nc\na"])
def test_a_prompt_with_all_lines_comes_back(prompt):
    """decode(...)[3:] once cut characters, and only the limit of lines must not cut any."""
    assert write(LINES, prompt, max_lines=2) == [(prompt, True)]


def test_the_prompt_is_unchanged_by_a_tokenizer(gpt):
    """The text is the prompt itself with the new tokens' text; the prompt is never decoded."""
    prompts = [*PROMPTS, "a b , c .  d", "caf\u00e9 \u2019tis", "a <|endoftext|> b"]
    texts = SonnetGPT(gpt).generate(prompts, seed=1, max_new_tokens=8)
    for prompt, text in zip(prompts, texts, strict=True):
        assert text.startswith(prompt)
        assert len(text) > len(prompt)
    assert SonnetGPT(gpt).generate([]) == []


def test_greedy_text_equals_transformers(gpt, reference):
    """Thirty tokens for each prompt in one batch: cache, left padding and positions at once."""
    settings = {"max_new_tokens": 30}
    end, expected = gpt.end_of_text, []
    theirs = GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=end, **settings)
    for prompt in PROMPTS:
        ids = torch.tensor(gpt.encode([prompt]))
        tokens = reference.generate(
            ids, attention_mask=ids.new_ones(ids.shape), generation_config=theirs
        )
        expected.append(prompt + gpt.decode(tokens[0, ids.shape[1] :].tolist()))
    assert SonnetGPT(gpt).generate(PROMPTS, temperature=0, max_lines=0, **settings) == expected


@pytest.mark.parametrize("size", [64, 2])
def test_a_text_in_company_equals_the_text_alone(gpt, monkeypatch, size):
    """Neither batch mates, padding, texts that end nor the size of batches change a text.

    Prompts of 1 and about 60 tokens have their own limits.
    """
    monkeypatch.setattr(sonnet_gpt, "BATCH_SIZE", size)
    long = gpt.decode(gpt.encode(["That thereby beauty's rose might never die " * 10])[0][:60])
    with torch.no_grad():  # end of text becomes more probable
        gpt.final_norm.bias += 5 * gpt.token_embedding.weight[gpt.end_of_text]
    model, prompts = SonnetGPT(gpt), [long, "a", *PROMPTS[:2]]
    settings = {"top_p": 0.95, "temperature": 1.5, "seed": 3}
    together = model.continue_texts(prompts, **settings)
    assert together == [model.continue_texts([prompt], **settings)[0] for prompt in prompts]
    assert {ended for _, ended in together} == {True, False}


def test_the_seed_determines_the_text(gpt):
    """Nothing else does: not the global random state, and not dropout; the mode stays."""
    model = SonnetGPT(gpt.train())
    first = model.generate(["a", "a", "b"], seed=3, max_new_tokens=12)
    torch.manual_seed(99)
    assert model.generate(["a", "a", "b"], seed=3, max_new_tokens=12) == first
    assert first[0] != first[1]  # the same prompt again gets other random numbers
    assert model.generate(["a"], seed=3, max_new_tokens=12) == first[:1]
    assert model.generate(["a"], seed=4, max_new_tokens=12) != first[:1]
    assert gpt.training


def test_logits_are_float32_under_autocast():
    """bfloat16 logits around -110 are multiples of 0.5, so that the first of many ties wins."""
    model = SonnetGPT(Scripted({}))
    model.gpt.table[:] = torch.tensor([-110.2, -110.1, -110.0, -110.3, -110.2, -110.1])
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(["a"], temperature=0, max_new_tokens=3) == ["accc"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(temperature):
    """One row of a batch, in the second step."""
    model = SonnetGPT(Scripted({"a": "b", "b": "a", "c": "c"}))
    model.gpt.table[LETTERS.index("b"), LETTERS.index("c")] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        model.generate(["c", "a"], temperature=temperature)


def test_unusable_prompts_and_settings_are_named():
    """A prompt would come back unchanged; a setting would give NaN, an empty set or no text."""
    model = SonnetGPT(Scripted({"a": "a"}, n_positions=8))
    prompts = {"'' has 0 tokens; 1 to 7 fit": ["a", ""], "8 tokens; 1 to 7 fit": ["a", "a" * 8]}
    for message, texts in prompts.items():
        with pytest.raises(InputError, match=message):
            model.generate(texts)
    for name, value in {"temperature": float("nan"), "top_p": 0.0, "top_k": -1}.items():
        with pytest.raises(InputError, match=f"{name} must be"):
            model.generate(["a"], **{name: value})


def test_one_text_is_not_a_list_of_prompts(gpt):
    """Otherwise each of its characters would be continued."""
    with pytest.raises(InputError, match="must be a list of texts, not the text 'From'"):
        SonnetGPT(gpt).generate("From")
