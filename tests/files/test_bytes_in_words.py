from __future__ import annotations

import pytest

from secateur.files.bytes_in_words import in_words

WORDS = {0: "0 bytes", 999: "999 bytes", 1000: "1 kB", 999_400: "999 kB", 999_600: "1 MB", 6_580_040: "6.58 MB"}


@pytest.mark.parametrize("num_bytes", [*WORDS, 10**21])
def test_sizes_have_three_digits_and_a_unit(num_bytes: int) -> None:
    assert in_words(num_bytes) == (WORDS | {10**21: "1e+06 PB"})[num_bytes]
