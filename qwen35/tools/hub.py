"""Lists the files of a model on either hub, with sizes, checksums and addresses.

huggingface_hub knows the first hub's address, list of files and token, and makes the requests to
both. Its snapshot_download is not used: release 2.4 begins a file anew whose download was stopped,
compares sizes alone over HTTP, and offline may take an existing folder as it is (dev/LOG.md).
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlencode, urlsplit

from huggingface_hub import HfApi, constants, errors, get_session, get_token, hf_hub_url
from huggingface_hub.utils import hf_raise_for_status
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from qwen35.errors import UserError, one_line

TIMEOUT = 30.0  # seconds without a byte
NEEDED = {".safetensors", ".json", ".txt", ".jinja"}  # weights, config, tokenizer, processor, chat template

HTTPError: type[Exception] = errors.HTTPError  # of all requests, whichever client they use


class DownloadError(UserError):
    """A download that cannot go on."""


class UnreachableError(DownloadError):
    """There is no network, or no hub at the address, or it fails just now."""


@dataclass(frozen=True)
class HubFile:
    name: str  # path in the model's folder
    size: int  # bytes
    url: str
    sha256: str | None
    git: str | None = None  # the hash of git's blob, which the first hub has of small files

    def is_same(self, path: Path) -> bool:
        """Whether the file at `path` is this one, as far as the hub says."""
        if size_of(path) != self.size:
            return False
        with path.open("rb") as content:
            if self.sha256:
                return sha_fileobj(content).hex() == self.sha256
            return not self.git or git_hash(content.read()) == self.git


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


class Hub:
    """A hub: its address, its token, and how to list a model's files."""

    token_name: str

    def __init__(self, address: str, token: str | None):
        """address: scheme and host, without user or query. Raises DownloadError."""
        self.address = address.rstrip("/")
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            named = address  # without what may be a secret
            if "@" in address or parts.query:
                named = f"{parts.hostname or ''} with more than a host"
            raise DownloadError(f"{named}: not the address of a hub, which is only https://…")
        if token is not None and not re.fullmatch(r"[!-~]+", token):
            raise DownloadError(f"{self.token_name}: a token has only letters, digits and signs, no spaces")
        self.host = parts.netloc
        self.headers = {"User-Agent": "qwen35", "Accept-Encoding": "identity"}
        self.headers |= {"Authorization": f"Bearer {token}"} if token else {}  # no redirect to another host gets it

    def files(self, model: str, revision: str | None) -> tuple[str, list[HubFile]]:
        """The revision, and its files that training or export needs. Raises DownloadError."""
        try:
            with self.requesting():
                revision, listed = self._list(model, revision)
            files = sorted((file for file in listed if is_needed(file.name)), key=lambda file: file.name)
        except DownloadError:
            raise
        except errors.HFValidationError as error:
            raise DownloadError(one_line(error)) from None
        except (KeyError, TypeError, AttributeError, ValueError):
            raise DownloadError(f"{self.host} does not answer with a list of files; is it a hub?") from None
        if odd := [file.name for file in files if type(file.size) is not int or file.size < 0]:
            raise DownloadError(f"{self.host} gives no size of {odd[0]}; is it a hub?")
        if twice := [a.name for a, b in pairwise(files) if a.name == b.name]:
            raise DownloadError(f"{model} on {self.host} lists {twice[0]} twice")
        if not any(file.name.endswith(".safetensors") for file in files):
            raise DownloadError(f"{model} on {self.host} has no safetensors files")
        return revision, files

    def _list(self, model: str, revision: str | None) -> tuple[str, list[HubFile]]:
        raise NotImplementedError

    @contextmanager
    def get(self, url: str, start: int = 0) -> Iterator[Any]:
        """The answer to a request for a file from byte `start` on, to be read in the block."""
        headers = self.headers | ({"Range": f"bytes={start}-"} if start else {})
        with self.requesting(), get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as answer:
            hf_raise_for_status(answer)
            yield answer

    @contextmanager
    def requesting(self) -> Iterator[None]:
        """Turns the errors of a request into lines. UnreachableError: another try may succeed."""
        try:
            yield
        except errors.OfflineModeIsEnabled:
            raise UnreachableError(f"{self.host} cannot be reached: HF_HUB_OFFLINE is set") from None
        except errors.HfHubHTTPError as error:
            code = error.response.status_code
            token = f"needs a token that may read it ({self.token_name} in the environment"
            token += " is not enough)" if "Authorization" in self.headers else ")"
            refusals = {
                401: f"there is no such model, or it {token}",
                403: f"the model {token}, or its terms must be accepted on its page",
                404: "there is no such model, revision or file",
            }
            if code in refusals:
                raise DownloadError(f"{self.host} answers {code}: {refusals[code]}") from None
            raise UnreachableError(f"{self.host} answers {code}") from None
        except HTTPError as error:
            raise UnreachableError(f"{self.host} cannot be reached: {one_line(error)}") from None


class HuggingFace(Hub):
    """HF_ENDPOINT names a mirror; HF_TOKEN is the token, else the one of `hf auth login`."""

    token_name = "HF_TOKEN"

    def __init__(self) -> None:
        super().__init__(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT, get_token())

    def _list(self, model: str, revision: str | None) -> tuple[str, list[HubFile]]:
        api = HfApi(endpoint=self.address, token=False, headers=self.headers)
        info = api.model_info(model, revision=revision or "main", files_metadata=True, timeout=TIMEOUT)
        commit, files = str(info.sha), []
        for sibling in info.siblings or []:
            url = hf_hub_url(model, sibling.rfilename, revision=commit, endpoint=self.address)
            checksums = (sibling.lfs.sha256, None) if sibling.lfs else (None, sibling.blob_id)
            files.append(HubFile(sibling.rfilename, sibling.size, url, *checksums))  # type: ignore[arg-type]  # checked
        return commit, files


class ModelScope(Hub):
    """MODELSCOPE_DOMAIN names another site; MODELSCOPE_API_TOKEN is the token.

    Its list of files is one request, so its own package is not needed.
    """

    token_name = "MODELSCOPE_API_TOKEN"

    def __init__(self) -> None:
        address = os.environ.get("MODELSCOPE_DOMAIN") or "https://modelscope.cn"
        address = address if "://" in address else f"https://{address}"
        super().__init__(address, os.environ.get(self.token_name) or None)

    def _list(self, model: str, revision: str | None) -> tuple[str, list[HubFile]]:
        at, revision = f"{self.address}/api/v1/models/{model}/repo", revision or "master"
        query = urlencode({"Revision": revision, "Recursive": "true"})
        answer = get_session().get(f"{at}/files?{query}", headers=self.headers, timeout=TIMEOUT)
        hf_raise_for_status(answer)
        files = []
        for file in answer.json()["Data"]["Files"]:
            if file["Type"] == "blob":
                url = f"{at}?{urlencode({'Revision': revision, 'FilePath': file['Path']})}"
                files.append(HubFile(file["Path"], file["Size"], url, file.get("Sha256") or None))
        return revision, files


HUBS: dict[str, type[HuggingFace] | type[ModelScope]] = {"hf": HuggingFace, "modelscope": ModelScope}


def is_needed(name: str) -> bool:
    """Whether training reads a file or export copies it. Raises DownloadError for a bad path."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise DownloadError(f"the hub lists a file {name!r}, which lies outside the model's folder")
    is_hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix in NEEDED and not is_hidden and not name.endswith(".bin.index.json")
