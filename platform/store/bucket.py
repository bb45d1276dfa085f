"""A folder in an S3 bucket: small objects, whole files both ways, and its errors in words.

Everything that S3 may do twice or not at all is settled here: requests are repeated on 5xx answers and broken
connections (botocore's standard mode; bodies that break off are ours to ask for again), and the first use of a bucket
asks impatiently whether it is there at all, so that a wrong address fails in seconds and before any work.
Imported only where a shared root is set: boto3 takes a while to load.
"""

from __future__ import annotations

import base64
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from s3transfer.exceptions import RetriesExceededError
from s3transfer.manager import TransferConfig, TransferManager
from s3transfer.subscribers import BaseSubscriber

from moray.platform.core.errors import InputError
from moray.platform.store.manifest import FileEntry

Progress = Callable[[float, float], None]  # bytes done, bytes in all

_ATTEMPTS = 8
_CONNECTIONS = 32
_PART = 16 << 20  # bytes; files of at least one part travel in parts
_QUIET_SECONDS = 2.0  # what takes no longer reports no progress
_BATCH = 1000  # the most objects that one request deletes
_BROKEN_BODY = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError)
_ENDPOINT = "is AWS_ENDPOINT_URL right, and nothing in between, such as a proxy that wants a login?"
# Of the whole root, not of one object: code -> (what, how to mend it).
_CREDENTIALS = ("the credentials are refused", "check AWS_ACCESS_KEY_ID and so on")
_CLOCK = ("the clocks of this machine and of the server differ", "set the clock")
_ACCOUNT = ("the account of these credentials is closed", "ask its owner")
_REGION = ("the bucket is in another region", "set AWS_DEFAULT_REGION to it, or AWS_ENDPOINT_URL to its server")
_REFUSALS = {
    "InvalidAccessKeyId": _CREDENTIALS, "SignatureDoesNotMatch": _CREDENTIALS, "ExpiredToken": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS, "RequestTimeTooSkewed": _CLOCK, "RequestExpired": _CLOCK,
    "AccountProblem": _ACCOUNT, "AllAccessDisabled": _ACCOUNT, "NotSignedUp": _ACCOUNT,
    "PermanentRedirect": _REGION, "AuthorizationHeaderMalformed": _REGION,
}  # fmt: skip
_ROOT = "moray-root.json"


@dataclass(frozen=True)
class Stored:
    """One object: its key below the root, size in bytes, when it was written (seconds since the epoch), its ETag."""

    key: str
    size: int
    modified: float
    etag: str = ""


