"""The right name for a file whose name is almost a prompt's, and what its sender reads about it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagewatch.inbox.advice import for_name, why_ignored
from imagewatch.protocol.names import fits, near_miss, stem_of
from imagewatch.protocol.right_name import right_name


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("x.prompt.txt.txt", "x.prompt.txt"),
        ("x.Prompt.TXT", "x.prompt.txt"),
        ("x.PROMPT.txt", "x.prompt.txt"),
        ("x.prompt (1).txt", "x (1).prompt.txt"),
        ("x.prompt.txt (1)", "x (1).prompt.txt"),
        ("x.prompt - Copy.txt", "x - Copy.prompt.txt"),
        ("x.prompt.txt.partial", "x.prompt.txt"),
        ("x.prompt", "x.prompt.txt"),
        ("x.promt.txt", "x.prompt.txt"),
        ("x.prmpt.txt", "x.prompt.txt"),
        ("x_prompt.txt", "x.prompt.txt"),
        ("my cat prompt.txt", "my cat.prompt.txt"),
        ("x.prompt.md", "x.prompt.txt"),
        ("x.prompt.docx", "x.prompt.txt"),
        ("x.prompt.txt ", "x.prompt.txt"),
        ("x.prompt.txt.", "x.prompt.txt"),
        ("x.prompt.txt.bak", "x.prompt.txt"),
        ("~x.prompt.txt", "x.prompt.txt"),
        ("#x.prompt.txt", "x.prompt.txt"),
        ("notes.txt", "notes.prompt.txt"),
        ("a.b.prompt.txt.txt", "a.b.prompt.txt"),
        ("prompt.txt", None),
        ("prompt (1).txt", None),
        (".prompt.txt", None),
    ],
)
def test_a_name_that_is_almost_right_has_a_right_one(name: str, right: str | None) -> None:
    assert near_miss(name)
    assert right_name(name) == right


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("x.prompt.txt.txt", "rename x.prompt.txt.txt to x.prompt.txt"),
        ("my x.promt.txt", 'rename "my x.promt.txt" to "my x.prompt.txt"'),
        ("x.prompt.txt.partial", "if the transfer is complete, rename x.prompt.txt.partial to x.prompt.txt"),
        ("x.prompt.docx", "save it as plain text with the name x.prompt.txt"),
        ("notes.txt", "if it is a prompt, rename notes.txt to notes.prompt.txt; if not, move it out of the inbox"),
        ("prompt (1).txt", "rename it to NAME.prompt.txt, with a NAME of your choice"),
    ],
)
def test_the_next_step_says_how_it_becomes_a_prompt(name: str, step: str) -> None:
    assert for_name(name) == step


def test_a_sender_who_does_not_see_the_last_ending_reads_that_there_is_one() -> None:
    assert why_ignored("a/x.prompt.txt.txt", "not a prompt") == "not a prompt (Windows may not show the last .txt)"
    assert why_ignored("a/x.prompt", "not a prompt") == "not a prompt"


names = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=255
) | st.lists(
    st.sampled_from(
        ["cat", ".prompt", ".txt", ".TXT", " (1)", " - Copy", ".", "~", "#", " ", "prompt", ".md", ".part"]
    ),
    min_size=1,
    max_size=9,
).map("".join)


@given(names)
def test_a_right_name_is_always_that_of_a_prompt_and_another_one(name: str) -> None:
    right = right_name(name)
    assert right is None or (stem_of(right) and right != name and fits(right) and "/" not in right)
