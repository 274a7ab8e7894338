"""Ways to read from a connection, and what each call says: one line for every call, to be compared between two runs.

Usage: readers.py serve CONTROL | readers.py drive CONTROL HOST PORT [splice] [short]

With "splice", the cases that do, and else the others: a pod that has spliced may be treated otherwise from then on. With
"short", flows that may be short-circuited are, before a case begins.
"""
import sys
import time

from ends import SO_ZEROCOPY, STILL, TCP_INQ, End, Remote, serve

# Seconds until a flow must have been short-circuited, and in which one may be of a pod that splices.
PATIENCE, SOME_TIME = 10, 0.3

CASES = []
BLOCKING_CASES = []
NONBLOCKING_CASES = []
SPLICING = set()


def case(function):
    CASES.append(function)
    return function


def blocking(function):
    """A case that means nothing to a socket that does not block."""
    BLOCKING_CASES.append(function)
    return function


def nonblocking(function):
    """A case in which a socket that blocks would."""
    NONBLOCKING_CASES.append(function)
    return function


def splices(function):
    SPLICING.add(function)
    return function


@case
def recv_in_pieces(r, w):
    w.do("send", "abcdefghij")
    w.do("send", "klm")
    w.do("drained")
    for length in (0, 1, 4, 100):
        r.do("recv", length)
    r.do("recv", 1, "DONTWAIT")
    w.do("shutdown", "SHUT_WR")
    r.do("poll", "RDHUP", 3000)
    r.do("recv", 10)
    r.do("recv", 10)
    r.do("send", "after the end")
    r.do("drained")
    w.do("recv", 100)


@case
def read_and_readv(r, w):
    w.do("send_gathered", "abc", "", "defghij", "klm")
    w.do("drained")
    r.do("read", 2)
    r.do("readv", 3, 1, 2)
    r.do("readv", 100, 5)


@case
def fionread(r, w):
    r.do("queued")
    for text in ("a", "bcdef", "g" * 5000):
        w.do("send", text)
        w.do("drained")
        r.do("queued")
    for length in (1, 3, 1000):
        r.do("recv", length)
        r.do("queued")
    r.do("recv", 10000)
    r.do("queued")
    w.do("shutdown", "SHUT_WR")
    r.do("poll", "RDHUP", 3000)
    r.do("queued")


@case
def peek(r, w):
    w.do("send", "abc")
    w.do("drained")
    r.do("recv", 2, "PEEK")
    r.do("recv", 100, "PEEK")
    w.do("send", "def")
    w.do("drained")
    r.do("recv", 100, "PEEK")
    r.do("recv", 100, "PEEK", "DONTWAIT")
    r.do("queued")
    r.do("recv", 4)
    r.do("recv", 100, "PEEK")
    r.do("recv", 100)
    r.do("recv", 100, "PEEK", "DONTWAIT")
    w.do("close")
    r.do("poll", "RDHUP", 3000)
    r.do("recv", 100, "PEEK")
    r.do("recv", 100)


@case
def peek_offset(r, w):
    r.do("set", "SOL_SOCKET", 42, 0)
    w.do("send", "abcdef")
    w.do("drained")
    r.do("recv", 2, "PEEK")
    r.do("recv", 2, "PEEK")
    r.do("recv", 3)
    r.do("recv", 2, "PEEK")


@case
def trunc_throws_away(r, w):
    w.do("send", "abcdefghij")
    w.do("drained")
    r.do("recv", 4, "TRUNC")
    r.do("queued")
    r.do("recv", 100)


@case
def poll_select_and_epoll(r, w):
    everything = "IN|PRI|OUT|RDHUP"
    r.do("poll", everything)
    r.do("epoll", "IN|RDHUP")
    r.do("events")
    w.do("send", "abc")
    w.do("drained")
    r.do("poll", everything)
    r.do("select", 0)
    r.do("events")
    r.do("recv", 2)
    r.do("poll", everything)
    r.do("events")
    r.do("recv", 2)
    r.do("poll", everything)
    r.do("events")
    w.do("shutdown", "SHUT_WR")
    r.do("events", 3)
    r.do("poll", everything)
    r.do("shutdown", "SHUT_WR")
    r.do("poll", everything)
    w.do("poll", "IN|RDHUP", 3000)
    w.do("poll", everything)