class Bucket:
    """Objects below `s3://bucket/prefix`; keys are relative to the prefix. Every error is an InputError."""

    def __init__(self, url: str, read_seconds: float = 60.0) -> None:
        """`read_seconds`: how long an answer may be silent before the request is made again."""
        parts = urlsplit(url)
        if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
            raise InputError(f"{url!r} is not an artifact root", "write MORAY_ARTIFACTS=s3://bucket/prefix")
        self.url = url.rstrip("/")
        self._name = parts.netloc
        self._prefix = parts.path.strip("/") + "/" if parts.path.strip("/") else ""
        self._read_seconds = read_seconds

    @cached_property
    def _client(self) -> Any:
        with self._in_words():
            quick = self._new_client(2, 5)
            self._check_listing(quick.list_objects_v2(Bucket=self._name, Prefix=self._prefix, MaxKeys=1))
            return self._new_client(_ATTEMPTS, 10)

    def _new_client(self, attempts: int, connect_seconds: float) -> Any:
        config = Config(
            retries={"mode": "standard", "max_attempts": attempts},
            connect_timeout=connect_seconds,
            read_timeout=self._read_seconds,
            max_pool_connections=_CONNECTIONS,
        )
        return self._session.client("s3", config=config)

    @cached_property
    def _session(self) -> boto3.session.Session:
        """This bucket's own, because boto3's default session keeps old credentials. It reads botocore's service
        descriptions, which takes 0.1 s, once for all of its clients."""
        return boto3.session.Session()

    def check_writable(self) -> None:
        """Raises InputError if objects cannot be created here, or if the server lets a second writer replace them."""
        if self.create(_ROOT, b"{}\n") and self.create(_ROOT, b"{}\n"):
            raise InputError(
                f"{self.url}: the server ignores If-None-Match, so two writers could not be told apart",
                "use AWS S3 or a server with conditional writes (MinIO, Ceph, R2 in current versions)",
            )

    def get(self, key: str) -> bytes | None:
        """A small object, or None if there is none."""
        with self._in_words(key):
            try:
                return self._body(key)
            except ClientError as error:
                if _code(error) in ("NoSuchKey", "404"):
                    return None
                raise

    def read_range(self, key: str, begin: int, end: int, etag: str = "") -> bytes:
        """Bytes [begin, end) of an object; with an ETag, of that version or not at all."""
        only = {"IfMatch": etag} if etag else {}
        with self._in_words(key):
            data = self._body(key, Range=f"bytes={begin}-{end - 1}", **only)
        if len(data) != end - begin:
            raise InputError(f"{self.url}/{key}: {len(data)} bytes came of {end - begin} from {begin} on")
        return data

    def _body(self, key: str, **request: str) -> bytes:
        for attempt in range(_ATTEMPTS):
            answer = self._client.get_object(Bucket=self._name, Key=self._prefix + key, **request)
            try:
                return bytes(answer["Body"].read())
            except _BROKEN_BODY:
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError

    def put(self, key: str, data: bytes) -> None:
        with self._in_words(key):
            self._client.put_object(Bucket=self._name, Key=self._prefix + key, Body=data)

    def create(self, key: str, data: bytes) -> bool:
        """Writes a small object unless there is one: then False.

        That one may be ours: where an answer is lost on the way, the repeated request finds what the first one wrote.
        """
        with self._in_words(key):
            for attempt in range(_ATTEMPTS):
                try:
                    self._client.put_object(Bucket=self._name, Key=self._prefix + key, Body=data, IfNoneMatch="*")
                    return True
                except ClientError as error:
                    if _status(error) == 412:
                        return False
                    if _status(error) != 409 or attempt == _ATTEMPTS - 1:  # 409: a rival is at it; ask again
                        raise
        raise AssertionError

    def delete(self, keys: Iterable[str]) -> None:
        """No error where one is gone already."""
        every = list(keys)
        with self._in_words():
            for start in range(0, len(every), _BATCH):
                batch = [{"Key": self._prefix + key} for key in every[start : start + _BATCH]]
                answer = self._client.delete_objects(Bucket=self._name, Delete={"Objects": batch, "Quiet": True})
                for failure in answer.get("Errors", []):
                    raise InputError(f"{self.url}: {failure['Key']} is not deleted: {failure.get('Message', '')}")

    def objects(self, prefix: str = "") -> Iterator[Stored]:
        """Every object whose key begins so, in the order of keys."""
        for page in self._pages(Prefix=self._prefix + prefix):
            for item in page.get("Contents", []):
                key = item["Key"][len(self._prefix) :]
                yield Stored(key, item["Size"], item["LastModified"].timestamp(), item.get("ETag", ""))

    def folders(self, prefix: str = "") -> list[str]:
        """The names that follow `prefix` up to the next slash, where there is one."""
        names = []
        for page in self._pages(Prefix=self._prefix + prefix, Delimiter="/"):
            names += [item["Prefix"].rstrip("/").rpartition("/")[2] for item in page.get("CommonPrefixes", [])]
        return names

    def abort_uploads(self, before: float) -> None:
        """Drops the parts of uploads that were begun before a time (seconds since the epoch) and never ended."""
        with self._in_words():
            pages = self._client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self._name, Prefix=self._prefix):
                for upload in page.get("Uploads", []):
                    if upload["Initiated"].timestamp() < before:
                        self._client.abort_multipart_upload(
                            Bucket=self._name, Key=upload["Key"], UploadId=upload["UploadId"]
                        )

    def upload(self, folder: Path, files: Sequence[FileEntry], prefix: str, progress: Progress) -> None:
        """Files of a folder -> objects below `prefix`. The server refuses what does not have the SHA-256 given."""

        def start(manager: TransferManager, entry: FileEntry, watcher: _Watcher) -> Any:
            key = f"{self._prefix}{prefix}/{entry.path}"
            return manager.upload(str(folder / entry.path), self._name, key, _checksum(entry), [watcher])

        self._transfer(start, files, prefix, progress)

    def download(self, prefix: str, files: Sequence[FileEntry], folder: Path, progress: Progress) -> None:
        """Objects below `prefix` -> files of a folder. What arrives is not checked here."""

        def start(manager: TransferManager, entry: FileEntry, watcher: _Watcher) -> Any:
            target = folder / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            key = f"{self._prefix}{prefix}/{entry.path}"
            return manager.download(self._name, key, str(target), subscribers=[watcher])

        self._transfer(start, files, prefix, progress)

    def _transfer(
        self,
        start: Callable[[TransferManager, FileEntry, _Watcher], Any],
        files: Sequence[FileEntry],
        prefix: str,
        progress: Progress,
    ) -> None:
        """Several files at once, large ones in parts; whatever ends it early, cancels what is still under way."""
        began, total, counter = time.monotonic(), sum(entry.size for entry in files), _Counter()
        config = TransferConfig(
            multipart_threshold=_PART,
            multipart_chunksize=_PART,
            max_request_concurrency=_ATTEMPTS,
            num_download_attempts=_ATTEMPTS,
        )
        with TransferManager(self._client, config) as manager:
            watchers = [_Watcher(counter) for _ in files]
            futures = [start(manager, entry, watcher) for entry, watcher in zip(files, watchers, strict=True)]
            for entry, watcher, future in zip(files, watchers, futures, strict=True):
                while not watcher.done.wait(0.2):
                    if time.monotonic() - began > _QUIET_SECONDS:
                        progress(min(counter.bytes, total), total)
                with self._in_words(f"{prefix}/{entry.path}"):
                    future.result()
        if time.monotonic() - began > _QUIET_SECONDS:
            progress(total, total)

    def _pages(self, **request: str) -> Iterator[Any]:
        with self._in_words():
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._name, **request):
                self._check_listing(page)
                yield page

    def _check_listing(self, answer: Any) -> None:
        """Every listing names its bucket. A login page, or no body at all, is parsed as a listing of nothing."""
        if "Name" not in answer:
            raise InputError(f"{self.url}: what answers is no S3 server: it lists no bucket", _ENDPOINT)

    @contextlib.contextmanager
    def _in_words(self, key: str = "") -> Iterator[None]:
        try:
            yield
        except (NoCredentialsError, PartialCredentialsError) as error:
            hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            raise InputError(f"{self.url}: no credentials", hint) from error
        except ClientError as error:
            raise self._refused(error, key) from error
        except RecursionError as error:  # botocore follows a redirect without a region to itself
            raise InputError(f"{self.url}: the server redirects to somewhere else", _ENDPOINT) from error
        except RetriesExceededError as error:
            raise self._unreachable(error.last_exception) from error
        except (BotoCoreError, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # a file of ours: the disk is full, say
            raise self._unreachable(error) from error

    def _refused(self, error: ClientError, key: str) -> InputError:
        code, where = _code(error) or f"HTTP {_status(error)}", f"{self.url}/{key}" if key else self.url
        if code == "NoSuchBucket":
            return InputError(f"{self.url}: there is no bucket {self._name!r}", "create it, or correct the address")
        if code in _REFUSALS:
            words, hint = _REFUSALS[code]
            return InputError(f"{self.url}: {words} ({code})", hint)
        if code == "AccessDenied" or _status(error) == 403:
            hint = "these credentials need s3:ListBucket, GetObject, PutObject and DeleteObject below that prefix"
            return InputError(f"{where}: access denied", hint)
        if code in ("NoSuchKey", "404"):
            return InputError(f"{where} is missing" + ("" if key else " (HTTP 404)"), "" if key else _ENDPOINT)
        if _status(error) == 412:
            return InputError(f"{where} was replaced while it was read", "run again")
        message = error.response.get("Error", {}).get("Message", "")
        words = f"{code}: {message}" if message else code
        return InputError(f"{where}: {words}", "the server's own words, or a proxy's; run again once it is well")

    def _unreachable(self, error: Exception) -> InputError:
        words = " ".join(str(error).split())[:300]
        return InputError(f"{self.url}: the server does not answer: {words}", "is it up, and AWS_ENDPOINT_URL right?")


class _Counter:
    """Bytes that have travelled, over all files and threads."""

    def __init__(self) -> None:
        self.bytes = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.bytes += count


class _Watcher(BaseSubscriber):
    """What the transfer manager tells about one file, in its threads."""

    def __init__(self, counter: _Counter) -> None:
        self.done = threading.Event()
        self._counter = counter

    def on_progress(self, future: Any, bytes_transferred: int, **_: Any) -> None:
        self._counter.add(bytes_transferred)

    def on_done(self, future: Any, **_: Any) -> None:
        self.done.set()


def _checksum(entry: FileEntry) -> dict[str, str]:
    """S3 knows the SHA-256 of a whole object only if it came in one piece; parts carry their own."""
    if entry.size >= _PART:
        return {"ChecksumAlgorithm": "SHA256"}
    return {"ChecksumSHA256": base64.b64encode(bytes.fromhex(entry.sha256)).decode()}


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
