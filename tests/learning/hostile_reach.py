"""Programs that reach for files, rights and the network of the host: all is refused."""

from hostile_programs import Hostile, denied

FILES = {
    "fills the folder": denied("""
written = 0
try:
    for i in range(1000):
        with open(f"{i}", "wb", buffering=0) as file: written += file.write(bytes(1 << 20))
except OSError as error: assert error.errno == errno.ENOSPC
assert written <= 16 << 20
"""),
    "fills the folder with names": Hostile("for i in range(10**6): open(str(i), 'w')", "failed", "No space left"),
    "one big file": Hostile(
        "file = open('x', 'wb')\nwhile True: file.write(bytes(1 << 16))", "failed", "File too large"
    ),
    "holes and links": denied("""
with open("x", "wb") as file:
    refused(file.truncate, 1 << 30)
    refused(os.posix_fallocate, file.fileno(), 0, 1 << 30)
"""),
    "fills /tmp and /dev/shm": denied("""
written = 0
try:
    for i in range(1000):
        name = f"{('/tmp', '/dev/shm')[i % 2]}/sandbox-was-here{i}"
        with open(name, "wb", buffering=0) as file: written += file.write(bytes(1 << 19))
except OSError as error: assert error.errno == errno.ENOSPC
assert written <= 16 << 20
"""),
    "writes elsewhere": denied("""
for folder in (HOME, os.path.expanduser("~"), REPOSITORY, FOLDER, FOLDER + "/folder", "/", "/etc", "/var/tmp", "/run",
               "/root", "/dev", "/usr/lib", "/proc", "/sys", os.path.dirname(os.__file__),
               os.path.dirname(sys.executable)):
    refused(open, folder + "/sandbox-was-here", "w")
    refused(os.mkdir, folder + "/sandbox-was-here.d")
for path in (REPOSITORY + "/pyproject.toml", FOLDER + "/open.txt", os.__file__, sys.executable, "/etc/ld.so.cache"):
    refused(open, path, "a")
    refused(os.truncate, path, 0)
    refused(os.utime, path)
"""),
    "deletes": denied("""
import shutil
for path in (REPOSITORY + "/pyproject.toml", FOLDER + "/open.txt", FOLDER + "/closed.txt", os.__file__, sys.executable):
    refused(os.unlink, path)
    refused(os.rename, path, "/tmp/x")
import json, json.decoder
for folder in (REPOSITORY, FOLDER, HOME, os.path.dirname(json.__file__), "/tmp/..", "/dev", "/etc"):
    shutil.rmtree(folder, ignore_errors=True)
for path in (os.__file__, json.decoder.__file__, sys.executable, "/dev/null", "/etc/ld.so.cache"): os.stat(path)
"""),
    "reads secrets": denied("""
for path in (FOLDER + "/open.txt", FOLDER + "/closed.txt", REPOSITORY + "/README.md", "/etc/passwd", "/etc/shadow"):
    refused(open, path)
    refused(open, "/proc/1/root" + path)
    refused(open, "/proc/self/root" + path)
    refused(open, "../../../../.." + path)
"""),
    "finds secrets": denied("""
for folder, folders, files in os.walk("/"):
    assert not set(files) & {"open.txt", "closed.txt", "pyproject.toml"}, folder
    if folder.startswith(("/proc", "/usr", sys.base_prefix + "/lib")): folders.clear()
"""),
    "links": denied("""
os.symlink(FOLDER + "/open.txt", "link")
refused(open, "link")
os.symlink(FOLDER, "folder")
refused(os.listdir, "folder")
refused(os.link, os.__file__, "hard")
os.symlink("/proc/1/root", "root")
refused(os.listdir, "root/")
os.mkfifo("fifo")
refused(os.mknod, "device", 0o600 | 0o060000, os.makedev(254, 0))
refused(os.mknod, "memory", 0o600 | 0o020000, os.makedev(1, 1))
"""),
    "changes the interpreter's rights": denied("""
for path in (sys.executable, os.__file__, "/usr/lib", "/", "/etc/ld.so.cache", "/dev/null"):
    refused(os.chmod, path, 0o777)
    refused(os.chown, path, os.getuid(), os.getgid())
    refused(os.setxattr, path, "user.x", b"x")
os.chmod("/tmp", 0o777)
"""),
    "kernel's settings": denied("""
for path in ("/proc/sys/kernel/hostname", "/proc/sys/user/max_user_namespaces", "/proc/sys/vm/drop_caches",
             "/proc/sysrq-trigger", "/sys/kernel/mm/transparent_hugepage/enabled", "/proc/self/oom_score_adj",
             "/proc/1/oom_score_adj", "/proc/self/uid_map", "/sys/fs/cgroup/cgroup.procs", "/dev/mem", "/dev/kmsg",
             "/dev/vda", "/dev/sda"):
    refused(open, path, "w")
    refused(open, path, "r+")
"""),
    "starts other programs": denied("""
import subprocess
for command in ("/bin/sh", "/usr/bin/id", "/usr/bin/sudo", "/usr/bin/mount"):
    refused(subprocess.run, [command])
assert os.system("true") != 0
"""),
}

