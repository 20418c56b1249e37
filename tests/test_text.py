"""The codec: round trip, strict decoding, limits, tokens, windows and padding."""

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Split
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from m2helpers.files import UserError
from m2helpers.models import embedded_tokenizer
from m2helpers.text import Codec, fit_scale, left_pad, right_pad, tokenise, windows

NUMERIC = st.text(alphabet="0123456789.-,;", max_size=60)


@st.composite
def series(draw):
    """Scaled values of any sign under the limit, with a codec whose scale brings them there."""
    shape = (draw(st.integers(0, 12)), draw(st.integers(1, 4)))
    scaled = draw(arrays(np.float64, shape, elements=st.floats(-999.4, 999.4)))
    codec = Codec(10 ** draw(st.floats(-4, 4)), draw(st.integers(0, 6)))
    return scaled / codec.scale, codec


# ---------------------------------------------------------------- encoding


@pytest.mark.slow
@given(series())
def test_round_trip_is_within_half_a_digit(example):
    values, codec = example
    text = codec.encode(values)
    decoded = codec.decode(text, values.shape[1])
    assert decoded.stop == len(text)
    assert decoded.values.shape == values.shape
    error = np.abs(decoded.values - values) * codec.scale
    assert error.max(initial=0) <= 0.5 * 10.0**-codec.precision + 1e-9


@pytest.mark.slow
@given(series())
def test_text_follows_the_grammar(example):
    values, codec = example
    text = codec.encode(values)
    decimals = rf"\.\d{{{codec.precision}}}" if codec.precision else ""
    number = rf"(?!-0(\.0+)?[,;])-?(0|[1-9]\d{{0,2}}){decimals}"
    step = ",".join([number] * values.shape[1]) + ";"
    assert re.fullmatch(f"({step})*", text)
    assert set(text) <= set(codec.alphabet)
    if len(values):
        assert min(map(len, text.split(";")[:-1])) + 1 >= codec.shortest_step(values.shape[1])


def test_the_example_of_the_design():
    values = np.array([[1.16, 1.27], [0.90, 0.95], [0.83, 0.69]])
    assert Codec(1.0).encode(values) == "1.16,1.27;0.90,0.95;0.83,0.69;"
    assert Codec(2.0, 1).encode(values[:1]) == "2.3,2.5;"
    assert Codec(100.0, 0).encode(values[:1]) == "116,127;"
    assert Codec(1.0, variable_separator=" ", step_separator="\n").encode(values[:2]) == "1.16 1.27\n0.90 0.95\n"
    assert Codec(1.0, variable_separator="%", step_separator="|").encode(values[:1]) == "1.16%1.27|"


def test_minus_zero_is_written_as_zero():
    assert Codec(1.0).encode([[-0.0, -0.004, -0.006]]) == "0.00,0.00,-0.01;"
    assert Codec(1.0, 0).encode([[-0.4]]) == "0;"


def test_shortest_step():
    for precision, n_variables in ((2, 2), (0, 1), (3, 4)):
        codec = Codec(1.0, precision)
        assert codec.shortest_step(n_variables) == len(codec.encode(np.zeros((1, n_variables))))


@pytest.mark.parametrize("value", [999.999, 1000.0, -1234.5, 1e30, float("inf")])
def test_a_value_over_the_digit_limit_is_refused(value):
    with pytest.raises(UserError, match=r"limit 1,000") as error:
        Codec(2.0).encode([[1.0, 2.0], [3.0, value / 2]])
    assert f"{value / 2:g}" in str(error.value) and "step 1, variable 1" in str(error.value)


def test_the_digit_limit_is_a_setting():
    assert Codec(1.0, max_integer_digits=5).encode([[12345.0]]) == "12345.00;"
    with pytest.raises(UserError, match=r"99\.996 .* is 100 .* limit 100:"):
        Codec(1.0, max_integer_digits=2).encode([[99.996]])
    assert Codec(1.0).encode([[999.99]]) == "999.99;"


def test_a_value_that_is_no_number_is_refused():
    with pytest.raises(UserError, match="value nan"):
        Codec(1.0).encode([[float("nan")]])