@case
def epoll_at_edges(r, w):
    r.do("epoll", "IN|RDHUP|ET")
    r.do("events")
    for text in ("a", "bc", "def"):
        w.do("send", text)
        w.do("drained")
        r.do("events", 3)
        r.do("events")
    r.do("recv", 1)
    r.do("events")
    w.do("send", "g")
    w.do("drained")
    r.do("events", 3)
    r.do("recv", 100)
    r.do("events")
    w.do("close")
    r.do("events", 3)
    r.do("events")


@case
def low_water_mark(r, w):
    r.do("set", "SOL_SOCKET", "SO_RCVLOWAT", 8)
    w.do("send", "abcd")
    w.do("drained")
    r.do("poll", "IN")
    r.do("select", 0)
    w.do("send", "efgh")
    w.do("drained")
    r.do("poll", "IN", 3000)
    r.do("recv", 100)
    w.do("send", "i")
    w.do("drained")
    r.do("poll", "IN")
    r.do("recv", 100, "DONTWAIT")
    w.do("send", "j")
    w.do("close")
    r.do("poll", "IN|RDHUP", 3000)
    r.do("recv", 100)


@case
@splices
def splice_what_is_there(r, w):
    w.do("send", "abcdefghij")
    w.do("drained")
    r.do("splice", 4, False)
    r.do("recv", 2)
    r.do("splice", 100, False)
    w.do("send", "klm")
    w.do("drained")
    r.do("poll", "IN", 3000)
    r.do("splice", 100, False)
    w.do("close")
    r.do("poll", "RDHUP", 3000)
    r.do("splice", 100, False)


@nonblocking
def nothing_to_read(r, w):
    for text in ("a", "bcd"):
        r.do("recv", 10)
        r.do("recv", 10, "PEEK")
        r.do("recv", 10, "WAITALL")
        r.do("poll", "IN|OUT")
        w.do("send", text)
        w.do("drained")
        r.do("recv", 10, "WAITALL")


@nonblocking
@splices
def nothing_to_splice(r, w):
    for text in ("a", "bcd"):
        r.do("splice", 10, False)
        w.do("send", text)
        w.do("drained")
        r.do("splice", 10, False)


@case
@splices
def splice_a_megabyte(r, w):
    r.start("all", "splice_all")
    w.do("send_pattern", 1 << 20, 3, 10000)
    w.do("shutdown", "SHUT_WR")
    r.finish("all")


@case
@splices
def splice_to_the_reader(r, w):
    w.do("splice_out", "spliced " * 100)
    w.do("send", "and sent")
    w.do("drained")
    r.do("recv", 1000)


@case
def sent_files(r, w):
    r.start("all", "read_all", 65536)
    w.do("send", "sent ")
    w.do("sendfile", 300000, 5)
    w.do("send", "more ", "MORE")
    w.do("send", "and no more")
    w.do("shutdown", "SHUT_WR")
    r.finish("all")


@case
def read_by_edges(r, w):
    r.start("all", "read_by_edges", 8192)
    w.do("send_pattern", 4 << 20, 13, 300000)
    w.do("shutdown", "SHUT_WR")
    r.finish("all")


@case
def urgent(r, w):
    r.do("own")
    r.do("at_mark")
    w.do("send", "abc")
    w.do("send", "X", "OOB")
    w.do("send", "def")
    w.do("drained")
    r.do("poll", "IN|PRI", 3000)
    r.do("select", 0)
    r.do("queued")
    r.do("recv", 100)
    r.do("at_mark")
    r.do("recv", 1, "OOB")
    r.do("recv", 1, "OOB")
    r.do("recv", 100)
    r.do("at_mark")
    r.do("poll", "IN|PRI")
    r.do("urgent_signals")


@case
def urgent_in_line(r, w):
    r.do("set", "SOL_SOCKET", "SO_OOBINLINE", 1)
    w.do("send", "abc")
    w.do("send", "X", "OOB")
    w.do("send", "def")
    w.do("drained")
    r.do("poll", "IN|PRI", 3000)
    r.do("recv", 100)
    r.do("at_mark")
    r.do("recv", 1, "OOB")
    r.do("recv", 100)
    r.do("at_mark")


@case
def inquiries(r, w):
    r.do("names")
    r.do("state")
    r.do("set", "IPPROTO_TCP", TCP_INQ, 1)
    w.do("send", "abcdef")
    w.do("drained")
    r.do("recvmsg", 2)
    r.do("recvmsg", 100, "PEEK")
    r.do("recvmsg", 100)
    r.do("error")


