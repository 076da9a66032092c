"""Drop packets of a network link: some at random, or every TCP connection to a closed port.

The kernel's packet scheduler runs a program on each packet of a link (eBPF at the hook `tcx`, Linux 6.6). It is written here
as bytes, so that neither a compiler nor iptables is needed. The link is filtered until the returned file is closed.
"""

import ctypes
import os
import platform
import struct
import threading
from collections.abc import Callable, Iterable

LIBC = ctypes.CDLL(None, use_errno=True)
BPF = {"x86_64": 321, "aarch64": 280}.get(platform.machine(), -1)  # the system call's number
PROG_LOAD, LINK_CREATE = 5, 28
SCHED_CLS = 3  # the type of a program for the packet scheduler
RECEIVED, SENT = 46, 47  # of a link: hooks BPF_TCX_INGRESS and BPF_TCX_EGRESS
NEXT, DROP = -1, 2  # results of a program
CLONE_NEWNET = 0x40000000
RANDOM = 7  # the helper bpf_get_prandom_u32

Code = list[tuple[int, int, int, int, int]]  # operation, destination and source registers, jump, constant


def lose(percent: float) -> bytes:
    """Return a program that drops this share of all packets."""
    return _program([(0x85, 0, 0, 0, RANDOM), (0x97, 0, 0, 0, 1000), (0xA5, 0, 0, 2, round(10 * percent))])


def only(ports: Iterable[int]) -> bytes:
    """Return a program that drops the first packet of every TCP connection over IPv4, except to these ports."""
    ports = list(ports)
    tests: Code = [
        (0x28, 0, 0, 0, 12), (0x55, 0, 0, 7 + len(ports), 0x0800),  # the Ethernet frame's type is IPv4
        (0x30, 0, 0, 0, 23), (0x55, 0, 0, 5 + len(ports), 6),  # the protocol is TCP
        (0x30, 0, 0, 0, 47), (0x57, 0, 0, 0, 0x12), (0x55, 0, 0, 2 + len(ports), 0x02),  # SYN without ACK
        (0x28, 0, 0, 0, 36),
    ]  # fmt: skip
    tests += [(0x15, 0, 0, len(ports) - n, port) for n, port in enumerate(ports)]
    return _program([*tests, (0x05, 0, 0, 2, 0)])


def _program(tests: Code) -> bytes:
    """Return a program that drops a packet if `tests` jump two instructions past their end."""
    code = [(0xBF, 6, 1, 0, 0), *tests, (0xB7, 0, 0, 0, NEXT), (0x95, 0, 0, 0, 0), (0xB7, 0, 0, 0, DROP)]
    return b"".join(struct.pack("<BBhi", op, dst | src << 4, jump, value) for op, dst, src, jump, value in
                    [*code, (0x95, 0, 0, 0, 0)])  # fmt: skip


def attach(program: bytes, pid: int, device: str, hook: int) -> int:
    """Run a program on the packets of a device in the network namespace of process `pid`; return a file to close."""
    return in_network(pid, lambda: _link(_load(program), _index(device), hook))


def in_network(pid: int, call: Callable[[], int]) -> int:
    """Call a function in a process's network namespace, which it enters for one thread."""
    results: list[int | OSError] = []

    def enter() -> None:
        try:
            with open(f"/proc/{pid}/ns/net") as namespace:
                _check(LIBC.setns(namespace.fileno(), CLONE_NEWNET))
            results.append(call())
        except OSError as error:
            results.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if isinstance(results[0], OSError):
        raise results[0]
    return results[0]


def _load(program: bytes) -> int:
    code, license = ctypes.create_string_buffer(program, len(program)), ctypes.create_string_buffer(b"GPL")
    fields = SCHED_CLS, len(program) // 8, ctypes.addressof(code), ctypes.addressof(license)
    return _bpf(PROG_LOAD, struct.pack("<IIQQ", *fields))


def _link(program: int, device: int, hook: int) -> int:
    try:
        return _bpf(LINK_CREATE, struct.pack("<IIII", program, device, hook, 0))
    finally:
        os.close(program)


def _bpf(command: int, fields: bytes) -> int:
    fields = fields.ljust(128, b"\0")
    return _check(LIBC.syscall(BPF, command, fields, len(fields)))


def _index(device: str) -> int:
    return _check(LIBC.if_nametoindex(device.encode()) or -1)


def _check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
