"""What a request may cost, estimated from charges for others."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagewatch.journal.prices import Asked, expected, kind_of


def charges(**known):
    """Charges for an image by quality, of requests to openai."""
    return {kind_of({"provider": "openai", "quality": quality}): prices for quality, prices in known.items()}


def cost(known, *, n=1, quality="low", assumed=150.0):
    return expected(Asked.of({"provider": "openai", "quality": quality, "n": n}), known, assumed)


def test_the_estimate_for_each_image_is_the_highest_charge_of_its_kind():
    found = cost(charges(low=[11, 12, 10], high=[167]), n=3)
    assert (found.low, found.usual, found.high, found.seen) == (30, 33, 36, 3)


def test_without_a_charge_of_its_kind_the_estimate_is_the_highest_charge_of_its_provider():
    found = cost(charges(high=[167], medium=[42]), n=2)
    assert (found.high, found.seen, found.usual) == (334, 0, None)
    assert "openai" in found.why


def test_without_any_charge_of_its_provider_the_estimate_is_the_assumed_credits_for_each_image():
    found = cost({}, n=4, assumed=150)
    assert (found.high, found.seen) == (600, 0)
    assert "limits.assumed_credits" in found.why


@pytest.mark.parametrize("field", ["provider", "model", "size", "quality"])
def test_provider_model_size_and_quality_make_another_kind(field):
    assert kind_of({"provider": "openai"}) != kind_of({"provider": "openai", field: "other"})


@pytest.mark.parametrize("field", ["n", "seed", "output_format"])
def test_other_options_do_not_make_another_kind(field):
    assert kind_of({"provider": "openai"}) == kind_of({"provider": "openai", field: 3})


@given(st.text(), st.text(), st.text())
def test_a_kind_is_the_same_when_it_is_read_from_disk(model, size, quality):
    fields = {"provider": "flux", "model": model, "size": size, "quality": quality}
    assert kind_of(json.loads(json.dumps(fields))) == kind_of(fields)
    assert kind_of(fields).isascii()


@pytest.mark.parametrize("n", [None, "3", 2.5, -1, 0, True])
def test_an_invalid_number_of_images_counts_as_one(n):
    assert Asked.of({"provider": "flux", "n": n}).n == 1


@given(st.floats(min_value=0, allow_infinity=False, exclude_min=True), st.integers(1, 4))
def test_a_cost_is_never_zero_and_never_infinite(price, n):
    found = cost(charges(low=[price]), n=n).high
    assert 0 < found < float("inf")