@case
def zero_copy(r, w):
    w.do("set", "SOL_SOCKET", SO_ZEROCOPY, 1)
    w.do("send", "z" * 20000, "ZEROCOPY")
    w.do("drained")
    r.do("recv", 100000, "PEEK")
    r.do("recv", 100000)
    w.do("completion")


@case
def a_megabyte_each_way(r, w):
    r.start("in", "read_all", 7777)
    w.start("in", "read_all", 100000)
    w.begin("out", "send_pattern", 1 << 20, 7, 1000)
    r.do("send_pattern", 1 << 20, 8, 300000)
    r.do("shutdown", "SHUT_WR")
    w.finish("out")
    w.do("shutdown", "SHUT_WR")
    r.finish("in")
    w.finish("in")


@case
def nobody_reads_for_a_while(r, w):
    w.do("fill", 256 << 20)
    w.do("poll", "OUT")
    w.do("shutdown", "SHUT_WR")
    sent = w.quiet("filled")
    got = r.quiet("read_all", 1 << 20)
    r.say(f"all was read to the end: {got.startswith(f'{sent} bytes ') and got.endswith('the end')}")


@case
def closed_with_bytes_unread(r, w):
    w.do("send", "never read")
    w.do("drained")
    r.do("close")
    w.do("poll", "IN|RDHUP", 3000)
    w.do("error")
    w.do("recv", 10)
    w.do("send", "x")


@case
def closed_with_bytes_unread_and_read_late(r, w):
    r.do("send", "for the writer")
    w.do("send", "never read")
    w.do("drained")
    r.do("drained")
    r.do("close")
    w.do("poll", "RDHUP", 3000)
    w.do("recv", 5)
    w.do("recv", 100)
    w.do("send", "x")


@case
def half_closed_with_bytes_unread(r, w):
    w.do("send", "for the reader")
    r.do("send", "for the writer")
    w.do("drained")
    r.do("drained")
    w.do("shutdown", "SHUT_WR")
    r.do("poll", "RDHUP", 3000)
    r.do("recv", 3)
    r.do("shutdown", "SHUT_WR")
    w.do("poll", "HUP", 3000)
    for end in (r, w):
        end.do("poll", "IN|RDHUP")
        end.do("recv", 100)
        end.do("recv", 100)


@case
def half_closed_by_the_reader_and_closed_by_the_writer(r, w):
    w.do("send", "abc")
    w.do("drained")
    r.do("shutdown", "SHUT_WR")
    w.do("poll", "RDHUP", 3000)
    w.do("recv", 10)
    w.do("send", "def")
    w.do("drained")
    w.do("close")
    r.do("poll", "HUP", 3000)
    r.do("recv", 2)
    r.do("recv", 100)
    r.do("recv", 100)


@case
def closed_with_everything_read(r, w):
    w.do("send", "abc")
    w.do("drained")
    r.do("recv", 10)
    r.do("send", "last words")
    r.do("close")
    w.do("poll", "RDHUP", 3000)
    w.do("recv", 100)
    w.do("recv", 100)
    w.do("send", "x")
    w.do("poll", "HUP", 3000)
    w.do("send", "x")


@case
def aborted(r, w):
    w.do("send", "abc")
    w.do("drained")
    w.do("linger", 0)
    w.do("close")
    r.do("poll", "RDHUP", 3000)
    r.do("recv", 2)
    r.do("recv", 10)
    r.do("send", "x")
    r.do("recv", 10)


@case
def no_more_reading(r, w):
    w.do("send", "abc")
    w.do("drained")
    r.do("shutdown", "SHUT_RD")
    r.do("poll", "IN|RDHUP")
    r.do("recv", 2)
    r.do("recv", 10)
    r.do("recv", 10)
    w.do("send", "def")
    w.do("drained")
    r.do("recv", 10)
    r.do("send", "the other way")
    r.do("drained")
    w.do("recv", 100)


@blocking
def blocked_recv(r, w):
    for text in ("a", "bcd"):
        r.start("recv", "recv", 100)
        w.do("send", text)
        r.finish("recv")
    r.start("recv", "recv", 100)
    w.do("shutdown", "SHUT_WR")
    r.finish("recv")


@blocking
def blocked_recv_of_an_aborted(r, w):
    r.start("recv", "recv", 100)
    w.do("linger", 0)
    w.do("close")
    r.finish("recv")


@blocking
def blocked_full_duplex(r, w):
    for round in range(5):
        r.start("recv", "recv", 100)
        w.start("recv", "recv", 100)
        r.do("send", f"from the reader {round}")
        w.finish("recv")
        w.do("send", f"from the writer {round}")
        r.finish("recv")


