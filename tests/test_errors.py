"""How programs end."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from emu3_megatron.errors import MachineFault, UserError, run_main


def _raising(error: Exception) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("a\nb"), 2),
        (ValueError("a b"), 2),
        (FileNotFoundError("a b"), 2),
        (MachineFault("a\nb"), 1),  # job scripts start it again
    ],
)
def test_errors_are_one_line_and_their_code_says_who_can_mend_them(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMU3_TRACEBACK", "")
    with pytest.raises(SystemExit) as ended:
        run_main(_raising(error))
    assert ended.value.code == code
    assert capsys.readouterr().err == "error: a b\n"
