"""A prefix in an S3 bucket: small objects, uploads and downloads of files, and readable errors.

This module repeats requests for a minute and a half while the server does not respond, breaks off, or reports an error
of its own. botocore's retries are not enough: their number is limited per client, whatever the time. The first use of a
bucket checks that it exists, without patience, so that a wrong address fails in seconds and before any work. Import the
module only if a shared root is set, because boto3 loads slowly.
"""

from __future__ import annotations

import base64
import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from s3transfer.exceptions import RetriesExceededError
from s3transfer.manager import TransferConfig, TransferManager
from s3transfer.subscribers import BaseSubscriber

from moray.platform.core.errors import InputError, StoreRefusedError, StoreUnreachableError
from moray.platform.store.manifest import FileEntry

T = TypeVar("T")
Progress = Callable[[float, float], None]  # bytes done, total bytes

PATIENCE = 90.0  # seconds for which a request is repeated
_SHORTEST_WAIT, _LONGEST_WAIT = 0.1, 5.0  # seconds between attempts
_CONFLICTS = 8  # attempts of a conditional write that conflicts with another one
_ATTEMPTS = 3  # by botocore, at once
_TRANSFERS = 8  # at a time
_CONNECTIONS = 32
_PART = 16 << 20  # bytes; larger files are transferred in parts
_QUIET_SECONDS = 2.0  # transfers shorter than this report no progress
_BATCH = 1000  # the most objects that one request deletes
_TRANSIENT = (HTTPClientError, ConnectionError, IncompleteReadError, RetriesExceededError)
_THROTTLED = ("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "RequestTimeout")
_ENDPOINT = "check AWS_ENDPOINT_URL, and that no proxy with a login page is in between"
_BUCKET = ("the bucket does not exist", "create it, or correct the address")
# Errors of the whole root, not of one object: code -> (problem, fix).
_CREDENTIALS = ("invalid credentials", "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN")
_CLOCK = ("the clock of this machine differs from the server's", "set the clock")
_ACCOUNT = ("the account of these credentials is disabled", "contact its owner")
_REGION = (
    "the bucket is in another region",
    "set AWS_DEFAULT_REGION to that region, or AWS_ENDPOINT_URL to its server",
)
_ROOT_ERRORS = {
    "InvalidAccessKeyId": _CREDENTIALS, "SignatureDoesNotMatch": _CREDENTIALS, "ExpiredToken": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS, "RequestTimeTooSkewed": _CLOCK, "RequestExpired": _CLOCK,
    "AccountProblem": _ACCOUNT, "AllAccessDisabled": _ACCOUNT, "NotSignedUp": _ACCOUNT,
    "PermanentRedirect": _REGION, "AuthorizationHeaderMalformed": _REGION, "NoSuchBucket": _BUCKET,
}  # fmt: skip
_FULL = ("XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded", "InsufficientStorage")
_ROOT = "moray-root.json"
_SHA256 = "sha256"  # in an object's metadata


@dataclass(frozen=True)
class Stored:
    """One object: key below the root, size in bytes, modification time (seconds since the epoch), ETag."""

    key: str
    size: int
    modified: float
    etag: str = ""


class Bucket:
    """Objects below `s3://bucket/prefix`; keys are relative to the prefix. Every error is an InputError."""

    def __init__(
        self,
        url: str,
        read_seconds: float = 60.0,
        variables: Mapping[str, str] | None = None,
        is_known: bool = False,
        patience: float | None = None,
    ) -> None:
        """read_seconds: read timeout of a response, after which the request is repeated. variables: AWS_... variables,
        instead of those of this process. is_known: another process has used the bucket, so the first use is not
        checked. patience: seconds for which a request is repeated, by default PATIENCE."""
        parts = urlsplit(url)
        if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
            raise InputError(f"{url!r} is not an artifact root", "set MORAY_ARTIFACTS=s3://bucket/prefix")
        self.url = url.rstrip("/")
        self._name = parts.netloc
        self._prefix = parts.path.strip("/") + "/" if parts.path.strip("/") else ""
        self._read_seconds = read_seconds
        self._variables, self._is_known = variables, is_known
        self._patience = PATIENCE if patience is None else patience
        self._opening = threading.Lock()

    @property
    def _client(self) -> Any:
        with self._opening:  # one thread opens it, the others wait
            return self._checked_client

    @cached_property
    def _checked_client(self) -> Any:
        with self._translated_errors():
            client = self._new_client()
            if not self._is_known:
                self._check_listing(client.list_objects_v2(Bucket=self._name, Prefix=self._prefix, MaxKeys=1))
            return client

    def _new_client(self) -> Any:
        config = Config(
            retries={"mode": "standard", "total_max_attempts": _ATTEMPTS if self._patience else 1},
            connect_timeout=5,
            read_timeout=self._read_seconds,
            max_pool_connections=_CONNECTIONS,
        )
        endpoint = self._variables.get("AWS_ENDPOINT_URL") if self._variables else None
        return self._session.client("s3", config=config, endpoint_url=endpoint)

    @cached_property
    def _session(self) -> boto3.session.Session:
        """A session of this bucket, because boto3's default session keeps old credentials. It loads botocore's service
        descriptions, which takes 0.1 s, once for all of its clients."""
        given = self._variables or {}
        return boto3.session.Session(
            aws_access_key_id=given.get("AWS_ACCESS_KEY_ID"),
            aws_secret_access_key=given.get("AWS_SECRET_ACCESS_KEY"),
            aws_session_token=given.get("AWS_SESSION_TOKEN"),
            region_name=given.get("AWS_REGION") or given.get("AWS_DEFAULT_REGION"),
            profile_name=given.get("AWS_PROFILE"),
        )

    def check_writable(self) -> None:
        """Raises InputError if objects cannot be created, or if the server ignores conditional writes."""
        if self.create(_ROOT, b"{}\n") and self.create(_ROOT, b"{}\n"):
            raise InputError(
                f"{self.url}: the server ignores If-None-Match, so a second writer could overwrite the first",
                "use AWS S3 or a server with conditional writes (MinIO, Ceph, R2 in current versions)",
            )

    def get(self, key: str) -> bytes | None:
        """Returns a small object, or None if it does not exist."""
        with self._translated_errors(key):
            try:
                return self._body(key)
            except ClientError as error:
                if _code(error) in ("NoSuchKey", "404"):
                    return None
                raise

    def head(self, key: str) -> Stored | None:
        """Returns the description of an object, or None if it does not exist."""
        with self._translated_errors(key):
            try:
                found = self._call("head_object", Key=self._prefix + key)
            except ClientError as error:
                if _status(error) == 404:
                    return None
                raise
        return Stored(key, found["ContentLength"], found["LastModified"].timestamp(), found.get("ETag", ""))

    def sha256(self, key: str) -> str:
        """Returns the SHA-256 that an upload stored with an object; "" if it has none."""
        with self._translated_errors(key):
            found = self._call("head_object", Key=self._prefix + key)
        return str(found.get("Metadata", {}).get(_SHA256, ""))

    def read_range(self, key: str, begin: int, end: int, etag: str = "") -> bytes:
        """Returns bytes [begin, end) of an object. With an ETag, raises InputError for any other version."""
        only = {"IfMatch": etag} if etag else {}
        with self._translated_errors(key):
            data = self._body(key, Range=f"bytes={begin}-{end - 1}", **only)
        if len(data) != end - begin:
            raise InputError(f"{self.url}/{key}: received {len(data)} of {end - begin} bytes at offset {begin}")
        return data

    def _body(self, key: str, **request: str) -> bytes:
        get = self._client.get_object

        def read() -> bytes:  # a body that breaks off is read again from its beginning
            return bytes(get(Bucket=self._name, Key=self._prefix + key, **request)["Body"].read())

        return self._repeated(read)

    def _call(self, operation: str, **request: Any) -> Any:
        """The response to a request of the S3 API for this bucket."""
        method = getattr(self._client, operation)
        return self._repeated(lambda: method(Bucket=self._name, **request))

    def _repeated(self, act: Callable[[], T]) -> T:
        """Calls `act` again while the server does not respond or reports an error of its own."""
        deadline, wait = time.monotonic() + self._patience, _SHORTEST_WAIT
        while True:
            try:
                return act()
            except (BotoCoreError, ClientError) as error:
                if not _is_transient(error) or time.monotonic() + wait > deadline:
                    raise
            time.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, _LONGEST_WAIT)

    def put(self, key: str, data: bytes) -> None:
        with self._translated_errors(key):
            self._call("put_object", Key=self._prefix + key, Body=data)

    def create(self, key: str, data: bytes) -> bool:
        """Writes a small object; returns False if it already exists.

        The existing object may be from this writer: if a response is lost, the repeated request finds the first write.
        """
        with self._translated_errors(key):
            for attempt in range(_CONFLICTS):
                try:
                    self._call("put_object", Key=self._prefix + key, Body=data, IfNoneMatch="*")
                    return True
                except ClientError as error:
                    if _status(error) == 412:
                        return False
                    if _status(error) != 409 or attempt == _CONFLICTS - 1:  # 409: a concurrent write; retry
                        raise
        raise AssertionError

    def delete(self, keys: Iterable[str]) -> None:
        """Deletes objects; no error for missing ones."""
        every = list(keys)
        with self._translated_errors():
            for start in range(0, len(every), _BATCH):
                batch = [{"Key": self._prefix + key} for key in every[start : start + _BATCH]]
                response = self._call("delete_objects", Delete={"Objects": batch, "Quiet": True})
                for failure in response.get("Errors", []):
                    raise InputError(f"{self.url}: could not delete {failure['Key']}: {failure.get('Message', '')}")

    def objects(self, prefix: str = "", after: str = "") -> Iterator[Stored]:
        """Yields every object whose key starts with `prefix`, and comes after the key `after`, in key order."""
        start = {"StartAfter": self._prefix + after} if after else {}
        for page in self._pages(Prefix=self._prefix + prefix, **start):
            for item in page.get("Contents", []):
                key = item["Key"][len(self._prefix) :]
                yield Stored(key, item["Size"], item["LastModified"].timestamp(), item.get("ETag", ""))

    def folders(self, prefix: str = "") -> list[str]:
        """Returns the folder names below `prefix`: each key's part up to the next slash."""
        names = []
        for page in self._pages(Prefix=self._prefix + prefix, Delimiter="/"):
            names += [item["Prefix"].rstrip("/").rpartition("/")[2] for item in page.get("CommonPrefixes", [])]
        return names

    def abort_uploads(self, before: float) -> None:
        """Aborts multipart uploads that were started before a time (seconds since the epoch) and not completed."""
        with self._translated_errors():
            pages = self._client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self._name, Prefix=self._prefix):
                for upload in page.get("Uploads", []):
                    if upload["Initiated"].timestamp() < before:
                        self._client.abort_multipart_upload(
                            Bucket=self._name, Key=upload["Key"], UploadId=upload["UploadId"]
                        )

    def upload_file(self, path: Path, key: str, sha256: str) -> None:
        """Uploads one file, large ones in parts, and stores its SHA-256 with it."""
        entry = FileEntry(path=key, size=path.stat().st_size, sha256=sha256)

        def start(manager: TransferManager, entry: FileEntry, watcher: _Watcher) -> Any:
            return manager.upload(str(path), self._name, self._prefix + key, _arguments(entry), [watcher])

        self._transfer(start, [entry], key.rpartition("/")[0], lambda done, total: None)

    def upload(self, folder: Path, files: Sequence[FileEntry], prefix: str, progress: Progress) -> None:
        """Uploads files of a folder to objects below `prefix`. The server checks each SHA-256."""

        def start(manager: TransferManager, entry: FileEntry, watcher: _Watcher) -> Any:
            key = f"{self._prefix}{prefix}/{entry.path}"
            return manager.upload(str(folder / entry.path), self._name, key, _arguments(entry), [watcher])

        self._transfer(start, files, prefix, progress)

    def download(self, prefix: str, files: Sequence[FileEntry], folder: Path, progress: Progress) -> None:
        """Downloads objects below `prefix` to files of a folder. The caller verifies the contents."""

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
        """Transfers files in parallel, large ones in parts. Those that fail for a passing reason are transferred again.
        Any other error cancels the remaining transfers."""
        began, total, counter = time.monotonic(), sum(entry.size for entry in files), _Counter()

        def show(watcher: _Watcher) -> None:
            while not watcher.done.wait(0.2):
                if time.monotonic() - began > _QUIET_SECONDS:
                    progress(min(counter.bytes, total), total)

        pending, deadline, wait = list(files), time.monotonic() + self._patience, _SHORTEST_WAIT
        while failed := self._transfer_once(start, pending, prefix, counter, show):
            if len(failed) < len(pending):
                deadline, wait = time.monotonic() + self._patience, _SHORTEST_WAIT
            if time.monotonic() + wait > deadline:
                raise self._unreachable(failed[-1][1])
            pending = [entry for entry, _ in failed]
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)
        if time.monotonic() - began > _QUIET_SECONDS:
            progress(total, total)

    def _transfer_once(
        self,
        start: Callable[[TransferManager, FileEntry, _Watcher], Any],
        files: Sequence[FileEntry],
        prefix: str,
        counter: _Counter,
        show: Callable[[_Watcher], None],
    ) -> list[tuple[FileEntry, Exception]]:
        """Transfers files; returns those that failed for a passing reason. show: called until a transfer has ended."""
        config = TransferConfig(
            multipart_threshold=_PART,
            multipart_chunksize=_PART,
            max_request_concurrency=_TRANSFERS,
            num_download_attempts=_ATTEMPTS,
        )
        failed: list[tuple[FileEntry, Exception]] = []
        with TransferManager(self._client, config) as manager:
            watchers = [_Watcher(counter) for _ in files]
            futures = [start(manager, entry, watcher) for entry, watcher in zip(files, watchers, strict=True)]
            for entry, watcher, future in zip(files, watchers, futures, strict=True):
                show(watcher)
                with self._translated_errors(f"{prefix}/{entry.path}"):
                    try:
                        future.result()
                    except (BotoCoreError, ClientError, RetriesExceededError) as error:
                        if not _is_transient(error):
                            raise
                        failed.append((entry, error))
        return failed

    def _pages(self, **request: str) -> Iterator[Any]:
        more: dict[str, str] = {}
        while True:
            with self._translated_errors():
                page = self._call("list_objects_v2", **request, **more)
                self._check_listing(page)
            yield page
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _check_listing(self, response: Any) -> None:
        """Raises InputError unless a listing names its bucket. botocore parses a login page, or an empty body, as an
        empty listing."""
        if "Name" not in response:
            raise InputError(f"{self.url}: the response is not from an S3 server: it names no bucket", _ENDPOINT)

    @contextlib.contextmanager
    def _translated_errors(self, key: str = "") -> Iterator[None]:
        try:
            yield
        except (NoCredentialsError, PartialCredentialsError) as error:
            hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            raise InputError(f"{self.url}: no credentials", hint) from error
        except ClientError as error:
            raise self._client_error(error, key) from error
        except RecursionError as error:  # botocore follows a redirect without a region to itself
            raise InputError(f"{self.url}: the server redirects endlessly", _ENDPOINT) from error
        except RetriesExceededError as error:
            raise self._unreachable(error.last_exception) from error
        except (BotoCoreError, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # an error of a local file, for example a full disk
            raise self._unreachable(error) from error

    def _client_error(self, error: ClientError, key: str) -> InputError:
        code, where = _code(error) or f"HTTP {_status(error)}", f"{self.url}/{key}" if key else self.url
        if code in _ROOT_ERRORS:
            problem, hint = _ROOT_ERRORS[code]
            return (StoreRefusedError if code == "NoSuchBucket" else InputError)(
                f"{self.url}: {problem} ({code})", hint
            )
        if code == "AccessDenied" or _status(error) == 403:
            hint = "these credentials need s3:ListBucket, GetObject, PutObject and DeleteObject below that prefix"
            return StoreRefusedError(f"{where}: access denied", hint)
        if code in _FULL or _status(error) == 507:
            return StoreRefusedError(
                f"{where}: the store is full ({code})", "free some space or raise its quota, then run again"
            )
        if code in ("NoSuchKey", "404"):
            return InputError(f"{where} is missing" + ("" if key else " (HTTP 404)"), "" if key else _ENDPOINT)
        if _status(error) == 412:
            return InputError(f"{where} was replaced while it was being read", "run again")
        message = error.response.get("Error", {}).get("Message", "")
        problem = f"{code}: {message}" if message else code
        kind = StoreUnreachableError if _is_transient(error) else InputError
        return kind(f"{where}: {problem}", "reported by the server or a proxy; run again when it works")

    def _unreachable(self, error: Exception) -> InputError:
        reason = " ".join(str(error).split())[:300]
        hint = "check that it is running and that AWS_ENDPOINT_URL is right"
        return StoreUnreachableError(f"{self.url}: the server does not respond: {reason}", hint)


class _Counter:
    """Bytes transferred, over all files and threads."""

    def __init__(self) -> None:
        self.bytes = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.bytes += count


class _Watcher(BaseSubscriber):
    """Callbacks of the transfer manager for one file, called in its threads."""

    def __init__(self, counter: _Counter) -> None:
        self.done = threading.Event()
        self._counter = counter

    def on_progress(self, future: Any, bytes_transferred: int, **_: Any) -> None:
        self._counter.add(bytes_transferred)

    def on_done(self, future: Any, **_: Any) -> None:
        self.done.set()


def _arguments(entry: FileEntry) -> dict[str, Any]:
    """The arguments of an upload: the SHA-256 as metadata, and as a checksum. S3 checks a whole object's SHA-256 only
    for single-part uploads; with several parts, each part has its own checksum."""
    metadata = {"Metadata": {_SHA256: entry.sha256}}
    if entry.size >= _PART:
        return {"ChecksumAlgorithm": "SHA256", **metadata}
    return {"ChecksumSHA256": base64.b64encode(bytes.fromhex(entry.sha256)).decode(), **metadata}


def _is_transient(error: Exception) -> bool:
    """Whether a repeated request may succeed: there was no whole response, or the server reports its own failure."""
    if not isinstance(error, ClientError):
        return isinstance(error, _TRANSIENT)
    code, status = _code(error), _status(error)
    return code in _THROTTLED or status == 429 or (status >= 500 and status != 507 and code not in _FULL)


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
