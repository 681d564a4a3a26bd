"""Whose is a file? The names that people, editors and transfer tools leave in a folder."""

from __future__ import annotations

import os
import random
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagewatch.protocol.image_kinds import IMAGE_ENDINGS
from imagewatch.protocol.names import (
    MOST_SIMILAR,
    NAME_MAX,
    SUFFIX,
    Siblings,
    final_name,
    fits,
    fitted,
    group,
    near_miss,
    stem_of,
    suffix_of,
    tagged,
)

JOB = "7f3a9c0d1e2b4a5f"


def alone(*names: str) -> Siblings:
    """What belongs to the only prompt among some names."""
    (dropped,) = group(names).values()
    return dropped


def size(name: str) -> int:
    return len(os.fsencode(name))


# What is a prompt


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("cat.prompt.txt", "cat"),
        ("a b.c.prompt.txt", "a b.c"),
        ("Ünïcödé 猫.prompt.txt", "Ünïcödé 猫"),
        ("cat.png.prompt.txt", "cat.png"),
        ("cat.prompt.txt.prompt.txt", "cat.prompt.txt"),
        ("\udce9t\udce9.prompt.txt", "\udce9t\udce9"),
        ("-.prompt.txt", "-"),
        ("new\nline.prompt.txt", "new\nline"),
    ],
)
def test_a_name_that_ends_in_exactly_prompt_txt_is_a_prompt(name, stem):
    assert stem_of(name) == stem
    assert group([name])[stem].prompt == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "prompt.txt",
        ".prompt.txt",
        "._cat.prompt.txt",
        "~cat.prompt.txt",
        "~$cat.prompt.txt",
        "#cat.prompt.txt",
        "cat.Prompt.txt",
        "cat.prompt.TXT",
        "cat.prompt.txt ",
        "cat.prompt.txt\n",
        "cat.prompt.txt.partial",
        "cat_prompt.txt",
        "cat.txt",
    ],
)
def test_hidden_names_and_names_that_only_resemble_a_prompt_are_none(name):
    assert stem_of(name) is None
    assert group([name]) == {}


@pytest.mark.parametrize(
    "name",
    [
        "cat.prompt.txt.txt",
        "cat.Prompt.TXT",
        "cat.PROMPT.TXT",
        "prompt (1).txt",
        "cat.prompt (1).txt",
        "cat.prompt.txt.partial",
        "cat.prompt.sync-conflict-20260101-101010-ABCDEFG.txt",
        "cat.prompt (conflicted copy 2026-01-01).txt",
        "cat.prompt.md",
        "cat.prompt.docx",
        "cat.prompt",
        "prompt.txt",
        ".prompt.txt",
        "cat.txt",
        "cat.promt.txt",
        "cat.promt.md",
        "#1 cat.prompt.txt",
        "~cat.prompt.txt",
    ],
)
def test_a_near_miss_is_recognised_as_one(name):
    assert near_miss(name)
    assert stem_of(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        "cat.prompt.txt",
        "cat.png",
        "notes.md",
        ".cat.prompt.txt",
        "._cat.prompt.txt",
        ".cat.prompt.txt.swp",
        "~$cat.prompt.txt",
        "~$prompt.docx",
        "#prompt.txt#",
        "cat.prompt.txt~",
        "cat.prompt.txt:Zone.Identifier",
    ],
)
def test_a_prompt_another_file_a_hidden_file_and_a_backup_are_no_near_misses(name):
    assert not near_miss(name)


def test_the_suffix_is_what_follows_the_last_dot_in_lower_case():
    assert [suffix_of(name) for name in ("a.PNG", "a.b.Jpg", "a", "", "a.", ".png")] == [
        "png",
        "jpg",
        "",
        "",
        "",
        "png",
    ]


# Whose image


def test_the_plain_image_comes_first_and_the_numbered_ones_in_number_order():
    names = ["cat.prompt.txt", "cat.10.png", "cat.2.jpg", "cat.1.webp", "cat.png", "cat.03.JPEG"]
    assert alone(*names).images == ["cat.png", "cat.1.webp", "cat.2.jpg", "cat.03.JPEG", "cat.10.png"]


def test_the_plain_image_comes_before_number_zero():
    assert alone("cat.prompt.txt", "cat.0.png", "cat.png", "cat.jpg").images == ["cat.jpg", "cat.png", "cat.0.png"]


