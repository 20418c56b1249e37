"""Decoding: cached as uncached, batched as alone, as `transformers` does it, and what happens when it goes wrong."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from m2helpers.files import UserError
from m2helpers.flops.account import generation_flops
from m2helpers.flops.costs import Cost
from m2helpers.forecasting import Generated, forecast, generate, generation, reading, sample_forecasts
from m2helpers.ledger import default_ledger
from m2helpers.lora import apply_lora
from m2helpers.models import add_head_bias
from m2helpers.settings import LoraSettings
from m2helpers.text import Codec, Grammar

CODEC = Codec(1.0)
CONTEXTS = ["1.16,1.27;0.90,0.95;0.83,0.69;", "2", "0.05,11.20;3.", "7.77,0.12;6.40,0.33;", "-0.50,1.00;", "9.99,9.98;"]


@pytest.fixture
def base(tiny_base):
    """A tiny base that writes nothing but the characters of numeric text, and often a `;`."""
    base = tiny_base()
    ids = base.tokenizer(CODEC.alphabet)["input_ids"]
    with torch.no_grad():
        base.model.lm_head.bias.fill_(-100)
        base.model.lm_head.bias[ids] = 0
        base.model.lm_head.bias[26] = 4
    return base


def _bias(base, token, value):
    with torch.no_grad():
        base.model.lm_head.bias[token] = value


@torch.no_grad()
def _uncached(base, context, n_steps, limit):
    """Greedy decoding with nothing but whole forward passes."""
    ids = base.tokenizer(context)["input_ids"]
    start = len(ids)
    while ids[start:].count(26) < n_steps and len(ids) < start + limit:
        ids.append(int(base.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return base.tokenizer.decode(ids[start:])


def _texts(base, contexts=CONTEXTS, n_steps=4, **options):
    return [g.text for g in generate(base, CODEC, contexts, n_steps, 2, **options)]


# ---------------------------------------------------------------- the same tokens, whatever the way


def test_cached_decoding_writes_what_uncached_does(base):
    expected = [_uncached(base, context, 4, 64) for context in CONTEXTS]
    assert len(set(expected)) >= 4 and len({len(t) for t in expected}) >= 3  # rows differ, and end at different times
    assert _texts(base, batch_size=1) == expected


@pytest.mark.parametrize("batch_size", [2, 4, 50])
def test_a_batch_writes_what_its_rows_write_alone(base, batch_size):
    alone = _texts(base, batch_size=1)
    assert _texts(base, batch_size=batch_size) == alone
    order = [3, 0, 5, 1, 4, 2]
    assert _texts(base, [CONTEXTS[i] for i in order], batch_size=batch_size) == [alone[i] for i in order]


@pytest.mark.slow
def test_a_batch_of_a_model_with_absolute_positions_is_as_alone(base, monkeypatch):
    """GPT-2 learns a vector for each position, so padding must not move a token to another one."""
    monkeypatch.setattr(
        "m2helpers.forecasting.generation.generation_cost", lambda *_, **options: Cost()
    )  # slow to count, and not asked here
    _bias(base, 26, 0)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=1, n_head=2, n_positions=128, initializer_range=0.3)
    other = replace(base, model=add_head_bias(GPT2LMHeadModel(config).eval()))
    with torch.no_grad():
        other.model.lm_head.bias.copy_(base.model.lm_head.bias)
    alone = _texts(other, n_steps=1, batch_size=1)
    assert len(set(alone)) > 2 and len("".join(alone)) > 20
    assert _texts(other, n_steps=1) == alone


def test_greedy_decoding_is_that_of_transformers(base):
    base.tokenizer.padding_side = "left"
    batch = base.tokenizer(CONTEXTS, return_tensors="pt", padding=True)
    model = base.model
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=256)
    for row, text in zip(out[:, batch["input_ids"].shape[1] :], _texts(base), strict=True):
        assert base.tokenizer.decode(row).startswith(text) and text


@pytest.mark.slow
def test_unmerged_updates_decode_as_they_predict(base):
    """Generation runs the adapted model, without dropout."""
    before = _texts(base)
    apply_lora(base.model, LoraSettings(lora_r=2, lora_dropout=0.5))
    with torch.no_grad():
        for name, p in base.model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.5)
    base.model.eval()
    adapted = _texts(base)
    assert adapted == [_uncached(base, context, 4, 64) for context in CONTEXTS] and adapted != before


# ---------------------------------------------------------------- where it stops


@pytest.mark.parametrize("n_steps", [1, 2, 5])
def test_a_row_ends_at_its_last_separator(base, n_steps):
    for text in _texts(base, n_steps=n_steps):
        assert text.count(";") == n_steps and text.endswith(";")


def test_a_row_without_separators_stops_at_the_limit_and_is_invalid(base):
    _bias(base, 26, -100)
    longest = len("-999.99,-999.99;")
    (out,) = generate(base, CODEC, CONTEXTS[:1], 3, 2)
    assert len(out.text) == 3 * longest and ";" not in out.text
    (result,) = forecast(base, CODEC, [np.ones((3, 2))], 3)
    assert not result.valid and result.values.shape == (0, 2) and result.text


@pytest.mark.slow
def test_a_row_may_stop_while_another_goes_on_to_the_limit(base):
    """Some rows end at once, others never write a separator: neither disturbs the other."""
    _bias(base, 26, 3)
    alone = [_texts(base, [c], n_steps=1)[0] for c in CONTEXTS]
    lengths = [len(text) for text in alone]
    assert min(lengths) < 8 and max(lengths) == 16 and len(set(lengths)) > 2, lengths
    assert _texts(base, n_steps=1) == alone


def test_the_end_of_text_token_does_not_hide(base):
    """What is no number stays in the text, and the forecast is invalid: nothing is skipped to make it parse."""
    _bias(base, 256, 200)
    (result,) = forecast(base, CODEC, [np.ones((3, 2))], 1)
    assert result.text.startswith("<|endoftext|>") and not result.valid and len(result.values) == 0


def test_a_forecast_has_the_steps_that_parse_and_no_more(base, monkeypatch):
    texts = ["1.00,2.00;3.00,4.00;", "1.00,2.00;x;", "", "1.00,2.00;3.00,4.00;5.00,6.00;"]

    def fake(base, codec, contexts, *_, **__):
        return [Generated(text, 7) for text in texts[: len(contexts)]]

    monkeypatch.setattr("m2helpers.forecasting.generation.generate", fake)
    whole, cut, nothing, long = forecast(base, Codec(2.0), [np.ones((3, 2))] * 4, 2)
    np.testing.assert_allclose(whole.values, [[0.5, 1.0], [1.5, 2.0]])
    assert [f.valid for f in (whole, cut, nothing, long)] == [True, False, False, True]
    assert [len(f.values) for f in (whole, cut, nothing, long)] == [2, 1, 0, 2]
    assert whole.flops == 7


# ---------------------------------------------------------------- cost


def test_flops_are_those_of_a_prefill_and_single_tokens(base):
    config = base.model.config
    alone = [generate(base, CODEC, [c], 2, 2)[0] for c in CONTEXTS]
    assert [g.flops for g in alone] == [
        generation_flops(config, 1, len(c), len(g.text)) for c, g in zip(CONTEXTS, alone, strict=True)
    ]
    padded = generate(base, CODEC, CONTEXTS, 2, 2)  # padding is billed like any token
    longest = max(map(len, CONTEXTS))
    assert [g.flops for g in padded] == [generation_flops(config, 1, longest, len(g.text)) for g in padded]
    assert min(g.flops for g in alone) > 0


def test_every_token_of_a_pass_is_billed(base, monkeypatch):
    """Forced tokens join a pass, and rows without one are padded: what is billed is what the passes read."""
    read, config = [], base.model.config
    wanted = reading._read
    monkeypatch.setattr(reading, "_read", lambda m, c, ids, *a: read.append(ids.shape) or wanted(m, c, ids, *a))
    written = generate(base, CODEC, CONTEXTS, 2, 2, constrained=True, temperature=1.0)
    prompt = max(map(len, CONTEXTS))
    assert sum(rows for rows, new in read if new == prompt) == len(CONTEXTS)  # prompts, a few rows at a time
    passes = [shape for shape in read if shape[1] != prompt]
    assert {new for _, new in passes} == {1, 2}
    # The longest-lived first: a pass of so many rows is one of theirs.
    tokens = [sum(new for rows, new in passes if rows > place) for place in range(len(CONTEXTS))]
    how = dict(vocabulary=len(Grammar(CODEC, 2).alphabet))
    expected = sorted(generation_flops(config, 1, prompt, n + 1, **how) for n in tokens)
    assert sorted(g.flops for g in written) == expected


def test_a_context_that_stands_several_times_is_read_and_billed_once(base, monkeypatch):
    """Its prefill is split among its rows, to the last FLOP; other contexts of the batch pay their own."""
    read, config, wanted = [], base.model.config, reading._read
    monkeypatch.setattr(reading, "_read", lambda m, c, ids, *a: read.append(ids.shape) or wanted(m, c, ids, *a))
    before = default_ledger(base).spent()
    contexts = [CONTEXTS[0]] * 3 + [CONTEXTS[3]] + [CONTEXTS[0]] * 4
    made = generate(base, CODEC, contexts, 2, 2, temperature=1.0)
    prompt = len(CONTEXTS[0])
    assert sum(rows for rows, new in read if new == prompt) == 2
    prefill = generation_flops(config, 1, prompt, 1)
    whole = [generation_flops(config, 1, prompt, len(g.text)) for g in made]  # what each would cost alone
    bill = default_ledger(base).spent() - before
    assert bill == sum(g.flops for g in made) == sum(whole) - 6 * prefill
    assert made[3].flops == whole[3]
    assert all(0 <= whole[i] - made[i].flops - prefill * 6 // 7 <= 1 for i in (0, 1, 2, 4, 5, 6, 7))


def test_more_than_a_model_can_read_is_refused(base):
    limit = base.model.config.max_position_embeddings
    with pytest.raises(UserError, match=f"reads {limit:,} at most; give fewer steps of the series, or ask for fewer"):
        generate(base, CODEC, ["1.00;" * (limit // 5)], 1, 1)


def test_decoding_that_is_stopped_is_billed_in_full(base, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    before = default_ledger(base).spent()
    monkeypatch.setattr(generation, "continue_prompts", stopped)
    with pytest.raises(KeyboardInterrupt):
        generate(base, CODEC, CONTEXTS[:1], 2, 2)
    (entry,) = default_ledger(base).entries()[-1:]
    assert entry["kind"] == "generate" and default_ledger(base).spent() - before == entry["flops"] > 0


def test_a_longer_context_costs_more(base, monkeypatch):
    _bias(base, 26, 100)  # one token each
    short, long, longer = (generate(base, CODEC, ["1" * n], 1, 1)[0] for n in (5, 50, 500))
    assert len(short.text) == len(long.text) == 1
    assert 0 < short.flops < long.flops < longer.flops
    adapter = LoraSettings(lora_r=4)
    assert generate(base, CODEC, ["1" * 5], 1, 1, lora=adapter)[0].flops == generation_flops(
        base.model.config, 1, 5, 1, lora_r=4
    )


# ---------------------------------------------------------------- sampling


@pytest.mark.slow
def test_samples_follow_the_seed(base):
    first, again, other = (_texts(base, temperature=2.0, seed=seed) for seed in (0, 0, 1))
    assert first == again != other and first != _texts(base)
    cold = _texts(base, temperature=1e-4)
    assert cold == _texts(base)  # so cold that only the likeliest is left


@pytest.mark.slow
@pytest.mark.parametrize("constrained", [False, True])
def test_a_contexts_draws_know_nothing_of_the_call(base, constrained):
    how = dict(temperature=1.5, seed=3, constrained=constrained)
    alone = {c: _texts(base, [c] * 3, **how) for c in CONTEXTS[:3]}
    assert all(len(set(texts)) > 1 for texts in alone.values())
    mixed = [CONTEXTS[i] for i in (2, 0, 1, 0, 2, 1, 1, 0, 2)]
    for batch_size in (50, 4):
        made = _texts(base, mixed, batch_size=batch_size, **how)
        assert {c: [t for m, t in zip(mixed, made, strict=True) if m == c] for c in CONTEXTS[:3]} == alone


def test_rows_of_one_prompt_are_as_rows_of_many(base, monkeypatch):
    """Greedy rows of one text, which hold it once, write what a row alone does, which holds its own; also where none can share."""
    alone = _texts(base, batch_size=1)
    for share in (True, False):
        if not share:
            monkeypatch.setattr(reading, "can_share", lambda *_: False)
        assert _texts(base, [c for c in CONTEXTS for _ in range(3)]) == [t for t in alone for _ in range(3)]


def test_samples_that_do_not_parse_are_left_out(base, monkeypatch):
    texts = ["1.00,2.00;", "1.00;", "3.00,4.00;"]
    monkeypatch.setattr("m2helpers.forecasting.generation.generate", lambda *_, **__: [Generated(t, 1) for t in texts])
    drawn = sample_forecasts(base, CODEC, np.ones((3, 2)), 1, 3)
    np.testing.assert_array_equal(drawn, [[[1, 2]], [[3, 4]]])
    texts[:] = ["x", "", ";"]
    assert sample_forecasts(base, CODEC, np.ones((3, 2)), 1, 3).shape == (0, 1, 2)


# ---------------------------------------------------------------- refusals


def test_impossible_requests_are_refused(base):
    with pytest.raises(UserError, match="a context is empty: give at least one step"):
        generate(base, CODEC, ["1.00,1.00;", ""], 1, 2)
    with pytest.raises(UserError, match="cannot forecast 0 steps: ask for at least 1"):
        forecast(base, CODEC, [np.ones((3, 2))], 0)
    with pytest.raises(UserError, match="cannot draw 0 samples: ask for at least 1"):
        sample_forecasts(base, CODEC, np.ones((3, 2)), 1, 0)
    with pytest.raises(UserError, match=r"shape \(5,\) cannot be encoded"):
        forecast(base, CODEC, [np.ones(5)], 1)
    with pytest.raises(UserError, match=r"limit 1,000"):
        forecast(base, CODEC, [np.full((2, 1), 2e3)], 1)


# ---------------------------------------------------------------- outputs that are no number


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "how", [{}, {"temperature": 0.9}, {"constrained": True}, {"constrained": True, "temperature": 0.9}]
)
def test_an_output_that_is_no_number_is_an_error(base, damage, how):
    with torch.no_grad():
        base.model.model.layers[1].mlp.down_proj.weight[3] = damage
    with pytest.raises(UserError, match="output is not a number: its weights are damaged or overflow; fetch or copy"):
        _texts(base, **how)


def test_one_row_that_is_no_number_is_an_error(base):
    """A token's own embedding is damaged: only the contexts that hold it are."""
    with torch.no_grad():
        base.model.model.embed_tokens.weight[24] = torch.nan  # a 9
        base.model.lm_head.weight = torch.nn.Parameter(base.model.lm_head.weight.nan_to_num())  # not its logit
    _bias(base, 24, -1000)  # and no 9 is drawn
    assert _texts(base, ["1.16,1.27;"], temperature=0.9)
    with pytest.raises(UserError, match="not a number"):
        _texts(base, ["1.16,1.27;", "9.99,9.98;"], temperature=0.9)
