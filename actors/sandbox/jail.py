"""The inside of the sandbox: a standalone script that isolates itself, starts one program and reports how it ended.

`actors/sandbox/run.py` runs it as `python -I -S jail.py STATUS_FD`. The request, a line of JSON, is read from standard
input, which stays open as a lifeline: when it closes, all processes of the sandbox end. There are three processes: this
one; the first process of the new PID namespace, after whose end the kernel kills all others; and the program, which has
no capabilities after its exec. The script imports nothing of Moray, so the program's memory holds nothing of it.

Root creates the namespaces directly, and runs the program under an unused user id. Other users, and root where this is
forbidden, also create a user namespace. Sources: namespaces(7), user_namespaces(7), pivot_root(2),
mount_setattr(2), seccomp(2), getrlimit(2). Needs Linux 5.14, where RLIMIT_NPROC counts by user namespace.
"""

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import secrets
import signal
import struct
import sys
import threading
from typing import Any

BOX = "/box"  # the program's own folder, in memory
REPORT_FD = 3  # descriptor for the program's report
_NOBODY = 65534
_REPORT_BYTES = 8192

_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
_NEWUSER, _NEWPID, _NEWNET, _NEWTIME = 0x10000000, 0x20000000, 0x40000000, 0x80
_SPACES = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
_ANY_SPACE = _SPACES | _NEWUSER | _NEWCGROUP | _NEWTIME
_NOSUID, _NODEV, _BIND, _REC, _PRIVATE = 2, 4, 4096, 16384, 1 << 18
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_MOUNT_SETATTR, _AT_RECURSIVE = 442, 0x8000
_SET_DUMPABLE, _SET_SECCOMP, _SET_CHILD_SUBREAPER, _SET_NO_NEW_PRIVS = 4, 22, 36, 38

# (audit architecture, numbers of syscalls). Numbers from 424 on are the same on all architectures.
_MACHINES = {
    "x86_64": (0xC000003E, {
        "socket": 41, "clone": 56, "pivot_root": 155, "shmget": 29, "semget": 64, "msgget": 68, "ptrace": 101,
        "syslog": 103, "personality": 135, "chroot": 161, "acct": 163, "mount": 165, "umount2": 166, "swapon": 167,
        "reboot": 169, "init_module": 175, "delete_module": 176, "quotactl": 179, "kexec_load": 246, "add_key": 248,
        "request_key": 249, "keyctl": 250, "unshare": 272, "perf_event_open": 298, "name_to_handle_at": 303,
        "open_by_handle_at": 304, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312,
        "finit_module": 313, "memfd_create": 319, "bpf": 321, "userfaultfd": 323,
    }),
    "aarch64": (0xC00000B7, {
        "socket": 198, "clone": 220, "pivot_root": 41, "shmget": 194, "semget": 190, "msgget": 186, "ptrace": 117,
        "syslog": 116, "personality": 92, "chroot": 51, "acct": 89, "mount": 40, "umount2": 39, "swapon": 224,
        "reboot": 142, "init_module": 105, "delete_module": 106, "quotactl": 60, "kexec_load": 104, "add_key": 217,
        "request_key": 218, "keyctl": 219, "unshare": 97, "perf_event_open": 241, "name_to_handle_at": 264,
        "open_by_handle_at": 265, "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272,
        "finit_module": 273, "memfd_create": 279, "bpf": 280, "userfaultfd": 282,
    }),
}  # fmt: skip
# io_uring, the new mount calls, mount_setattr, pidfd_getfd, memfd_secret
_FORBIDDEN_EVERYWHERE = (425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 442, 447)
_CLONE3 = 435

# Codes of filter instructions (code, jump if true, jump if false, value): load a word, compare it, return an action.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_UNIX = 1  # AF_UNIX

_libc = ctypes.CDLL(None, use_errno=True)


class CannotIsolate(Exception):
    """The system refused a call that the sandbox needs, which the message names."""