@blocking
def blocked_poll_select_and_epoll(r, w):
    r.do("epoll", "IN")
    for how in (("poll", "IN", -1), ("select", None), ("events", -1)):
        r.start("wait", *how)
        w.do("send", "a")
        r.finish("wait")
        r.do("recv", 100)


@blocking
def blocked_peek(r, w):
    r.start("peek", "recv", 100, "PEEK")
    w.do("send", "abc")
    r.finish("peek")
    r.do("recv", 100)


@blocking
def wait_for_all(r, w):
    r.start("recv", "recv", 10, "WAITALL")
    for text in ("abcd", "ef", "ghijkl"):
        w.do("send", text)
        w.do("drained")
    r.finish("recv")
    r.do("recv", 100)
    r.start("recv", "recv", 10, "WAITALL", "PEEK")
    for text in ("abcd", "efghijkl"):
        w.do("send", text)
        w.do("drained")
    r.finish("recv")
    r.do("recv", 12, "WAITALL")
    r.start("recv", "recv", 10, "WAITALL")
    w.do("send", "mno")
    w.do("close")
    r.finish("recv")
    r.do("recv", 10, "WAITALL")


@blocking
def wait_for_all_of_much(r, w):
    r.start("recv", "recv", 3 << 20, "WAITALL")
    w.do("send_pattern", 3 << 20, 9, 1 << 16)
    r.finish("recv")


@blocking
def wait_for_all_until_a_signal(r, w):
    r.start("recv", "recv", 10, "WAITALL")
    w.do("send", "abcd")
    w.do("drained")
    r.wait_for_sleep("recv")
    r.interrupt("recv", "SIGUSR1")
    r.finish("recv")
    w.do("send", "efgh")
    r.do("recv", 100)


@blocking
def low_water_mark_of_a_blocked_recv(r, w):
    r.do("set", "SOL_SOCKET", "SO_RCVLOWAT", 6)
    r.start("recv", "recv", 100)
    w.do("send", "abc")
    w.do("drained")
    w.do("send", "defg")
    r.finish("recv")
    r.start("recv", "recv", 4)
    w.do("send", "hi")
    w.do("drained")
    w.do("send", "jklm")
    r.finish("recv")
    r.do("recv", 2)
    r.start("recv", "recv", 100)
    w.do("send", "l")
    w.do("close")
    r.finish("recv")


@blocking
def receive_timeout(r, w):
    r.do("timeout", "SO_RCVTIMEO", 100)
    r.do("recv_timed", 10)
    w.do("send", "abc")
    w.do("drained")
    r.do("recv_timed", 10)
    r.do("recv_timed", 10, "WAITALL")
    w.do("send", "de")
    w.do("drained")
    r.do("recv_timed", 10, "WAITALL")
    r.do("timeout", "SO_RCVTIMEO", 900)
    r.start("recv", "recv_timed", 10)
    w.do("send", "fg")
    r.finish("recv")


@blocking
def signals(r, w):
    r.start("recv", "recv", 10)
    r.interrupt("recv", "SIGUSR1")
    r.finish("recv")
    w.do("send", "abc")
    r.do("recv", 10)
    r.start("recv", "recv", 10)
    for _ in range(20):
        r.interrupt("recv", "SIGUSR2")
    w.do("send", "def")
    r.finish("recv")
    r.start("read", "read", 10)
    r.interrupt("read", "SIGUSR1")
    r.finish("read")
    w.do("send", "ghi")
    r.do("read", 10)


@blocking
@splices
def signals_while_splicing(r, w):
    r.start("splice", "splice", 10)
    r.interrupt("splice", "SIGUSR1")
    r.finish("splice")
    w.do("send", "abc")
    r.do("read", 10)


@blocking
@splices
def blocked_splice(r, w):
    for text in ("a", "bcd"):
        r.start("splice", "splice", 100)
        w.do("send", text)
        r.finish("splice")
    r.start("splice", "splice", 100)
    w.do("shutdown", "SHUT_WR")
    r.finish("splice")


@blocking
def two_threads_read(r, w):
    r.start("one", "recv", 1)
    r.start("two", "recv", 1)
    w.do("send", "a")
    w.do("drained")
    w.do("send", "b")
    r.finish_all("one", "two")


@blocking
def blocked_send(r, w):
    w.start("send", "send_pattern", 24 << 20, 11, 24 << 20)
    r.start("all", "read_all", 1 << 18)
    w.finish("send")
    w.do("shutdown", "SHUT_WR")
    r.finish("all")