def test_the_order_in_which_a_folder_is_listed_does_not_matter():
    names = [f"cat.{k}.png" for k in range(15)] + ["cat.png", "cat.webp", "cat.gif", "cat.prompt.txt"]
    shuffled = names.copy()
    random.Random(4).shuffle(shuffled)
    assert alone(*shuffled) == alone(*names)


@pytest.mark.parametrize("name", ["cat.png", "cat.PNG", "cat.jpg", "cat.JPeG", "cat.webp", "cat.1.png", "cat.007.jpg"])
def test_an_image_of_exactly_the_stems_name_belongs_to_it_in_any_case_of_the_suffix(name):
    assert alone("cat.prompt.txt", name).images == [name]


@pytest.mark.parametrize(
    "name",
    [
        "catalog.png",
        "cat-2.png",
        "cat_2.png",
        "cat2.png",
        "cat.png.bak",
        "cat.final.png",
        "cat.1.2.png",
        "cat.-1.png",
        "cat.1a.png",
        "cat.².png",
        "cat.\u0661.png",
        "cat..png",
        "cat.sync-conflict-20260101-101010-ABCDEFG.png",
        "cat (conflicted copy 2026-01-01).png",
        "Cat.png",
        " cat.png",
        "cat .png",
        ".cat.png",
        "._cat.png",
        "~cat.png",
        "#cat.png",
        "cat.prompt.png",
        "cat.png\n",
    ],
)
def test_no_wildcard_ever_makes_a_file_an_image_of_a_prompt(name):
    dropped = alone("cat.prompt.txt", name)
    assert dropped.images == []


def test_a_numbered_name_that_is_the_plain_image_of_another_prompt_is_that_prompts_alone():
    stems = group(["cat.prompt.txt", "cat.1.prompt.txt", "cat.1.png", "cat.2.png", "cat.1.1.png"])
    assert stems["cat"].images == ["cat.2.png"]
    assert stems["cat.1"].images == ["cat.1.png", "cat.1.1.png"]


def test_a_file_with_any_ending_of_an_image_is_one_and_its_content_decides_whether_it_can_be_sent():
    names = ["cat.prompt.txt", "cat.gif", "cat.HEIC", "cat.3.tiff", "cat.mpo", "cat.png", "cat.doc", "dog.gif"]
    assert alone(*names).images == ["cat.HEIC", "cat.gif", "cat.mpo", "cat.png", "cat.3.tiff"]
    assert alone(*names, "cat.4.jpg_large", "cat.5.pjpeg", "cat.jfif").images[-2:] == ["cat.4.jpg_large", "cat.5.pjpeg"]


# Which other files may be meant for a prompt

MEANT = {
    "cat": (  # noqa: SIM905  quoted one by one they would be harder to read
        "cat.MP.jpg|cat.jpg.jpg|cat.final.png|cat.prompt.jpg|cat.prompt.png|cat.prompt.txt.png|cat.prompt (1).jpg|"
        "Cat.png|CAT.1.PNG|cat.-1.png|cat.1.2.png|cat.1234567890.png|cat.in1.png|cat..png|cat.png |cat.unknown|"
        "cat.log|cat.prompt.docx|cat.prompt.txt.gpg|cat.sync-conflict-20260101-101010-ABCDEFG.png|cat|"
        "cat (copy).png|cat (another copy).png|cat (3rd copy).png|cat - Copy.png|cat - Copy (2).png|cat copy.png|"
        "cat copy 2.png|cat-copy.jpg|"
        "cat (1).png|cat(1).png|cat[1].jpg|cat-2.png|cat_2.png|cat 2.png|cat2.png|cat~2.jpg|"
        "under_1.png|cat - Kopie.png|cat - Kopie (2).png|Copy of cat.png|Copy (2) of cat.jpg|Kopie von cat.png|"
        "cat (conflicted copy 2026-01-01).png|cat (Jane's conflicted copy 2026-01-01).png|CAT-1.gif|"
        "cat 12.webp|cat .png|"
        "cat (1).pdf|cat-2.unknown"
    ).split("|"),
    "photo.jpg": [
        "photo.jpg",
        "Photo.JPG",
        "photo (1).jpg",
        "photo - Copy.jpg",
        "photo.jpg (1)",
        "photo.jpg.final.jpg",
    ],
    "a.b": ["a.b.c.png", "A.B.png", "a.b-2.png", "a.b (1).png"],
    "caf\u00e9": ["CAFE\u0301.png", "Cafe\u0301-2.png", "cafe\u0301 (1).webp", "cafe\u0301.final.png"],
}


