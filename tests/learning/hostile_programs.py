"""Programs that mean harm, to the machine that they run on or to the verdict.

A program whose attempts must all be refused by the kernel passes when they are.
Names in capitals that a program does not set itself are set by the test: FOLDER with open.txt (mode 666), closed.txt
(600) and folder/, SECRET (reversed) that both files hold, REPOSITORY, HOME, PARENT, and the ports of who listens.
"""

from typing import NamedTuple


class Hostile(NamedTuple):
    """A program and its end."""

    source: str
    outcome: str
    message: str = ""
    seconds: float = 20.0


TRY = """
import ctypes, errno, os, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)

def refused(what, *arguments, **named):
    try:
        result = what(*arguments, **named)
    except (OSError, ValueError):
        return
    assert result == -1, f"{what} was allowed: {result!r}"
"""


def denied(source: str) -> Hostile:
    """All that is tried must fail, and says so by assertions."""
    return Hostile(TRY + source, "passed")


def endless(source: str) -> Hostile:
    """Only the clock ends it."""
    return Hostile(source, "timeout", "not done after", seconds=1.0)


def early(source: str, message: str = "exit status 0 before the end") -> Hostile:
    """Ends before its last line, which would be a failure."""
    return Hostile(source + "\nassert False", "failed", message)


TIME = {
    "infinite loop": endless("while True: pass"),
    "sleep forever": endless("import time; time.sleep(10**6)"),
    "ignores every signal": endless("""
import signal
for number in signal.valid_signals() - {9, 19, 32, 33}:
    signal.signal(number, signal.SIG_IGN)
while True: pass
"""),
    "blocks every signal and stops": endless("""
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
os.kill(os.getpid(), signal.SIGSTOP)
"""),
    "loop in C": endless("x = 3 ** (10 ** 8)"),
    "hopeless pattern": endless("import re; re.match('(a+)+b', 'a' * 60)"),
    "processor time on many threads": Hostile("""
import hashlib, threading
def work():
    data = bytes(1 << 24)
    while True: hashlib.sha256(data)
for _ in range(3): threading.Thread(target=work).start()
""", "timeout", seconds=1.0),
    "hangs at exit": endless("import atexit, time; atexit.register(time.sleep, 10**6)"),
    "thread goes on": endless("import threading, time; threading.Thread(target=time.sleep, args=(10**6,)).start()"),
    "destructor loops": endless("""
class Endless:
    def __del__(self):
        while True: pass
x = Endless()
"""),
    "message of the error hangs": endless("""
class Endless(Exception):
    def __str__(self):
        while True: pass
raise Endless
"""),
}  # fmt: skip

PROCESSES = {
    "fork bomb": endless("""
import os
while True:
    try: os.fork()
    except OSError: pass
"""),
    "fork bomb without a parent": early("""
import os
if os.fork() == 0:
    while True:
        try:
            if os.fork(): os._exit(0)
        except OSError: pass
os._exit(0)
"""),
    "daemon": early("""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 64)
        time.sleep(10**6)
    os._exit(0)
os.wait()
os._exit(0)
"""),
    "daemon of a program that passes": Hostile("""
import os, signal, time
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        time.sleep(10**6)
    os._exit(0)
os.wait()
""", "passed"),
    "thread bomb": Hostile("""
import threading, time
while True: threading.Thread(target=time.sleep, args=(10**6,), daemon=True).start()
""", "failed", "can't start new thread"),
    "kills all": denied("""
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGSTOP):
    refused(os.kill, PARENT, number)
    try: os.kill(-1, number)
    except ProcessLookupError: pass
"""),
    "kills process 1": denied("""
for number in signal.valid_signals():
    try: os.kill(1, number)
    except PermissionError: pass
time.sleep(0.1)
assert os.getppid() == 1
"""),
    "signal to the process group": Hostile("import os; os.killpg(0, 9)", "failed", "killed by SIGKILL"),
    "signal to the parent": denied("""
try: os.kill(os.getppid(), 9)
except PermissionError: pass
time.sleep(0.1)
assert os.getppid() == 1
"""),
    "looks into other processes": denied("""
seen = [name for name in os.listdir("/proc") if name.isdigit()]
assert set(seen) <= {"1", str(os.getpid())}, seen
for number in (0, 1, PARENT):
    for name in ("environ", "mem", "maps", "root/etc/passwd", "cwd/x", "fd/0"):
        refused(open, f"/proc/{number}/{name}", "rb")
    refused(libc.ptrace, 16, number, 0, 0)
    refused(libc.process_vm_readv, number, 0, 0, 0, 0, 0)
"""),
    "reads the parent's environment": denied("""
import glob
for name in glob.glob("/proc/*/environ") + glob.glob("/proc/*/task/*/environ"):
    try: assert SECRET[::-1].encode() not in open(name, "rb").read()
    except OSError: pass
assert not os.environ
assert b"=" not in open("/proc/self/environ", "rb").read().replace(b"LC_CTYPE=", b"")
"""),
}  # fmt: skip

