"""Lists the files of a model on either hub, with sizes, checksums and addresses, and opens them.

A small client of the public HTTP interfaces over the standard library. huggingface_hub comes with
transformers, but its download verifies no checksum, takes a folder for complete if there is no
network, and names its errors differently in the releases that go with transformers 5.2 to 5.23;
and ModelScope needs the same code anyway.
"""

import hashlib
import json
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import quote, urlencode, urlsplit

from qwen35.errors import UserError, one_line

TIMEOUT = 30.0  # seconds without a byte
LARGEST_LISTING = 64 * 2**20
MODEL = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name
NEEDED = {".safetensors", ".json", ".txt", ".jinja"}  # weights, config, tokenizer, processor, chat template
MODELSCOPE = "https://modelscope.cn"


class DownloadError(UserError):
    """A download that cannot go on."""


class UnreachableError(DownloadError):
    """There is no network, or no hub at the address."""


@dataclass(frozen=True)
class HubFile:
    name: str  # path in the model's folder
    size: int  # bytes
    url: str
    checksum: tuple[Literal["sha256", "git"], str] | None  # None if the hub gives none

    def hasher(self) -> Any:
        """A hash object of the checksum's kind; git's already includes the header."""
        if self.checksum is not None and self.checksum[0] == "git":
            return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        return hashlib.sha256()


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Sends the token to the hub itself alone, not to the storage that it redirects to."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        new = super().redirect_request(req, fp, 307 if code == 308 else code, msg, headers, newurl)
        if (
            new is not None
            and urlsplit(new.full_url)[:2] == urlsplit(req.full_url)[:2]
            and req.has_header("Authorization")
        ):
            new.add_unredirected_header("Authorization", req.get_header("Authorization"))
        return new

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # Python 3.10 does not know it


_opener = urllib.request.build_opener(_Redirects)


class Hub:
    """A hub: its address, its requests, and how to read its answers."""

    def __init__(self, address: str, token: str | None, token_name: str):
        """address: scheme and host, without user or query. Raises DownloadError."""
        self.address, self.token, self.token_name = address.rstrip("/"), token, token_name
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            named = f"{parts.hostname or ''} with more than a host" if "@" in address or parts.query else address
            raise DownloadError(
                f"{named}: not the address of a hub, which is only https://…"
            )  # the rest may be a secret
        if token is not None and not re.fullmatch(r"[!-~]+", token):
            raise DownloadError(f"{token_name}: a token has only letters, digits and signs, no spaces")
        self.host = parts.netloc

    def files(self, model: str) -> list[HubFile]:
        """Those that training or export needs, sorted by name. Raises DownloadError."""
        listed = sorted(self._list(model), key=lambda file: file.name)
        if twice := [a.name for a, b in pairwise(listed) if a.name == b.name]:
            raise DownloadError(f"{model} on {self.host} lists {twice[0]} twice")
        if not any(file.name.endswith(".safetensors") for file in listed):
            raise DownloadError(f"{model} on {self.host} has no safetensors files")
        return listed

    def _list(self, model: str) -> list[HubFile]:
        raise NotImplementedError

    def open(self, url: str, start: int = 0) -> Any:
        """The answer to a GET from byte `start` on. Raises OSError; DownloadError: do not retry."""
        request = urllib.request.Request(url, headers={"User-Agent": "qwen35"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        if self.token is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        try:
            return _opener.open(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            with error:
                if refusal := self._refusal(error.code):
                    raise DownloadError(refusal) from None
                raise OSError(f"{self.host} answers {error.code} {error.reason}") from None
        except urllib.error.URLError as error:
            reason = error.reason
            raise OSError(one_line(reason) if isinstance(reason, BaseException) else str(reason)) from None

    def _refusal(self, code: int) -> str | None:
        token = f"needs a token that may read it ({self.token_name} in the environment"
        token += " is not enough)" if self.token is not None else ")"
        return {
            401: f"{self.host} answers 401: there is no such model, or it {token}",
            403: f"{self.host} answers 403: the model {token}, or its terms must be accepted on its page",
            404: f"{self.host} answers 404: there is no such model or file",
        }.get(code)

    def _ask(self, path: str) -> Any:
        try:
            with self.open(f"{self.address}{path}") as answer:
                text = answer.read(LARGEST_LISTING)
        except (OSError, HTTPException) as error:
            raise UnreachableError(f"{self.host} cannot be reached: {one_line(error)}") from None
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise DownloadError(f"{self.host} does not answer with JSON; is it a hub?") from None

    def _file(self, name: Any, size: Any, url: str, sha256: Any, git: Any = None) -> HubFile:
        if type(size) is not int or size < 0:
            raise DownloadError(f"{self.host} gives no size of {name}; is it a hub?")
        for kind, digits, value in (("sha256", 64, sha256), ("git", 40, git)):
            if isinstance(value, str) and re.fullmatch(rf"[0-9a-f]{{{digits}}}", value):
                return HubFile(name, size, url, (kind, value))  # type: ignore[arg-type]  # "sha256" or "git"
        return HubFile(name, size, url, None)


class HuggingFace(Hub):
    """HF_ENDPOINT names a mirror; HF_TOKEN is the token."""

    def __init__(self) -> None:
        from huggingface_hub import constants  # has the hub's address

        address = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
        super().__init__(address, os.environ.get("HF_TOKEN") or None, "HF_TOKEN")

    def _list(self, model: str) -> list[HubFile]:
        answer = self._ask(f"/api/models/{model}/revision/main?blobs=true")
        try:
            revision, siblings = answer["sha"], answer["siblings"]
            entries = [(s["rfilename"], s.get("lfs") or {}, s) for s in siblings]
            return [
                self._file(
                    name,
                    s.get("size"),
                    f"{self.address}/{model}/resolve/{quote(revision)}/{quote(name)}",
                    lfs.get("sha256"),
                    None if lfs else s.get("blobId"),
                )
                for name, lfs, s in entries
                if is_needed(name)
            ]
        except (KeyError, TypeError, AttributeError):
            raise DownloadError(f"{self.host} does not answer with a list of files; is it a hub?") from None


class ModelScope(Hub):
    """MODELSCOPE_DOMAIN names another site; MODELSCOPE_API_TOKEN is the token."""

    def __init__(self) -> None:
        address = os.environ.get("MODELSCOPE_DOMAIN") or MODELSCOPE
        address = address if "://" in address else f"https://{address}"
        super().__init__(address, os.environ.get("MODELSCOPE_API_TOKEN") or None, "MODELSCOPE_API_TOKEN")

    def _list(self, model: str) -> list[HubFile]:
        answer = self._ask(f"/api/v1/models/{model}/repo/files?Revision=master&Recursive=true")
        try:
            found = answer["Data"]["Files"]
            return [
                self._file(
                    file["Path"],
                    file.get("Size"),
                    f"{self.address}/api/v1/models/{model}/repo?"
                    + urlencode({"Revision": "master", "FilePath": file["Path"]}),
                    file.get("Sha256"),
                )
                for file in found
                if file["Type"] == "blob" and is_needed(file["Path"])
            ]
        except (KeyError, TypeError, AttributeError):
            raise DownloadError(f"{self.host} does not answer with a list of files; is it a hub?") from None


HUBS: dict[str, type[HuggingFace] | type[ModelScope]] = {"hf": HuggingFace, "modelscope": ModelScope}


def is_needed(name: str) -> bool:
    """Whether training reads a file or export copies it. Raises DownloadError for a bad path."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise DownloadError(f"the hub lists a file {name!r}, which lies outside the model's folder")
    is_hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix in NEEDED and not is_hidden and not name.endswith(".bin.index.json")