@pytest.mark.parametrize(
    ("stem", "name"),
    [(("under" if name == "under_1.png" else stem), name) for stem, names in MEANT.items() for name in names],
)
def test_a_file_that_may_be_meant_for_a_prompt_is_known_for_it_and_not_used(stem, name):
    dropped = alone(f"{stem}.prompt.txt", name)
    assert (dropped.images, dropped.uncertain, dropped.busy) == ([], [name], [])


@pytest.mark.parametrize(
    "name",
    [
        *(
            "catalog.png",
            "dog-2.png",
            "cat-2026.png",
            "2.png",
            "category.1.png",
            "concat.png",
            "ca.png",
            "cat-final.png",
        ),
        *(".cat-2.png", "._cat.png", "~cat.png", "#cat.png", ".cat.final.png", " cat.png"),
        # What editors, transfers and backups leave.
        *("cat.png~", "cat.jpg_original", "cat.png.bak", "cat.bak", "cat.png.orig", "cat.lock", "cat.prompt.txt.lock"),
        *("cat.prompt.txt~", "cat.png:Zone.Identifier", "cat.log.tmp", "cat.log.part", "cat.old", "cat.png.backup"),
    ],
)
def test_a_file_that_is_not_meant_for_a_prompt_is_not_uncertain(name):
    assert alone("cat.prompt.txt", name).uncertain == []


def test_a_file_may_be_meant_for_the_prompt_alone_whose_name_is_most_like_its_own():
    names = ["cat", "cat.1", "cat-2", "Cat", "photo", "photo.jpg"]
    files = ["cat.1.final.png", "cat-2.final.png", "Cat.final.png", "cat.final.png", "CAT.final.png", "photo.jpg"]
    stems = group([*(f"{name}.prompt.txt" for name in names), *files])
    assert {stem: dropped.uncertain for stem, dropped in stems.items()} == {
        "cat": ["CAT.final.png", "cat.final.png"],
        "cat.1": ["cat.1.final.png"],
        "cat-2": ["cat-2.final.png"],
        "Cat": ["CAT.final.png", "Cat.final.png"],
        "photo": [],  # photo.jpg is its image
        "photo.jpg": [],
    }


def test_a_transfer_of_a_file_that_may_be_meant_holds_the_prompt():
    marks = [".cat-2.png.AbC123", "cat.final.jpg.part", "Cat.png.crdownload", "cat (1).png.tmp"]
    dropped = alone("cat.prompt.txt", *marks, "cat.log.part", "dog-2.png.part")
    assert (sorted(dropped.busy), dropped.uncertain, dropped.coming) == (sorted(marks), [], [])


def test_of_very_many_files_that_may_be_meant_for_one_prompt_some_are_remembered():
    dropped = alone("cat.prompt.txt", *(f"cat.{number}.log" for number in range(1000)))
    assert len(dropped.uncertain) == MOST_SIMILAR


@pytest.mark.timeout(20)
def test_names_that_are_made_to_be_slow_are_not():
    for name in (
        "1." * 127,
        "_1" * 120 + ".png",
        "(" * 250,
        " " * 250 + ".",
        "-" * 200 + "x1",
        "copy of " * 30,
        "1)." * 80,
    ):
        for _ in range(200):
            group(["cat.prompt.txt", name])


def test_a_name_belongs_to_its_prompt_however_its_accents_are_composed():
    composed, apart = "caf\u00e9", "cafe\u0301"
    for one, other in ((composed, apart), (apart, composed)):
        dropped = alone(f"{one}.prompt.txt", f"{other}.png", f"{other}.2.jpg", f".{other}.webp.A1b2C3")
        assert dropped.images == [f"{other}.png", f"{other}.2.jpg"]
        assert dropped.busy == [f".{other}.webp.A1b2C3"]


