"""Every decoder on noise, and on damaged seeds. `make fuzz` searches further."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.brief import brief, no_hang
from tests.fuzz.fuzz_all import TARGETS
from tests.fuzz.fuzz_target import Target

# Line ends, text ends, signs, numbers too long for int(), half a surrogate, and brackets.
TOKENS = [
    b"\0",
    b"\n",
    b"\r",
    b" ",
    b":",
    b'"',
    b"-",
    b"_",
    b"\xff",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"\x1b[31m",
    b"\xe2\x80\xae",
]
TOKENS += [
    b"-1",
    b"0x",
    b"0x_",
    b"1e999",
    b"NaN",
    b"null",
    b"{}",
    b"[]",
    b"[" * 100,
    b"9" * 20,
    b"9" * 5000,
    b"\xff" * 8,
]


@st.composite
def changed(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """Draws a seed with up to six changes: bytes replaced, removed, inserted or repeated."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + draw(st.sampled_from([1, 4, 40])))))
        put = draw(
            st.one_of(st.sampled_from(TOKENS), st.binary(max_size=4), st.just(b""), st.just(data[start:end] * 3))
        )
        data = data[:start] + put + data[end:]
    return data


EACH = pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))


@EACH
def test_every_seed_is_decoded(target: Target) -> None:
    seeds = list(target.seeds())
    assert seeds
    for seed in seeds:
        assert len(seed) <= target.longest
        target.run(seed)


@EACH
def test_noise_and_damage_raise_expected_errors_only(target: Target) -> None:
    seeds = list(target.seeds())

    @brief(40)
    @given(st.one_of(changed(seeds), changed(seeds), st.binary(max_size=300)))
    def run(data: bytes) -> None:
        target.run(data)

    with no_hang():
        run()
