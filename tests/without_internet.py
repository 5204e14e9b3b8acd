"""Run a command that the kernel kills when it, or anything it starts, opens an internet socket. Linux only.

A seccomp filter on socket(2). It is inherited by all children and cannot be taken off. Exits with `UNSUPPORTED` where
there is no such thing.
"""

import ctypes
import os
import socket
import struct
import sys

UNSUPPORTED = 77
# <linux/audit.h> and <asm/unistd.h>: how the kernel calls the architecture, and its number of socket(2).
ARCHITECTURES = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
SET_NO_NEW_PRIVS, SET_SECCOMP, MODE_FILTER = 38, 22, 2  # <linux/prctl.h>, <linux/seccomp.h>
KILL_PROCESS, ALLOW = 0x80000000, 0x7FFF0000
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # <linux/bpf_common.h>
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data, little-endian


def program(architecture: int, socket_call: int) -> list[tuple[int, int, int, int]]:
    """Instructions: what to do, how many to skip if equal, how many if not, operand."""
    return [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_IF_EQUAL, 0, 6, architecture),  # of another one the numbers mean something else
        (LOAD, 0, 0, NUMBER),
        (JUMP_IF_EQUAL, 0, 3, socket_call),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (JUMP_IF_EQUAL, 2, 0, socket.AF_INET),
        (JUMP_IF_EQUAL, 1, 0, socket.AF_INET6),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, KILL_PROCESS),
    ]


def forbid() -> bool:
    """Put the filter on this process; whether that was possible."""
    known = ARCHITECTURES.get(os.uname().machine)
    if sys.platform != "linux" or known is None:
        return False
    instructions = program(*known)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in instructions))
    pointer = ctypes.create_string_buffer(struct.pack("HP", len(instructions), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    return not (prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(SET_SECCOMP, MODE_FILTER, ctypes.addressof(pointer), 0, 0))


if __name__ == "__main__":
    if not forbid():
        sys.exit(UNSUPPORTED)
    os.execvp(sys.argv[1], sys.argv[1:])
