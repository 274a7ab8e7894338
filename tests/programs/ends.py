"""One end of a connection: makes system calls on it and tells their results, here or, by a control socket, in another pod.

Calls are made as they are, by libc: Python's own would repeat what a signal interrupted. A call that is expected to block runs
on a thread of its own, and what follows begins when the kernel says that the thread sleeps in it: nothing here waits for a
length of time to pass, except for what never comes.
"""
import ctypes
import errno
import fcntl
import functools
import hashlib
import json
import os
import select
import signal
import socket
import struct
import termios
import threading
import time

NEVER = 3.0
STILL = "still blocks"
LIBC = ctypes.CDLL(None, use_errno=True)
for call in (LIBC.recv, LIBC.send, LIBC.read, LIBC.write, LIBC.splice):
    call.restype = ctypes.c_ssize_t
SIOCOUTQ = 0x5411
SIOCATMARK = 0x8905
TCP_INQ = 36
SO_ZEROCOPY = 60
MSG_ZEROCOPY = 0x4000000
# Calls of x86_64 in which a thread may sleep: read, write, poll, readv, select, accept, sendto, recvfrom, sendmsg, recvmsg,
# epoll_wait, pselect6, ppoll, splice, epoll_pwait, accept4.
SLEEPING = {0, 1, 7, 19, 23, 43, 44, 45, 46, 47, 232, 270, 271, 275, 281, 288}


def show(data):
    data = bytes(data)
    return repr(data) if len(data) <= 40 else f"{len(data)} bytes {hashlib.sha256(data).hexdigest()[:16]}"


@functools.lru_cache(maxsize=4)
def pattern(length, seed=1):
    """Bytes of which any two stretches differ."""
    block = hashlib.sha256(str(seed).encode()).digest()
    out = bytearray()
    while len(out) < length:
        out += block
        block = hashlib.sha256(block).digest()
    return bytes(out[:length])


def masks(mask):
    names = ("IN", "PRI", "OUT", "ERR", "HUP", "RDHUP")
    found = [name for name in names if mask & getattr(select, "POLL" + name)]
    return "|".join(found) or "nothing"


def raw(call, *arguments):
    """A call of libc: its result, or the name of its error."""
    result = call(*arguments)
    return result if result >= 0 else errno.errorcode[ctypes.get_errno()]