def test_two_prompts_whose_names_differ_only_in_how_accents_are_composed_keep_their_own_images():
    composed, apart = "caf\u00e9", "cafe\u0301"
    stems = group([f"{name}.{suffix}" for name in (composed, apart) for suffix in ("prompt.txt", "png")])
    assert {stem: dropped.images for stem, dropped in stems.items()} == {
        composed: [f"{composed}.png"],
        apart: [f"{apart}.png"],
    }


def test_images_without_a_prompt_belong_to_none():
    assert group(["cat.png", "cat.1.png", "dog.gif", ".cat.png.swp"]) == {}


# Who is still writing

PROGRAMS = {
    "vim": ".{}.swp",
    "vim, second window": ".{}.swo",
    "vim, probe": ".{}.swx",
    "Kate": ".{}.kate-swp",
    "LibreOffice": ".~lock.{}#",
    "Office": "~${}",
    "Emacs, lock": ".#{}",
    "Emacs, auto-save": "#{}#",
    "JetBrains, new": "{}___jb_tmp___",
    "JetBrains, old": "{}___jb_old___",
    "Cocoa": "{}.sb-1a2b3c4d-AbCdEf",
    "Syncthing": ".syncthing.{}.tmp",
    "Syncthing on Windows": "~syncthing~{}.tmp",
    "Nextcloud": ".{}.~1a2b3c4d",
    "rsync": ".{}.AbC123",
    "rclone": "{}.9f8e7d6c.partial",
    "rclone, six characters": "{}.AbC123.partial",
    "wget and others": "{}.partial",
    "Chrome": "{}.crdownload",
    "Firefox": "{}.part",
    "Safari": "{}.download",
    "aria2": "{}.aria2",
    "WinSCP": "{}.filepart",
    "writers of temporary files": "{}.tmp",
    "lftp": ".in.{}.",
    "Unison": ".unison.{}.0123456789abcdef0123456789abcdef.unison.tmp",
    "Thunar": "{}.partial~",
    "Opera": "{}.opdownload",
    "Resilio": "{}.!sync",
    "Nextcloud server": "{}.ocTransferId1234567.part",
    "GLib": "{}.X4B1ZQ",
    "Qt": "{}.nYzQHa",
}
TARGETS = ["cat.prompt.txt", "cat.png", "cat.2.jpg", "cat.webp", "cat.jpeg", "cat.11.JPEG", "cat.heic"]


@pytest.mark.parametrize("form", PROGRAMS.values(), ids=PROGRAMS.keys())
@pytest.mark.parametrize("target", TARGETS)
def test_a_program_at_work_on_any_file_of_a_stem_is_seen(form, target):
    mark = form.format(target)
    assert final_name(mark) == target
    dropped = alone("cat.prompt.txt", mark)
    assert dropped.busy == [mark]
    assert dropped.images == []


