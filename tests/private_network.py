"""Runs a command with a loopback device of its own, so that nothing but the command sends bytes over it.

python -m tests.private_network COMMAND [ARGUMENT …]
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_NEW_USER = 0x10000000  # CLONE_NEWUSER, which gives any user the right to the rest
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 0x1  # SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP


def enter() -> None:
    """Move this process to a network namespace whose loopback device is up. Raises OSError if not permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_NETWORK | (_NEW_USER if os.geteuid() else 0)) != 0:
        raise OSError(ctypes.get_errno(), "network namespaces are not permitted here")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = fcntl.ioctl(control, _GET_FLAGS, struct.pack("16sH14x", b"lo", 0))
        name, flags = struct.unpack("16sH14x", request)
        fcntl.ioctl(control, _SET_FLAGS, struct.pack("16sH14x", name, flags | _UP))


if __name__ == "__main__":
    enter()
    os.execv(sys.argv[1], sys.argv[1:])