RIGHTS = {
    "becomes root": denied("""
for user in {0, 1, 1000, 65533} - {os.getuid()}:
    for change in (os.setuid, os.seteuid, os.setgid): refused(change, user)
    refused(os.setresuid, user, user, user)
refused(os.setgroups, [0])
assert os.getuid() == os.geteuid() != 0
"""),
    "mounts": denied("""
for kind, target in ((b"tmpfs", b"/tmp"), (b"proc", b"/proc"), (b"sysfs", b"/tmp"), (b"overlay", b"/")):
    refused(libc.mount, kind, target, kind, 0, None)
refused(libc.mount, None, b"/", None, 32, None)
refused(libc.mount, None, b"/usr/lib", None, 32 | 4096, None)
refused(libc.umount2, b"/tmp", 2)
refused(libc.umount2, b"/proc", 2)
for number in (428, 429, 430, 442): refused(libc.syscall, number, -100, b"/", 0, 0, 0)
"""),
    "makes namespaces": denied("""
for kind in (0x10000000, 0x20000, 0x20000000, 0x40000000, 0x10000000 | 0x20000, 0x80):
    refused(libc.unshare, kind)
    clone, order = {"x86_64": (56, (0, 0, 0, 0)), "aarch64": (220, (0, 0, 0, 0))}[os.uname().machine]
    if kind != 0x80:
        child = libc.syscall(clone, ctypes.c_long(kind | signal.SIGCHLD), *map(ctypes.c_long, order))
        if child == 0: os._exit(0)
        assert child == -1, "a namespace was made"
        request = (ctypes.c_uint64 * 11)(kind, 0, 0, 0, signal.SIGCHLD)
        child = libc.syscall(435, request, ctypes.c_long(ctypes.sizeof(request)))
        if child == 0: os._exit(0)
        assert child == -1, "a namespace was made"
for name in ("user", "mnt", "pid", "net"):
    refused(libc.setns, os.open(f"/proc/self/ns/{name}", os.O_RDONLY), 0)
"""),
    "leaves its root": denied("""
os.mkdir("x")
refused(os.chroot, "x")
refused(os.chroot, ".")
os.chdir("/")
for _ in range(50): os.chdir("..")
assert "home" not in os.listdir() or not os.path.exists(FOLDER)
"""),
    "gets capabilities": denied("""
refused(libc.capset, (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6))
for number in range(41): refused(libc.prctl, 47, 2, ctypes.c_ulong(number), 0, 0)
status = open("/proc/self/status").read()
assert "CapEff:\\t0000000000000000" in status and "CapBnd:\\t0000000000000000" in status and "NoNewPrivs:\\t1" in status
refused(libc.prctl, 38, 0, 0, 0, 0)
refused(libc.sethostname, b"x", 1)
refused(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1))
refused(os.nice, -5)
refused(time.clock_settime, time.CLOCK_REALTIME, 0)
"""),
    "unusual system calls": denied("""
for number in (425, 427, 438, 447): refused(libc.syscall, number, 1, 0, 0, 0, 0)
machine = os.uname().machine
for name, numbers in {"bpf": (321, 280), "keyctl": (250, 219), "perf": (298, 241), "userfaultfd": (323, 282)}.items():
    refused(libc.syscall, numbers[machine == "aarch64"], 0, 0, 0, 0, 0)
"""),
}

NETWORK = {
    "connects": denied("""
import socket
for address in ("127.0.0.1", "127.1.2.3", "8.8.8.8", "169.254.169.254", "10.0.0.1"):
    refused(socket.create_connection, (address, TCP), timeout=2)
refused(socket.create_connection, ("::1", TCP), timeout=2)
"""),
    "sends datagrams": denied("""
import socket
for address in ("127.0.0.1", "8.8.8.8", "255.255.255.255"):
    refused(socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto, b"x", (address, UDP))
"""),
    "asks for names": denied("""
import socket
for name in ("example.org", "pypi.org"): refused(socket.getaddrinfo, name, 80)
"""),
    "listens": denied("""
import socket
server = socket.create_server(("127.0.0.1", TCP))
refused(socket.create_connection, ("127.0.0.1", TCP), timeout=1)
refused(socket.create_server, ("127.0.0.1", 80))
"""),
    "local sockets": denied("""
import socket
refused(socket.socket(socket.AF_UNIX).connect, LOCAL)
for path in ("/run/docker.sock", "/var/run/docker.sock", "/run/systemd/private", "/run/dbus/system_bus_socket"):
    refused(socket.socket(socket.AF_UNIX).connect, path)
"""),
    "other kinds of sockets": denied("""
import socket
for family in set(range(50)) - {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6}:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
        refused(socket.socket, family, kind)
refused(socket.socket, socket.AF_INET, socket.SOCK_RAW)
"""),
}

REACH = {**FILES, **RIGHTS, **NETWORK}
