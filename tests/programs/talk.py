"""Requests and answers, with asyncio or with blocking sockets and threads.

Usage: talk.py (tasks|threads) serve PORT | talk.py (tasks|threads) ask HOST PORT CONNECTIONS ROUNDS

A request is a length and so many bytes, the answer their digest and the bytes.
"""
import asyncio
import hashlib
import random
import socket
import socketserver
import struct
import sys
import threading

PATIENCE = 20
DIGEST = 32


def messages(seed, rounds):
    """What one connection asks: mostly small, now and then much."""
    source = random.Random(seed)
    for at in range(rounds):
        yield source.randbytes(source.randrange(1, 200_000 if at % 20 == 0 else 200))


def answer_to(message):
    return hashlib.sha256(message).digest() + message


async def answer_by_task(reader, writer):
    try:
        while True:
            (length,) = struct.unpack("!I", await reader.readexactly(4))
            writer.write(answer_to(await reader.readexactly(length)))
            await writer.drain()
    except asyncio.IncompleteReadError as end:
        if end.partial:
            print("ended within a message", file=sys.stderr)
    finally:
        writer.close()


async def serve_tasks(port):
    server = await asyncio.start_server(answer_by_task, "0.0.0.0", port)
    await server.serve_forever()


async def exchange_by_task(host, port, seed, rounds):
    reader, writer = await asyncio.open_connection(host, port)
    for at, message in enumerate(messages(seed, rounds)):
        writer.write(struct.pack("!I", len(message)) + message)
        await writer.drain()
        if await reader.readexactly(DIGEST + len(message)) != answer_to(message):
            return f"another answer in round {at}"
    writer.write_eof()
    rest = await reader.read()
    writer.close()
    return f"{rounds} rounds, then {rest!r}"


async def ask_by_tasks(host, port, connections, rounds):
    asked = [exchange_by_task(host, port, seed, rounds) for seed in range(connections)]
    return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), PATIENCE)


class Answer(socketserver.StreamRequestHandler):
    def handle(self):
        while head := self.rfile.read(4):
            (length,) = struct.unpack("!I", head)
            self.wfile.write(answer_to(self.rfile.read(length)))


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128


def exchange_by_thread(host, port, seed, rounds):
    with socket.create_connection((host, port)) as connection:
        with connection.makefile("rb") as stream:
            for at, message in enumerate(messages(seed, rounds)):
                connection.sendall(struct.pack("!I", len(message)) + message)
                if stream.read(DIGEST + len(message)) != answer_to(message):
                    return f"another answer in round {at}"
            connection.shutdown(socket.SHUT_WR)
            return f"{rounds} rounds, then {stream.read()!r}"


def ask_by_threads(host, port, connections, rounds):
    said = ["it did not end"] * connections

    def work(seed):
        try:
            said[seed] = exchange_by_thread(host, port, seed, rounds)
        except OSError as error:
            said[seed] = repr(error)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    return said


def main():
    way, what, *rest = sys.argv[1:]
    if what == "serve":
        port = int(rest[0])
        if way == "tasks":
            asyncio.run(serve_tasks(port))
        else:
            Server(("0.0.0.0", port), Answer).serve_forever()
    host, port, connections, rounds = rest[0], *map(int, rest[1:])
    if way == "tasks":
        said = asyncio.run(ask_by_tasks(host, port, connections, rounds))
    else:
        said = ask_by_threads(host, port, connections, rounds)
    for at, line in enumerate(said):
        print(at, line)


main()
