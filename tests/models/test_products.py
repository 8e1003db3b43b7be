"""Products with weights in few bits: what they equal, and that rows do not meet in them."""

import pytest
import torch
import torch.nn.functional as F

from hf_dpzo.models import products
from hf_dpzo.models.products import has_int8_products, is_16_bit, multiply_exactly, multiply_integers, multiply_rounded


needs_int8_products = pytest.mark.skipif(not has_int8_products(), reason="the processor has no products of int8")


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


@pytest.fixture
def quantized(draw):
    """Return int8 weights `[48, 96]` and their scales `[48]`."""
    return (draw(48, 96) * 40).clamp(-128, 127).to(torch.int8), draw(48).abs() / 100


@needs_int8_products
def test_int8_products_are_as_near_to_float64_as_float32_ones(draw, quantized):
    integers, scale = quantized
    inputs, bias = draw(3, 7, 96) * torch.logspace(-3, 3, 96), draw(48)  # A few inputs are far above the others.
    weight = integers.double() * scale.double()[:, None]
    exact = F.linear(inputs.double(), weight, bias.double())
    found = multiply_integers(inputs, integers, scale, bias)
    assert found.dtype == torch.float32 and found.shape == exact.shape
    float32_error = (F.linear(inputs, weight.float(), bias) - exact).norm()
    assert (found - exact).norm() < 8 * float32_error


@needs_int8_products
def test_a_rows_int8_product_has_the_same_bits_in_every_batch_and_at_every_point(draw, quantized):
    inputs = draw(5, 7, 96)
    inputs[3] *= 1e6
    together = multiply_integers(inputs, *quantized, None)
    alone = torch.stack([multiply_integers(row[:1], *quantized, None)[0] for row in inputs])
    assert torch.equal(together[:, 0], alone)
    points = torch.stack([inputs, inputs.flip(0)])
    stacked = torch.func.vmap(lambda x: multiply_integers(x, *quantized, None))(points)
    assert torch.equal(stacked, torch.stack([together, together.flip(0)]))


@needs_int8_products
def test_int8_products_do_not_overflow():
    """A kernel without instructions for 8 bits adds pairs up in 16 bits, and would be off."""
    integers = torch.full((4, 1024), -128, dtype=torch.int8)
    found = multiply_integers(torch.full((2, 1024), -3.0), integers, torch.ones(4), None)
    assert torch.equal(found, torch.full((2, 4), 3.0 * 128 * 1024))


@needs_int8_products
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 1e-44])
def test_strange_rows_leave_their_neighbours_as_they_are(value, draw, quantized):
    inputs = draw(3, 96)
    before = multiply_integers(inputs, *quantized, None)
    inputs[1] = value
    after = multiply_integers(inputs, *quantized, None)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    expected = inputs[1] @ (quantized[0] * quantized[1][:, None]).t()
    assert torch.equal(after[1].isfinite(), expected.isfinite())
    assert value != 0 or not after[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_unpacked_where_a_processor_cannot_multiply_them(dtype, draw, monkeypatch):
    monkeypatch.setattr(products, "has_bfloat16_products", lambda: False)
    inputs, weight, bias = draw(3, 7, 96), draw(48, 96).to(dtype), draw(48).to(dtype)
    assert torch.equal(multiply_rounded(inputs, weight, bias), F.linear(inputs, weight.float()) + bias.float())


def test_bfloat16_products_round_inputs_and_outputs_alone(draw, monkeypatch):
    monkeypatch.setattr(products, "has_bfloat16_products", lambda: True)
    inputs, weight = draw(3, 7, 96), draw(48, 96).bfloat16()
    expected = F.linear(inputs.bfloat16().float(), weight.float())
    found = multiply_rounded(inputs, weight, None)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=2**-8, atol=1e-4)
    assert torch.equal(found, found.bfloat16().float()) and not torch.equal(found, expected)


def test_logits_are_those_of_float32_also_over_several_chunks(draw, monkeypatch):
    monkeypatch.setattr(products, "WORDS_PER_CHUNK", 20)
    inputs, weight, bias = draw(3, 7, 96), draw(48, 96).bfloat16(), draw(48).bfloat16()
    expected = F.linear(inputs, weight.float(), bias.float())
    assert torch.allclose(multiply_exactly(inputs, weight, bias), expected, rtol=0, atol=1e-5)


def test_only_plain_16_bit_weights_on_a_cpu_are_taken():
    assert is_16_bit(torch.zeros(2).bfloat16())
    assert not is_16_bit(torch.zeros(2).double())
    assert not is_16_bit(torch.zeros(2, dtype=torch.bfloat16, device="meta"))