def _check(call: str, result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise CannotIsolate(f"{call}: {os.strerror(code)}")


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    arguments = [text.encode() if text else None for text in (source, target, kind)]
    _check(f"mount {target}", _libc.mount(*arguments, ctypes.c_ulong(flags), options.encode() or None))


def _set_attributes(path: str, flags: int, recursive: bool) -> None:
    attributes = struct.pack("QQQQ", flags, 0, 0, 0)
    result = _libc.syscall(
        ctypes.c_long(_MOUNT_SETATTR),
        ctypes.c_int(-100),
        path.encode(),
        ctypes.c_uint(_AT_RECURSIVE if recursive else 0),
        attributes,
        ctypes.c_size_t(len(attributes)),
    )
    _check(f"mount_setattr {path}", result)


def enter_namespaces() -> int | None:
    """Creates namespaces for later child processes. Returns the user id for the program; None: the current one."""
    if os.geteuid() == 0:
        if _libc.unshare(_SPACES) == 0:
            return (1 << 30) + secrets.randbelow(1 << 29)
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        _libc.prctl(_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self belongs to root, and the map cannot be written
    user, group = os.geteuid(), os.getegid()
    _check("unshare user, mount, PID, network and IPC namespaces", _libc.unshare(_SPACES | _NEWUSER))
    try:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{_NOBODY} {user} 1"),
            ("gid_map", f"{_NOBODY} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError as error:
        raise CannotIsolate(f"/proc/self/{name}: {error.strerror}") from error
    return None


def build_root(folders: list[str], devices: list[str], disk_bytes: int, owner: int) -> None:
    """Replaces the root file system by one with BOX and read-only mounts of `folders` (and files) and `devices`.

    A new in-memory file system becomes the root, with the old root in one of its folders. The mounts are made from
    there before the old root is unmounted.
    """
    _mount("", "/", "", _REC | _PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    os.chdir("/tmp")
    os.mkdir("old")
    _check("pivot_root", _libc.syscall(ctypes.c_long(_calls()[1]["pivot_root"]), b".", b"old"))
    os.chdir("/")
    for path in folders:
        _show(path, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)
    for path in devices:
        _show(path, _ATTR_NOSUID)
    os.mkdir(BOX)
    _mount(
        "tmpfs", BOX, "tmpfs", _NOSUID | _NODEV, f"size={disk_bytes},nr_inodes=4096,mode=700,uid={owner},gid={owner}"
    )
    _check("umount2 of the old root", _libc.umount2(b"/old", 2))
    os.rmdir("/old")
    _set_attributes("/", _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, recursive=False)


def _show(path: str, flags: int) -> None:
    source = "/old" + path
    if not os.path.lexists(source) or os.path.lexists(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), path)
        return
    if os.path.isdir(source):
        os.mkdir(path)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    _mount(source, path, "", _BIND | _REC)
    _set_attributes(path, flags, recursive=True)


def _calls() -> tuple[int, dict[str, int]]:
    machine = platform.machine()
    if machine not in _MACHINES:
        raise CannotIsolate(f"unsupported machine {machine}")
    return _MACHINES[machine]


def _load(at: int) -> tuple[int, int, int, int]:
    return _LOAD, 0, 0, at


def _return(action: int) -> tuple[int, int, int, int]:
    return _RETURN, 0, 0, action


def forbid_calls() -> None:
    """Installs a seccomp filter.

    Opening a socket that is not local kills the process, so that the attempt is visible. Calls that create namespaces,
    mount, trace other processes, or allocate memory outside all limits fail with EPERM.
    """
    architecture, numbers = _calls()
    allow, kill = 0x7FFF0000, 0x80000000
    refuse, absent = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    program = [_load(4), (_EQUAL, 1, 0, architecture), _return(kill), _load(0)]
    program += [(_AT_LEAST, 0, 1, 0x40000000), _return(refuse)]  # the x32 numbers of x86-64
    named = [number for name, number in numbers.items() if name not in ("socket", "clone")]
    for number in (*named, *_FORBIDDEN_EVERYWHERE):
        program += [(_EQUAL, 0, 1, number), _return(refuse)]
    # A filter cannot read clone3's flags, which are in memory; libraries fall back to clone.
    program += [(_EQUAL, 0, 1, _CLONE3), _return(absent)]
    program += [(_EQUAL, 0, 4, numbers["socket"]), _load(16), (_EQUAL, 0, 1, _UNIX), _return(allow), _return(kill)]
    program += [(_EQUAL, 0, 4, numbers["clone"]), _load(16), (_ANY_BIT, 1, 0, _ANY_SPACE)]
    program += [_return(allow), _return(refuse)]
    program += [_return(allow)]
    filters = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(filters)
    header = struct.pack("HP", len(program), ctypes.addressof(buffer))
    _check("no_new_privs", _libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _check("seccomp", _libc.prctl(_SET_SECCOMP, 2, header, 0, 0))


def limit_resources(limits: dict[str, int], processes: int | None) -> None:
    for name, value in (
        ("RLIMIT_AS", limits["memory_bytes"]),
        ("RLIMIT_FSIZE", limits["file_bytes"]),
        ("RLIMIT_NOFILE", limits["open_files"]),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_MEMLOCK", 0),
        ("RLIMIT_MSGQUEUE", 0),
    ):
        number = getattr(resource, name, None) or {"RLIMIT_MSGQUEUE": 12}[name]
        resource.setrlimit(number, (value, value))
    if processes is not None:
        resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_seconds"], limits["cpu_seconds"] + 1))


def become_program(request: dict[str, Any], user: int | None, report: int) -> None:
    """Executes the program, or writes the error to the report pipe. Does not return."""
    try:
        os.setsid()
        os.chdir(request["folder"])
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(1, 2)
        os.dup2(report, REPORT_FD)
        os.closerange(REPORT_FD + 1, 4096)
        processes = request["limits"]["processes"] + (0 if user else 3)  # two processes and one thread of this script
        # Without isolation, the limit would count all processes of the user.
        limit_resources(request["limits"], processes if request["isolate"] else None)
        if user is not None:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        forbid_calls()
        os.execve(request["argv"][0], request["argv"], {})
    except BaseException as error:
        os.write(REPORT_FD, json.dumps({"setup": f"{type(error).__name__}: {error}"}).encode())
        os._exit(70)


def first_process(request: dict[str, Any], user: int | None) -> dict[str, Any]:
    """Builds the root, starts the program and reaps its child processes. Returns its exit status and report."""
    if request["isolate"]:
        build_root(
            request["folders"], request["devices"], request["limits"]["disk_bytes"], _NOBODY if user is None else user
        )
        request["folder"] = BOX
    else:
        _libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for name, text in request["files"].items():
        with open(os.path.join(request["folder"], name), "w", encoding="utf-8") as file:
            file.write(text)
    reader, writer = os.pipe()
    program = os.fork()
    if program == 0:
        become_program(request, user, writer)
    os.close(writer)
    threading.Thread(target=_end_with_lifeline, args=(program,), daemon=True).start()
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == program:
            break
    if not request["isolate"]:
        _end_orphans()
    os.set_blocking(reader, False)
    report = b""
    with contextlib.suppress(BlockingIOError):  # a remaining child of the program may hold the other end open
        report = os.read(reader, _REPORT_BYTES)
    return {"status": os.waitstatus_to_exitcode(status), "report": report.decode(errors="replace")}


def _end_orphans() -> None:
    """Kills the program's remaining processes if there is no PID namespace. All have become children of this one."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            left = file.read().split()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
            while os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return


def _end_with_lifeline(program: int) -> None:
    while os.read(0, 4096):
        continue
    with contextlib.suppress(OSError):  # in a PID namespace, all other processes end with this one
        os.killpg(program, signal.SIGKILL)
    os._exit(71)


def _read_request() -> Any:
    data = b""
    while not data.endswith(b"\n"):
        more = os.read(0, 1 << 16)
        if not more:
            os._exit(71)
        data += more
    return json.loads(data)


def main() -> None:
    status = int(sys.argv[1])
    request = _read_request()
    try:
        user = enter_namespaces() if request["isolate"] else None
    except CannotIsolate as error:
        os.write(status, json.dumps({"refused": str(error)}).encode())
        return
    child = os.fork()
    if child:
        os.close(status)
        os.close(1)
        os.waitpid(child, 0)
        return
    try:
        ended = first_process(request, user)
    except CannotIsolate as error:
        ended = {"refused": str(error)}
    except OSError as error:
        ended = {"refused": f"{error.filename or 'setup'}: {error.strerror}"}
    os.write(status, json.dumps(ended).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
