"""Words to a phone's shell, and serial numbers: what a stranger has written stays a word."""

from __future__ import annotations

import subprocess

import pytest

from service.errors import DeviceLost
from workers.devices.adb import Adb, check_serial, quote

HOSTILE = ("; reboot", "$(id)", "`id`", "'", '"', "a b", "a\nb", "*", "-rf", "\\", "& true", "| cat", "> /x", "#", "")


@pytest.mark.parametrize("word", HOSTILE)
def test_a_shell_reads_a_quoted_word_as_that_word(word: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f"printf '%s\\0' {quote(word, 'next')}"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{word}\0next\0"


def test_without_quotes_the_words_would_be_commands() -> None:
    """Control."""
    done = subprocess.run(["sh", "-c", "printf '%s' $(echo hidden)"], capture_output=True, text=True, check=True)
    assert done.stdout == "hidden"


@pytest.mark.parametrize("serial", ["-s", "--help", "", "a;b", "a'b", "a\nb", "a/b", "$x", "`x`", "x" * 129, "\0"])
def test_what_cannot_be_a_serial_number_is_refused_before_adb_is_asked(serial: str) -> None:
    with pytest.raises(DeviceLost, match="cannot be a device's serial number"):
        Adb("127.0.0.1", 1).phone(serial)


@pytest.mark.parametrize("serial", ["emulator-5554", "192.0.2.7:5555", "R5CT1234ABC", "adb-X._adb-tls-connect._tcp"])
def test_serial_numbers_of_phones_pass(serial: str) -> None:
    assert check_serial(serial) == serial
