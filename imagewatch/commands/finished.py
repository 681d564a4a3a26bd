"""Finds a finished prompt, to ask for it once more: by its receipt, or by the archive if the receipt was removed.

The receipt has the text and the request as it was sent. The images are in the archive and are recognized by the hashes
of the receipt. All these files are in shared folders, so none of them is trusted.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from imagewatch.commands.drop import SubmitRequest, require_stem, stem_for
from imagewatch.commands.expected_cost import charge, total
from imagewatch.commands.ledger import open_journal
from imagewatch.commands.row_states import Found, by_stem, read_result
from imagewatch.config.schema import DELETE, Options
from imagewatch.config.validate import check
from imagewatch.protocol import notice
from imagewatch.protocol.names import ERROR, RECEIPT, SUFFIX, stem_of, tagged
from imagewatch.protocol.prompt import MAX_BYTES
from imagewatch.protocol.request import read_image
from imagewatch.system.errors import BadRequest, SpoolError, UsageError
from imagewatch.system.text import amount, printable, whole
from imagewatch.system.untrusted import open_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from imagewatch.commands.expected_cost import Costs
    from imagewatch.config.schema import Config

_TAG = re.compile(r"\.(?:[0-9a-f]{4}|[0-9a-f]{16})")
_DIGITS = re.compile(r"-[0-9a-f]{6}")
_LONGEST = 180
"""Bytes of a name that are kept for the new one."""


@dataclass(frozen=True)
class Finished:
    """A finished prompt.

    Attributes:
        name: Its base name.
        folder: Its folder below the inbox.
        path: Its receipt, or its prompt in the archive.
        request: What it asked for.
        fields: The body that was sent, without text and images; empty without a receipt.
        credits: What it cost; None if that is not known.
        asked: How many images it asked for.
    """

    name: str
    folder: str
    path: str
    request: SubmitRequest
    fields: Mapping[str, Any]
    credits: float | None = None
    asked: int = 1

    def new_name(self) -> str:
        """Return a new base name: the same with six random digits, in the place of those that it may have already."""
        base = _DIGITS.sub("", self.name) if _DIGITS.fullmatch(self.name[-7:]) else self.name
        while len(base.encode()) > _LONGEST:
            base = base[:-1]
        name = f"{base}-{secrets.token_hex(3)}"
        try:
            require_stem(name)
        except BadRequest:  # a name with characters that submit does not write
            return stem_for(self.request.text)
        return name


class FinishedPrompts:
    """Finds finished prompts.

    Args:
        config: The folders.
        blind: Only the folders are known: the state folder is not that of the daemon.
    """

    def __init__(self, config: Config, *, blind: bool) -> None:
        self._config = None if blind else config
        self._folders = config.folders
        self._archive = "" if config.folders.archive == DELETE else config.folders.archive

    def find(self, name: str) -> Finished:
        """Return the finished prompt of a name.

        Args:
            name: Its base name with its folder below the inbox, or the path of its receipt or its archived prompt.

        Raises:
            UsageError: There is none, it is not finished, several have this name, or its images are missing.
            SpoolError: A folder cannot be listed.
        """
        if path := self._path_of(name, self._folders.outbox, RECEIPT):
            return self._of_receipt(Found(path, read_result(path)))
        if self._archive and (path := self._path_of(name, self._archive, SUFFIX)):
            return self._of_archive(path)
        folder, stem = os.path.split(name.removesuffix(SUFFIX).strip("/"))
        if ".." in folder.split("/"):
            raise _none(name, f"see the names in {printable(self._folders.outbox)}")
        receipts = self._receipts(folder, stem)
        archived = self._archived(folder, stem) if not receipts else []
        self._require_at_rest(folder, stem, {str(one.facts.get("job")) for one in receipts})
        if not receipts and not archived:
            raise self._not_finished(name, folder, stem)
        if len({_key(one) for one in receipts} or archived) > 1:
            paths = ", ".join(map(printable, [*(one.path for one in receipts), *archived]))
            message = f"several finished prompts have this name: {printable(name, 255)}"
            raise UsageError(message, hint=f"name one by its path: {paths}")
        return self._of_receipt(receipts[0]) if receipts else self._of_archive(archived[0])

    def _path_of(self, name: str, top: str, ending: str) -> str:
        """Return the absolute path of a file that is named by its path, or an empty string."""
        if not name.endswith(ending):
            return ""
        for base in (top, "."):
            path = os.path.abspath(os.path.join(base, name))
            if path.startswith(top + os.sep) and os.path.lexists(path):
                return path
        return ""

    def _receipts(self, folder: str, stem: str) -> list[Found]:
        """Return the receipts of a name, the plain one first. A name with a job's short id is that receipt alone."""
        where = os.path.join(self._folders.outbox, folder)
        exact = os.path.join(where, stem + RECEIPT)
        source = whole(os.path.join(folder, stem + SUFFIX))
        found = [Found(path, read_result(path)) for path in sorted(by_stem(where, RECEIPT).get(stem, []))]
        known = [one for one in found if one.facts.get("source") == source]
        known.sort(key=lambda one: one.path != exact)
        return known or [one for one in found if one.path == exact and one.facts]

    def _archived(self, folder: str, stem: str) -> list[str]:
        if not self._archive:
            return []
        where = os.path.join(self._archive, folder)
        exact = os.path.join(where, stem + SUFFIX)
        found = []
        for path in sorted(by_stem(where, SUFFIX).get(stem, [])):
            between = os.path.basename(path)[len(stem) : -len(SUFFIX)]
            if path == exact or _TAG.fullmatch(between):
                found.append(path)
        return found

    def _require_at_rest(self, folder: str, stem: str, done: set[str]) -> None:
        """Refuse a name whose newest prompt is not finished: it is not clear which one is meant.

        Args:
            folder: The folder below the inbox.
            stem: The name.
            done: The ids of its jobs that have a receipt.

        Raises:
            UsageError: It waits or is in flight.
        """
        source, hint = os.path.join(folder, stem + SUFFIX), "wait for its result, or name the receipt of another one"
        if os.path.lexists(os.path.join(self._folders.inbox, source)):
            raise UsageError(f"the prompt waits in the inbox and is not finished: {printable(source)}", hint=hint)
        if self._is_in_flight(folder, stem, done):
            raise UsageError(f"the prompt is in flight and not finished: {printable(source)}", hint=hint)

    def _is_in_flight(self, folder: str, stem: str, done: set[str]) -> bool:
        """Return whether the journal says so, if this user may read it, or the status in the folders.

        For a moment, a job that has its receipt is in both. The journal has its id; the status has only names, so it
        counts only if there is no receipt.
        """
        source, names = os.path.join(folder, stem + SUFFIX), set()
        if not done and self._folders.notice and (found := notice.read(self._folders.notice)):
            names |= {one.name for one in found.in_flight.files}
        if self._config:
            with contextlib.suppress(SpoolError), open_journal(self._config) as journal:
                jobs = [job for one in journal.unfinished() if one not in done and (job := journal.job(one))]
                names |= {job.claim.source for job in jobs}
        return not names.isdisjoint({source, whole(source), printable(source)})

    def _not_finished(self, name: str, folder: str, stem: str) -> UsageError:
        """Return why there is no finished prompt of a name."""
        where = os.path.join(self._folders.errors, folder)
        failed = next(iter(by_stem(where, ERROR).get(stem, [])), "")
        if failed:
            return UsageError(
                f"the prompt failed: {printable(name, 255)}", hint=f"what to do is in {printable(failed)}"
            )
        others = []
        for top, _, names in os.walk(self._folders.outbox):
            if stem + RECEIPT in names:
                others.append(os.path.join(os.path.relpath(top, self._folders.outbox), stem))
        if others:
            return _none(
                name, "did you mean " + " or ".join(printable(one.removeprefix("./"), 255) for one in others) + "?"
            )
        hint = f"see the names in {printable(self._folders.outbox)}; one that was dropped just now may be in flight"
        return _none(name, hint)

    def _of_receipt(self, found: Found) -> Finished:
        facts, shown = found.facts, printable(found.path)
        text, fields, source = facts.get("prompt"), facts.get("request"), facts.get("source")
        if not (isinstance(text, str) and isinstance(fields, dict) and isinstance(source, str)):
            raise UsageError(f"not a receipt of imagewatch: {shown}", hint="name another one")
        if hashlib.sha256(text.encode()).hexdigest() != facts.get("prompt_sha256"):
            raise UsageError(f"the text of this receipt was changed: {shown}", hint="use imagewatch submit")
        known = {name: value for name, value in fields.items() if name in Options.__struct_fields__}
        options, problems = check(known, Options)
        if problems:
            raise UsageError(f"not a receipt of imagewatch: {shown}: {problems[0]}", hint="name another one")
        given = {name: getattr(options, name) for name in known}
        folder = os.path.dirname(os.path.relpath(found.path, self._folders.outbox))
        stem = stem_of(os.path.basename(source)) or os.path.basename(found.path).removesuffix(RECEIPT)
        request = SubmitRequest(text, given, self._images(facts, folder, stem))
        return Finished(stem, folder, found.path, request, given, charge(facts), options.n or 1)

    def _images(self, facts: Mapping[str, Any], folder: str, stem: str) -> tuple[str, ...]:
        """Return the paths of the images that a request had."""
        inputs, paths = facts.get("inputs"), []
        for item in inputs if isinstance(inputs, list) else []:
            name, digest = (item.get(key) for key in ("file", "sha256")) if isinstance(item, dict) else (None, None)
            if not isinstance(name, str) or not isinstance(digest, str) or "/" in name or name in {"", ".", ".."}:
                raise UsageError("the receipt names an input that is no file name", hint="use imagewatch submit")
            path = self._archived_image(folder, name, stem, str(facts.get("job")), digest)
            if not path:
                shown = printable(name, 255)
                kept = "is not in the archive, or was changed" if self._archive else "was removed (archive = delete)"
                hint = "if you have the image: imagewatch submit --image FILE, with the text of the receipt"
                if self._archive:
                    hint = f"if the prompt was completed just now, run the command again in a second; {hint}"
                raise UsageError(f"the image {shown} of this prompt {kept}", hint=hint)
            paths.append(path)
        return tuple(paths)

    def _archived_image(self, folder: str, name: str, stem: str, job: str, digest: str) -> str:
        """Return the path of an archived image by its hash, or an empty string."""
        if not self._archive:
            return ""
        for one in dict.fromkeys((name, tagged(name, stem, job[:4]), tagged(name, stem, job))):
            path = os.path.join(self._archive, folder, one)
            with contextlib.suppress(BadRequest):
                if read_image(path, one).sha256 == digest:
                    return path
        return ""

    def _of_archive(self, path: str) -> Finished:
        """Return what an archived prompt asks for, with its images beside it."""
        folder = os.path.dirname(os.path.relpath(path, self._archive))
        try:
            with open_file(path) as file:
                request = SubmitRequest.of_file(file.read(MAX_BYTES + 1), path, {}, ())
        except OSError as error:
            raise UsageError(f"cannot read {printable(path)}: {error.strerror}", hint="use imagewatch submit") from None
        request = _with_own_images(request, os.path.basename(path).removesuffix(SUFFIX))
        fields = {name: value for name, value in request.options.items() if value is not None}
        asked = fields.get("n") or 1
        return Finished(os.path.basename(path).removesuffix(SUFFIX), folder, path, request, {}, None, asked)


