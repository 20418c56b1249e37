"""Bytes and rounding of quantised weights, held against what is loaded and against NF4 worked out by hand."""

import pytest
import torch
from transformers import BitsAndBytesConfig, Qwen2Config

from m2helpers.flops import CAP, QWEN_15B, forward_account
from m2helpers.instruct.evidence import measured_bytes, needs, quantisation_errors, weight_bytes
from m2helpers.instruct.quantised import load_for_tuning
from m2helpers.models import load_base
from m2helpers.settings import InstructSettings

pytestmark = pytest.mark.slow
# Appendix E of the paper: quantiles of a normal distribution, from -1 to 1, with an exact zero.
LEVELS = (-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0)
LEVELS += (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)
NF4 = torch.tensor(LEVELS)


def _rounded(weight):
    """Each block of 64 by its largest magnitude, each quotient to the nearest value, and back."""
    blocks = weight.float().reshape(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    return (NF4[(blocks / scales).unsqueeze(-1).sub(NF4).abs().argmin(-1)] * scales).reshape(weight.shape)


@pytest.fixture(scope="module")
def full():
    return load_base("embedded", head_bias=False, dtype="float32")


def test_rounding_is_to_the_nearest_of_sixteen_values(full):
    four = load_for_tuning("embedded", InstructSettings())
    found = quantisation_errors(full.model, four.model)
    assert len(found) == 6 * 7
    for layer, matrix, error in found.itertuples(index=False):
        block = "mlp" if matrix in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        weight = full.model.get_parameter(f"model.layers.{layer}.{block}.{matrix}.weight").detach()
        expected = torch.linalg.norm(weight - _rounded(weight)) / torch.linalg.norm(weight)
        assert error == pytest.approx(float(expected), rel=1e-3)


def test_computed_bytes_are_the_measured_ones(full):
    computed = weight_bytes(full.model)
    assert computed["float32"] == measured_bytes(full.model)
    assert computed["NF4, double"] == measured_bytes(
        load_for_tuning("embedded", InstructSettings(double_quant=True)).model
    )
    eight = BitsAndBytesConfig(load_in_8bit=True)
    assert computed["int8"] == measured_bytes(load_base("embedded", head_bias=False, quantised=eight).model)


def test_what_qwen_15b_needs_follows_from_its_config():
    need = needs(Qwen2Config(**QWEN_15B), InstructSettings(), rows=4, length=100)
    assert need["parameters"] == 1_543_714_304  # as the model card has it: 1.54 B, of them 1.31 B without the embedding
    assert need["quantised"] == 28 * (2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960)
    assert need["trainable"] == 28 * 16 * (1536 + 1536 + 1536 + 256)
    step = 3 * forward_account(QWEN_15B, 2, 100, lora_r=16, head_bias=False, loss=True).forward
    assert need["epoch_flops"] == 2 * (step + 3 * need["quantised"]) < CAP
