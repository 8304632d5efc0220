"""The machinery of options by itself: fields, words for what is allowed, values in messages."""

import dataclasses

import pytest

from tinyllama.config.options import (
    allowed,
    convert,
    nearest,
    option,
    options_of,
    shown,
    text_rows,
    to_toml,
)


def test_an_option_is_a_field_with_its_default_and_its_help() -> None:
    made = dataclasses.make_dataclass(
        "Made", [("width", int, option(3, "how wide")), ("name", str, option("x", "what it is"))]
    )
    instance = made()
    assert (instance.width, instance.name) == (3, "x")
    assert options_of("section", made) == (
        ("section.width", "width", 3, int, "how wide"),
        ("section.name", "name", "x", str, "what it is"),
    )


def test_a_list_that_may_be_empty_is_a_list_of_its_items() -> None:
    assert allowed(tuple[int, ...]) == "a list, each item an integer"
    assert convert([], tuple[int, ...]) == ()
    with pytest.raises(ValueError, match="float"):
        convert([1.5], tuple[int, ...])


def test_values_are_shown_whole_up_to_100_characters() -> None:
    text = "y" * 98  # and two quotes
    assert shown(text) == f'"{text}"'
    assert shown(text + "y") == f'"{text}y...'
    assert shown(None) == "nothing"


def test_letters_of_another_alphabet_are_written_as_they_are() -> None:
    assert to_toml("é") == '"é"'


def test_tables_and_lists_are_written_on_one_line() -> None:
    assert to_toml({"a": 1, "b": [2, True]}) == '{"a" = 1, "b" = [2, true]}'


def test_initials_make_a_name_near() -> None:
    names = ["kline", "keep_last_n"]
    assert nearest("kln", names) == "keep_last_n"
    assert nearest("klin", names) == "kline"


def test_options_for_a_terminal_are_a_line_each_and_indented_text_below() -> None:
    made = dataclasses.make_dataclass(
        "Made",
        [
            ("width", int, option(3, "how wide the stream is that runs through all layers, say")),
            ("name", str | None, option(None, "what it is")),
        ],
    )
    assert list(text_rows(options_of("section", made))) == [
        "  section.width = 3",
        "      how wide the stream is that runs through all layers, say",
        "      allowed: an integer",
        "  section.name = (not set)",
        "      what it is",
        "      allowed: a string",
    ]


def test_text_for_a_terminal_is_broken_at_80_columns() -> None:
    def rows(help_text: str) -> list[str]:
        made = dataclasses.make_dataclass("Made", [("a", int, option(3, help_text))])
        return list(text_rows(options_of("s", made)))

    assert rows("x" * 70 + " yyy")[1] == " " * 6 + "x" * 70 + " yyy"
    assert rows("x" * 70 + " yyyy")[1] == " " * 6 + "x" * 70 + "\n" + " " * 6 + "yyyy"
