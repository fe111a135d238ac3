"""Writing: where a text starts and ends, and that neither the batch nor the cache changes it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from config import GPT2Config, InputError
from models.sonnet_gpt import SonnetGPT

LETTERS = "abc \n$"  # the scripted model's vocabulary; $ ends a text
PROMPTS = ["From", "That thereby beauty's", "a", "When forty win"]


class Scripted(nn.Module):
    """Stands in for GPT2Model: after each letter, the next one's logits are written down here."""

    tokenizer = SimpleNamespace(
        encode=lambda text: SimpleNamespace(ids=[LETTERS.index(letter) for letter in text]),
        decode=lambda ids: "".join(LETTERS[token] for token in ids),
    )
    end_of_text = LETTERS.index("$")

    def __init__(self, following, positions=100):
        super().__init__()
        self.config = GPT2Config(layers=1, width=1, heads=1, vocab_size=len(LETTERS), positions=positions)
        self.token_embedding = nn.Embedding(1, 1)
        self.table = torch.full((len(LETTERS), len(LETTERS)), -1e9)
        for letter, others in following.items():
            for other in others:
                self.table[LETTERS.index(letter), LETTERS.index(other)] = 0.0

    def forward(self, tokens, mask, cache):
        assert mask.shape == (len(tokens), cache.length + tokens.shape[1])
        cache.length += tokens.shape[1]
        return {"last_token": self.table[tokens[:, -1]]}

    def hidden_state_to_token(self, hidden):
        return hidden


def write(following, *prompts, positions=100, **settings):
    return SonnetGPT(Scripted(following, positions)).generate(list(prompts), **settings)


def greedy(gpt, prompts, tokens=40):
    return SonnetGPT(gpt).generate(prompts, temperature=0, max_new_tokens=tokens, max_lines=None)


def test_a_row_ends_at_end_of_text():
    """The end-of-text token is no part of the text, and nothing follows it."""
    assert write({"a": "b", "b": "c", "c": "$", "$": "a"}, "a", "c", "aab") == ["abc", "c", "aabc"]


@pytest.mark.parametrize("count", [1, 5])
def test_a_row_ends_after_max_new_tokens(count):
    """128 new tokens were too few for most sonnets; the count is of new tokens, not of all."""
    assert write({"a": "a"}, "aaa", "a", max_new_tokens=count) == ["aaa" + "a" * count, "a" + "a" * count]


def test_a_row_ends_where_the_positions_end():
    """The longest prompt fills the positions exactly; one more token would be an error."""
    assert write({"a": "a"}, "aa", positions=8) == ["a" * 8]


def test_a_row_ends_with_its_last_line():
    """The prompt's lines count, empty ones do not, and nothing of the next line is left."""
    assert write({"a": "\n", "\n": "a"}, "a", max_lines=3) == ["a\na\na"]
    assert write({"a": "\n", "\n": "a"}, "b\nb\na", max_lines=3) == ["b\nb\na"]
    assert write({"a": "\n", "\n": " ", " ": "a"}, "a\n\n", max_lines=3) == ["a\n\n a\n a"]
    assert write({"a": "\n", "\n": "a"}, "a", max_lines=None, max_new_tokens=6) == ["a\na\na\na"]


@pytest.mark.parametrize("prompt", ["a\n", "a\n\n", "a\nb\nc\n", "\na\n ", "a\nb\nc\na"])
@pytest.mark.parametrize("next_letter", ["$", "\n", "b"])
def test_the_prompt_is_unchanged(prompt, next_letter):
    """decode(...)[3:] once cut characters; an early end or many given lines must cut none either."""
    following = {letter: next_letter for letter in "a\n "} | {"b": "$"}
    (text,) = write(following, prompt, max_lines=2, max_new_tokens=4)
    assert text.startswith(prompt)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_prompt_is_unchanged_by_a_tokenizer(gpt, prompt):
    """The text is the prompt itself with the new tokens' text, never the prompt decoded again."""
    (text,) = SonnetGPT(gpt).generate([prompt], seed=1, max_new_tokens=8)
    assert text.startswith(prompt)
    assert len(text) > len(prompt)


def test_greedy_text_equals_transformers(gpt, reference):
    """Forty tokens for prompts of four lengths in one batch: cache, left padding and positions at once."""
    rows = [gpt.tokenizer.encode(prompt).ids for prompt in PROMPTS]
    width, end = max(map(len, rows)), gpt.end_of_text
    ids = torch.tensor([[end] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    settings = GenerationConfig(do_sample=False, max_new_tokens=40, eos_token_id=end, pad_token_id=end)
    theirs = reference.generate(ids, attention_mask=mask, generation_config=settings)[:, width:].tolist()
    assert len({token for row in theirs for token in row}) > 20  # one token repeated would prove little
    expected = [prompt + gpt.tokenizer.decode(row) for prompt, row in zip(PROMPTS, theirs, strict=True)]
    assert greedy(gpt, PROMPTS) == expected


def test_greedy_batch_equals_each_alone(gpt):
    """Neither batch-mates nor the padding beside them may change a text."""
    assert greedy(gpt, PROMPTS) == [greedy(gpt, [prompt])[0] for prompt in PROMPTS]


def test_greedy_after_a_row_has_ended(gpt):
    """When one row leaves the batch, the others must go on with their own cache, mask and tokens."""
    with torch.no_grad():  # end of text scores just above what the fourth row would write first
        prompt = torch.tensor([gpt.tokenizer.encode(PROMPTS[3]).ids])
        first = gpt.hidden_state_to_token(gpt(prompt)["last_token"]).argmax()
        gpt.token_embedding.weight[gpt.end_of_text] = 1.0001 * gpt.token_embedding.weight[first]
    together = greedy(gpt, PROMPTS)
    assert [text == prompt for text, prompt in zip(together, PROMPTS, strict=True)] == [False, False, False, True]
    assert together == [greedy(gpt, [prompt])[0] for prompt in PROMPTS]


def test_a_row_that_ends_moves_no_other_rows_draws():
    """With sampling too: the second text is the same whether the first goes on or ends at once."""
    following = {"a": "abc", "b": "abc", "c": "abc", " ": "$"}
    going, (ended, beside) = write(following, "a", "b", seed=5), write(following, " ", "b", seed=5)
    assert ended == " "
    assert beside == going[1]
    assert len(set(beside)) == 3


def test_a_seed_fixes_the_text(gpt):
    """And nothing else does: not the global random state, which dropout uses."""
    model = SonnetGPT(gpt.train())
    first = model.generate(PROMPTS, seed=3, max_new_tokens=20)
    torch.manual_seed(99)
    assert model.generate(PROMPTS, seed=3, max_new_tokens=20) == first
    assert model.generate(PROMPTS, seed=4, max_new_tokens=20) != first


@pytest.mark.parametrize("length", [8, 9])
def test_a_prompt_that_leaves_no_position_is_refused(length):
    """It would come back as it was, as if the model had chosen to write nothing."""
    with pytest.raises(InputError, match=f"{length} tokens.* 8 positions"):
        write({"a": "a"}, "a", "a" * length, positions=8)


def test_an_empty_prompt_is_refused(gpt):
    """There would be no token to start from, and no last hidden state."""
    with pytest.raises(InputError, match="prompt is empty"):
        SonnetGPT(gpt).generate(["From", ""])


@pytest.mark.parametrize("setting", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": 0}])
def test_settings_are_checked_before_anything_is_written(gpt, setting):
    """The error must reach whoever calls generate, naming the option."""
    with pytest.raises(InputError, match=next(iter(setting))):
        SonnetGPT(gpt).generate(["From"], **setting)