MEMORY = {
    "one big block": Hostile("x = bytearray(1 << 40)", "memory", "MemoryError"),
    "block by block": Hostile("x = []\nwhile True: x.append(bytearray(1 << 20))", "memory", "MemoryError"),
    "many small ones": Hostile("x = []\nwhile True: x.append([x])", "memory", "MemoryError"),
    "bomb of zeros": Hostile("""
import zlib
data = zlib.compress(bytes(1 << 26), 9)
for _ in range(8): x = zlib.decompress(data) * 8
""", "memory", "MemoryError"),
    "many children": denied("""
read, write = os.pipe()
children = 0
try:
    while children < 50:
        if os.fork() == 0:
            held = []
            try:
                while True: held.append(bytearray(1 << 20))
            except MemoryError: pass
            os.write(write, b"%d\\n" % len(held))
            time.sleep(60)
        children += 1
except BlockingIOError: pass
told = b""
while told.count(b"\\n") < children: told += os.read(read, 100)
assert children == 3 and sum(map(int, told.split())) < 3 * 192
"""),
    "shared memory": denied("""
import mmap
refused(libc.shmget, 0, 1 << 20, 0o1600)
refused(libc.msgget, 0, 0o1600)
refused(libc.semget, 0, 100, 0o1600)
refused(os.memfd_create, "x")
refused(libc.syscall, {"x86_64": 240, "aarch64": 180}[os.uname().machine], b"queue", os.O_CREAT | os.O_RDWR, 0o600, 0)
try: mmap.mmap(-1, 1 << 30)
except OSError: pass
else: assert False
"""),
    "locked memory": denied("""
refused(libc.mlock, ctypes.create_string_buffer(1 << 13), ctypes.c_size_t(4096))
refused(libc.mlockall, 3)
"""),
    "raised limits": denied("""
import resource
for name in dir(resource):
    if not name.startswith("RLIMIT_"): continue
    which = getattr(resource, name)
    soft, hard = resource.getrlimit(which)
    if hard != resource.RLIM_INFINITY:
        refused(resource.setrlimit, which, (hard + 1, hard + 1))
        refused(resource.prlimit, 0, which, (-1, -1))
assert resource.getrlimit(resource.RLIMIT_NPROC)[1] < 10
assert resource.getrlimit(resource.RLIMIT_CORE)[1] == 0
"""),
    "deep recursion": Hostile("def f(): f()\nf()", "failed", "RecursionError"),
    "stack runs over": Hostile("""
import sys
sys.setrecursionlimit(10**9)
class A:
    def __getattr__(self, name): return getattr(self, name + "x")
A().x
""", "failed"),
    "segmentation fault": Hostile("import ctypes; ctypes.string_at(0)", "failed", "killed by SIGSEGV"),
    "many open files": Hostile("x = []\nwhile True: x.append(open('/dev/null'))", "failed", "Too many open files"),
}  # fmt: skip

OUTPUT = {
    "prints forever": endless("while True: print('x' * 1000)"),
    "prints errors forever": endless("import sys\nwhile True: sys.stderr.write('x' * 1000 + '\\n')"),
    "one line of errors forever": endless("import os\nwhile True: os.write(2, b'x' * 100000)"),
    "huge message": Hostile("raise ValueError('x' * 30_000_000)", "failed", "ValueError: xxxx"),
    "message of many lines": Hostile("raise ValueError('x\\n' * 1_000_000 + 'end')", "failed", "end"),
    "terminal's commands": Hostile(
        "raise ValueError('\\x1b]0;title\\x07\\x1b[2J\\r\\x9b\\u202e')", "failed", "ValueError"
    ),
    "not text": Hostile("import os; os.write(2, bytes(range(256)) * 100); os._exit(1)", "failed"),
    "closes all": Hostile("import os; os.closerange(0, 256)", "failed"),
}

PASSES = {
    "leaves early": early("import sys; sys.exit(0)"),
    "leaves early for good": early("import os; os._exit(0)"),
    "raises SystemExit": early("raise SystemExit"),
    "raises SystemExit in a function": early("def f(x):\n    raise SystemExit(0)\nf(1)"),
    "leaves in C": early("import ctypes; ctypes.CDLL(None).exit(0)"),
    "becomes another program": early("import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'pass'])"),
    "a child ends in its place": early("import os\nif os.fork(): os._exit(0)", "exit status 0 before"),
    "a child gets to the end": Hostile("""
import os, time
if os.fork():
    time.sleep(0.3)
    os._exit(0)
""", "failed", "exit status 0 before"),
    "replaces functions": early("""
import builtins, os, posix, sys
for module in (os, posix): module.write = lambda *a: 32
builtins.exec = builtins.compile = builtins.open = lambda *a, **k: None
sys.excepthook = lambda *a: os._exit(0)
sys.exit = lambda *a: None
"""),
    "replaces modules": early("""
import os, sys
sys.modules.clear()
sys.excepthook = lambda *a: os._exit(0)
"""),
    "writes where the end is told": early("""
import os
for fd in range(3, 64):
    for text in (b"1", b"passed", b"ended 0 1\\n", b"0" * 32):
        try: os.write(fd, text)
        except OSError: pass
os._exit(0)
"""),
    "looks for the token": early("""
import gc, os, sys
found = set()
def look(thing):
    if isinstance(thing, bytes): found.add(thing[:32])
frame = sys._getframe()
while frame:
    for thing in (*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts): look(thing)
    frame = frame.f_back
for thing in gc.get_objects():
    look(thing)
    for other in gc.get_referents(thing): look(other)
for fd in range(64):
    try:
        os.lseek(fd, 0, 0)
        look(os.read(fd, 32))
    except OSError: pass
for name in ("cmdline", "environ"): look(open(f"/proc/self/{name}", "rb").read())
for token in found:
    if len(token) == 32:
        os.write(3, token)
        os._exit(0)
os._exit(0)
"""),
    "fills the channel": Hostile("import os\nfor _ in range(4): os.write(3, b'x' * 1000)", "failed", "exit status 0"),
    "an error after the end": Hostile("import atexit, os; atexit.register(os._exit, 7)", "failed", "exit status 7"),
}  # fmt: skip

ABUSE = {**TIME, **PROCESSES, **MEMORY, **OUTPUT, **PASSES}