class End:
    """Executes calls by name. `say` gives one line for each."""

    def __init__(self):
        self.socket = None
        self.listener = None
        self.epoll = None
        self.pipe = None
        self.urgent = 0
        self.running = {}
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.signal(signal.SIGUSR2, lambda *_: None)
        signal.siginterrupt(signal.SIGUSR2, False)
        signal.signal(signal.SIGURG, self.count_urgent)

    def count_urgent(self, *_):
        self.urgent += 1

    # --- how calls are made

    def do(self, name, *arguments):
        try:
            return str(getattr(self, "op_" + name)(*arguments))
        except OSError as error:
            return errno.errorcode.get(error.errno, str(error))

    def call(self, name, *arguments):
        """A call that is not expected to block."""
        self.begin("call", name, *arguments)
        return self.finish("call")

    def start(self, key, name, *arguments):
        """A call that is expected to block."""
        self.begin(key, name, *arguments)
        return self.wait_for_sleep(key)

    def begin(self, key, name, *arguments):
        state = {"result": None, "tid": None}
        ready = threading.Event()

        def work():
            state["tid"] = threading.get_native_id()
            ready.set()
            state["result"] = self.do(name, *arguments)

        state["thread"] = threading.Thread(target=work, daemon=True)
        state["thread"].start()
        ready.wait()
        self.running[key] = state

    def wait_for_sleep(self, key):
        state = self.running[key]
        path = f"/proc/self/task/{state['tid']}/syscall"
        deadline = time.monotonic() + NEVER
        while time.monotonic() < deadline:
            if state["result"] is not None:
                return "ended at once"
            try:
                with open(path) as file:
                    word = file.read().split()[0]
            except (OSError, IndexError):
                continue
            if word.isdigit() and int(word) in SLEEPING:
                return "blocks"
            time.sleep(0.0002)
        return "neither blocks nor ends"

    def finish(self, key):
        state = self.running[key]
        state["thread"].join(NEVER)
        if state["thread"].is_alive():
            return STILL
        del self.running[key]
        return state["result"]

    def finish_all(self, *keys):
        return " ".join(sorted(self.finish(key) for key in keys))

    def interrupt(self, key, name):
        signal.pthread_kill(self.running[key]["thread"].ident, getattr(signal, name))
        return "sent"

    def close_up(self):
        """After a case, however it went."""
        self.urgent = 0
        if self.socket is not None and self.running:
            try:
                self.socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for state in self.running.values():
            state["thread"].join(NEVER)
        self.running = {}
        return self.do("close")

    # --- the connection's life

    def op_listen(self, port):
        self.listener = socket.create_server(("0.0.0.0", port), backlog=16)
        return "ok"

    def op_connect(self, host, port):
        self.socket = socket.create_connection((host, port))
        self.socket.settimeout(None)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return "ok"

    def op_accept(self):
        self.socket, _ = self.listener.accept()
        self.socket.settimeout(None)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return "ok"

    def op_close(self):
        for thing in (self.epoll, self.socket):
            if thing is not None:
                thing.close()
        for fd in self.pipe or ():
            os.close(fd)
        self.socket = self.epoll = self.pipe = None
        return "ok"

    def op_shutdown(self, how):
        self.socket.shutdown(getattr(socket, how))
        return "ok"

    def op_nonblocking(self):
        self.socket.setblocking(False)
        return "ok"

    def op_blocking(self):
        self.socket.setblocking(True)
        return "ok"

    def op_exchange(self, first, rounds):
        """Small messages to and fro, whether the socket blocks or not."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        for at in range(rounds):
            if first:
                self.socket.send(bytes([at % 256]))
            if not poll.poll(NEVER * 1000):
                return f"nothing came in round {at}"
            got = self.socket.recv(100)
            if got != bytes([at % 256]):
                return f"{got!r} in round {at}"
            if not first:
                self.socket.send(got)
        return "ok"

    # --- calls on it

    def op_recv(self, length, *flags):
        buffer = ctypes.create_string_buffer(max(length, 1))
        value = sum(getattr(socket, "MSG_" + flag) for flag in flags)
        result = raw(LIBC.recv, self.socket.fileno(), buffer, ctypes.c_size_t(length), value)
        if isinstance(result, str):
            return result
        return f"{result} {show(buffer.raw[:min(result, length)])}"

    def op_read(self, length):
        buffer = ctypes.create_string_buffer(length)
        result = raw(LIBC.read, self.socket.fileno(), buffer, ctypes.c_size_t(length))
        return result if isinstance(result, str) else f"{result} {show(buffer.raw[:result])}"

    def op_recv_timed(self, length, *flags):
        begun = time.monotonic()
        result = self.op_recv(length, *flags)
        limit = struct.unpack("ll", self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16))
        waited = time.monotonic() - begun >= limit[0] + limit[1] / 1e6 - 0.005
        return f"{result}{' after the whole time' if waited else ' in time'}"

    def op_readv(self, *lengths):
        buffers = [bytearray(length) for length in lengths]
        count = os.readv(self.socket.fileno(), buffers)
        return f"{count} {[bytes(buffer) for buffer in buffers]}"

    def op_recvmsg(self, length, *flags):
        value = sum(getattr(socket, "MSG_" + flag) for flag in flags)
        data, extra, found, _ = self.socket.recvmsg(length, 256, value)
        told = [(level, kind, content.hex()) for level, kind, content in extra]
        return f"{show(data)} {told} flags {found:#x}"

    def op_read_all(self, piece):
        """To the end, or to an error, blocking or not."""
        whole, poll = hashlib.sha256(), select.poll()
        poll.register(self.socket, select.POLLIN)
        count = 0
        while True:
            if not poll.poll(NEVER * 1000):
                return f"{count} bytes {whole.hexdigest()[:16]}, then nothing"
            try:
                data = self.socket.recv(piece)
            except BlockingIOError:
                continue
            except OSError as error:
                return f"{count} bytes {whole.hexdigest()[:16]}, then {errno.errorcode[error.errno]}"
            if not data:
                return f"{count} bytes {whole.hexdigest()[:16]}, then the end"
            whole.update(data)
            count += len(data)

    def op_read_by_edges(self, piece):
        """To the end, as nginx does: told of news once, and by FIONREAD whether there is more to read."""
        whole, count, epoll = hashlib.sha256(), 0, select.epoll()
        epoll.register(self.socket, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
        while events := epoll.poll(NEVER):
            more = True
            while more or events[0][1] & select.EPOLLRDHUP:
                try:
                    data = self.socket.recv(piece, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    break
                if not data:
                    return f"{count} bytes {whole.hexdigest()[:16]}, then the end"
                whole.update(data)
                count += len(data)
                more = self.op_queued() > 0
        return f"{count} bytes {whole.hexdigest()[:16]}, then nothing"

    def op_send(self, text, *flags):
        data = text.encode()
        value = sum(MSG_ZEROCOPY if flag == "ZEROCOPY" else getattr(socket, "MSG_" + flag) for flag in flags)
        return raw(LIBC.send, self.socket.fileno(), data, ctypes.c_size_t(len(data)), value | socket.MSG_NOSIGNAL)

    def op_send_gathered(self, *texts):
        return self.socket.sendmsg([text.encode() for text in texts])

    def op_send_pattern(self, length, seed, piece):
        """All of it, blocking or not, in pieces."""
        data, poll, at = pattern(length, seed), select.poll(), 0
        poll.register(self.socket, select.POLLOUT)
        while at < length:
            try:
                at += self.socket.send(data[at:at + piece])
            except BlockingIOError:
                if not poll.poll(NEVER * 1000):
                    return f"stuck at {at}"
        return f"{at} {hashlib.sha256(data).hexdigest()[:16]}"

    def op_send_once(self, length):
        """One call, of which only the kind of result is the same every time."""
        data = bytes(length)
        result = raw(LIBC.send, self.socket.fileno(), data, ctypes.c_size_t(length), socket.MSG_NOSIGNAL)
        if isinstance(result, str):
            return result
        return "all of it" if result == length else "a part of it"

    def op_fill(self, most):
        """Until there is room no more, at most so much."""
        poll, sent, data = select.poll(), 0, bytes(65536)
        poll.register(self.socket, select.POLLOUT)
        while sent < most and poll.poll(200):
            try:
                sent += self.socket.send(data, socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
        self.filled = sent
        return "room no more" if sent < most else "no bound"

    def op_filled(self):
        return self.filled

    def op_sendfile(self, length, seed):
        file = os.memfd_create("content")
        os.write(file, pattern(length, seed))
        at, poll = 0, select.poll()
        poll.register(self.socket, select.POLLOUT)
        while at < length:
            try:
                at += os.sendfile(self.socket.fileno(), file, at, length - at)
            except BlockingIOError:
                if not poll.poll(NEVER * 1000):
                    return f"stuck at {at}"
        os.close(file)
        return at

    def op_splice_out(self, text):
        ours, theirs = os.pipe()
        os.write(theirs, text.encode())
        sent = os.splice(ours, self.socket.fileno(), 65536)
        os.close(ours)
        os.close(theirs)
        return sent

    def op_splice(self, length, wait=True):
        if self.pipe is None:
            self.pipe = os.pipe()
        flags = 0 if wait else 2
        moved = raw(LIBC.splice, self.socket.fileno(), None, self.pipe[1], None, ctypes.c_size_t(length), flags)
        if isinstance(moved, str) or moved == 0:
            return moved
        return f"{moved} {show(os.read(self.pipe[0], moved))}"

    def op_splice_all(self):
        whole, count, in_vain = hashlib.sha256(), 0, 0
        self.pipe = self.pipe or os.pipe()
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        # Woken up in vain now and then is one thing, told of bytes that splice does not find another.
        while in_vain < 1000 and poll.poll(NEVER * 1000):
            try:
                moved = os.splice(self.socket.fileno(), self.pipe[1], 65536, flags=2)
            except BlockingIOError:
                in_vain += 1
                continue
            if moved == 0:
                return f"{count} bytes {whole.hexdigest()[:16]}, then the end"
            whole.update(os.read(self.pipe[0], moved))
            count += moved
        return f"{count} bytes {whole.hexdigest()[:16]}, then nothing"

    # --- what is known of it

    def op_drained(self):
        """All that was sent has reached the other end's queue."""
        deadline = time.monotonic() + NEVER
        while time.monotonic() < deadline:
            left = struct.unpack("i", fcntl.ioctl(self.socket, SIOCOUTQ, b"\0\0\0\0"))[0]
            if left == 0:
                return "ok"
            time.sleep(0.0002)
        return f"{left} bytes were not acknowledged"

    def op_queued(self):
        return struct.unpack("i", fcntl.ioctl(self.socket, termios.FIONREAD, b"\0\0\0\0"))[0]

    def op_at_mark(self):
        return struct.unpack("i", fcntl.ioctl(self.socket, SIOCATMARK, b"\0\0\0\0"))[0]

    def op_poll(self, names, timeout=0):
        poll = select.poll()
        poll.register(self.socket, sum(getattr(select, "POLL" + name) for name in names.split("|")))
        found = poll.poll(timeout)
        return masks(found[0][1]) if found else "nothing"

    def op_select(self, timeout):
        found = select.select([self.socket], [], [self.socket], timeout)
        return f"readable {len(found[0])}, exceptional {len(found[2])}"

    def op_epoll(self, names):
        self.epoll = select.epoll()
        self.epoll.register(self.socket, sum(getattr(select, "EPOLL" + name) for name in names.split("|")))
        return "ok"

    def op_events(self, timeout=0):
        found = self.epoll.poll(timeout)
        return masks(found[0][1]) if found else "nothing"

    def op_set(self, level, name, value):
        number = name if isinstance(name, int) else getattr(socket, name)
        self.socket.setsockopt(getattr(socket, level), number, value)
        return "ok"

    def op_timeout(self, name, milliseconds):
        value = struct.pack("ll", 0, milliseconds * 1000)
        self.socket.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        return "ok"

    def op_linger(self, seconds):
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
        return "ok"

    def op_own(self):
        fcntl.fcntl(self.socket, fcntl.F_SETOWN, os.getpid())
        return "ok"

    def op_urgent_signals(self):
        return "some" if self.urgent else "none"

    def op_error(self):
        value = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return errno.errorcode.get(value, value)

    def op_state(self):
        return self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]

    def op_carried(self):
        """How many bytes TCP has sent: tcp_info's tcpi_bytes_sent."""
        return struct.unpack_from("Q", self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 208), 200)[0]

    def op_names(self):
        return f"{self.socket.getsockname()[0]} to {self.socket.getpeername()[0]}"

    def op_completion(self):
        """What the kernel says of a zero-copy send, once it does."""
        poll = select.poll()
        poll.register(self.socket, 0)
        if not poll.poll(NEVER * 1000):
            return "none"
        _, extra, _, _ = self.socket.recvmsg(0, 256, socket.MSG_ERRQUEUE)
        # struct sock_extended_err: error, origin, type, code, padding, info, data.
        return [struct.unpack("=IBBBBII", content[:16]) for _, _, content in extra]


def serve(path):
    """Executes what comes by the control socket, and answers."""
    end = End()
    control = socket.socket(socket.AF_UNIX)
    control.bind(path)
    control.listen(1)
    print("listening", flush=True)
    connection, _ = control.accept()
    lines = connection.makefile("rw")
    for line in lines:
        how, arguments = json.loads(line)
        lines.write(json.dumps(getattr(end, how)(*arguments)) + "\n")
        lines.flush()


class Remote:
    """The same as an `End`, in another pod."""

    def __init__(self, path):
        control = socket.socket(socket.AF_UNIX)
        control.connect(path)
        self.lines = control.makefile("rw")

    def __getattr__(self, how):
        def ask(*arguments):
            self.lines.write(json.dumps([how, arguments]) + "\n")
            self.lines.flush()
            return json.loads(self.lines.readline())

        return ask
