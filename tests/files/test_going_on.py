"""An error that passes tells how to go on, where something was left to go on from."""

from __future__ import annotations

import pytest

from secateur.errors import SecateurError
from secateur.files.going_on import told_how_to_go_on


@pytest.mark.parametrize(
    ("error", "is_possible", "notes"),
    [
        (KeyboardInterrupt(), True, ["with --resume"]),
        (OSError(28, "No space left on device"), True, ["with --resume"]),
        (KeyboardInterrupt(), False, []),
        (SecateurError("bad input"), True, []),
    ],
)
def test_who_can_go_on_is_told_how(error: BaseException, is_possible: bool, notes: list[str]) -> None:
    with pytest.raises(type(error)) as caught, told_how_to_go_on("with --resume", lambda: is_possible):
        raise error
    assert getattr(caught.value, "__notes__", []) == notes