@blocking
def blocked_send_to_one_who_closes(r, w):
    w.start("send", "send_once", 256 << 20)
    r.do("recv", 10)
    r.do("close")
    w.finish("send")
    w.do("send", "x")
    w.do("send", "x")


@blocking
def send_timeout(r, w):
    w.do("timeout", "SO_SNDTIMEO", 100)
    w.do("send_once", 256 << 20)
    # The other end's window may have grown meanwhile.
    last = ""
    for _ in range(10):
        last = w.quiet("send_once", 64 << 20)
        if last == "EAGAIN":
            break
    w.say(f"sends no more: {last}")


@blocking
def blocked_send_and_a_signal(r, w):
    w.start("send", "send_once", 256 << 20)
    w.interrupt("send", "SIGUSR1")
    w.finish("send")


class Stuck(Exception):
    """What should not have blocked did: the case is over."""


class Said:
    """An end whose calls are said, each with its result."""

    def __init__(self, end, name, say):
        self.end, self.name, self.prefix = end, name, say

    def say(self, text):
        self.prefix(f"{self.name} {text}")

    def do(self, *call):
        result = self.end.call(*call)
        self.say(f"{shown(call)} = {result}")
        if result == STILL:
            raise Stuck

    def quiet(self, *call):
        return self.end.call(*call)

    def start(self, key, *call):
        self.say(f"begins {shown(call)}: {self.end.start(key, *call)}")

    def begin(self, key, *call):
        """Whether it blocks depends on the other end's speed."""
        self.end.begin(key, *call)

    def __getattr__(self, how):
        return lambda *words: self.say(f"{how} {' '.join(words)} = {getattr(self.end, how)(*words)}")


def shown(call):
    name, *arguments = call
    words = [word if len(str(word)) < 60 else f"{word[:8]}... ({len(word)})" for word in map(str, arguments)]
    return f"{name}({', '.join(words)})"


# How the sockets are: they block, they never do, they do after what came before the case.
BLOCKING, NONBLOCKING, BLOCKING_LATE = "", ", nonblocking", ", nonblocking at first"


def drive(control, host, port, splice, is_short):
    ends = End(), Remote(control)
    ends[1].do("listen", port)
    every = [(function, BLOCKING) for function in CASES + BLOCKING_CASES]
    every += [(function, NONBLOCKING) for function in CASES + NONBLOCKING_CASES]
    every += [(function, BLOCKING_LATE) for function in CASES + BLOCKING_CASES]
    for function, sockets in every:
        if (function in SPLICING) != splice:
            continue
        for reader in ("client", "server"):
            # A flow that has just begun, and one that has been used for a while.
            for rounds in (0, 50):
                if sockets == BLOCKING_LATE and not rounds:
                    continue
                name = f"{function.__name__}{sockets}{', used' * bool(rounds)}, {reader} reads"
                run(function, name, ends, reader, (host, port), sockets, rounds, is_short)


def run(function, name, ends, reader, to, sockets, rounds, is_short):
    def say(text):
        print(f"{name}\t{text}", flush=True)

    here, there = both = Said(ends[0], "client", say), Said(ends[1], "server", say)
    there.end.start("accept", "accept")
    here.do("connect", *to)
    there.end.finish("accept")
    if sockets != BLOCKING:
        for end in both:
            end.do("nonblocking")
    if rounds:
        there.end.start("exchange", "exchange", False, rounds)
        here.do("exchange", True, rounds)
        there.finish("exchange")
        if is_short and sockets != BLOCKING:
            patience = SOME_TIME if function in SPLICING else PATIENCE
            if not becomes_short(*ends, patience) and function not in SPLICING:
                say("was not short-circuited")
    if sockets == BLOCKING_LATE:
        for end in both:
            end.do("blocking")
    try:
        function(*(both if reader == "client" else reversed(both)))
    except Stuck:
        pass
    for end in ends:
        end.close_up()


def becomes_short(here, there, patience):
    """Small messages to and fro, until TCP sees nothing of them."""
    deadline = time.monotonic() + patience
    before = None
    while time.monotonic() < deadline:
        there.begin("exchange", "exchange", False, 20)
        here.call("exchange", True, 20)
        there.finish("exchange")
        carried = here.do("carried"), there.do("carried")
        if carried == before:
            return True
        before = carried
    return False


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        drive(sys.argv[2], sys.argv[3], int(sys.argv[4]), "splice" in sys.argv[5:], "short" in sys.argv[5:])
