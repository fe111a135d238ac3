"""Generation: where a text starts and ends, and that neither batch nor cache changes it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from transformers import GenerationConfig

from config import GPT2Config, InputError
from models.sonnet_gpt import SonnetGPT
from modules.attention import KVCache

LETTERS = "abc \n$"  # the scripted model's vocabulary; $ ends a text
PROMPTS = ["From", "That thereby beauty's", "a", "When forty win"]


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

    def forward(self, tokens, mask, cache, right_padded):
        assert mask.shape == (len(tokens), cache.length + tokens.shape[1])
        if cache.keys is None:
            cache.append(0, *torch.zeros(2, len(tokens), 1, tokens.shape[1], 1))
        cache.length += tokens.shape[1]
        return {"last_token": self.table[tokens[:, -1]]}

    def hidden_state_to_token(self, hidden):
        return hidden


def write(following, *prompts, n_positions=100, **settings):
    return SonnetGPT(Scripted(following, n_positions)).generate(list(prompts), **settings)


def greedy(gpt, prompts, tokens=40):
    settings = {"temperature": 0, "max_new_tokens": tokens, "max_lines": None}
    return SonnetGPT(gpt).generate(prompts, **settings)


def test_a_text_ends_at_end_of_text():
    """The end-of-text token is not part of the text, and nothing follows it."""
    following = {"a": "b", "b": "c", "c": "$", "$": "a"}
    assert write(following, "a", "c", "aab") == ["abc", "c", "aabc"]


@pytest.mark.parametrize("count", [1, 5])
def test_a_text_ends_after_max_new_tokens(count):
    """The limit counts new tokens, not all (128 in all were too few for most sonnets)."""
    texts = write({"a": "a"}, "aaa", "a", max_new_tokens=count)
    assert texts == ["aaa" + "a" * count, "a" + "a" * count]


def test_a_text_ends_where_the_positions_end():
    """The longest prompt fills the positions exactly; one more token would be an error."""
    assert write({"a": "a"}, "aa", n_positions=8) == ["a" * 8]


def test_a_text_ends_with_its_last_line():
    """The prompt's lines count, empty ones do not, and nothing of the next line remains."""
    assert write({"a": "\n", "\n": "a"}, "a", max_lines=3) == ["a\na\na"]
    assert write({"a": "\n", "\n": "a"}, "b\nb\na", max_lines=3) == ["b\nb\na"]
    assert write({"a": "\n", "\n": " ", " ": "a"}, "a\n\n", max_lines=3) == ["a\n\n a\n a"]
    texts = write({"a": "\n", "\n": "a"}, "a", max_lines=None, max_new_tokens=6)
    assert texts == ["a\na\na\na"]


@pytest.mark.parametrize("prompt", ["a\n", "a\n\n", "a\nb\nc\n", "\na\n ", "a\nb\nc\na"])
@pytest.mark.parametrize("next_letter", ["$", "\n", "b"])
def test_the_prompt_is_unchanged(prompt, next_letter):
    """decode(...)[3:] once cut characters; an early end or many given lines cut none either."""
    following = {letter: next_letter for letter in "a\n "} | {"b": "$"}
    (text,) = write(following, prompt, max_lines=2, max_new_tokens=4)
    assert text.startswith(prompt)


@pytest.mark.parametrize("prompt", [*PROMPTS, "a b , c .  d", "caf\u00e9 \u2019tis"])
def test_the_prompt_is_unchanged_by_a_tokenizer(gpt, prompt):
    """The text is the prompt itself with the new tokens' text; the prompt is never decoded."""
    (text,) = SonnetGPT(gpt).generate([prompt], seed=1, max_new_tokens=8)
    assert text.startswith(prompt)
    assert len(text) > len(prompt)


def test_no_prompts_give_no_texts(gpt):
    assert SonnetGPT(gpt).generate([]) == []