def _with_own_images(request: SubmitRequest, base: str) -> SubmitRequest:
    """Return a request with the images of its job: if their names existed in the archive, all of its files have its id.

    Without that, an image that the prompt names would be the one of another job.
    """
    stem, _, tag = base.rpartition(".")
    if not stem or not _TAG.fullmatch(f".{tag}"):
        return request

    def own(path: str) -> str:
        folder, name = os.path.split(path)
        return path if name.startswith(base) else os.path.join(folder, tagged(name, stem, tag))

    return replace(request, images=tuple(map(own, request.images)))


def changed(found: Finished, n: int | None, seed: int | None) -> Finished:
    """Return a finished prompt with another number of images or another seed, if one is given."""
    new = {name: value for name, value in (("n", n), ("seed", seed)) if value is not None}
    request = replace(found.request, options={**found.request.options, **new})
    return replace(found, request=request, fields={**found.fields, **new} if found.fields else {})


def describe(found: Finished, costs: Costs, *, keeps_seed: bool) -> Iterator[str]:
    """Yield what is going to be dropped, and what it may cost, in lines."""
    yield f"Once more: {printable(found.path)}"
    seed = found.fields.get("seed")
    if seed is not None and keeps_seed:
        yield f"The seed is {seed}; the same seed may give the same image again (--seed changes it)."
    asked = int(found.fields.get("n") or found.request.options.get("n") or 1)
    (cost,) = costs.of([found.fields])
    if cost is not None:
        yield total([cost])
    elif found.credits is not None:
        yield f"Expected cost: {amount(found.credits / max(found.asked, 1) * asked)} credits, as before."
    else:
        yield total([None])


def _key(found: Found) -> str:
    """Return what is equal for receipts of the same request."""
    facts = found.facts
    inputs = facts.get("inputs")
    hashes = [item.get("sha256") for item in inputs if isinstance(item, dict)] if isinstance(inputs, list) else []
    return repr((facts.get("prompt_sha256"), facts.get("request"), hashes))


def _none(name: str, hint: str) -> UsageError:
    return UsageError(f"no finished prompt has this name: {printable(name, 255)}", hint=hint)
