"""Numbers as people write and read them."""

import pytest

from sa_convert.console.amounts import format_percent, human_bytes, human_count, parse_percent


@pytest.mark.parametrize(
    ("text", "value"), [("8%", 0.08), ("8.0 %", 0.08), (" 0% ", 0.0), ("100%", 1.0), ("0.5%", 0.005)]
)
def test_percent(text, value):
    assert parse_percent(text) == value


@pytest.mark.parametrize("text", [8, 0.08, "8", "%", "-1%", "100.1%", "1e1%", None, True, "8%%", "5% 6%"])
def test_no_percent(text):
    with pytest.raises(ValueError, match="%"):
        parse_percent(text)


def test_percent_survives_writing():
    for percent in [f"{n / 8}%" for n in range(801)] + ["7%", "29%", "33.333333333%", "0.0001%"]:
        value = parse_percent(percent)
        assert parse_percent(format_percent(value)) == value


def test_percent_is_written_short():
    assert [format_percent(value) for value in (0.07, 0.5, 1.0, 0.0, 0.085, 0.1 + 0.2)] == [
        "7%", "50%", "100%", "0%", "8.5%", "30.000000000000004%",
    ]  # fmt: skip


def test_human_sizes():
    sizes = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 999_949: "999.9 kB", 999_960: "1.0 MB", 269_060_552: "269.1 MB"}
    for size, text in sizes.items():
        assert human_bytes(size) == text
    assert human_bytes(16_060_522_496) == "16.1 GB"
    assert [human_count(n) for n in (272, 134_515_008, 8_030_261_248)] == ["272", "134.5 M", "8.0 B"]
