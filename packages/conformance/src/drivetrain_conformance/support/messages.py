"""The rules for texts of errors, as checks."""

from __future__ import annotations

import pickle
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from drivetrain_interfaces import DrivetrainError

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Names that the contract gives a meaning to (docs/contracts/precision.md).
KNOWN_PRECISIONS = ("16-mixed", "16-true", "32-true", "64-true", "bf16-mixed", "bf16-true")

_APOLOGIES = re.compile(r"please|sorry|something went wrong|contact us|oops", re.IGNORECASE)


@contextmanager
def refused(
    kind: type[DrivetrainError] | tuple[type[DrivetrainError], ...], *, naming: str, rule: str
) -> Iterator[pytest.ExceptionInfo[DrivetrainError]]:
    """Expect an error whose text names what was asked for and follows the rules for texts.

    Args:
        kind: The class, or classes, of the error.
        naming: A pattern for what the text must name; case does not matter.
        rule: The rule in words, with its number.
    """
    try:
        with pytest.raises(DrivetrainError) as caught:
            yield caught
    except pytest.fail.Exception:
        pytest.fail(f"{rule}; nothing was raised")
    except Exception as other:  # noqa: BLE001 - the report says what it was
        pytest.fail(f"{rule}; what was raised is {type(other).__name__}: {other}")
    error = caught.value
    assert isinstance(error, kind), f"{rule}; what was raised is {type(error).__name__}: {error}"
    assert re.search(naming, str(error), re.IGNORECASE), (
        f"{rule}; the text must name what was asked for ({naming!r}), and it is: {error}"
    )
    check_text(error)


def check_text(error: DrivetrainError) -> None:
    """Check that an error says what was asked and found, then what to do, and that it pickles."""
    text = f"{type(error).__name__}: {error}"
    assert error.message.strip(), f"an error says what was asked for and what was found: {text}"
    assert error.hint.strip(), f"an error says what to do, in a second sentence: {text}"
    for part in (error.message, error.hint):
        assert part.rstrip()[-1] in ".:!?)", f"an error is made of whole sentences: {text}"
    assert str(error).endswith(f"[{error.code}]"), f"an error ends with its code: {text}"
    apology = _APOLOGIES.search(str(error))
    assert apology is None, f"an error does not say {apology and apology.group()!r}: {text}"
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - made one call earlier
    assert type(copy) is type(error), f"an error survives pickling: {text}"
    assert str(copy) == str(error), f"an error survives pickling with its text: {text}"