@pytest.mark.parametrize("shape", [(3,), (2, 0), (1, 2, 3), ()])
def test_a_wrong_shape_is_refused(shape):
    with pytest.raises(UserError, match=re.escape(str(shape))):
        Codec(1.0).encode(np.zeros(shape))


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(scale=0.0), "scale 0.0"),
        (dict(scale=-1.0), "scale -1.0"),
        (dict(scale=float("nan")), "scale nan"),
        (dict(scale=float("inf")), "scale inf"),
        (dict(precision=-1), "precision -1"),
        (dict(max_integer_digits=0), "0 integer digits"),
        (dict(variable_separator=";"), "separators"),
        (dict(step_separator=""), "separators"),
        (dict(step_separator=";;"), "separators"),
        (dict(variable_separator="."), "separators"),
        (dict(variable_separator="-"), "separators"),
        (dict(step_separator="7"), "separators"),
    ],
)
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        Codec(**dict(scale=1.0) | settings)


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    "text, whole, stop",
    [
        ("", 0, 0),
        ("1.00,2.00;3.00,4.00;", 2, 20),
        ("1.00,2.00;3.00,4.00", 1, 10),  # the last step lacks its separator
        ("1.00,2.00;3.00;4.00,5.00;", 1, 10),  # a step with one value
        ("1.00,2.00;3.00,4.00,5.00;", 1, 10),  # and with three
        ("1.00,2.00;x3.00,4.00;", 1, 10),  # junk
        ("1.00,2.00; 3.00,4.00;", 1, 10),  # a space
        ("1.00,2.00;03.00,4.00;", 1, 10),  # a leading zero
        ("1.00,2.00;3.0,4.00;", 1, 10),  # too few decimals
        ("1.00,2.00;3.000,4.00;", 1, 10),  # too many
        ("1.00,2.00;3,4.00;", 1, 10),  # none
        ("1.00,2.00;.50,4.00;", 1, 10),  # no digit before the point
        ("1.00,2.00;1000.00,4.00;", 1, 10),  # more digits than the limit
        ("1.00,2.00;--1.00,4.00;", 1, 10),
        ("1.00,2.00;+1.00,4.00;", 1, 10),
        ("1.00,2.00;3٣.00,4.00;", 1, 10),  # digits, but not ours
        ("1.00,2.00;3.0٠,4.00;", 1, 10),
        ("1.00,2.00;;3.00,4.00;", 1, 10),
        ("00,2.00;3.00,4.00;", 0, 0),  # begins inside a number
        ("1.00,2.00;-999.99,0.00;<|endoftext|>", 2, 23),
    ],
)
def test_decoding_is_strict_and_never_fills_in(text, whole, stop):
    decoded = Codec(1.0).decode(text, 2)
    assert decoded.values.shape == (whole, 2) and decoded.stop == stop


@pytest.mark.slow
@given(series(), st.data())
def test_a_cut_text_decodes_to_its_whole_steps(example, data):
    values, codec = example
    text = codec.encode(values)
    cut = text[: data.draw(st.integers(0, len(text)))]
    decoded = codec.decode(cut, values.shape[1])
    assert len(decoded.values) == cut.count(";") and decoded.stop == cut.rfind(";") + 1


@given(NUMERIC, st.integers(1, 2), st.integers(0, 2))
def test_what_decodes_is_what_encode_writes(text, n_variables, precision):
    codec = Codec(1.0, precision)
    decoded = codec.decode(text, n_variables)
    read = re.sub(r"-(0(\.0+)?[,;])", r"\1", text[: decoded.stop])  # a sign before nothing but zeros is read too
    assert codec.encode(decoded.values) == read
    assert decoded.stop == 0 or text[decoded.stop - 1] == ";"


def test_decoding_gives_back_the_units():
    np.testing.assert_allclose(Codec(4.0).decode("1.00,-2.00;", 2).values, [[0.25, -0.5]])


# ---------------------------------------------------------------- scale


def test_scale_puts_the_percentile_at_ten():
    values = np.random.default_rng(0).gamma(2, 1, (50, 40, 2))
    assert np.percentile(values * fit_scale(values), 99.7) == pytest.approx(10)
    assert fit_scale(-values) == fit_scale(values)


@pytest.mark.parametrize("values", [np.zeros((3, 2)), np.full((3, 2), np.nan)])
def test_no_scale_without_values(values):
    with pytest.raises(UserError, match=r"99\.7th percentile of the values is (0|nan)"):
        fit_scale(values)


# ---------------------------------------------------------------- tokens


def test_one_token_a_character():
    (ids, negative) = tokenise(["1.23", "-0.95,;"], embedded_tokenizer())
    assert ids.tolist() == [16, 13, 17, 18] and ids.dtype == np.int64
    assert negative.tolist() == [12, 15, 13, 24, 20, 11, 26]
    assert tokenise([], embedded_tokenizer()) == []