def test_greedy_text_equals_transformers(gpt, reference):
    """Forty tokens for four prompts in one batch: cache, left padding and positions at once."""
    rows = gpt.encode(PROMPTS)
    width, end = max(map(len, rows)), gpt.end_of_text
    ids = torch.tensor([[end] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=40, eos_token_id=end, pad_token_id=end
    )
    theirs = reference.generate(ids, attention_mask=mask, generation_config=settings)
    theirs = theirs[:, width:].tolist()
    assert len({token for row in theirs for token in row}) > 20  # not only a repeated token
    expected = [prompt + gpt.decode(row) for prompt, row in zip(PROMPTS, theirs, strict=True)]
    assert greedy(gpt, PROMPTS) == expected


def test_greedy_batch_equals_each_prompt_alone(gpt):
    """Neither batch-mates nor padding change a text."""
    assert greedy(gpt, PROMPTS) == [greedy(gpt, [prompt])[0] for prompt in PROMPTS]


def test_greedy_after_a_text_has_ended(gpt):
    """When a sequence leaves the batch, the others keep their own cache, mask and tokens."""
    with torch.no_grad():  # end of text scores just above the fourth prompt's first token
        prompt = torch.tensor(gpt.encode(PROMPTS[3:]))
        first = gpt.hidden_state_to_token(gpt(prompt)["last_token"]).argmax()
        weight = gpt.token_embedding.weight
        weight[gpt.end_of_text] = 1.0001 * weight[first]
    together = greedy(gpt, PROMPTS)
    ended = [text == prompt for text, prompt in zip(together, PROMPTS, strict=True)]
    assert ended == [False, False, False, True]
    assert together == [greedy(gpt, [prompt])[0] for prompt in PROMPTS]


@torch.no_grad()
def shift_logits(gpt):
    """Move all logits to around -110: channel 0 is 1 in the embedding and -110 in the output."""
    gpt.token_embedding.weight[:, 0] = 1.0
    gpt.final_norm.weight[0] = 0.0
    gpt.final_norm.bias[0] = -110.0
    return gpt


@torch.no_grad()
def greedy_tokens(gpt, prompt, count, dtype):
    """Greedy decoding under bfloat16 autocast, with logits in `dtype`."""
    tokens = torch.tensor(gpt.encode([prompt]))
    cache, new_tokens = KVCache(gpt.config, 1, 64), []
    for _ in range(count):
        with torch.autocast("cpu", torch.bfloat16):
            hidden = gpt(tokens, cache=cache)["last_token"]
        logits = hidden.to(dtype) @ gpt.token_embedding.weight.to(dtype).T
        assert -130 < logits.min() < logits.max() < -90
        tokens = logits.argmax(-1, keepdim=True)
        if tokens.item() == gpt.end_of_text:
            break
        new_tokens.append(tokens.item())
    return new_tokens


def test_greedy_text_under_autocast_uses_float32_logits(gpt):
    """bfloat16 logits around -110 are multiples of 0.5, so that the first of many ties wins."""
    shift_logits(gpt)
    exact = [greedy_tokens(gpt, prompt, 20, torch.float32) for prompt in PROMPTS]
    rough = [greedy_tokens(gpt, prompt, 20, torch.bfloat16) for prompt in PROMPTS]
    assert all(map(list.__ne__, exact, rough))
    with torch.autocast("cpu", torch.bfloat16):
        texts = [greedy(gpt, [prompt], 20)[0] for prompt in PROMPTS]
    assert texts == [
        prompt + gpt.decode(tokens) for prompt, tokens in zip(PROMPTS, exact, strict=True)
    ]


@torch.no_grad()
def test_dev_loss_under_autocast_uses_float32_logits(gpt, ids):
    """Losses of bfloat16 logits around -110 would be off by several percent."""
    shift_logits(gpt)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = gpt(ids[:, :-1])["last_hidden_state"]
        loss = SonnetGPT(gpt).loss(ids[:, :-1], ids[:, 1:])
    logits = (hidden.float() @ gpt.token_embedding.weight.T).flatten(0, 1)
    labels = ids[:, 1:].flatten()
    assert abs(F.cross_entropy(logits.bfloat16().float(), labels) - loss) > 1e-3
    assert_close(loss, F.cross_entropy(logits, labels), atol=1e-4, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(value, temperature):
    """One row of a batch in the second step; its token -1 must not reach the embedding."""
    model = SonnetGPT(Scripted({"a": "b", "b": "a", "c": "c"}))
    model.gpt.table[LETTERS.index("b"), LETTERS.index("c")] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        model.generate(["c", "a"], temperature=temperature)


def test_the_end_of_one_text_does_not_change_another():
    """With sampling, the second text is the same whether the first continues or ends at once."""
    following = {"a": "abc", "b": "abc", "c": "abc", " ": "$"}
    continued = write(following, "a", "b", seed=5)
    ended, other = write(following, " ", "b", seed=5)
    assert ended == " "
    assert other == continued[1]
    assert len(set(other)) == 3


def test_the_seed_determines_the_text(gpt):
    """Nothing else does: not the global random state, and not dropout."""
    model = SonnetGPT(gpt.train())
    first = model.generate(PROMPTS, seed=3, max_new_tokens=20)
    torch.manual_seed(99)
    assert model.generate(PROMPTS, seed=3, max_new_tokens=20) == first
    assert model.generate(PROMPTS, seed=4, max_new_tokens=20) != first


@pytest.mark.parametrize("length", [8, 9])
def test_a_prompt_that_leaves_no_position_is_an_error(length):
    """It would come back unchanged, as if the model had chosen to write nothing."""
    with pytest.raises(InputError, match=f"{length} tokens.* 8"):
        write({"a": "a"}, "a", "a" * length, n_positions=8)


def test_an_empty_prompt_is_an_error(gpt):
    """There would be no token to start from."""
    with pytest.raises(InputError, match="empty"):
        SonnetGPT(gpt).generate(["From", ""])


def test_a_single_text_is_an_error(gpt):
    """Each of its characters would be continued."""
    with pytest.raises(InputError, match="list of texts"):
        SonnetGPT(gpt).generate("From")


@pytest.mark.parametrize(
    "setting",
    [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": 0}, {"max_lines": 0}],
)
def test_settings_are_checked_before_anything_is_written(gpt, setting):
    """The error reaches the caller of generate and names the option."""
    with pytest.raises(InputError, match=next(iter(setting))):
        SonnetGPT(gpt).generate(["From"], **setting)