@pytest.mark.parametrize("form", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_a_program_at_work_on_another_stem_holds_no_other(form):
    names = [form.format(target) for target in ("dog.prompt.txt", "catalog.png", "cat.txt", "cat", "cat.doc")]
    stems = group(["cat.prompt.txt", "catfish.prompt.txt", *names])
    assert [dropped.busy for dropped in stems.values()] == [[], []]


@pytest.mark.parametrize("stem", ["c", "ca", "cat", "a longer name"])
def test_the_lock_of_office_lacks_the_beginning_of_a_longer_name(stem):
    name = f"{stem}.prompt.txt"
    for mark in (f"~${name}", f"~${name[1:]}", f"~${name[2:]}"):
        assert alone(name, mark).busy == [mark]
        assert group([name, mark, "something else.prompt.txt"])["something else"].busy == []
    assert alone(name, f"~${name[3:]}").busy == []


def test_an_image_that_is_only_there_as_a_mark_is_known():
    names = [
        "cat.prompt.txt",
        "cat.png",
        ".cat.png.A1b2C3",
        "cat.1.jpg.part",
        ".cat.prompt.txt.swp",
        ".cat.1.jpg.A1b2C3",
    ]
    assert alone(*names).coming == ["cat.1.jpg"]


def test_a_transfer_of_an_image_holds_only_the_prompt_that_owns_it():
    stems = group(["cat.prompt.txt", "cat.1.prompt.txt", ".cat.1.png.AbC123", "cat.2.png.part"])
    assert stems["cat.1"].busy == [".cat.1.png.AbC123"]
    assert stems["cat"].busy == ["cat.2.png.part"]


@pytest.mark.parametrize(
    "name",
    [
        ".cat.prompt.txt.un~",
        "cat.prompt.txt~",
        "4913",
        ".nfs000123",
        ".DS_Store",
        "cat.bak",
        "._cat.prompt.txt",
        "cat.png.backup",
        "cat.prompt.txt.orig",
        "cat.prompt.txt:Zone.Identifier",
    ],
)
def test_what_stays_behind_after_the_work_holds_nothing(name):
    assert alone("cat.prompt.txt", name).busy == []


def test_what_is_on_its_way_to_a_hidden_name_holds_nothing():
    assert group([".cat.prompt.txt", ".syncthing..cat.prompt.txt.tmp", "dog.prompt.txt"])["dog"].busy == []


# Names that exist, names that are long


def test_the_short_id_is_before_the_ending():
    cases = {
        ("cat.prompt.txt", "cat"): "cat.7f3a.prompt.txt",
        ("cat.png", "cat"): "cat.7f3a.png",
        ("cat.1.png", "cat"): "cat.7f3a.1.png",
        ("cat.receipt.toml", "cat"): "cat.7f3a.receipt.toml",
        ("logo.png", "cat"): "logo.7f3a.png",
        ("catalog.png", "cat"): "catalog.7f3a.png",
        ("a.b.c.png", "a.b"): "a.b.7f3a.c.png",
        ("README", "cat"): "README.7f3a",
        (".png", "cat"): ".png.7f3a",
    }
    assert {case: tagged(*case, "7f3a") for case in cases} == cases


@pytest.mark.parametrize("letter", ["x", "ü", "猫", "🐈", "\udce9"])
@pytest.mark.parametrize("tag", [JOB[:4], JOB])
def test_a_tag_in_a_name_of_full_length_shortens_the_readable_part_between_two_characters(letter, tag):
    stem = letter * ((NAME_MAX - len(SUFFIX)) // size(letter))
    name = tagged(stem + SUFFIX, stem, tag)
    assert fits(name)
    assert NAME_MAX - size(name) < size(letter)
    head = name.removesuffix(f".{tag}{SUFFIX}")
    assert head
    assert stem.startswith(head)


def test_a_declared_image_with_a_long_name_behind_a_short_stem_is_cut_too():
    name = tagged("a." + "b" * 249 + ".png", "a", JOB)
    assert fits(name)
    assert name.startswith("a.bbb")
    assert name.endswith(f"b.{JOB}.png")


def test_a_name_of_bytes_that_are_no_text_keeps_its_bytes_when_it_is_cut():
    stem = os.fsdecode(b"\xe9" * 244)
    name = os.fsencode(tagged(stem + SUFFIX, stem, "7f3a"))
    assert name == b"\xe9" * 239 + b".7f3a.prompt.txt"


def test_fitted_leaves_alone_what_fits():
    assert fitted("cat", ".png") == "cat.png"
    assert fitted("x" * 251, ".png") == "x" * 251 + ".png"
    assert fitted("x" * 252, ".png") == "x" * 251 + ".png"
    assert fitted("猫" * 84, ".png") == "猫" * 83 + ".png"


@pytest.mark.timeout(10)
def test_fitted_cuts_a_book_as_soon_as_a_name():
    assert fitted("猫" * 1_000_000, ".png") == "猫" * 83 + ".png"
    assert fitted("cat", "x" * 300) == "x" * 300


def test_a_name_fits_by_its_bytes_and_not_by_its_characters():
    assert fits("x" * 255)
    assert not fits("x" * 256)
    assert fits("猫" * 85)
    assert not fits("猫" * 86)
    assert fits("\udcff" * 255)


# Anything

PIECES = (  # noqa: SIM905  quoted one by one they would be harder to read
    "cat cat dog 1 2 007 prompt txt png JPG webp gif heic tmp part partial swp ~ # $ . . . .prompt.txt lock syncthing "
    "in AbC123 é e\u0301"
).split()
pieces = st.sampled_from([*PIECES, "\udcff", "\n", " "])
odd = st.lists(pieces, max_size=8).map("".join)
any_name = st.one_of(
    odd,
    odd.map(lambda stem: stem + SUFFIX),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.binary(max_size=12).map(os.fsdecode),
    st.tuples(st.sampled_from(list(PROGRAMS.values())), odd).map(lambda pair: pair[0].replace("{}", pair[1])),
)


@given(st.lists(any_name, max_size=30, unique=True), st.randoms())
@settings(max_examples=300, deadline=None)
def test_any_names_are_sorted_and_nothing_belongs_to_two(names, rng):
    stems = group(names)
    assert set(stems) == {stem for name in names if (stem := stem_of(name)) is not None}
    owned = [name for dropped in stems.values() for name in (*dropped.images, *dropped.busy)]
    whole = [name for name in owned if not name.startswith("~$")]  # the lock of Office names several immediately
    assert len(whole) == len(set(whole))
    assert set(owned) <= set(names) - {dropped.prompt for dropped in stems.values()}
    for dropped in stems.values():
        for name in dropped.images:
            plain, start = unicodedata.normalize("NFC", name), unicodedata.normalize("NFC", dropped.stem) + "."
            between, dot, _ = plain.removeprefix(start).rpartition(".")
            assert plain.startswith(start)
            assert not dot or (between.isascii() and between.isdigit())
        assert {suffix_of(name) for name in dropped.images} <= IMAGE_ENDINGS
        assert not {*dropped.uncertain} & {*owned, dropped.prompt}
    for name in names:
        near_miss(name)
    again = names.copy()
    rng.shuffle(again)
    for stem, dropped in group(again).items():
        assert (dropped.images, dropped.uncertain) == (stems[stem].images, stems[stem].uncertain)
        assert sorted(dropped.busy) == sorted(stems[stem].busy)


file_names = (
    st.one_of(
        any_name, st.binary(min_size=200, max_size=255).map(os.fsdecode), st.text("é猫x.", min_size=60, max_size=250)
    )
    .map(lambda name: os.fsdecode(os.fsencode(name).replace(b"/", b"").replace(b"\0", b"")))
    .filter(lambda name: name and fits(name) and name not in {".", ".."})
)


@given(file_names, st.one_of(file_names, st.just("")), st.sampled_from([JOB[:4], JOB]))
@settings(max_examples=500, deadline=None)
def test_a_tagged_name_fits_is_a_file_name_and_is_visible_if_it_was(name, stem, tag):
    stem = stem or name.partition(".")[0] or "x"
    result = tagged(name, stem, tag)
    assert fits(result)
    assert f".{tag}" in result
    assert "/" not in result
    assert "\0" not in result
    assert result[0] == name[0]


@given(file_names, st.sampled_from(["png", "JPG", "webp", "heic", "prompt.txt"]), st.sampled_from([JOB[:4], JOB]))
@settings(max_examples=300, deadline=None)
def test_a_tagged_name_keeps_its_ending(head, ending, tag):
    stem = fitted(head, f".{ending}").removesuffix(f".{ending}")
    result = tagged(f"{stem}.{ending}", stem, tag)
    assert fits(result)
    assert result.endswith(f".{tag}.{ending}")
    assert head.startswith(result.removesuffix(f".{tag}.{ending}"))


additions = st.sampled_from(
    ["", " (1)", "-2", "_10", " - Copy", " (copy)", " copy 2", " - Copy (2)", ".final", ".MP", ".1.2"]
)


@given(
    file_names.filter(lambda name: stem_of(name + SUFFIX) is not None),
    additions,
    st.sampled_from(["jpg", "MPO", "PnG"]),
)
@settings(max_examples=300, deadline=None)
def test_beside_any_prompt_a_file_with_an_addition_to_its_name_is_its_image_or_known_for_it(stem, addition, ending):
    name = f"{stem}{addition}.{ending}"
    dropped = alone(stem + SUFFIX, name)
    assert name in dropped.images or name in dropped.uncertain


@given(st.text("catCAT éÉ", min_size=1, max_size=8), st.sampled_from(["NFC", "NFD"]))
@settings(max_examples=200, deadline=None)
def test_upper_and_lower_case_and_accents_do_not_hide_a_file(stem, form):
    name = unicodedata.normalize(form, stem).swapcase() + ".png"
    dropped = alone(stem + SUFFIX, name)
    assert name in dropped.images or name in dropped.uncertain