def _byte_level(merges, **options):
    """A small byte-level BPE over the characters of numeric text, like GPT-2's."""
    vocab = {symbol: i for i, symbol in enumerate([*"0123456789.,;-Ġ", *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(BPE(vocab, merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False, **options)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_tokenizer_that_merges_digits_is_refused():
    assert len(tokenise(["1.23;"], _byte_level([]))[0]) == 5  # the same without a merge
    merging = _byte_level([("2", "3")])
    with pytest.raises(UserError, match=r"'1\.23;'… as 4 tokens, not 5: it merges characters; use a base"):
        tokenise(["0.14;", "1.23;"], merging)


def test_a_minus_is_a_token_of_its_own_where_the_vocabulary_merges_it_with_separators():
    plain, merging = _byte_level([]), _byte_level([(",", "-"), (";", "-")])
    text = "-1.25,-0.50;-2.00,3.00;"
    assert len(merging(text)["input_ids"]) == len(text) - 2
    assert tokenise([text], merging)[0].tolist() == tokenise([text], plain)[0].tolist() == plain(text)["input_ids"]


def _qwen(merges):
    """Qwen2's own tokenizer class, which splits digits before it merges, with the bytes and some merges of Qwen2.5's."""
    vocab = embedded_tokenizer().get_vocab()
    for left, right in merges:
        vocab[left + right] = len(vocab)
    return Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.mark.parametrize("precision", [0, 2])
def test_merges_of_qwen_leave_numeric_text_one_token_a_character(precision):
    tokenizer = _qwen([(",", "-"), (";", "-"), (".", ","), ("0", "0"), ("1", "2"), (";", ";")])
    assert len(tokenizer(",-;-")["input_ids"]) == 2  # the merges are in use
    text = Codec(1.0, precision).encode([[-100.0, -12.12], [12.12, -0.5], [0.0, 0.0]])
    assert tokenizer(text)["input_ids"] != embedded_tokenizer()(text)["input_ids"]
    (ids,) = tokenise([text], tokenizer)
    assert ids.tolist() == embedded_tokenizer()(text)["input_ids"] and len(ids) == len(text)
    assert tokenizer.decode(ids) == text  # so what is learned is read back


@pytest.mark.parametrize("merge", [("0", "0"), ("1", "."), (".", "5"), ("0", ";"), ("0", ",")])
def test_a_merge_with_a_digit_is_refused_in_words(merge):
    with pytest.raises(UserError, match="merges characters; use a base whose tokenizer splits digits, such as Qwen2"):
        tokenise(["100.50,1.50;"], _byte_level([merge]))


def test_a_tokenizer_that_adds_and_merges_is_refused():
    """As many tokens as characters, but not one for each: a space put in front, and one pair merged."""
    tokenizer = Tokenizer(BPE({s: i for i, s in enumerate([*"0123456789.,;Ġ", "23"])}, [("2", "3")]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True, use_regex=False)
    with pytest.raises(UserError, match="a token of its own"):
        tokenise(["1.23,1;"], PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def test_a_tokenizer_that_does_not_know_a_character_is_refused():
    tokenizer = Tokenizer(WordLevel({s: i for i, s in enumerate([*"0123456789.,", "<unk>"])}, "<unk>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    with pytest.raises(UserError, match="a token of its own"):
        tokenise(["1.2;"], PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))


# ---------------------------------------------------------------- windows and padding


def test_the_last_short_window_is_kept():
    assert windows(1000, 512, 512) == [(0, 512), (512, 1000)]
    assert windows(1024, 512, 512) == [(0, 512), (512, 1024)]
    assert windows(100, 512, 512) == [(0, 100)]
    assert windows(0, 512, 512) == []


@given(st.integers(1, 300), st.integers(1, 80), st.integers(1, 80))
def test_windows_cover_every_token_and_none_repeats_the_last(n, length, stride):
    stride = min(stride, length)
    spans = windows(n, length, stride)
    assert spans[0][0] == 0 and spans[-1][1] == n
    for (start, stop), (later, end) in pairwise(spans):
        assert later == start + stride and later <= stop < end  # no gap, and something new
    assert all(0 < stop - start <= length for start, stop in spans)


def test_right_padding():
    ids, mask = right_pad([np.array([1, 2, 3]), np.array([4])], 9)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_left_padding():
    ids, mask = left_pad([np.array([1, 2, 3]), np.array([4])], 9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
